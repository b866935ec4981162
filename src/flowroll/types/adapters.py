"""Low-rank adapters (LoRA) that an engine holds beside its weights: what names one, and what is said of a change of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flowroll.errors import InvalidRequestError

MAX_LORA_NAME_CHARS = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterRecord:
    """The adapter that made a sample.

    Attributes:
        name: It was loaded under.
        version: Of the engine's weights when it was loaded; another adapter under the same name has another one.
        sha256: `replay.adapter_checksum` of a trainer's model that has the same one.
        merged: Whether it was added to the weights; else it ran beside them, as in training.
    """

    name: str
    version: str
    sha256: str
    merged: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraAdapter:
    """An adapter in memory.

    Attributes:
        name: By which a request chooses it.
        version: Of the engine's weights when it was loaded.
        sha256: Over its tensors, their names and scales.
        merged: Whether it was added to a copy of the weights that it changes; else it runs beside them.
        num_layers: Linears that it changes.
        num_bytes: That it takes in memory, on rank 0.
    """

    name: str
    version: str
    sha256: str
    merged: bool
    num_layers: int
    num_bytes: int

    @property
    def record(self) -> AdapterRecord:
        """What a sample's record says of it."""
        return AdapterRecord(name=self.name, version=self.version, sha256=self.sha256, merged=self.merged)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterChange:
    """A finished change of adapters.

    Attributes:
        lora_name: Which one.
        weight_version: Version of the engine's weights from now on.
        previous_version: The one before.
        adapter: What has the name now; None: nothing has.
        read_s: Seconds that reading and checking took, while generation went on.
        paused_s: Seconds for which no request could run.
    """

    lora_name: str
    weight_version: str
    previous_version: str
    adapter: LoraAdapter | None
    read_s: float
    paused_s: float


def adapter_config_text(config: Mapping[str, Any]) -> str:
    """The text of adapter_config.json.

    Args:
        config: What peft's `LoraConfig.to_dict()` or `dataclasses.asdict` gives.

    Raises:
        InvalidRequestError: It holds what has no place in JSON.
    """
    try:
        # peft keeps names in sets.
        return json.dumps(dict(config), default=sorted)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequestError(
            f"config must be what adapter_config.json holds, got {error}; send LoraConfig.to_dict().", field="config"
        ) from error


def check_lora_name(name: object) -> None:
    """Refuses what cannot name an adapter.

    Raises:
        InvalidRequestError: It is no text, empty, too long, or not printable.
    """
    if not (isinstance(name, str) and 0 < len(name) <= MAX_LORA_NAME_CHARS and name.isprintable()):
        shown = f"{len(name)} characters" if isinstance(name, str) else type(name).__name__
        raise InvalidRequestError(
            f"lora_name must be printable text of 1 to {MAX_LORA_NAME_CHARS} characters, got {shown}; use a short name.",
            field="lora_name",
        )
