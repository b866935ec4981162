"""Records, step by step, the tensors that a rollout asked for, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from flowroll.engine.plan import RequestPlan
from flowroll.engine.runner.streams import Mark, Streams
from flowroll.families.checksums import tensor_checksum, tensors_digest
from flowroll.sampling import dynamics, transition
from flowroll.types import DebugTensors, StepTensors, Trajectory

_DEBUG = ("velocity", "mean", "noise")


class Rows:
    """One tensor of the answer, in the host's memory, made before its rows are known.

    Args:
        steps: The step, or the state, of each row.
        shape: The shape of a row.
        dtype: The dtype.
        is_pinned: Whether rows are copied here by a device that nobody waits for.

    Attributes:
        tensor: The tensor. It has memory of its own, since whoever keeps or pickles it means it alone.
    """

    def __init__(self, steps: Sequence[int], shape: Sequence[int], dtype: torch.dtype, *, is_pinned: bool) -> None:
        self.steps = tuple(steps)
        self._places = {step: place for place, step in enumerate(self.steps)}
        self.tensor = torch.empty((len(self.steps), *shape), dtype=dtype, pin_memory=is_pinned)

    def __contains__(self, step: int) -> bool:
        return step in self._places

    def __getitem__(self, step: int) -> Tensor:
        return self.tensor[self._places[step]]

    def of(self, steps: Sequence[int]) -> Tensor:
        """Returns the rows of these steps, the tensor itself if that is all of it."""
        if tuple(steps) == self.steps:
            return self.tensor
        return self.tensor[[self._places[step] for step in steps]]

    def clear_but(self, steps: range) -> None:
        """Fills the rows of all other steps with zeros."""
        for step in self.steps:
            if step not in steps:
                self[step].zero_()

    def take_over(self, other: Rows, stop: int) -> None:
        """Copies the rows of all steps before `stop` from another record."""
        for step in self.steps:
            if step < stop and step in other:
                self[step].copy_(other[step])


class Recorder:
    """Records the tensors of one sample, and the pictures that are made of them; the sample owns it.

    Each step copies its rows into the tensors of the answer, which were made when the sample started. On a GPU the loop does
    not wait for these copies: whoever reads the record calls `wait` first.

    Args:
        plan: The request.
        streams: The streams of the model's device.
        stop: The step before which the record ends: that of the sample's fork, or the end of the request's.

    Attributes:
        fields: The rows that are kept, by the name of a `StepField`, once `wait` has returned.
        pictures: The predicted pictures that were asked for, by step.
    """

    def __init__(self, plan: RequestPlan, streams: Streams, *, stop: int) -> None:
        self.plan, self._streams, self._stop = plan, streams, stop
        shape = plan.geometry.latent_shape
        self.fields = {
            name: self._rows(steps, shape, torch.float32) for name in (*_DEBUG, "x0") if (steps := self._steps_of(name))
        }
        self._log_probs = self._rows(self._until_stop(range(plan.schedule.num_steps)), (), torch.float32)
        for rows in (self._log_probs, *self.fields.values()):
            rows.clear_but(plan.steps)
        self.pictures: dict[int, Tensor] = {}
        # Their dtype is known with the first velocity; until then the first state waits.
        self._states: Rows | None = None
        self._first: Tensor | None = None
        # What the sample started from, and the noise of its steps: digests, or tensors whose copies have not arrived yet.
        self._start: str | Tensor | None = None
        self._noises: dict[int, str | Tensor] = {}
        # The record of the sample that this one forked off, and where.
        self._parent: tuple[Recorder, int] | None = None
        # What the next step copies, and when the last copies arrive.
        self._leaving: list[tuple[Tensor, Tensor]] = []
        self._arrived: Mark | None = None

    def branch(self, step: int, *, stop: int) -> Recorder:
        """Returns a recorder that goes on from what was recorded so far, for a child that takes this step next."""
        child = Recorder(self.plan, self._streams, stop=stop)
        child._parent, child._first, child._start, child._noises = (self, step), self._first, self._start, {**self._noises}
        if self._states is not None:
            child._make_states(self._states.tensor.dtype)
        return child

    def keep_latents(self, state: int, latents: Float[Tensor, " *latent"]) -> None:
        """Records the latents of a state (0..T) if the request asked for them."""
        if self._start is None:
            self._first, self._start = latents, self._noted(latents)
        elif self._states is not None and state in self._states:
            assert latents.dtype == self._states.tensor.dtype or self._states.tensor.dtype == torch.float32
            self._leaving.append((self._states[state], latents))
        self._leave()

    def keep_step(
        self,
        step: int,
        *,
        latents: Float[Tensor, " *latent"],
        velocity: Float[Tensor, " *latent"],
        noise: Float[Tensor, " *latent"] | None,
        mean: Float[Tensor, " *latent"],
        log_prob: Float[Tensor, ""],
    ) -> None:
        """Records what the request asks for of one transition from these latents; `noise` is None for a deterministic step.

        The copies begin with `keep_latents` of the state after it.
        """
        if self._first is not None:
            self._begin_states(self._first, velocity.dtype)
        self._leaving.append((self._log_probs[step], log_prob))
        sigma = self.plan.record.sigmas[step]
        makers: Mapping[str, Callable[[], Tensor | None]] = {
            # A copy, because the memory of a forward's result may be that of the next one's too.
            "velocity": lambda: velocity.to(torch.float32, copy=self._streams.are_queued),
            "mean": lambda: mean.to(torch.float32),
            "noise": lambda: noise,
            "x0": lambda: transition.clean_prediction(latents, velocity, sigma),
        }
        for name, make in makers.items():
            if name in self.fields and step in self.fields[name]:
                made = make()
                if made is None:
                    self.fields[name][step].zero_()
                else:
                    self._leaving.append((self.fields[name][step], made))
        if noise is not None:
            # Drawn here, so without the questions that a caller's tensor is asked.
            self._noises[step] = self.fields["noise"][step] if self._streams.are_queued else tensors_digest((noise,))

    def wait(self) -> None:
        """Waits until everything that was recorded so far has arrived in host memory, and completes the record."""
        if self._arrived is not None:
            self._arrived.synchronize()
        if self._parent is None:
            return
        parent, step = self._parent
        parent.wait()
        for name in self.fields.keys() & parent.fields.keys():
            self.fields[name].take_over(parent.fields[name], step)
        self._log_probs.take_over(parent._log_probs, step)
        if self._states is not None and parent._states is not None:
            self._states.take_over(parent._states, step + 1)
        self._parent = None

    def log_probs(self) -> Float[Tensor, " steps"]:
        """Returns the log-probs of all steps; 0 for a step that was not run."""
        return self._log_probs.tensor

    def start_sha256(self) -> str:
        """Returns the digest of the state that the sample started from."""
        assert self._start is not None
        return _digest(self._start)

    def noise_sha256(self) -> tuple[str | None, ...]:
        """Returns the digest of the noise of each step; None for a step that drew none."""
        noises = map(self._noises.get, range(self.plan.schedule.num_steps))
        return tuple(None if noise is None else _digest(noise) for noise in noises)

    def debug_tensors(self) -> DebugTensors | None:
        """Returns the debug tensors, or None if the request did not ask for them."""
        if not self.plan.params.debug_mode:
            return None
        velocity, mean, noise = (self.fields[name].tensor for name in _DEBUG)
        std = self._stds(range(self.plan.schedule.num_steps))
        return DebugTensors(variance_noise=noise, prev_sample_mean=mean, noise_std_dev=std, model_output=velocity)

    def step_tensors(self) -> StepTensors | None:
        """Returns the fields of the steps that the request chose; None if it chose none."""
        names, steps = self.plan.params.return_fields, self.plan.field_steps
        if names is None:
            return None
        none = torch.empty((0, *self.plan.geometry.latent_shape))
        tensors = {name: self.fields[name].of(steps) if steps else none for name in names if name != "std"}
        return StepTensors(
            step_indices=steps,
            tensors={name: self._stds(steps) if name == "std" else tensors[name] for name in names},
        )

    def trajectory(self) -> Trajectory | None:
        """Returns the trajectory, float32 if the dtypes of its states differ; None if it was not asked for."""
        if not self.plan.params.return_dit_trajectory:
            return None
        assert self._states is not None
        schedule = self.plan.schedule
        return Trajectory(
            latents=self._states.tensor,
            latent_step_indices=self._states.steps,
            timesteps=schedule.timesteps.clone(),
            sigmas=schedule.sigmas.clone(),
        )

    def _rows(self, steps: Sequence[int], shape: Sequence[int], dtype: torch.dtype) -> Rows:
        return Rows(steps, shape, dtype, is_pinned=self._streams.are_queued)

    def _until_stop(self, steps: range) -> range:
        """Returns the steps, without those after a fork, which the children record; zeros after the last step are kept."""
        return steps if self._stop == self.plan.steps.stop else range(steps.start, self._stop)

    def _steps_of(self, name: str) -> list[int]:
        """Returns the steps of which a field is kept; for the debug tensors also those that are not run."""
        if name in _DEBUG and self.plan.params.debug_mode:
            return list(self._until_stop(range(self.plan.schedule.num_steps)))
        # On a GPU the digests are made of it at the end.
        is_noted = name == "noise" and self._streams.are_queued
        return [step for step in self._until_stop(self.plan.steps) if is_noted or self.plan.keeps(name, step)]

    def _begin_states(self, first: Tensor, velocity_dtype: torch.dtype) -> None:
        """Makes the memory of the trajectory, and records the first state."""
        steps = self.plan.steps
        assert self.plan.transitions is not None
        taken = (self.plan.transitions[step] for step in steps)
        dtypes = {first.dtype, *(dynamics.next_dtype(one, velocity_dtype) for one in taken)}
        self._make_states(dtypes.pop() if len(dtypes) == 1 else torch.float32)
        if self._states is not None and steps.start in self._states:
            self._leaving.append((self._states[steps.start], first))
        self._first = None

    def _make_states(self, dtype: torch.dtype) -> None:
        params, steps = self.plan.params, self.plan.steps
        if params.return_dit_trajectory:
            states = range(steps.start, self._stop + 1)
            chosen = [state for state in states if params.return_step_indices is None or state in params.return_step_indices]
            self._states = self._rows(chosen, self.plan.geometry.latent_shape, dtype)

    def _stds(self, steps: Sequence[int]) -> Float[Tensor, " steps 1"]:
        """Returns the total std of each step, 0 for one that was not run."""
        transitions, run = self.plan.transitions, self.plan.steps
        assert transitions is not None
        stds = [[transitions[step].std if step in run else 0.0] for step in steps]
        return torch.tensor(stds, dtype=torch.float32).reshape(len(stds), 1)

    def _noted(self, tensor: Tensor) -> str | Tensor:
        """Returns the digest of a CPU tensor; of a GPU tensor, which no step may wait for, where its copy will be."""
        if not self._streams.are_queued:
            return tensor_checksum(tensor)
        copied = self._rows((0,), tensor.shape, tensor.dtype)[0]
        self._leaving.append((copied, tensor))
        return copied

    def _leave(self) -> None:
        self._arrived, self._leaving = self._streams.copy_out(self._leaving), []


def _digest(noted: str | Tensor) -> str:
    return tensor_checksum(noted) if isinstance(noted, Tensor) else noted
