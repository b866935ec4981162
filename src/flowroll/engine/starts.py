"""Where the samples of a request start, stop and fork, and what each is drawn from: checked, with defaults filled in."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from flowroll.engine.config import Limits
from flowroll.engine.facts import ModelFacts
from flowroll.families import Geometry
from flowroll.sampling.noise import child_seed
from flowroll.sampling.transition import Transition
from flowroll.types import MAX_SEED, SamplingParams, all_finite, branch_digest
from flowroll.types.forks import Branch, Fork, count_leaves
from flowroll.types.rules import refuse
from flowroll.types.starts import PER_SAMPLE
from flowroll.types.tensors import plain_tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedSample:
    """One sample of a request: what it is drawn from.

    Attributes:
        root: The place of the sample that was started among those of the request.
        index: The place of its answer, or of the first one of its leaves, among the answers.
        seed: The seed of the sample, which names it.
        init_seed: The seed of its initial noise; None if it starts from latents of the request.
        sde_seed: The seed of the noise of its stochastic steps, up to its first fork.
        latents_sha256: The digest of the latents that it starts from; None if it starts from initial noise.
        branches: The nodes at each fork that came before.
    """

    root: int
    index: int
    seed: int
    init_seed: int | None
    sde_seed: int
    latents_sha256: str | None = None
    branches: tuple[Branch, ...] = ()

    @property
    def noise_seed(self) -> int:
        """The seed of the noise of the steps that come next."""
        return self.branches[-1].sde_seed if self.branches else self.sde_seed

    @property
    def node(self) -> str:
        """The id of the node, as in `Branch`."""
        return self.branches[-1].id if self.branches else str(self.root)

    def children(self, forks: Fork) -> tuple[PlannedSample, ...]:
        """Returns what the sample becomes at its next fork.

        Args:
            forks: All forks of the request.
        """
        level = len(self.branches)
        step, count = forks[level]
        num_leaves = count_leaves(forks[level + 1 :])
        return tuple(
            replace(
                self,
                index=self.index + child * num_leaves,
                branches=(
                    *self.branches,
                    Branch(
                        step=step,
                        parent=self.node,
                        id=f"{self.node}/{child}",
                        sde_seed=child_seed(self.noise_seed, step, child),
                    ),
                ),
            )
            for child in range(count)
        )


def plan_steps(params: SamplingParams, num_steps: int) -> range:
    """Returns the steps that are run, of a grid of so many.

    Raises:
        InvalidRequestError: The grid does not have them.
    """
    start, stop = params.start_step or 0, num_steps if params.stop_step is None else params.stop_step
    if start >= num_steps:
        refuse("start_step", f"lie in 0..{num_steps - 1} for {num_steps} steps", start, "start earlier")
    if stop > num_steps:
        refuse("stop_step", f"be at most {num_steps} for {num_steps} steps", stop, "leave it out to run to the end")
    return range(start, stop)


def with_checked_latents(params: SamplingParams, model: ModelFacts, geometry: Geometry) -> SamplingParams:
    """Returns the request with a copy of its latents on the CPU, which nobody else can change.

    The latents that a pipeline is given are cast to the dtype of its noise. Here they are, if they are initial noise and lose
    nothing by it; any other cast would be a start from another state than the request says, and is refused.

    Raises:
        InvalidRequestError: They do not fit the model or the size, or are not finite.
    """
    latents = params.latents
    if latents is None:
        return params
    shape, count, given = geometry.latent_shape, params.num_samples, tuple(latents.shape)
    if given not in (shape, (count, *shape)):
        rule = f"have the shape {list(shape)} at {geometry.width} x {geometry.height}, or {[count, *shape]} for {count} samples"
        refuse("latents", rule, list(given)[:8], "send states as a trajectory holds them")
    if latents.dtype not in (torch.float32, model.dtype):
        known = " or ".join(dict.fromkeys(map(str, (torch.float32, model.dtype))))
        refuse("latents", f"be {known}", latents.dtype, "send them as a trajectory holds them; they are not cast")
    copied = plain_tensor(latents, "latents").clone()
    if not all_finite(copied):
        refuse("latents", "be finite", "NaN or infinity", "look at the steps that made them")
    if not params.start_step:
        noise = copied.to(model.family.noise_dtype(model.dtype))
        if not torch.equal(noise.to(torch.float32), copied.to(torch.float32)):
            rule = f"be values of {noise.dtype} at step 0, in which the pipeline draws its noise"
            refuse("latents", rule, "others", f"round them to {noise.dtype} first")
        copied = noise
    return replace(params, latents=copied)


def plan_samples(params: SamplingParams, limits: Limits, geometry: Geometry) -> tuple[PlannedSample, ...]:
    """Returns the samples that are started, each with its seeds.

    Raises:
        InvalidRequestError: There are more of them, or of their leaves, than the limit.
    """
    count, leaves = params.num_samples, count_leaves(cast(Fork | None, params.fork))
    if count * leaves > limits.max_outputs:
        lists = (name for name in PER_SAMPLE if isinstance(getattr(params, name), tuple))
        field = "fork" if count <= limits.max_outputs else next(lists, "num_outputs_per_prompt")
        shown = count if leaves == 1 else f"{count} with {leaves} leaves each"
        refuse(field, f"ask for at most {limits.max_outputs} samples", shown, "send several requests")
    init, sde = (
        value if value is None or isinstance(value, tuple) else (value,) * count
        for value in (params.init_seed, params.sde_seed)
    )
    seeds = params.seeds
    if seeds is None and params.seed is None and (init is not None or params.latents is not None) and sde is not None:
        # Nothing is left to be drawn.
        seeds = sde
    if seeds is None:
        first = params.seed if params.seed is not None else secrets.randbelow(MAX_SEED + 2 - count)
        seeds = tuple(range(first, first + count))
    digests = _digests(params.latents, count, geometry)
    return tuple(
        PlannedSample(
            root=index,
            index=index * leaves,
            seed=seed,
            init_seed=init_seed if digest is None else None,
            sde_seed=sde_seed,
            latents_sha256=digest,
        )
        for index, (seed, init_seed, sde_seed, digest) in enumerate(
            zip(seeds, init or seeds, sde or seeds, digests, strict=True)
        )
    )


def _digests(latents: Tensor | None, count: int, geometry: Geometry) -> list[str | None]:
    if latents is None:
        return [None] * count
    states = [latents] if latents.ndim == len(geometry.latent_shape) else list(latents)
    digests: list[str | None] = [branch_digest({"latents": state}) for state in states]
    return digests * (count // len(digests))


def check_forks(params: SamplingParams, chosen: Sequence[Transition], steps: range) -> None:
    """Refuses a fork at a step that is not run or draws no noise.

    Raises:
        InvalidRequestError: There is one; the message says where a fork could be.
    """
    for step, _ in cast(Fork, params.fork or ()):
        stochastic = [other for other in steps if chosen[other].is_stochastic]
        if step not in stochastic:
            later = next((other for other in stochastic if other > step), None)
            remedy = f"fork at step {later}" if later is not None else "leave it out"
            refuse("fork", "be at steps that are run and draw noise, without which children would be equal", step, remedy)
