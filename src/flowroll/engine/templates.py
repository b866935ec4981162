"""Checks at load that the chat template of a tokenizer comes to an end: a template is a program, and may loop for ever."""

from __future__ import annotations

import ctypes
import threading
from typing import Any

from flowroll.errors import CheckpointError

# How long a template may take for a short text, in seconds, and how many characters it may add. Real ones take a millisecond.
_MOST_S, _MOST_CHARS = 5.0, 2**20


class _TooSlowError(Exception):
    """Raised in the thread of a template that does not end."""


def check_chat_template(name: str, tokenizer: Any, text: str) -> None:
    """Renders a tokenizer's chat template, if it has one, for a short text.

    Args:
        name: The name of the tokenizer in an error message.
        tokenizer: A tokenizer of transformers.
        text: The text of the user's message.

    Raises:
        CheckpointError: The template does not come to an end, makes far too much text, or cannot be rendered.
    """
    if not getattr(tokenizer, "chat_template", None):
        return
    outcome: list[str | BaseException] = []

    def render() -> None:
        try:
            messages = [{"role": "user", "content": text}]
            outcome.append(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=render, name="flowroll-template", daemon=True)
    thread.start()
    thread.join(_MOST_S)
    if not outcome:
        _interrupt(thread)
        raise CheckpointError(f"{name} must render its chat template within {_MOST_S:g} s, got no end; copy it again.")
    (rendered,) = outcome
    if isinstance(rendered, BaseException):
        reason = (str(rendered).strip().splitlines() or [type(rendered).__name__])[0][:200]
        raise CheckpointError(f"{name} must have a chat template that can be rendered, got {reason}; copy it again.")
    if len(rendered) > _MOST_CHARS:
        raise CheckpointError(
            f"{name} must have a chat template of at most {_MOST_CHARS} characters, got {len(rendered)}; copy it again."
        )


def _interrupt(thread: threading.Thread) -> None:
    """Raises an exception in a thread, so that it does not go on for ever. It takes effect between two bytecodes."""
    if thread.ident is not None:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(_TooSlowError))
