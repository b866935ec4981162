"""Records, step by step, the tensors that a rollout asked for, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from flowroll.engine.plan import RequestPlan
from flowroll.families.checksums import tensor_checksum
from flowroll.sampling import transition
from flowroll.types import DebugTensors, StepTensors, Trajectory


@dataclass(slots=True, kw_only=True)
class Recorder:
    """Records the tensors of one sample, and the pictures that are made of them; the sample owns it.

    The loop never changes a tensor in place, so on the CPU the recorder keeps references. On a GPU, each step starts copies of
    its tensors to pinned memory, and the loop does not wait for them: whoever reads the record calls `wait` first. The tensors
    are stacked once, at the end.
    """

    plan: RequestPlan
    log_probs: list[Float[Tensor, ""]] = field(default_factory=list)
    # By the name of a `StepField`, then by step.
    kept: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    pictures: dict[int, Tensor] = field(default_factory=dict)
    latents: dict[int, Tensor] = field(default_factory=dict)
    dtypes: set[torch.dtype] = field(default_factory=set)
    # What a sample started from, and the noise of its steps: digests, or tensors whose copies have not arrived yet.
    start: str | Tensor | None = None
    noises: dict[int, str | Tensor] = field(default_factory=dict)
    _copied: torch.cuda.Event | None = field(default=None, init=False)

    def branch(self) -> Recorder:
        """Returns a recorder that goes on from what was recorded so far, for a child; both refer to the same tensors."""
        # The child's own copies are noted at its first step, on the same stream after those of its parent.
        return replace(
            self,
            log_probs=[*self.log_probs],
            kept={name: {**rows} for name, rows in self.kept.items()},
            pictures={**self.pictures},
            latents={**self.latents},
            dtypes={*self.dtypes},
            noises={**self.noises},
        )

    def keep_latents(self, state: int, latents: Float[Tensor, " *latent"]) -> None:
        """Records the latents of a state (0..T) if the request asked for them, and their dtype in any case."""
        params = self.plan.params
        self.dtypes.add(latents.dtype)
        if self.start is None:
            self.start = _digest_when_here(latents)
        wanted = params.return_step_indices is None or state in params.return_step_indices
        if params.return_dit_trajectory and wanted:
            self.latents[state] = _to_host(latents)
        self._note_copies(latents)

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
        """Records what the request asks for of one transition from these latents; `noise` is None for a deterministic step."""
        self.log_probs.append(_to_host(log_prob))
        if noise is not None:
            self.noises[step] = _digest_when_here(noise)
        sigma = self.plan.record.sigmas[step]
        makers: Mapping[str, Callable[[], Tensor]] = {
            "velocity": lambda: _to_host(_alone(velocity.to(torch.float32))),
            "mean": lambda: _to_host(mean.to(torch.float32)),
            "noise": lambda: torch.zeros(mean.shape) if noise is None else _to_host(noise),
            "x0": lambda: _to_host(transition.clean_prediction(latents, velocity, sigma)),
        }
        for name, make in makers.items():
            if self.plan.keeps(name, step):
                self.kept.setdefault(name, {})[step] = make()
        self._note_copies(mean)

    def wait(self) -> None:
        """Waits until everything that was recorded so far has arrived in host memory."""
        if self._copied is not None:
            self._copied.synchronize()

    def stacked_log_probs(self) -> Float[Tensor, " steps"]:
        """Returns the log-probs of all steps, on the CPU; 0 for a step that was not run."""
        return self._by_step(self.log_probs)

    def start_sha256(self) -> str:
        """Returns the digest of the state that the sample started from."""
        assert self.start is not None
        return _digest(self.start)

    def noise_sha256(self) -> tuple[str | None, ...]:
        """Returns the digest of the noise of each step; None for a step that drew none."""
        noises = map(self.noises.get, range(self.plan.schedule.num_steps))
        return tuple(None if noise is None else _digest(noise) for noise in noises)

    def debug_tensors(self) -> DebugTensors | None:
        """Returns the debug tensors on the CPU, or None if the request did not ask for them."""
        if not self.plan.params.debug_mode:
            return None
        return DebugTensors(
            variance_noise=self._of_all("noise"),
            prev_sample_mean=self._of_all("mean"),
            noise_std_dev=self._of_all("std"),
            model_output=self._of_all("velocity"),
        )

    def step_tensors(self) -> StepTensors | None:
        """Returns the fields of the steps that the request chose, on the CPU; None if it chose none."""
        names, steps = self.plan.params.return_fields, self.plan.field_steps
        if names is None:
            return None
        shape = self.plan.geometry.latent_shape
        rows = {name: [self._row(name, step) for step in steps] for name in names}
        none = {name: torch.empty((0, 1) if name == "std" else (0, *shape)) for name in names}
        return StepTensors(
            step_indices=steps, tensors={name: torch.stack(rows[name]) if steps else none[name] for name in names}
        )

    def _row(self, name: str, step: int) -> Tensor:
        """Returns one field of a step that was run."""
        if name != "std":
            return self.kept[name][step]
        assert self.plan.transitions is not None
        return torch.tensor([self.plan.transitions[step].std], dtype=torch.float32)

    def _of_all(self, name: str) -> Tensor:
        return self._by_step([self._row(name, step) for step in self.plan.steps])

    def trajectory(self) -> Trajectory | None:
        """Returns the trajectory on the CPU, float32 if the dtypes of its states differ; None if it was not asked for."""
        if not self.plan.params.return_dit_trajectory:
            return None
        schedule = self.plan.schedule
        kept = [self.latents[state] for state in sorted(self.latents)]
        dtype = next(iter(self.dtypes)) if len(self.dtypes) == 1 else torch.float32
        stacked = torch.empty((0, *self.plan.geometry.latent_shape), dtype=dtype)
        if kept:
            stacked = torch.stack([latents.to(dtype) for latents in kept])
        return Trajectory(
            latents=stacked,
            latent_step_indices=tuple(sorted(self.latents)),
            timesteps=schedule.timesteps.clone(),
            sigmas=schedule.sigmas.clone(),
        )

    def _by_step(self, rows: Sequence[Tensor]) -> Tensor:
        """Stacks one tensor for each step that was run, with zeros in the rows of the other steps."""
        num_steps, steps = self.plan.schedule.num_steps, self.plan.steps
        if len(steps) == num_steps:
            return torch.stack(list(rows))
        stacked = torch.zeros((num_steps, *rows[0].shape), dtype=rows[0].dtype)
        torch.stack(list(rows), out=stacked[steps.start : steps.stop])
        return stacked

    def _note_copies(self, kept: Tensor) -> None:
        if kept.device.type == "cuda":
            self._copied = self._copied or torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record(torch.cuda.current_stream(kept.device))


def _to_host(tensor: Tensor) -> Tensor:
    """Returns a CPU tensor itself; for a GPU tensor, a pinned copy that is complete once the stream has reached it."""
    return tensor.to("cpu", non_blocking=True)


def _alone(tensor: Tensor) -> Tensor:
    """Returns a tensor that keeps no memory alive but its own: a velocity may be a few rows of what a forward returned."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _digest_when_here(tensor: Tensor) -> str | Tensor:
    """Returns the digest of a CPU tensor; of a GPU tensor, which no step may wait for, its copy."""
    copied = _to_host(tensor)
    return copied if tensor.is_cuda else tensor_checksum(copied)


def _digest(noted: str | Tensor) -> str:
    return tensor_checksum(noted) if isinstance(noted, Tensor) else noted
