"""Checkpoints of Stable Diffusion 3 with something changed, and what their pipeline makes of a request."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from flowroll.engine.loading import modules_of
from flowroll.families.alignment import align_weights

NO_T5 = {"text_encoder_3": None, "tokenizer_3": None}
REQUEST: dict[str, Any] = {"prompt": "a red cup", "negative_prompt": "blurry", "height": 80, "width": 112}


def load(folder: Path, dtype: str = "float32", **parts: Any) -> Any:
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, dtype=getattr(torch, dtype), **parts)
    pipeline.set_progress_bar_config(disable=True)
    for module in modules_of(pipeline).values():
        align_weights(module)
    return pipeline


def latents_of(pipeline: Any, **request: Any) -> Tensor:
    generator = torch.Generator(pipeline.device).manual_seed(7)
    return pipeline(**{**REQUEST, **request}, generator=generator, output_type="latent").images[0]


def edited(source: Path, folder: Path, file: str, **values: Any) -> Path:
    """A copy of a checkpoint with other values in one of its JSON files."""
    shutil.copytree(source, folder)
    edit_json(folder / file, **values)
    return folder


def edit_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
