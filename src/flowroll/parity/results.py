"""What the harness found: one type per level of the report. Plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from flowroll.types import Number


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """How far one tensor is from the one it should be.

    Attributes:
        equal: Same shape, same dtype, and `torch.equal`.
        max_abs: Largest absolute difference; NaN where one of the two has a NaN. None where shapes differ, or there are no
            numbers.
        mean_abs: Mean absolute difference.
        min_cosine: Smallest cosine over the steps; of tensors with one number a step, the cosine over all steps.
        first_step: The first step that is not equal; None where all are, or where the tensor has no steps.
        note: What the figures cannot say.
    """

    equal: bool
    max_abs: Number | None = 0.0
    mean_abs: Number | None = 0.0
    min_cosine: Number | None = 1.0
    first_step: int | None = None
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorParity:
    """One tensor of one mode, over all samples.

    Attributes:
        name: E.g. "latents" or "env.positive.encoder_hidden_states".
        first: Of the first step; None for a tensor that has no steps.
        whole: Over all steps.
    """

    name: str
    first: Measure | None
    whole: Measure


@dataclass(frozen=True, slots=True, kw_only=True)
class ModeParity:
    """One mode of one layout.

    Attributes:
        mode: The dynamics.
        tensors: In the order of a rollout.
        received_bytes_per_step: Bytes that rank 0 received a step, by mesh axis.
    """

    mode: str
    tensors: tuple[TensorParity, ...]
    received_bytes_per_step: Mapping[str, Number] = field(default_factory=dict)

    @property
    def differing(self) -> tuple[TensorParity, ...]:
        """The tensors that are not equal."""
        return tuple(tensor for tensor in self.tensors if not tensor.whole.equal)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutParity:
    """One layout against one rank.

    Attributes:
        layout: Its name.
        num_ranks: Its processes.
        transformer_bytes: Of the transformer's weights on one rank.
        modes: Those that ran to their end.
        error: Why not all of them did; None if all did.
        idle_axes: Mesh axes on which no byte moved: nothing was shared out there.
    """

    layout: str
    num_ranks: int
    transformer_bytes: int
    modes: tuple[ModeParity, ...]
    error: str | None = None
    idle_axes: tuple[str, ...] = ()

    @property
    def is_exact(self) -> bool:
        """Whether every tensor of every mode is equal; a layout that failed is not."""
        return self.error is None and not any(mode.differing for mode in self.modes)

    @property
    def num_compared(self) -> int:
        """Tensors, over all modes."""
        return sum(len(mode.tensors) for mode in self.modes)


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityReport:
    """A whole run.

    Attributes:
        model: Name of the checkpoint's folder, without its path.
        date: Day of the run, UTC.
        command: What repeats the run.
        configuration: What was run, as names and values.
        versions: Of the libraries.
        machine: The hardware.
        transformer_bytes: Of the transformer's weights on the one rank that the layouts are compared with.
        layouts: In the order asked for.
    """

    model: str
    date: str
    command: str
    configuration: Mapping[str, str]
    versions: Mapping[str, str]
    machine: Mapping[str, str]
    transformer_bytes: int
    layouts: tuple[LayoutParity, ...]

    @property
    def is_exact(self) -> bool:
        """Whether every layout is."""
        return all(layout.is_exact for layout in self.layouts)
