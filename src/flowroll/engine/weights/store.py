"""The weights of one engine: their versions, updates and checksums.

It does not schedule anything: whoever calls `commit` ensures that no request runs meanwhile. Checksums are computed in pieces,
between which samples may take steps, but no commit may come.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

from flowroll.engine.adapters.adapter_set import AdapterSet
from flowroll.engine.loading import modules_of
from flowroll.engine.runner.executor import Executor
from flowroll.engine.weights.digests import Pieces, WeightDigests
from flowroll.engine.weights.offload import WeightOffload
from flowroll.engine.weights.receiver import WeightReceiver
from flowroll.engine.weights.staged import StagedWeights, WeightFiles, check_updatable, listed, slots_of, stage_weights
from flowroll.engine.weights.versions import WeightVersions
from flowroll.errors import InvalidRequestError, RankLostError, ShuttingDownError, WeightsMismatchError
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
        self._digests = WeightDigests(self._module, executor)

    def release(self) -> None:
        """Drops the reference to the pipeline and its modules."""
        self._pipeline = None

    def stage(self, files: WeightFiles) -> StagedWeights:
        """Reads new weights beside the old ones on this rank; see `stage_weights` for the errors."""
        return stage_weights(self._module(files.module, for_update=True), files)

    def receive(self, module: str, *, partial: bool) -> WeightReceiver:
        """Returns a receiver for new weights of a module, which arrive tensor by tensor."""
        name = check_updatable(module)
        return WeightReceiver(name, slots_of(self._module(name, for_update=True)), partial=partial)

    def commit(self, staged: StagedWeights, weight_version: str | None) -> WeightUpdate:
        """Puts new weights in place on every rank, or, after an error, on none.

        Raises:
            RankLostError: A rank has weights that are of no use any more; the engine ends.
            WeightsRejectedError: The transformer's weights were discarded, and these are not all of them.
        """
        self._offload.check_memory()
        staged.check_whole()
        started_s = time.perf_counter()
        module, previous = staged.module, self.versions.current
        version = self.versions.state.following(weight_version)
        num_tensors, num_bytes = staged.num_tensors, staged.num_bytes
        is_transformer = module == "transformer"
        if is_transformer:
            self._offload.check_brings_all(staged.replaced)
            self._executor.stage_weights(staged.source)

        def conclude() -> None:
            self._digests.forget(module)
            adapters = self._adapters.over_new_base() if is_transformer else None
            # Everything that can fail comes before the other ranks' commit, which cannot be undone. Only assignments follow.
            advanced = self.versions.state.after(version)
            if is_transformer:
                self._executor.commit()
            self.versions.adopt(advanced)
            if adapters is not None:
                self._adapters.adopt(adapters)
                self._offload.note_weights()

        try:
            staged.commit(conclude)
        except RankLostError as error:
            self._executor.lose(error.message)
            raise
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

    def checksums(self, modules: Sequence[str]) -> Pieces[dict[str, str]]:
        """Computes the sha256 over the names and tensors of each of these modules, by module."""
        found = {}
        for module in modules:
            found[module] = yield from self._digests.of_module(module)
        return found

    def note_checksum(self, max_bytes: int) -> None:
        """Computes the transformer's checksum now, for `known_checksum`, unless its weights have more than `max_bytes`."""
        slots = slots_of(self._module("transformer")).values()
        if sum(slot.dtype.itemsize * math.prod(slot.shape) for slot in slots) <= max_bytes:
            for _ in self._digests.of_module("transformer"):
                pass

    def known_checksum(self) -> str | None:
        """Returns the transformer's checksum, as `checksums` computes it, if it was computed since the weights changed."""
        return self._digests.known("transformer")

    def verify(self, expected: Iterable[tuple[str, str]], module: str) -> Pieces[tuple[int, str]]:
        """Compares a module's tensors one by one with the expected checksums.

        It gives the number of tensors, and the version of the weights that were compared.

        Raises:
            WeightsMismatchError: A name is unknown, missing or doubled, or a tensor differs.
        """
        pairs = list(expected)
        counts = Counter(name for name, _ in pairs)
        actual = yield from self._digests.of_tensors(module, "plain")
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
        return len(actual), self.versions.current

    def differing(self, expected: Mapping[str, str], module: str) -> Pieces[tuple[list[str], list[str]]]:
        """Finds the expected names that the module does not have, and those whose `typed_tensor_checksum` differs."""
        actual = yield from self._digests.of_tensors(module, "typed")
        different = [name for name, digest in expected.items() if name in actual and digest.lower() != actual[name]]
        return sorted(set(expected) - set(actual)), sorted(different)

    def _module(self, name: str, *, for_update: bool = False) -> Any:
        pipeline = self._pipeline
        if pipeline is None:
            raise ShuttingDownError("the engine must run to use its weights, got a shutdown; ask another replica.")
        modules = modules_of(pipeline)
        if name not in modules:
            known = ", ".join(one for one in get_args(ModuleName) if one in modules)
            raise InvalidRequestError(f"module must be one of {known}, got {name}; choose one.", field="module")
        (self._offload.check_memory if for_update else self._offload.check_awake)()
        return modules[name]

    @property
    def modules(self) -> tuple[str, ...]:
        """The names of the modules of the checkpoint that have weights."""
        modules = modules_of(self._pipeline) if self._pipeline is not None else {}
        return tuple(name for name in get_args(ModuleName) if name in modules)
