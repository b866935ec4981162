"""The weights of one engine: their versions, updates and checksums.

It does not schedule anything: whoever calls `commit`, `checksum`, `verify` or `differing` ensures that no request runs
meanwhile.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, get_args

from torch import Tensor

from flowroll.engine.adapters.adapter_set import AdapterSet
from flowroll.engine.loading import modules_of
from flowroll.engine.runner.executor import Executor
from flowroll.engine.weights.offload import WeightOffload
from flowroll.engine.weights.receiver import WeightReceiver
from flowroll.engine.weights.staged import StagedWeights, WeightFiles, check_updatable, listed, slots_of, stage_weights
from flowroll.engine.weights.versions import WeightVersions
from flowroll.errors import InvalidRequestError, ShuttingDownError, WeightsMismatchError
from flowroll.families.checksums import checksum_of, tensor_checksum, typed_tensor_checksum
from flowroll.parallel.linears import whole_tensors
from flowroll.types import ModuleName, WeightUpdate


class WeightStore:
    """Updates the weights of one engine, and computes their checksums.

    Args:
        pipeline: The diffusers pipeline that holds the modules.
        executor: Reaches the other ranks, which hold only their parts of the transformer.
        adapters: The adapters of the transformer; merged ones are merged again when the transformer changes.
        offload: Tells whether the weights are in memory.
        versions: The versions of the weights; all modules together have one version.
    """

    def __init__(
        self, pipeline: Any, executor: Executor, adapters: AdapterSet, offload: WeightOffload, versions: WeightVersions
    ) -> None:
        self._pipeline, self._executor, self._adapters = pipeline, executor, adapters
        self._offload, self.versions = offload, versions

    def release(self) -> None:
        """Drops the reference to the pipeline and its modules."""
        self._pipeline = None

    def stage(self, files: WeightFiles) -> StagedWeights:
        """Reads new weights beside the old ones on this rank; see `stage_weights` for the errors."""
        return stage_weights(self._module(files.module), files)

    def receive(self, module: str, *, partial: bool) -> WeightReceiver:
        """Returns a receiver for new weights of a module, which arrive tensor by tensor."""
        name = check_updatable(module)
        return WeightReceiver(name, slots_of(self._module(name)), partial=partial)

    def commit(self, staged: StagedWeights, weight_version: str | None) -> WeightUpdate:
        """Puts new weights in place on every rank, or, after an error, on none."""
        self._offload.check_awake()
        staged.check_whole()
        started_s = time.perf_counter()
        module, previous = staged.module, self.versions.current
        version = self.versions.following(weight_version)
        num_tensors, num_bytes = staged.num_tensors, staged.num_bytes
        is_transformer = module == "transformer"
        if is_transformer:
            self._executor.stage_weights(staged.source)

        def conclude() -> None:
            adapters = self._adapters.over_new_base() if is_transformer else None
            # Everything that can fail comes before the other ranks' commit, which cannot be undone. Only assignments follow.
            advanced = self.versions.advanced(version)
            if is_transformer:
                self._executor.commit()
            self.versions.adopt(advanced)
            if adapters is not None:
                self._adapters.adopt(adapters)

        try:
            staged.commit(conclude)
        except BaseException:
            if is_transformer:
                self._executor.drop_staged()
            raise
        return WeightUpdate(
            module=module,
            weight_version=version,
            previous_version=previous,
            num_tensors=num_tensors,
            num_bytes=num_bytes,
            read_s=staged.seconds,
            paused_s=time.perf_counter() - started_s,
        )

    def checksum(self, module: str) -> str:
        """Returns the sha256 over a module's names and tensors."""
        with self._tensors(module) as tensors:
            return checksum_of(tensors)

    def verify(self, expected: Iterable[tuple[str, str]], module: str) -> int:
        """Compares a module's tensors one by one with the expected checksums; returns the number of tensors.

        Raises:
            WeightsMismatchError: A name is unknown, missing or doubled, or a tensor differs.
        """
        pairs = list(expected)
        counts = Counter(name for name, _ in pairs)
        with self._tensors(module) as tensors:
            actual = {name: tensor_checksum(tensor) for name, tensor in tensors}
        wanted = {name: digest.lower() for name, digest in pairs}
        findings = {
            "doubled": [name for name, count in counts.items() if count > 1],
            "unknown": set(counts) - set(actual),
            "missing": set(actual) - set(counts),
            "different": [name for name, digest in actual.items() if name in wanted and wanted[name] != digest],
        }
        if found := "; ".join(f"{kind}: {listed(names)}" for kind, names in findings.items() if names):
            raise WeightsMismatchError(
                f"{module} must have the expected tensors in version {self.versions.current}, got {found}; update the weights, "
                "or compare with the version that is meant.",
                field="expected",
            )
        return len(actual)

    def differing(self, expected: Mapping[str, str], module: str) -> tuple[list[str], list[str]]:
        """Returns the expected names that the module does not have, and those whose `typed_tensor_checksum` differs."""
        with self._tensors(module) as tensors:
            # All tensors are iterated over, because the ranks gather the sharded ones one after the other.
            actual = {name: typed_tensor_checksum(tensor) for name, tensor in tensors if name in expected}
        different = [name for name, digest in actual.items() if digest != expected[name].lower()]
        return sorted(set(expected) - set(actual)), sorted(different)

    @contextlib.contextmanager
    def _tensors(self, name: str) -> Iterator[Iterator[tuple[str, Tensor]]]:
        """Yields all of a module's tensors, whole, in the order of their names. Sharded ones are gathered from every rank."""
        module = self._module(name)
        if name == "transformer":
            with self._executor.gathering():
                yield whole_tensors(module)
        else:
            yield whole_tensors(module)

    def _module(self, name: str) -> Any:
        pipeline = self._pipeline
        if pipeline is None:
            raise ShuttingDownError("the engine must run to use its weights, got a shutdown; ask another replica.")
        modules = modules_of(pipeline)
        if name not in modules:
            known = ", ".join(one for one in get_args(ModuleName) if one in modules)
            raise InvalidRequestError(f"module must be one of {known}, got {name}; choose one.", field="module")
        self._offload.check_awake()
        return modules[name]

    @property
    def modules(self) -> tuple[str, ...]:
        """The names of the modules of the checkpoint that have weights."""
        modules = modules_of(self._pipeline) if self._pipeline is not None else {}
        return tuple(name for name in get_args(ModuleName) if name in modules)
