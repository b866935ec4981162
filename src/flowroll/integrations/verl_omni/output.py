"""The class of what the server's `generate` returns."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from dataclasses import dataclass, field
from typing import Any

_log = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class PlainOutput:
    """The attributes of verl-omni's `DiffusionOutput`, where verl-omni is not installed.

    Attributes:
        diffusion_output: The picture, uint8 [colors, height, width], or the final latents, float32.
        log_probs: The log-probs of the window, float32; None where they were not asked for.
        stop_reason: "completed" or "aborted".
        num_preempted: None; the engine does not say.
        extra_fields: What else the trainer reads, by name.
    """

    diffusion_output: Any
    log_probs: Any = None
    stop_reason: str | None = None
    num_preempted: int | None = None
    extra_fields: dict[str, Any] = field(default_factory=dict)


def output_class() -> type[Any]:
    """Returns verl-omni's `DiffusionOutput`, or `PlainOutput` where it cannot be imported."""
    if importlib.util.find_spec("verl_omni") is None:
        return PlainOutput
    try:
        found: type[Any] = importlib.import_module("verl_omni.workers.rollout.replica").DiffusionOutput
        return found
    except ImportError as error:
        _log.warning("verl-omni's DiffusionOutput cannot be imported (%s); answers have its attributes alone", error)
        return PlainOutput
