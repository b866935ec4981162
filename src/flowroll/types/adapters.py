"""Low-rank adapters (LoRA) that an engine holds beside its weights: their names, and the reports about their changes."""

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
        name: The name under which the adapter was loaded.
        version: The version of the engine's weights when the adapter was loaded; another adapter under the same name has
            another version.
        sha256: The adapter's checksum, equal to `replay.adapter_checksum` of a trainer's model with the same adapter.
        merged: Whether the adapter was added to the weights; otherwise it ran beside them, as in training.
    """

    name: str
    version: str
    sha256: str
    merged: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraAdapter:
    """An adapter in memory.

    Attributes:
        name: The name by which a request chooses the adapter.
        version: The version of the engine's weights when the adapter was loaded.
        sha256: The sha256 over the adapter's tensors, their names and scales.
        merged: Whether the adapter was added to a copy of the weights that it changes; otherwise it runs beside them.
        num_layers: The number of linear layers that the adapter changes.
        num_bytes: The bytes that the adapter takes in memory on rank 0.
    """

    name: str
    version: str
    sha256: str
    merged: bool
    num_layers: int
    num_bytes: int

    @property
    def record(self) -> AdapterRecord:
        """The adapter's entry in a sample's record."""
        return AdapterRecord(name=self.name, version=self.version, sha256=self.sha256, merged=self.merged)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterChange:
    """A finished change of adapters.

    Attributes:
        lora_name: The name of the adapter that was changed.
        weight_version: The version of the engine's weights from now on.
        previous_version: The version before the change.
        adapter: The adapter that has the name now; None if none has.
        read_s: The seconds that reading and checking took, while generation continued.
        paused_s: Seconds for which no request could run.
    """

    lora_name: str
    weight_version: str
    previous_version: str
    adapter: LoraAdapter | None
    read_s: float
    paused_s: float


def adapter_config_text(config: Mapping[str, Any]) -> str:
    """Returns the text of adapter_config.json.

    Args:
        config: The result of peft's `LoraConfig.to_dict()` or of `dataclasses.asdict`.

    Raises:
        InvalidRequestError: The configuration holds a value that JSON cannot represent.
    """
    try:
        # peft keeps names in sets.
        return json.dumps(dict(config), default=sorted)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequestError(
            f"config must be what adapter_config.json holds, got {error}; send LoraConfig.to_dict().", field="config"
        ) from error


def check_lora_name(name: object, field: str = "lora_name") -> None:
    """Refuses a value that cannot be the name of an adapter or of a policy.

    Raises:
        InvalidRequestError: The name is not a text, is empty, too long, or not printable.
    """
    if not (isinstance(name, str) and 0 < len(name) <= MAX_LORA_NAME_CHARS and name.isprintable()):
        shown = f"{len(name)} characters" if isinstance(name, str) else type(name).__name__
        raise InvalidRequestError(
            f"{field} must be printable text of 1 to {MAX_LORA_NAME_CHARS} characters, got {shown}; use a short name.",
            field=field,
        )
