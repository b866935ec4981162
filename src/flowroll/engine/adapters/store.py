"""Reads, checks, loads and unloads the LoRA adapters of one engine, on all of its ranks.

It does not schedule anything: whoever calls `commit` or `unload` ensures that no request runs meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flowroll.engine.adapters.adapter_set import Adapter, AdapterSet
from flowroll.engine.adapters.files import AdapterFiles, adapter_of, check_stored, read_adapter, refused, without_prefix
from flowroll.engine.adapters.pushed import PUSHED_ADAPTER, LoraFactors, as_peft
from flowroll.engine.adapters.pushed import refused as refused_push
from flowroll.engine.config import AdapterLimits
from flowroll.engine.runner.changes import DropAdapter, LoadAdapter
from flowroll.engine.runner.executor import Executor
from flowroll.engine.weights.offload import WeightOffload
from flowroll.engine.weights.staged import listed
from flowroll.engine.weights.versions import WeightVersions
from flowroll.types import AdapterChange, LoraAdapter, check_lora_name
from flowroll.wire.safetensors import StoredTensor


@dataclass(frozen=True, slots=True, kw_only=True)
class StagedAdapter:
    """An adapter that was read and checked, but is not loaded yet.

    Attributes:
        files: The files that it was read from; the other ranks read them too.
        adapter: The adapter.
        seconds: How long reading and checking took, in seconds.
    """

    files: AdapterFiles
    adapter: Adapter
    seconds: float


class AdapterStore:
    """Changes the adapters of an engine; `AdapterSet` holds those of one rank.

    Args:
        adapters: The adapters of this rank.
        executor: Reaches the other ranks.
        offload: Tells whether the weights are in memory.
        versions: The versions of the weights; a change of adapters makes a new one.
        limits: The limits of the number and bytes of adapters.
    """

    def __init__(
        self,
        adapters: AdapterSet,
        executor: Executor,
        offload: WeightOffload,
        versions: WeightVersions,
        limits: AdapterLimits,
    ) -> None:
        self._adapters, self._executor = adapters, executor
        self._offload, self._versions, self._limits = offload, versions, limits

    @property
    def loaded(self) -> tuple[LoraAdapter, ...]:
        """The loaded adapters."""
        return self._adapters.loaded

    def stage(self, files: AdapterFiles, *, name: str, merged: bool) -> StagedAdapter:
        """Reads and checks an adapter. May be called from any thread while requests run.

        Raises:
            InvalidRequestError: The name is not a valid short text.
            WeightsRejectedError: The adapter is refused.
        """
        started_s = time.perf_counter()
        check_lora_name(name)
        self._offload.check_awake()
        with files.named_in_errors():
            data = read_adapter(files, max_bytes=self._limits.max_adapter_bytes)
            adapter = self._adapters.stage(data, name=name, merged=merged)
        self._check_room(adapter.about)
        return StagedAdapter(files=files, adapter=adapter, seconds=time.perf_counter() - started_s)

    def check(self, config: Mapping[str, Any], stored: Sequence[StoredTensor], *, name: str, merged: bool) -> None:
        """Checks an adapter before the data of its tensors has come. May be called from any thread while requests run.

        Raises:
            InvalidRequestError: The name is not a valid short text.
            WeightsRejectedError: The adapter is refused.
        """
        check_lora_name(name)
        self._offload.check_awake()
        check_stored(stored, self._limits.max_adapter_bytes, "the body")
        shapes = without_prefix({tensor.name: tensor.shape for tensor in stored})
        self._adapters.check(config, shapes)
        total = sum(tensor.stop - tensor.start for tensor in stored)
        self._check_room(
            LoraAdapter(name=name, version="", sha256="", merged=merged, num_layers=len(stored) // 2, num_bytes=total)
        )

    def stage_pushed(self, factors: Mapping[str, LoraFactors], *, merged: bool) -> StagedAdapter:
        """Makes an adapter from the factors that a trainer has pushed, and the current factors of all other layers.

        After its commit, requests that name no adapter run with it.

        Args:
            factors: The factors by layer.
            merged: Whether the adapter is added to a copy of the weights.

        Raises:
            WeightsRejectedError: A layer is none of the transformer's modules, or the adapter is refused.
        """
        if unknown := set(factors) - self._adapters.module_names:
            raise refused_push(f"must be of the transformer's layers, got {listed(unknown)}")
        tensors, config = as_peft({**self._adapters.factors(PUSHED_ADAPTER), **factors})
        return self.stage(adapter_of(tensors, config), name=PUSHED_ADAPTER, merged=merged)

    def commit(self, staged: StagedAdapter, weight_version: str | None) -> AdapterChange:
        """Puts a staged adapter in place on every rank, or, after an error, on none."""

        def change(version: str) -> LoraAdapter:
            self._check_room(staged.adapter.about)
            adapter = self._adapters.finished(staged.adapter, version)
            with staged.files.named_in_errors():
                load = LoadAdapter(config=staged.files.config, weights=staged.files.weights, about=adapter.about)
                self._executor.change(load, lambda: self._adapters.put(adapter))
            return adapter.about

        return self._change(staged.adapter.about.name, change, weight_version, read_s=staged.seconds)

    def unload(self, name: str, weight_version: str | None) -> AdapterChange:
        """Unloads an adapter on every rank."""

        def change(version: str) -> None:
            self._executor.change(DropAdapter(name=name))

        return self._change(name, change, weight_version, read_s=0.0)

    def _change(
        self, name: str, change: Callable[[str], LoraAdapter | None], weight_version: str | None, *, read_s: float
    ) -> AdapterChange:
        self._offload.check_awake()
        started_s = time.perf_counter()
        version, previous = self._versions.state.following(weight_version), self._versions.current
        adapter = change(version)
        self._versions.advance(version)
        return AdapterChange(
            lora_name=name,
            weight_version=version,
            previous_version=previous,
            adapter=adapter,
            read_s=read_s,
            paused_s=time.perf_counter() - started_s,
        )

    def _check_room(self, wanted: LoraAdapter) -> None:
        limits = self._limits
        others = [adapter for adapter in self.loaded if adapter.name != wanted.name]
        total = wanted.num_bytes + sum(adapter.num_bytes for adapter in others)
        if len(others) >= limits.max_adapters or total > limits.max_adapter_bytes:
            raise refused(
                f"the adapters must be at most {limits.max_adapters} with {limits.max_adapter_bytes} bytes together, got "
                f"{len(others) + 1} with {total}; unload one first, or start the engine with a higher limit."
            )
