"""The bytes that a rank receives in one guided step, by the formulas of docs/parallel.md: one set of three for each family."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from flowroll.engine.checkpoint import Checkpoint
from flowroll.parallel.shards import shard_rows
from flowroll.types import Layout


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What a formula is about: two ranks, both branches with texts of one length.

    Attributes:
        config: The transformer's configuration.
        image: Image tokens.
        text: Text tokens.
    """

    config: Mapping[str, Any]
    image: int
    text: int


Formula: TypeAlias = Callable[[Sizes], int]


def received_bytes(checkpoint: Checkpoint, layout: Layout, *, image: int, text: int, element_bytes: int) -> int:
    """Returns the bytes that a rank of sp2, cfg2 or tp2 receives in one guided step."""
    config = json.loads((checkpoint.folder / "transformer" / "config.json").read_text())
    return element_bytes * FORMULAS[checkpoint.family.name][layout.name](Sizes(config=config, image=image, text=text))


def longest(rows: int) -> int:
    """Returns the longer of the two shards of so many rows; a shorter one travels with filler rows."""
    shard = shard_rows(rows, 0, 2)
    assert shard is not None
    return max(shard.sizes)


def _width(config: Mapping[str, Any]) -> int:
    return int(config["num_attention_heads"] * config["attention_head_dim"])


def _qwen_image_rows(sizes: Sizes) -> int:
    """Keys and values of every block, and the velocity, of the other rank's rows; a forward for each branch."""
    return 2 * longest(sizes.image) * (2 * _width(sizes.config) * sizes.config["num_layers"] + 64)


def _qwen_image_branch(sizes: Sizes) -> int:
    """The other branch's velocity."""
    return sizes.image * 64


def _qwen_image_columns(sizes: Sizes) -> int:
    """The other rank's half of every sharded linear's output."""
    width = _width(sizes.config)
    # Two modulations of 6 widths; q, k, v, out (4) and the two linears of the MLP (4 + 1) for image and text.
    block = 2 * 6 * width + (sizes.image + sizes.text) * 9 * width
    return 2 * (sizes.config["num_layers"] * block + 2 * width) // 2


def _z_image_rows(sizes: Sizes) -> int:
    """Keys and values of every block, and what leaves the two regions, of the other rank's rows of the pair."""
    config, width = sizes.config, sizes.config["dim"]
    image, everything = longest(sizes.image), longest(sizes.image + sizes.text)
    return 2 * (image * width * (2 * config["n_refiner_layers"] + 1) + everything * (2 * width * config["n_layers"] + 64))


def _z_image_branch(sizes: Sizes) -> int:
    """The other branch of what leaves the two regions: the noise refiner's rows and the velocity's."""
    return sizes.image * sizes.config["dim"] + (sizes.image + sizes.text) * 64


def _z_image_columns(sizes: Sizes) -> int:
    config, width = sizes.config, sizes.config["dim"]
    hidden = width // 3 * 8 if width % 3 == 0 else int(width / 3 * 8)
    linears = 5 * width + 2 * hidden
    modulated = config["n_layers"] * (sizes.image + sizes.text) + config["n_refiner_layers"] * sizes.image
    rows = modulated + config["n_refiner_layers"] * sizes.text
    return 2 * (rows * linears + (config["n_layers"] + config["n_refiner_layers"]) * 4 * width) // 2


def _sd3_rows(sizes: Sizes) -> int:
    """Keys and values of every attention, and the velocity, of the other rank's rows of the pair's image."""
    config = sizes.config
    attentions = config["num_layers"] + len(config["dual_attention_layers"])
    return 2 * longest(sizes.image) * (2 * _width(config) * attentions + _patch(config))


def _sd3_branch(sizes: Sizes) -> int:
    """The other branch's velocity."""
    return sizes.image * _patch(sizes.config)


def _sd3_columns(sizes: Sizes) -> int:
    """The other rank's half of every sharded linear's output, for both rows of the pair."""
    config, width = sizes.config, _width(sizes.config)
    dual = len(config["dual_attention_layers"])
    # One row of modulation: 6 widths for image and text, 3 more for a second attention; 2 for the last text and the end.
    modulation = 12 * config["num_layers"] - 4 + 3 * dual + 2
    # q, k, v, out (4) and the two linears of the MLP (4 + 1); the last block's text has q, k and v alone.
    image, text = 9 * config["num_layers"] + 4 * dual, 9 * config["num_layers"] - 6
    return 2 * width * (modulation + image * sizes.image + text * sizes.text) // 2


def _patch(config: Mapping[str, Any]) -> int:
    return int(config["patch_size"] ** 2 * config["out_channels"])


FORMULAS: Mapping[str, Mapping[str, Formula]] = {
    "qwen_image": {"sp2": _qwen_image_rows, "cfg2": _qwen_image_branch, "tp2": _qwen_image_columns},
    "z_image": {"sp2": _z_image_rows, "cfg2": _z_image_branch, "tp2": _z_image_columns},
    "sd3": {"sp2": _sd3_rows, "cfg2": _sd3_branch, "tp2": _sd3_columns},
}
