"""An engine's LoRA adapters."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from flowroll.engine.adapters.adapter_set import Adapter
from flowroll.engine.adapters.files import AdapterFiles, find_adapter, read_adapter, refused, write_adapter
from flowroll.engine.adapters.pushed import PUSHED_ADAPTER, LoraFactors, as_peft
from flowroll.engine.adapters.pushed import refused as refused_push
from flowroll.engine.core import EngineCore
from flowroll.engine.scheduler import ExclusiveMode
from flowroll.engine.weights.staged import listed
from flowroll.types import AdapterChange, LoraAdapter, check_lora_name


@dataclass(frozen=True, slots=True, kw_only=True)
class StagedAdapter:
    """An adapter that was read and checked, beside those that are loaded.

    Attributes:
        files: Where it was read from; the other ranks read it there too.
        adapter: It.
        seconds: That reading and checking took.
    """

    files: AdapterFiles
    adapter: Adapter
    seconds: float


class LoraEngine(EngineCore):
    """The part of `Engine` that holds adapters; adapters.py makes them."""

    def lora_adapters(self) -> tuple[LoraAdapter, ...]:
        """The loaded adapters.

        Raises:
            ShuttingDownError: The engine was interrupted or closed.
        """
        return self._open_model().adapters.loaded

    def load_lora_adapter(
        self,
        folder: str | Path,
        *,
        name: str,
        merged: bool = False,
        weight_version: str | None = None,
        mode: ExclusiveMode = "drain",
    ) -> AdapterChange:
        """Loads a LoRA adapter that peft has saved, for requests that give its name as `lora_name`.

        One that has the name is replaced, at once. The adapter keeps the dtype that it was saved in, as in peft. Requests go on
        while it is read and checked; then the change waits for those that run. The model without adapter is not touched.

        Args:
            folder: With adapter_config.json and adapter_model.safetensors.
            name: Printable text of 1 to 128 characters.
            merged: Add it to a copy of the weights that it changes, which takes their memory once more, and then costs
                nothing in a forward; a rollout has the bits of a checkpoint that peft's `merge_and_unload` made. Otherwise it
                runs beside the weights, and a rollout has the bits of a trainer's peft model.
            weight_version: Of the engine's weights from now on; None: one more than the highest number so far.
            mode: What becomes of the requests that run: "drain": they finish first; "abort": they are done again, wholly.

        Raises:
            InvalidRequestError: A name or version that is no short text.
            WeightsRejectedError: It cannot be read to its end, is no plain LoRA of this model's linears, or there is no room
                for it. Everything is as it was.
            ShuttingDownError: The engine was interrupted or closed.
        """
        staged = self.stage_lora_adapter(find_adapter(folder), name=name, merged=merged)
        return self.commit_lora_adapter(staged, weight_version=weight_version, mode=mode)

    def load_lora_adapter_from_tensors(
        self,
        tensors: Mapping[str, Tensor],
        config: Mapping[str, Any],
        *,
        name: str,
        merged: bool = False,
        weight_version: str | None = None,
        mode: ExclusiveMode = "drain",
    ) -> AdapterChange:
        """As `load_lora_adapter`, from a trainer in this process. Other ranks have to be on this machine.

        Args:
            tensors: `peft.get_peft_model_state_dict(model)`.
            config: `model.peft_config["default"].to_dict()`.
            name: See `load_lora_adapter`, as for the rest.
            merged: The same.
            weight_version: The same.
            mode: The same.
        """
        # Where other ranks read it too.
        with tempfile.TemporaryDirectory(prefix="flowroll-") as folder:
            write_adapter(Path(folder), tensors, config)
            return self.load_lora_adapter(folder, name=name, merged=merged, weight_version=weight_version, mode=mode)

    def stage_lora_adapter(self, files: AdapterFiles, *, name: str, merged: bool = False) -> StagedAdapter:
        """The first half of loading: reads and checks; may be called from any thread, while requests run.

        Raises:
            InvalidRequestError: A name that is no short text.
            WeightsRejectedError: It cannot be taken.
            ShuttingDownError: The engine was interrupted or closed.
        """
        started_s = time.perf_counter()
        check_lora_name(name)
        adapters = self._open_model().adapters
        self._offload.check_awake()
        data = read_adapter(files, max_bytes=self.info.adapter_limits.max_adapter_bytes)
        adapter = adapters.stage(data, name=name, merged=merged)
        self._check_room(adapter.about)
        return StagedAdapter(files=files, adapter=adapter, seconds=time.perf_counter() - started_s)

    def stage_pushed_lora(self, factors: Mapping[str, LoraFactors], folder: Path, *, merged: bool) -> StagedAdapter:
        """Makes an adapter of factors that a trainer has pushed, and of those of other layers that are in place.

        Once it is committed, requests that name no adapter run with it.

        Args:
            factors: By layer.
            folder: An empty one, in which the adapter stays until it is committed: the other ranks read it there.
            merged: See `load_lora_adapter`.

        Raises:
            WeightsRejectedError: A layer is none of the transformer's linears, or the adapter cannot be taken.
            ShuttingDownError: The engine was interrupted or closed.
        """
        model = self._open_model()
        known = {name for name, _ in model.transformer.named_modules()}
        if unknown := set(factors) - known:
            raise refused_push(f"must be of the transformer's layers, got {listed(unknown)}")
        tensors, config = as_peft({**model.adapters.factors(PUSHED_ADAPTER), **factors})
        write_adapter(folder, tensors, config)
        return self.stage_lora_adapter(find_adapter(folder), name=PUSHED_ADAPTER, merged=merged)

    def commit_lora_adapter(
        self, staged: StagedAdapter, *, weight_version: str | None = None, mode: ExclusiveMode = "drain"
    ) -> AdapterChange:
        """The second half: puts it in place once no request runs; see `load_lora_adapter`."""
        adapters = self._open_model().adapters

        def change(version: str) -> LoraAdapter:
            self._check_room(staged.adapter.about)
            adapter = adapters.finished(staged.adapter, version)
            self._executor.stage_adapter(staged.files.folder, adapter.about)
            self._executor.commit()
            adapters.put(adapter)
            return adapter.about

        return self._change_adapter(staged.adapter.about.name, change, weight_version, mode, read_s=staged.seconds)

    def unload_lora_adapter(
        self, name: str, *, weight_version: str | None = None, mode: ExclusiveMode = "drain"
    ) -> AdapterChange:
        """Forgets an adapter; requests that wait for it end in an error.

        Args:
            name: Of the adapter.
            weight_version: Of the engine's weights from now on; None: one more than the highest number so far.
            mode: What becomes of the requests that run; see `load_lora_adapter`.

        Raises:
            InvalidRequestError: There is no such adapter, or a version that is no short text.
            ShuttingDownError: The engine was interrupted or closed.
        """
        adapters = self._open_model().adapters

        def change(version: str) -> None:
            adapters.drop(name)
            self._executor.unload_adapter(name)

        return self._change_adapter(name, change, weight_version, mode, read_s=0.0)

    def _change_adapter(
        self,
        name: str,
        change: Callable[[str], LoraAdapter | None],
        weight_version: str | None,
        mode: ExclusiveMode,
        *,
        read_s: float,
    ) -> AdapterChange:
        def run() -> AdapterChange:
            self._offload.check_awake()
            started_s = time.perf_counter()
            versions = self._weights.versions
            version, previous = versions.following(weight_version), versions.current
            adapter = change(version)
            versions.advance(version)
            return AdapterChange(
                lora_name=name,
                weight_version=version,
                previous_version=previous,
                adapter=adapter,
                read_s=read_s,
                paused_s=time.perf_counter() - started_s,
            )

        return self._alone(run, mode)

    def _check_room(self, wanted: LoraAdapter) -> None:
        limits = self.info.adapter_limits
        others = [adapter for adapter in self._open_model().adapters.loaded if adapter.name != wanted.name]
        total = wanted.num_bytes + sum(adapter.num_bytes for adapter in others)
        if len(others) >= limits.max_adapters or total > limits.max_adapter_bytes:
            raise refused(
                f"the adapters must be at most {limits.max_adapters} with {limits.max_adapter_bytes} bytes together, got "
                f"{len(others) + 1} with {total}; unload one first, or start the engine with a higher limit."
            )
