"""Checkpoints that differ in one module's weights, and files with something wrong."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

WEIGHTS = "diffusion_pytorch_model.safetensors"
# Small, and with everything recorded.
REQUEST: dict[str, Any] = {
    "prompt": "a cat",
    "seed": 3,
    "height": 64,
    "width": 64,
    "num_inference_steps": 2,
    "return_denoising_env": True,
    "return_dit_trajectory": True,
    "debug_mode": True,
}


def with_other(checkpoint: Path, target: Path, module: str = "transformer", factor: float = 1.01) -> Path:
    """A copy of a checkpoint with other weights in one module; the values are no round numbers in any dtype."""
    shutil.copytree(checkpoint, target)
    change(target / module, lambda tensors: {name: _scaled(tensor, factor) for name, tensor in tensors.items()})
    return target


def _scaled(tensor: Tensor, factor: float) -> Tensor:
    """Counters stay as they are."""
    return tensor * factor if tensor.is_floating_point() else tensor


def change(folder: Path, edit: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Saves the weights of a module's folder again after an edit."""
    save_file(edit(load_file(folder / WEIGHTS)), folder / WEIGHTS)


def in_shards(folder: Path, count: int) -> list[Path]:
    """Splits the weights of a module's folder into several files with an index, in the order of the names."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(tensors)
    files, weight_map = [], {}
    for index in range(count):
        part = names[index::count]
        file = folder / f"diffusion_pytorch_model-{index + 1:05d}-of-{count:05d}.safetensors"
        save_file({name: tensors[name] for name in part}, file)
        weight_map |= dict.fromkeys(part, file.name)
        files.append(file)
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return files


def edit_header(file: Path, edit: Callable[[str], str]) -> None:
    """Changes the text of a safetensors header; the data stays."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = edit(data[8 : 8 + length].decode()).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])


def edit_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))
