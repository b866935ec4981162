"""Why a replay is not exact, in plain words.

Owns the checks that tell the possible causes apart. The first ones read what is certain off the rollout and the transformer: a
grid that contradicts itself, rounded latents, another dtype. Where they find nothing, the recorded velocities decide whether
guidance, the negative prompt or the weights explain the difference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from flowroll.exact import kernels_of, use_exact_kernels
from flowroll.families import Output, StepInput, StepScore, Transformer
from flowroll.families.alignment import unaligned_weights
from flowroll.replay.sources import Place, Source, fast_parts_of, grid_fault, kernels_that_made
from flowroll.replay.steps import run_pair
from flowroll.sampling import transition
from flowroll.types import DenoisingEnv, EnvValue, Number, Rollout, env_digests

Kind: TypeAlias = Literal[
    "weight_version",
    "dtype",
    "device",
    "alignment",
    "sigmas",
    "dynamics",
    "latents",
    "guidance",
    "env",
    "kernels",
    "exactness",
    "weights",
    "log_probs",
]
Encode: TypeAlias = Callable[[Rollout], DenoisingEnv | None]


@dataclass(frozen=True, slots=True)
class Cause:
    """One thing that differs from what made the rollout.

    Attributes:
        kind: What differs.
        message: What differs in plain words, with the values.
    """

    kind: Kind
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """What is known about one rollout, and what follows from it.

    Attributes:
        source: The rollout.
        scores: Its replayed steps.
        transformer: The transformer that replayed them.
        place: Where it did.
        autocast: The dtypes to which autocast was on in its forwards.
        weight_version: Version of the transformer's weights; None: unknown.
        encode: Encodes the rollout's prompts again, and returns None where it cannot; None: that cannot be done for any.
    """

    source: Source
    scores: Mapping[int, StepScore]
    transformer: Transformer
    place: Place
    autocast: frozenset[torch.dtype]
    weight_version: str | None
    encode: Encode | None

    def causes(self) -> list[Cause]:
        """Returns the causes of a replay that is not exact; at least one."""
        fast = list(fast_causes(self.source))
        certain = [*self._settings(), *grid_causes(self.source), *self._latents()]
        # Of a fast rollout the velocities are others in any case.
        return fast + (certain or list(self._env()) or ([] if fast else [self._velocity()]))

    def _settings(self) -> Iterator[Cause]:
        record, version, place = self.source.rollout.sampling, self.source.rollout.weight_version, self.place
        if self.weight_version not in (None, version):
            shown = f"the rollout is of weight version {version}, the transformer of {self.weight_version}"
            yield Cause("weight_version", f"other weights: {shown}")
        if place.dtype is not None and str(place.dtype) != record.model_dtype:
            yield Cause("dtype", f"another dtype: {record.model_dtype} made the rollout, {place.dtype} replayed it")
        if self.autocast:
            dtypes = ", ".join(sorted(map(str, self.autocast)))
            shown = f"torch.autocast to {dtypes} is on in the forward, and the engine rolls out without it"
            yield Cause("dtype", f"other dtypes in the forward: {shown}")
        if place.device.type != record.device:
            yield Cause("device", f"another device: {record.device} made the rollout, {place.device.type} replayed it")
        if isinstance(self.transformer, nn.Module) and (names := unaligned_weights(self.transformer)):
            shown = f"{names[0]} and others lie off multiples of 16 bytes; call flowroll.replay.align_weights(transformer)"
            yield Cause("alignment", f"other addresses of the weights: {shown}")
        own, made_by = kernels_of(self.transformer), kernels_that_made(self.source.rollout)
        if own != made_by and not fast_parts_of(self.source.rollout):
            yield Cause("kernels", f"other kernels: {made_by} made the rollout, {own or 'others'} replayed it")
        rule = self.source.family.guidance(record.guidance_scale).rule
        if rule != record.guidance_rule:
            shown = f"a scale of {record.guidance_scale} means {rule}, the record says {record.guidance_rule}"
            yield Cause("guidance", f"another guidance: {shown}")
        embedded, given = self.source.recipe.guidance.embedded, self.source.env.guidance
        held = [] if given is None else given.flatten().tolist()
        if embedded is not None and held != torch.tensor([embedded], dtype=torch.float32).tolist():
            shown = f"the record says {embedded:g}, the env holds {', '.join(f'{scale:g}' for scale in held)}"
            yield Cause("guidance", f"another scale for the model's own guidance: {shown}")

    def _latents(self) -> Iterator[Cause]:
        source, debug, cpu = self.source, self.source.rollout.debug_tensors, torch.device("cpu")
        stochastic = [step for step, this in enumerate(source.recipe.transitions) if this.is_stochastic]
        made = {step: source.state(step + 1, cpu) for step in stochastic if source.has_states(step)}
        for dtype in (torch.bfloat16, torch.float16):
            if made and all(torch.equal(state.to(dtype).to(state.dtype), state) for state in made.values()):
                name = str(dtype).removeprefix("torch.")
                yield Cause("latents", f"rounded latents: every value after a stochastic step is one of {name}")
                return
        if debug is None:
            return
        for step, state in made.items():
            this = source.recipe.transitions[step]
            drawn = transition.sample(this, debug.prev_sample_mean[step], debug.variance_noise[step])
            if debug.noise_std_dev[step].item() == this.std and not torch.equal(drawn, state):
                shown = f"state {step + 1} is not the recorded mean plus the recorded noise of step {step}"
                yield Cause("latents", f"other latents: {shown}")
                return

    def _env(self) -> Iterator[Cause]:
        """Compares the env with the digests in the record, and with what this model makes of the prompts."""
        source, record, is_wrong = self.source, self.source.rollout.sampling, False
        right = None if self.encode is None else self.encode(source.rollout)
        recorded = (record.pos_cond_sha256, record.neg_cond_sha256)
        branches = zip(
            ("pos_cond_kwargs", "neg_cond_kwargs"),
            ("prompt", "negative prompt"),
            recorded,
            env_digests(source.env),
            strict=True,
        )
        for name, words, then, now in branches:
            branch: Mapping[str, Any] | None = getattr(source.env, name)
            if branch is None or (name == "neg_cond_kwargs" and not source.recipe.guidance.is_active):
                continue
            if shown := source.family.conditioning.contradiction(branch):
                message = f"another env: in the {words}'s branch {shown}"
            elif then not in (None, now):
                message = f"another env: the {words}'s branch is not the one that the rollout was made with"
            elif right is not None and not _same(branch, getattr(right, name)):
                message = f"another env: the {words}'s branch is not what this model makes of its text"
            else:
                continue
            is_wrong = True
            yield Cause("env", message)
        debug = source.rollout.debug_tensors
        if not is_wrong or right is None or debug is None:
            return
        # Whether the weights differ as well: with the right env the recorded velocities would still be missed.
        step = next(iter(self.scores))
        velocity = run_pair(self.transformer, replace(source, env=right), step, self.place).velocity
        if (off := _relative(velocity, debug.model_output[step])) > self._rounding:
            shown = f"with the env that this model makes, the velocity of step {step} is off by {off:.1e} of its norm"
            yield Cause("weights", f"other weights: {shown}")

    def _velocity(self) -> Cause:
        """Returns what explains the step whose velocity differs most."""
        source, debug, has_digest = self.source, self.source.rollout.debug_tensors, self.source.rollout.sampling.pos_cond_sha256
        if debug is None:
            env = "" if has_digest else ", another env"
            return Cause("weights", f"other weights{env} or another guidance: without debug tensors they cannot be told apart")
        errors = {step: _relative(score.velocity, debug.model_output[step]) for step, score in self.scores.items()}
        step = max(errors, key=errors.__getitem__)
        if errors[step] == 0:
            return Cause("log_probs", "other log-probs: every velocity is the recorded one, the log-probs are not")
        shown = f"the velocity of step {step} is off by {errors[step]:.1e} of its norm"
        if errors[step] < self._rounding:
            words = "other kernels (thread count, library versions), or weights that have hardly moved"
            return Cause("kernels", f"{words}: {shown}{self._other_kernels()}")
        if source.recipe.guidances[step].is_active and (cause := self._guidance(step, debug.model_output[step])):
            return cause
        if self.encode is not None and self.encode(source.rollout) is not None:
            return Cause("weights", f"other weights: {shown}, and the env is what this model makes of the prompts")
        if has_digest:
            # An altered env would have been found before.
            return Cause("weights", f"other weights: {shown}, and the env is the one that the rollout was made with")
        return Cause("weights", f"other weights (or another prompt's env, which only the text encoder can tell): {shown}")

    def _other_kernels(self) -> str:
        made, own = self.source.rollout.provenance, use_exact_kernels(self.place.device).name
        if made is None or made.certificate in (None, own):
            return ""
        return f"; the engine's kernels have the certificate {made.certificate}, those of this process {own}"

    def _guidance(self, step: int, recorded: Tensor) -> Cause | None:
        """Finds whether another scale, or the prompt's branch alone, gives the recorded velocity of a step."""
        source, place, recipe = self.source, self.place, self.source.recipe
        one = recipe.step_input(source.state(step, place.device), step, source.env_on(place))
        outputs = source.family.run_in_turn(self.transformer, source.family.forward_inputs(one, recipe.dtype))
        recorded = recorded.to(place.device)
        if (scale := fitted_scale(source, outputs, recorded, one)) is not None:
            fit = f"the record says {one.guidance.scale:g}, the recorded velocities fit {scale:g}"
            return Cause("guidance", f"another guidance scale: {fit}")
        if source.family.fits_conditional(outputs, recorded, one):
            return Cause("env", "another env: the prompt's branch fits the recorded velocities, the negative prompt's does not")
        return None

    @property
    def _rounding(self) -> float:
        """Relative differences below this may come from other kernels."""
        eps = torch.finfo(self.source.recipe.dtype).eps
        return 64 * eps if self.source.recipe.dtype == torch.float32 else eps


def fast_causes(source: Source) -> Iterator[Cause]:
    """Returns that a fast engine made a rollout, where one did: it is not exact, whatever replays it."""
    if parts := fast_parts_of(source.rollout):
        yield Cause("exactness", f"another mode: a fast engine made the rollout, which is not exact ({', '.join(parts)})")


def grid_causes(source: Source) -> Iterator[Cause]:
    """Returns where the grid of sigmas, or what follows from it, contradicts itself."""
    record, debug = source.rollout.sampling, source.rollout.debug_tensors
    scales = [t / sigma if sigma else torch.inf for t, sigma in zip(record.timesteps, record.sigmas[:-1], strict=True)]
    if fault := grid_fault(source.rollout):
        yield Cause("sigmas", f"another grid: {fault}")
    elif not all(a > b for a, b in pairwise(record.sigmas)) or record.sigmas[-1] != 0:
        yield Cause("sigmas", "another grid: the record's sigmas do not fall to 0 step by step")
    elif max(scales) - min(scales) > 1e-3 * max(scales):
        yield Cause("sigmas", "another grid: the record's timesteps are not its sigmas on the scale of the model")
    elif debug is not None:
        run = source.steps_run
        stds = torch.tensor(
            [this.std if step in run else 0.0 for step, this in enumerate(source.recipe.transitions)], dtype=torch.float32
        )
        yield from _std_causes(debug.noise_std_dev.flatten().tolist(), stds.tolist())


def _std_causes(recorded: Sequence[float], replayed: Sequence[float]) -> Iterator[Cause]:
    """Compares the std of every transition with the recorded one."""
    pairs = list(zip(recorded, replayed, strict=True))
    different = next((step for step, (a, b) in enumerate(pairs) if a != b), None)
    if different is None:
        return
    shown = f"at step {different} the std was {recorded[different]:.6g}, now it is {replayed[different]:.6g}"
    factors = [a / b for a, b in pairs if b]
    if any((a == 0) != (b == 0) for a, b in pairs):
        yield Cause("dynamics", f"other stochastic steps or another sde_type: {shown}")
    elif max(factors) - min(factors) < 1e-4 * max(factors):
        yield Cause("dynamics", f"another noise level: {shown}, and every std by the same factor")
    else:
        yield Cause("sigmas", f"another grid of sigmas, or another sde_type: {shown}")


def fitted_scale(source: Source, outputs: Sequence[Output], velocity: Tensor, one: StepInput) -> float | None:
    """Returns the guidance scale, other than the recorded one, with which these outputs give a velocity; None if none does."""
    guidance, family = one.guidance, source.family

    def error(scale: Number) -> float:
        return _relative(family.apply_guidance(list(outputs), replace(one, guidance=replace(guidance, scale=scale))), velocity)

    grid = [0.5 * index for index in range(41)] + [20 * 50 ** (index / 20) for index in range(1, 21)]
    best = min(range(len(grid)), key=lambda index: error(grid[index]))
    low, high = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    for _ in range(40):
        third = (high - low) / 3
        low, high = (low, high - third) if error(low + third) < error(high - third) else (low + third, high)
    found = (low + high) / 2
    # People choose round numbers; the first of equals is taken.
    scale = min((round(found, 1), round(found, 2), found), key=error)
    tolerance = 1e-5 if source.recipe.dtype == torch.float32 else 1e-2
    return scale if error(scale) <= min(tolerance, 0.2 * error(guidance.scale)) else None


def _same(a: EnvValue | Mapping[str, EnvValue], b: EnvValue | Mapping[str, EnvValue] | None) -> bool:
    """Returns whether two branches are of the same text; other kernels may have rounded them differently."""
    if isinstance(a, Tensor):
        if not isinstance(b, Tensor) or (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        return torch.equal(a.cpu(), b.cpu()) or _relative(a, b) < (1e-4 if a.dtype == torch.float32 else 1e-2)
    if isinstance(a, Mapping):
        return isinstance(b, Mapping) and a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return bool(a == b)


def _relative(value: Tensor, expected: Tensor) -> float:
    """Returns the norm of the difference, relative to the norm of what is expected."""
    value, expected = value.float().to(expected.device), expected.float()
    return float((value - expected).norm() / expected.norm())
