"""What the harness and the process of a layout tell each other: a specification in, facts and rollout files out."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from flowroll.types import Layout, Number, SamplingParams

_FACTS = "facts.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildSpec:
    """What the process of one layout runs.

    Attributes:
        folder: Where its results go; it exists.
        model: The checkpoint folder.
        variant: Variant of the model family.
        dtype: Of the weights.
        device: Of rank 0.
        layout: The degrees of the axes.
        rank_timeout_s: How long ranks wait for each other.
        num_threads: CPU threads of each rank.
        requests: By mode.
    """

    folder: str
    model: str
    variant: str
    dtype: str
    device: str
    layout: Layout
    rank_timeout_s: Number
    num_threads: int
    requests: Mapping[str, SamplingParams]


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What the process of a layout says beside its rollouts; written anew after every mode.

    Attributes:
        parameters: Of the transformer, on all ranks together.
        transformer_bytes: Of the transformer's weights on rank 0.
        received_bytes: Bytes that rank 0 received during a mode's forwards, by mode and mesh axis.
        seeds: Of the rollouts of a mode that is done.
        versions: Of the libraries whose code shapes the bits.
        machine: The hardware, in words.
        error: Why it ended early; None if it did not.
    """

    parameters: int = 0
    transformer_bytes: int = 0
    received_bytes: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    seeds: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    machine: Mapping[str, str] = field(default_factory=dict)
    error: str | None = None


def encode_spec(spec: ChildSpec) -> str:
    """One line of text."""
    return msgspec.json.encode(spec).decode()


def decode_spec(line: str) -> ChildSpec:
    """What `encode_spec` wrote."""
    return msgspec.json.decode(line, type=ChildSpec)


def rollout_file(folder: Path, mode: str, seed: int) -> Path:
    """Where one rollout of a layout is."""
    return folder / f"{mode}-seed-{seed}.safetensors"


def write_facts(folder: Path, facts: Facts) -> None:
    """Replaces the facts of a layout, whole or not at all."""
    unfinished = folder / f"{_FACTS}.part"
    unfinished.write_bytes(msgspec.json.encode(facts))
    os.replace(unfinished, folder / _FACTS)


def read_facts(folder: Path) -> Facts:
    """The facts of a layout; blank ones where its process wrote none."""
    file = folder / _FACTS
    return msgspec.json.decode(file.read_bytes(), type=Facts) if file.is_file() else Facts()
