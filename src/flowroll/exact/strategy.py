"""The strategies for the velocities of several samples; the engine's two give each sample the bits that it has alone.

`Merged` runs several samples in one forward under the function mode of `mode`; `Alone` runs one forward per sample and branch.
The runner chooses one per device with `choose_strategy`, and knows neither how samples are grouped nor what a key is made of.
`PlainBatch` is not exact: a trainer may ask for it by name.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from typing_extensions import override

from flowroll.exact.graphs import GraphedForwards, RunForward
from flowroll.exact.modulation import Modulations
from flowroll.exact.padding import padded_length
from flowroll.exact.sharing import SharedForwards
from flowroll.families import Family, ForwardInput, Geometry, Output, StepInput, Transformer

# Computes the outputs of forward inputs that share a forward.
Compute: TypeAlias = Callable[[Sequence[ForwardInput]], list[Output]]
StrategyName: TypeAlias = Literal["merged", "alone"]
# How many rows of padding, times the numbers in a weight matrix of the model, cost as much as a forward of their own. It was
# measured on small models with one thread in float32; in bfloat16 it is 7 million.
_FORWARD_IS_WORTH = 2_500_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Forward:
    """One forward of the transformer, not yet run, for one or several forward inputs of the same key.

    Ranks that share the work may run any part of it (`part`): an output has the same bits whichever inputs are beside it.

    Attributes:
        inputs: The forward inputs, one per sample and branch (or per pair of branches).
        rows_per_sample: The number of entries that an input has in the transformer's batch: 2 if the branches are a pair.
        compute: Computes the outputs of some of the inputs, in their order.
    """

    inputs: tuple[ForwardInput, ...]
    rows_per_sample: int
    compute: Compute

    def __call__(self) -> list[Output]:
        """Runs the forward, and returns one output per input."""
        return self.compute(self.inputs)

    def part(self, start: int, stop: int) -> Forward:
        """Returns the forward of the inputs from `start` up to, but without, `stop`."""
        return replace(self, inputs=self.inputs[start:stop])


# Runs the forwards of one step: one list of outputs per forward.
RunForwards: TypeAlias = Callable[[Sequence[Forward]], list[list[Output]]]


def run_here(forwards: Sequence[Forward]) -> list[list[Output]]:
    """Runs all forwards on this rank, one after the other, and returns their outputs."""
    return [forward() for forward in forwards]


class Strategy(ABC):
    """Computes the velocities of several samples.

    Args:
        family: The model family.
        dtype: The transformer's dtype.
        run: Runs the forwards of one step; ranks that share forwards pass a function of their own.

    Attributes:
        name: What the strategy is called in a sample's provenance.
        is_exact: Whether each sample has the bits that it has alone.
    """

    name: ClassVar[str]
    is_exact: ClassVar[bool] = True

    # What records forwards, and what keeps modulations; None where nothing does.
    graphs: GraphedForwards | None = None
    modulations: Modulations | None = None

    def __init__(self, family: Family, dtype: torch.dtype, run: RunForwards = run_here) -> None:
        self.family, self.dtype, self._run = family, dtype, run

    def batch_key(self, one: StepInput) -> Hashable:
        """Returns a key; samples with equal keys run faster when they are passed to `velocities` together.

        The key is the same at every step of a sample. Samples with different keys may be passed together as well.
        """
        # No key depends on the dtype; the latents keep their own, because a cast would allocate a tensor per sample.
        inputs = self.family.forward_inputs(one, one.latents.dtype)
        return tuple(self._key(forward_input, one.geometry) for forward_input in inputs)

    def _key(self, forward_input: ForwardInput, geometry: Geometry | None) -> Hashable:
        """Returns a key; forward inputs with equal keys may share a forward."""
        return self.family.collate_key(forward_input, geometry)

    def velocities(self, transformer: Transformer, inputs: Sequence[StepInput]) -> list[Tensor]:
        """Computes the guided velocities of several samples.

        Args:
            transformer: The model, or a wrapper with its call signature; all samples have the same adapter.
            inputs: The step inputs of the samples, which may be at any steps of any schedules.

        Returns:
            One velocity per sample, in the order of the inputs.
        """
        own = [self.family.forward_inputs(one, self.dtype) for one in inputs]
        owners = [one for some, one in zip(own, inputs, strict=True) for _ in some]
        outputs = iter(self._outputs(transformer, [forward_input for some in own for forward_input in some], owners))
        return [self.family.apply_guidance([next(outputs) for _ in some], one) for some, one in zip(own, inputs, strict=True)]

    def _outputs(self, transformer: Transformer, inputs: Sequence[ForwardInput], owners: Sequence[StepInput]) -> list[Output]:
        """Returns one output per forward input, each of which belongs to a step input."""
        grouped = self._forwards(transformer, inputs, owners)
        forwards = [
            Forward(
                inputs=tuple(inputs[index] for index in members),
                rows_per_sample=self.family.rows_per_sample(inputs[members[0]]),
                compute=compute,
            )
            for members, compute in grouped
        ]
        outputs: dict[int, Output] = {}
        for (members, _), found in zip(grouped, self._run(forwards), strict=True):
            outputs.update(zip(members, found, strict=True))
        return [outputs[index] for index in range(len(inputs))]

    @abstractmethod
    def _forwards(
        self, transformer: Transformer, inputs: Sequence[ForwardInput], owners: Sequence[StepInput]
    ) -> list[tuple[list[int], Compute]]:
        """Groups the inputs that share a forward, and says how each group is computed."""


class Alone(Strategy):
    """Runs one forward per sample and branch, which is exact by construction on every device.

    Args:
        family: The model family.
        dtype: The transformer's dtype.
        run: Runs the forwards of one step.
        graphs: Records forwards of small samples and replays them; None: every forward runs eagerly.
        modulations: Keeps what modulation layers make of a timestep; None: every forward computes it.
    """

    name = "alone"

    def __init__(
        self,
        family: Family,
        dtype: torch.dtype,
        run: RunForwards = run_here,
        graphs: GraphedForwards | None = None,
        modulations: Modulations | None = None,
    ) -> None:
        super().__init__(family, dtype, run)
        self.graphs, self.modulations = graphs, modulations

    @override
    def _forwards(
        self, transformer: Transformer, inputs: Sequence[ForwardInput], owners: Sequence[StepInput]
    ) -> list[tuple[list[int], Compute]]:
        def by(owner: StepInput) -> Compute:
            return lambda some: [self._output(transformer, one, owner) for one in some]

        return [([index], by(owner)) for index, owner in enumerate(owners)]

    def _output(self, transformer: Transformer, one: ForwardInput, owner: StepInput) -> Output:
        run: RunForward = self.family.run
        modulations = self.modulations
        if modulations is not None and owner.number is not None:
            given = modulations.given(transformer, one, owner.number)
            if given is None:
                return modulations.keep(run, transformer, one, owner.number)
            run, one = modulations.running(run), given
        if self.graphs is not None and self.graphs.takes(owner.geometry):
            return self.graphs.run(run, transformer, one)
        return run(transformer, one)


class Grouped(Strategy):
    """Runs one forward for all forward inputs of the same key, whichever samples and branches they belong to."""

    @override
    def _forwards(
        self, transformer: Transformer, inputs: Sequence[ForwardInput], owners: Sequence[StepInput]
    ) -> list[tuple[list[int], Compute]]:
        groups: dict[Hashable, list[int]] = {}
        for index, (one, owner) in enumerate(zip(inputs, owners, strict=True)):
            groups.setdefault(self._key(one, owner.geometry), []).append(index)

        def compute(some: Sequence[ForwardInput]) -> list[Output]:
            return self._together(transformer, some)

        return [(members, compute) for members in groups.values()]

    @abstractmethod
    def _together(self, transformer: Transformer, inputs: Sequence[ForwardInput]) -> list[Output]:
        """Computes the outputs of inputs of one key."""


class Merged(Grouped):
    """Computes in a shared forward what every sample has alone, bit for bit."""

    name = "merged"

    def __init__(
        self,
        family: Family,
        dtype: torch.dtype,
        run: RunForwards = run_here,
        agree: Callable[[bool], bool] | None = None,
        *,
        with_programs: bool = False,
    ) -> None:
        super().__init__(family, dtype, run)
        self._shared = SharedForwards(family, agree, with_programs=with_programs)
        # Ranks that share a forward would have to agree on how its texts are padded.
        self._pads_texts = agree is None
        self._mean_weights: WeakKeyDictionary[nn.Module, float] = WeakKeyDictionary()

    @override
    def _key(self, forward_input: ForwardInput, geometry: Geometry | None) -> Hashable:
        return self.family.collate_key(forward_input, geometry, any_length=self._pads_texts)

    @override
    def _forwards(
        self, transformer: Transformer, inputs: Sequence[ForwardInput], owners: Sequence[StepInput]
    ) -> list[tuple[list[int], Compute]]:
        return [
            (part, compute)
            for members, compute in super()._forwards(transformer, inputs, owners)
            for part in self._by_length(transformer, inputs, members)
        ]

    def _by_length(self, transformer: Transformer, inputs: Sequence[ForwardInput], members: Sequence[int]) -> list[list[int]]:
        """Divides inputs that may share a forward, so that no more rows of padding are computed than a forward is worth."""
        runs: dict[int, list[int]] = {}
        for index in members:
            runs.setdefault(self.family.num_text_rows(inputs[index]), []).append(index)
        if len(runs) == 1:
            return [list(members)]
        parts: list[list[int]] = []
        padded = 0
        for length in sorted(runs, reverse=True):
            rows = len(runs[length]) * (padded - length)
            if parts and rows * self._mean_weight(transformer) <= _FORWARD_IS_WORTH:
                parts[-1] += runs[length]
            else:
                parts.append(runs[length])
                padded = padded_length(length)
        return parts

    def _mean_weight(self, transformer: Transformer) -> float:
        """Returns how many numbers a weight matrix of the model has on average."""
        if not isinstance(transformer, nn.Module):
            return math.inf
        if transformer not in self._mean_weights:
            sizes = [weight.numel() for weight in transformer.parameters() if weight.ndim == 2]
            self._mean_weights[transformer] = sum(sizes) / len(sizes) if sizes else math.inf
        return self._mean_weights[transformer]

    @override
    def _together(self, transformer: Transformer, inputs: Sequence[ForwardInput]) -> list[Output]:
        return self._shared.outputs(transformer, inputs)


class PlainBatch(Grouped):
    """Computes an ordinary batch, in which a sample may have other last bits than alone."""

    name = "fast"
    is_exact = False

    @override
    def _together(self, transformer: Transformer, inputs: Sequence[ForwardInput]) -> list[Output]:
        if len(inputs) == 1:
            return self.family.run_in_turn(transformer, inputs)
        return self.family.uncollate(self.family.run(transformer, self.family.collate(inputs)), len(inputs))


def choose_strategy(
    family: Family,
    *,
    device: torch.device,
    dtype: torch.dtype,
    run: RunForwards = run_here,
    agree: Callable[[bool], bool] | None = None,
    name: StrategyName | None = None,
    with_programs: bool = False,
    graphs: GraphedForwards | None = None,
    modulations: Modulations | None = None,
) -> Strategy:
    """Makes the strategy for a device: merged on a CPU, alone on other devices, whose kernels have not been measured.

    A family whose samples share no forward always runs alone.

    Args:
        family: The model family.
        device: The device of the transformer.
        dtype: The transformer's dtype.
        run: Runs the forwards of one step.
        agree: Tells whether all ranks that share a forward vote yes; None if there is one rank.
        name: The name of a strategy; None: the strategy of the device.
        with_programs: Whether shared forwards may skip the model's Python code (`programs`): nothing but weights ever changes
            in a transformer that is run.
        graphs: Records and replays forwards of samples that run alone.
        modulations: Keeps the modulations of samples that run alone.
    """
    if not family.shares_forwards or (name or ("merged" if device.type == "cpu" else "alone")) == "alone":
        return Alone(family, dtype, run, graphs, modulations)
    return Merged(family, dtype, run, agree, with_programs=with_programs)
