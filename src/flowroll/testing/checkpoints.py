"""Checkpoint folders of the real diffusers classes with random weights, built offline.

What flowroll promises about real checkpoints (schedules, latent channels, the 8x VAE, the text template) is as in them; widths
and depths are not, nor the VAE of qwen_image_edit, which is 16x.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

import torch
from diffusers import DiffusionPipeline

from flowroll.errors import CheckpointError, InvalidRequestError
from flowroll.testing.flux import make_flux
from flowroll.testing.flux2 import make_flux2
from flowroll.testing.parts import Size
from flowroll.testing.qwen_image import make_qwen_image
from flowroll.testing.qwen_image_21 import make_qwen_image_21
from flowroll.testing.qwen_image_edit import make_qwen_image_edit
from flowroll.testing.sd3 import make_sd3
from flowroll.testing.weights import align_file
from flowroll.testing.z_image import make_z_image

# Of each family: a pipeline from its size, a seed and fields of the transformer's configuration.
BUILDERS: Mapping[str, Callable[[Size, int, dict[str, Any]], DiffusionPipeline]] = {
    "qwen_image": make_qwen_image,
    "z_image": make_z_image,
    "sd3": make_sd3,
    "flux": make_flux,
    "qwen_image_21": make_qwen_image_21,
    "flux2": make_flux2,
    "qwen_image_edit": make_qwen_image_edit,
}


def make_checkpoint(family: str, directory: str | Path, *, seed: int = 0, size: Size = "tiny", **overrides: Any) -> Path:
    """Builds a pipeline with random weights and saves it as a checkpoint folder; needs no network.

    Args:
        family: One of `BUILDERS`.
        directory: Where to save; made if need be. A checkpoint that is there is overwritten.
        seed: Same seed, same bytes.
        size: "tiny"; "mid": about 100 million parameters in the transformer; or "shapes": about one million, the architecture
            that `flowroll.examples.shapes.train` trains.
        **overrides: Fields of the transformer's configuration, e.g. `num_layers`; of flux2 also `is_distilled`, of
            qwen_image_edit `takes_several`.

    Returns:
        The folder.

    Raises:
        InvalidRequestError: An unknown family or size.
        CheckpointError: The path is taken by something that is no folder.
    """
    for field, value, known in (("family", family, tuple(BUILDERS)), ("size", size, get_args(Size))):
        if value not in known:
            raise InvalidRequestError(f"{field} must be one of {', '.join(known)}, got {value}; choose one.", field=field)
    folder = Path(directory)
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"directory must be a folder or free, got the file {folder}; choose another path.")
    # The classes draw initial weights from the global generator, which is the caller's.
    with torch.random.fork_rng(devices=[]):
        pipeline = BUILDERS[family](size, seed, overrides)
    pipeline.save_pretrained(folder)
    for file in folder.glob("*/*.safetensors"):
        align_file(file)
    return folder
