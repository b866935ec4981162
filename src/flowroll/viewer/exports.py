"""What the viewer shows as a file: a contact sheet, a moving strip, or a page that needs nothing else."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from flowroll.errors import InvalidRequestError
from flowroll.plots import ContactRow, contact_sheet
from flowroll.store import StoredSample
from flowroll.types.pictures import encode_png
from flowroll.viewer.pages import Pages, Query
from flowroll.viewer.source import Model, Source
from flowroll.viewer.steps import picture_of_step, steps_of
from flowroll.wire.files import write_whole

# More rows than these are too small to look at.
MOST_SAMPLES = 16
_FRAME_MS, _LAST_FRAME_MS = 250, 1500
# The name of the picture itself among those of steps.
_END = "picture"


def write_view(source: Source, path: Path, *, title: str, model: Model | None = None) -> None:
    """Writes what there is to see to a file, whose ending says as what.

    Args:
        source: What is looked at.
        path: Ends in `.html` (a page of all samples, or of the one there is), `.png` (a sheet of the first 16, their steps from
            left to right) or `.gif` (the same, moving).
        title: Above it.
        model: Decodes steps of which there is no picture.

    Raises:
        InvalidRequestError: The ending is another one, or there is no picture.
    """
    writers: Mapping[str, Callable[..., None]] = {".html": _write_page, ".png": _write_sheet, ".gif": _write_strip}
    if (writer := writers.get(path.suffix.lower())) is None:
        raise InvalidRequestError(f"out must end in {', '.join(writers)}, got {path.name}; name the file so.", field="out")
    writer(source, path, title, model)


def _write_page(source: Source, path: Path, title: str, model: Model | None) -> None:
    pages, found = Pages(source, model=model, title=title, is_single_file=True), source.select()
    text = pages.sample(found.ids[0]) if len(found) == 1 else pages.gallery(Query())
    write_whole(path, [text.encode()])


def _write_sheet(source: Source, path: Path, title: str, model: Model | None) -> None:
    samples, columns = _pictures(source, model)
    rows = [
        ContactRow(label=_label(sample), images=[_tensor(pictures[column]) for column in columns])
        for sample, pictures in samples
    ]
    contact_sheet(rows, columns, path, title=title)


def _write_strip(source: Source, path: Path, title: str, model: Model | None) -> None:
    samples, columns = _pictures(source, model)
    frames = [_beside([PIL.Image.open(io.BytesIO(pictures[column])) for _, pictures in samples]) for column in columns]
    durations = [_FRAME_MS] * (len(frames) - 1) + [_LAST_FRAME_MS]
    written = io.BytesIO()
    frames[0].save(
        written, format="GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0, comment=title.encode()
    )
    write_whole(path, [written.getvalue()])


def _pictures(source: Source, model: Model | None) -> tuple[list[tuple[StoredSample, dict[str, bytes]]], list[str]]:
    """Returns the pictures of the first samples by step, and the steps of which each of them has one, the last picture last."""
    found: list[tuple[StoredSample, dict[str, bytes]]] = []
    for sample in source.select()[:MOST_SAMPLES].samples():
        rollout, pictures = source.load(sample.id), {}
        for step in steps_of(rollout, model=model):
            if step.has_picture and (png := picture_of_step(rollout, step.index, model)) is not None:
                pictures[f"step {step.index}"] = png
        if rollout.image is not None:
            pictures[_END] = encode_png(rollout.image)
        found.append((sample, pictures))
    columns = [name for name in found[0][1] if all(name in pictures for _, pictures in found)] if found else []
    if not columns:
        raise InvalidRequestError(
            "the rollouts must have pictures of the same steps, got none; roll out with decode_step_indices.", field="out"
        )
    return found, columns


def _label(sample: StoredSample) -> str:
    reward = "" if sample.reward is None else f"\nreward {sample.reward:.3g}"
    return f"seed {sample.seed}{reward}"


def _tensor(png: bytes) -> Tensor:
    pixels = np.array(PIL.Image.open(io.BytesIO(png)).convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1)[:, None].float() / 255


def _beside(pictures: Sequence[PIL.Image.Image]) -> PIL.Image.Image:
    """Puts pictures into one row."""
    frame = PIL.Image.new("RGB", (sum(picture.width for picture in pictures), max(picture.height for picture in pictures)))
    left = 0
    for picture in pictures:
        frame.paste(picture, (left, 0))
        left += picture.width
    return frame
