"""Results as people see them: tensors by dtype and shape, a rollout in a few lines, a card in a notebook.

Nothing here knows the fields of a result beyond what `Rollout` tells.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor

from flowroll.errors import MissingExtraError
from flowroll.types.pictures import encode_png

if TYPE_CHECKING:
    from flowroll.types.results import Rollout

T = TypeVar("T")
_MOST_CHARS, _MOST_ITEMS = 80, 8
# A picture in a notebook is shown at this width at most.
_CARD_PIXELS = 256


class Shown:
    """Gives a dataclass a short `repr`, in which a tensor is its dtype and shape."""

    __slots__ = ()

    def __repr__(self) -> str:
        values = ", ".join(f"{field.name}={brief(getattr(self, field.name))}" for field in fields(self))  # type: ignore[arg-type]
        return f"{type(self).__name__}({values})"


def brief(value: object) -> str:
    """Writes a value in short: a tensor as `float32[5, 16]`, a long text or list with its beginning alone."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {brief(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        shown = [brief(item) for item in value[:_MOST_ITEMS]]
        if len(value) > len(shown):
            shown.append(f"... {len(value)} in all")
        return ("[{}]" if isinstance(value, list) else "({})").format(", ".join(shown))
    text = repr(value)
    return text if len(text) <= _MOST_CHARS else text[: _MOST_CHARS - 3] + "..."


def with_tensors(value: T, change: Callable[[Tensor], Tensor]) -> T:
    """Returns the same result with every tensor replaced, at any depth; values without tensors stay the same objects."""
    found: Any = value
    if next(tensors_of(value), None) is None:
        return value
    if isinstance(value, Tensor):
        found = change(value)
    elif is_dataclass(value) and not isinstance(value, type):
        found = replace(value, **{field.name: with_tensors(getattr(value, field.name), change) for field in fields(value)})
    elif isinstance(value, Mapping):
        found = {key: with_tensors(item, change) for key, item in value.items()}
    elif isinstance(value, list | tuple):
        found = type(value)(with_tensors(item, change) for item in value)
    return found  # type: ignore[no-any-return]


def tensors_of(value: object) -> Iterator[Tensor]:
    """Yields every tensor of a result, at any depth."""
    if isinstance(value, Tensor):
        yield value
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from tensors_of(getattr(value, field.name))
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_of(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_of(item)


def rollout_text(rollout: Rollout) -> str:
    """Writes a rollout in a few lines."""
    title, rows = _title(rollout), list(rollout_rows(rollout))
    width = max(len(name) for name, _ in rows)
    return "\n".join([f"Rollout of {title}", *(f"  {name:<{width}}  {value}" for name, value in rows)])


def rollout_html(rollout: Rollout) -> str:
    """Writes a rollout as a card of HTML: its picture, where there is one and Pillow is installed, beside the same rows."""
    rows = "".join(
        f'<tr><th style="text-align:left">{html.escape(name)}</th><td style="text-align:left">{html.escape(value)}</td></tr>'
        for name, value in rollout_rows(rollout)
    )
    table = f'<table style="font-size:small">{rows}</table>'
    png = rollout_png(rollout)
    picture = "" if png is None else _picture(png, rollout.prompt or "")
    title = html.escape(_title(rollout))
    return f'<div style="display:flex;gap:1em;align-items:flex-start">{picture}<div><b>{title}</b>{table}</div></div>'


def rollout_png(rollout: Rollout) -> bytes | None:
    """Returns a rollout's picture as PNG; None where there is no picture, or no Pillow."""
    if rollout.image is None:
        return None
    try:
        return encode_png(rollout.image)
    except MissingExtraError:
        return None


def format_bytes(count: int) -> str:
    """Writes a number of bytes as people do, e.g. `12.3 MiB`."""
    if count < 2**10:
        return f"{count} B"
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"


def _picture(png: bytes, text: str) -> str:
    data = base64.b64encode(png).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{html.escape(text)}" style="max-width:{_CARD_PIXELS}px">'


def _title(rollout: Rollout) -> str:
    prompt = "token ids" if rollout.prompt is None else brief(rollout.prompt)
    return f"{prompt}, seed {rollout.seed}, weights {rollout.weight_version}"


def rollout_rows(rollout: Rollout) -> Iterator[tuple[str, str]]:
    """Yields the names and texts of what there is."""
    record = rollout.sampling
    model = record.family if record.variant == "base" else f"{record.family} {record.variant}"
    dynamics = f"{record.sde_type}, noise level {record.noise_level:g}" if record.steps is None else "dynamics step by step"
    guidance = "no guidance" if record.guidance_rule == "none" else f"guidance {record.guidance_scale:g}"
    size = f"{record.width} x {record.height}"
    yield "sampling", f"{model}, {record.num_inference_steps} steps, {dynamics}, {guidance}, {size} pixels"
    if rollout.image is not None:
        yield "image", f"PNG, {format_bytes(len(rollout.image))}" if isinstance(rollout.image, bytes) else brief(rollout.image)
    if rollout.latents is not None:
        yield "latents", brief(rollout.latents)
    if rollout.log_probs is not None:
        yield "log_probs", _numbers(rollout.log_probs, rollout.sde_step_indices or ())
    if (trajectory := rollout.dit_trajectory) is not None:
        yield "dit_trajectory", f"{brief(trajectory.latents)}, states {_indices(trajectory.latent_step_indices)}"
    if (env := rollout.denoising_env) is not None:
        shown = {**env.image_kwargs, **env.pos_cond_kwargs}
        named = ", ".join(f"{name} {brief(value)}" for name, value in shown.items() if isinstance(value, Tensor))
        yield "denoising_env", named + ("" if env.neg_cond_kwargs is None else "; and without the prompt")
    if (debug := rollout.debug_tensors) is not None:
        yield (
            "debug_tensors",
            f"{brief(debug.model_output)} each of three, {format_bytes(sum(t.nbytes for t in tensors_of(debug)))}",
        )
    if (chosen := rollout.step_tensors) is not None:
        yield "step_tensors", f"{', '.join(chosen.tensors)} of steps {_indices(chosen.step_indices)}"
    if (images := rollout.step_images) is not None:
        yield "step_images", f"of steps {_indices(images.step_indices)}"
    yield "in all", f"{format_bytes(sum(tensor.nbytes for tensor in tensors_of(rollout)))}, {rollout.inference_time_s:.2f} s"


def _numbers(log_probs: Tensor, stochastic: Sequence[int]) -> str:
    """Writes the log-probs of the steps that have a density; "-" where there is none."""
    shown = [f"{value:.4g}" if step in stochastic else "-" for step, value in enumerate(log_probs[:_MOST_ITEMS].tolist())]
    return " ".join(shown) + (f" ... {len(log_probs)} in all" if len(log_probs) > len(shown) else "")


def _indices(indices: Sequence[int]) -> str:
    """Writes ascending indices, a whole range as its ends."""
    if len(indices) > 2 and list(indices) == list(range(indices[0], indices[-1] + 1)):
        return f"{indices[0]} to {indices[-1]}"
    return " ".join(map(str, indices[:_MOST_ITEMS])) + (" ..." if len(indices) > _MOST_ITEMS else "")
