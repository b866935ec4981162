"""The changes of the weights that all ranks of an engine make together, or none of them.

Each has two halves. `prepare` reads, copies and allocates beside what is in place, and can fail; the function that it returns
puts the change into effect, and cannot. Every rank runs the same code: rank 0 prepares a change and sends it to the others,
and once all of them are ready, each puts it into effect; see `Executor.change`.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import msgspec

from flowroll.engine.adapters.files import AdapterFiles, read_adapter, refused
from flowroll.engine.loading import LoadedModel
from flowroll.engine.policies.held import HeldWeights
from flowroll.engine.runner.shapes import TensorShape
from flowroll.engine.weights.offload import SleepMode, WeightOffload
from flowroll.engine.weights.shares import Shares
from flowroll.engine.weights.staged import StagedWeights, WeightFiles, rejected, slots_of, stage_weights
from flowroll.errors import EngineError, FlowrollError, WeightsRejectedError
from flowroll.parallel.mesh import Mesh
from flowroll.types import LoraAdapter


@dataclass(frozen=True, slots=True, kw_only=True)
class RankWeights:
    """All weights that one rank has.

    Attributes:
        model: The model, or this rank's part of it, with the adapters.
        held: The sets of weights that policies hold beside those in place.
        offload: Keeps the weights while the engine sleeps.
        mesh: The collectives of all ranks; None if there is only one.
    """

    model: LoadedModel
    held: HeldWeights
    offload: WeightOffload
    mesh: Mesh | None


class Change(msgspec.Struct, frozen=True, tag=True):
    """A change of the weights.

    Attributes:
        error: The class of the error if another rank cannot prepare the change.
        field: The field of the request that this error names.
    """

    error: ClassVar[type[FlowrollError]] = EngineError
    field: ClassVar[str | None] = None

    def prepare(self, weights: RankWeights) -> Callable[[], Any]:
        """Makes the change ready on one rank, and returns the function that puts it into effect.

        Raises:
            WeightsRejectedError: New weights cannot be read to their end, or are refused.
            EngineError: There is no room for the change.
        """
        raise NotImplementedError


class ReadWeights(Change, frozen=True):
    """New weights of the transformer from files. A rank that finds other files than their stamps tell of refuses them."""

    error = WeightsRejectedError
    field = "model_path"

    files: WeightFiles

    def prepare(self, weights: RankWeights) -> Callable[[], Any]:
        """Reads this rank's part beside the old weights."""
        return _replacing(weights, stage_weights(weights.model.transformer, self.files))


class TakeWeights(Change, frozen=True):
    """New weights of the transformer that rank 0 broadcasts, in this order, once every rank has made room for them."""

    error = WeightsRejectedError

    tensors: dict[str, TensorShape]

    def prepare(self, weights: RankWeights) -> Callable[[], Any]:
        """Allocates memory. The returned function receives the weights, and returns the one that puts them in place."""
        try:
            shares = Shares(self.tensors, slots_of(weights.model.transformer))
        except (MemoryError, RuntimeError) as error:  # torch's lack of memory is a RuntimeError
            raise rejected(error) from error

        def receive() -> Callable[[], None]:
            assert weights.mesh is not None
            return _replacing(weights, shares.fill(weights.mesh))

        return receive


class LoadAdapter(Change, frozen=True):
    """An adapter from files. A rank that finds another adapter there refuses it."""

    error = WeightsRejectedError
    field = "lora_path"

    config: Path
    weights: Path
    about: LoraAdapter

    def prepare(self, weights: RankWeights) -> Callable[[], Any]:
        """Reads the adapter beside the loaded ones."""
        adapters, about = weights.model.adapters, self.about
        # Without a limit, because rank 0 has checked the number of bytes.
        data = read_adapter(AdapterFiles(places=(self.config, self.weights)), max_bytes=sys.maxsize)
        adapter = adapters.stage(data, name=about.name, merged=about.merged)
        if adapter.about.sha256 != about.sha256:
            raise refused(
                f"{self.weights} must hold the same adapter on every rank, got another one; save it where all ranks read."
            )
        return lambda: adapters.put(adapters.finished(adapter, about.version))


class DropAdapter(Change, frozen=True):
    """An adapter goes."""

    name: str

    def prepare(self, weights: RankWeights) -> Callable[[], Any]:
        """Checks that the adapter is there.

        Raises:
            InvalidRequestError: The adapter is not loaded.
        """
        weights.model.adapters.record(self.name)
        return functools.partial(weights.model.adapters.drop, self.name)


class UpdatePolicy(Change, frozen=True):
    """A policy that is copied or moved: an adapter, or a set of weights.

    Its second half returns the number of bytes of the policy on this rank.

    Attributes:
        source: The adapter, or the set; null: the weights in place.
        decay: The policy's own share of an average; null: it becomes a copy.
        is_adapter: Whether both are adapters.
        version: The version that an adapter gets.
    """

    name: str
    source: str | None
    decay: float | None
    is_adapter: bool
    version: str

    def prepare(self, weights: RankWeights) -> Callable[[], Any]:
        """Computes the policy beside the one that it takes the place of."""
        if not self.is_adapter:
            return weights.held.prepare_update(self.name, self.source, self.decay)
        assert self.source is not None
        averaged = weights.model.adapters.averaged(self.name, self.source, self.decay)
        adapter = replace(averaged, about=replace(averaged.about, version=self.version))

        def put() -> int:
            weights.model.adapters.put(adapter)
            return adapter.about.num_bytes

        return put


class DropPolicy(Change, frozen=True):
    """A policy that is a set of weights goes."""

    name: str

    def prepare(self, weights: RankWeights) -> Callable[[], Any]:
        """Returns the function that drops the set; nothing has to be made ready."""
        return functools.partial(weights.held.drop, self.name)


class PutInPlace(Change, frozen=True):
    """The exchange of the weights in place with the set of a policy; null: with those that the engine was last given."""

    name: str | None

    def prepare(self, weights: RankWeights) -> Callable[[], Any]:
        """Finds room for the weights in place.

        Raises:
            AsleepError: There are none, since the engine sleeps.
            InvalidRequestError: There is no such set any more.
        """
        if self.name is not None:
            weights.offload.check_awake()
        return weights.held.prepare_exchange(self.name)


class Sleep(Change, frozen=True):
    """The release of the memory of all weights, or, for null, their return. Its second half returns the number of bytes."""

    mode: SleepMode | None

    def prepare(self, weights: RankWeights) -> Callable[[], Any]:
        """Copies the weights to where they are kept, or back."""
        offload = weights.offload
        return offload.prepare_resume() if self.mode is None else offload.prepare_release(self.mode)


AnyChange: TypeAlias = ReadWeights | TakeWeights | LoadAdapter | DropAdapter | UpdatePolicy | DropPolicy | PutInPlace | Sleep


def _replacing(weights: RankWeights, staged: StagedWeights) -> Callable[[], None]:
    def conclude() -> None:
        weights.model.adapters.adopt(weights.model.adapters.over_new_base())
        # Rank 0 has checked that nothing is missing.
        weights.offload.note_weights()

    return lambda: staged.commit(conclude)
