"""Why a replay is not exact, in plain words.

Owns the checks that tell the possible causes apart. First what can be read off the rollout and the transformer without a
doubt (a grid that contradicts itself, rounded latents, another dtype); then, from the recorded velocities, what of guidance,
the negative prompt and the weights explains the difference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from flowroll.families import Guidance, StepScore, Transformer
from flowroll.families.alignment import unaligned_weights
from flowroll.families.base import Output, run_in_turn
from flowroll.replay.scoring import run_pair
from flowroll.replay.sources import Place, Source, grid_fault
from flowroll.sampling import transition
from flowroll.types import DebugTensors, DenoisingEnv, EnvValue, Number, Rollout, branch_digest

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
    "weights",
    "log_probs",
]
Encode: TypeAlias = Callable[[Rollout], DenoisingEnv]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cause:
    """One thing that differs from what made the rollout.

    Attributes:
        kind: What differs.
        message: In plain words, with the values.
    """

    kind: Kind
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What is known about one rollout.

    Attributes:
        source: The rollout.
        scores: Its replayed steps.
        transformer: What replayed them.
        place: Where.
        weight_version: Of the transformer's weights; None: unknown.
        encode: Encodes the rollout's prompts again; None: cannot be done.
    """

    source: Source
    scores: Mapping[int, StepScore]
    transformer: Transformer
    place: Place
    weight_version: str | None
    encode: Encode | None


def causes_of(evidence: Evidence) -> list[Cause]:
    """The causes of a replay that is not exact; at least one."""
    source = evidence.source
    certain = [*_setting_causes(evidence), *grid_causes(source), *_latent_causes(source)]
    if not certain and (certain := list(_env_causes(evidence))):
        certain += _weights_beside_env(evidence)
    return certain or [_velocity_cause(evidence)]


def _setting_causes(evidence: Evidence) -> Iterator[Cause]:
    rollout, place = evidence.source.rollout, evidence.place
    record = rollout.sampling
    if evidence.weight_version is not None and evidence.weight_version != rollout.weight_version:
        shown = f"the rollout is of weight version {rollout.weight_version}, the transformer of {evidence.weight_version}"
        yield Cause(kind="weight_version", message=f"other weights: {shown}")
    if place.dtype is not None and str(place.dtype) != record.model_dtype:
        yield Cause(kind="dtype", message=f"another dtype: {record.model_dtype} made the rollout, {place.dtype} replayed it")
    if torch.is_autocast_enabled(place.device.type):
        shown = f"torch.autocast is on for {place.device.type}, and the engine rolls out without it"
        yield Cause(kind="dtype", message=f"other dtypes in the forward: {shown}")
    if place.device.type != record.device:
        yield Cause(kind="device", message=f"another device: {record.device} made the rollout, {place.device.type} replayed it")
    if isinstance(evidence.transformer, nn.Module) and (names := unaligned_weights(evidence.transformer)):
        shown = f"{names[0]} and others lie off multiples of 16 bytes; call flowroll.replay.align_weights(transformer)"
        yield Cause(kind="alignment", message=f"other addresses of the weights: {shown}")
    rule = evidence.source.family.guidance(record.guidance_scale).rule
    if rule != record.guidance_rule:
        shown = f"a scale of {record.guidance_scale} means {rule}, the record says {record.guidance_rule}"
        yield Cause(kind="guidance", message=f"another guidance: {shown}")


def grid_causes(source: Source) -> Iterator[Cause]:
    """Where the grid of sigmas, or what follows from it, contradicts itself."""
    record, debug = source.rollout.sampling, source.rollout.debug_tensors
    scales = [t / sigma if sigma else torch.inf for t, sigma in zip(record.timesteps, record.sigmas[:-1], strict=True)]
    if fault := grid_fault(source.rollout):
        yield Cause(kind="sigmas", message=f"another grid: {fault}")
    elif not all(a > b for a, b in pairwise(record.sigmas)) or record.sigmas[-1] != 0:
        yield Cause(kind="sigmas", message="another grid: the record's sigmas do not fall to 0 step by step")
    elif max(scales) - min(scales) > 1e-3 * max(scales):
        yield Cause(kind="sigmas", message="another grid: the record's timesteps are not its sigmas on the scale of the model")
    elif debug is not None:
        yield from _std_causes(source, debug)


def _std_causes(source: Source, debug: DebugTensors) -> Iterator[Cause]:
    """Compares the std of every transition with the recorded one."""
    recorded = debug.noise_std_dev.flatten().tolist()
    replayed = torch.tensor([this.std for this in source.recipe.transitions], dtype=torch.float32).tolist()
    if recorded == replayed:
        return
    steps = [step for step, (a, b) in enumerate(zip(recorded, replayed, strict=True)) if a != b]
    shown = f"at step {steps[0]} the std was {recorded[steps[0]]:.6g}, now it is {replayed[steps[0]]:.6g}"
    if any((a == 0) != (b == 0) for a, b in zip(recorded, replayed, strict=True)):
        yield Cause(kind="dynamics", message=f"other stochastic steps or another sde_type: {shown}")
        return
    factors = [a / b for a, b in zip(recorded, replayed, strict=True) if b]
    if max(factors) - min(factors) < 1e-4 * max(factors):
        yield Cause(kind="dynamics", message=f"another noise level: {shown}, and every std by the same factor")
    else:
        yield Cause(kind="sigmas", message=f"another grid of sigmas, or another sde_type: {shown}")


def _latent_causes(source: Source) -> Iterator[Cause]:
    trajectory, debug = source.trajectory, source.rollout.debug_tensors
    made = [step for step, this in enumerate(source.recipe.transitions) if this.is_stochastic and source.has_states(step)]
    if not made:
        return
    device = torch.device("cpu")
    states = torch.stack([source.state(step + 1, device) for step in made])
    for dtype in (torch.bfloat16, torch.float16):
        if trajectory.latents.dtype == dtype or torch.equal(states.to(dtype).to(states.dtype), states):
            name = str(dtype).removeprefix("torch.")
            yield Cause(kind="latents", message=f"rounded latents: every value after a stochastic step is one of {name}")
            return
    if debug is None:
        return
    for step in made:
        this = source.recipe.transitions[step]
        drawn = transition.sample(this, debug.prev_sample_mean[step], debug.variance_noise[step])
        if debug.noise_std_dev[step].item() == this.std and not torch.equal(drawn, source.state(step + 1, device)):
            shown = f"state {step + 1} is not the recorded mean plus the recorded noise of step {step}"
            yield Cause(kind="latents", message=f"other latents: {shown}")
            return


def _env_causes(evidence: Evidence) -> Iterator[Cause]:
    source = evidence.source
    expected = None if evidence.encode is None else evidence.encode(source.rollout)
    digests = _recorded_digests(source)
    for name, words in (("pos_cond_kwargs", "prompt"), ("neg_cond_kwargs", "negative prompt")):
        branch: Mapping[str, EnvValue] | None = getattr(source.env, name)
        if branch is None or (name == "neg_cond_kwargs" and not source.recipe.guidance.is_active):
            continue
        embeds = branch[source.family.embeds_key]
        assert isinstance(embeds, Tensor)
        if branch.get("txt_seq_lens", [embeds.shape[0]]) != [embeds.shape[0]]:
            shown = f"txt_seq_lens is {branch['txt_seq_lens']}, {source.family.embeds_key} has {embeds.shape[0]} tokens"
            yield Cause(kind="env", message=f"another env: in the {words}'s branch {shown}")
        elif digests[name] not in (None, branch_digest(branch)):
            yield Cause(kind="env", message=f"another env: the {words}'s branch is not the one that the rollout was made with")
        elif expected is not None and not _same(branch, getattr(expected, name)):
            yield Cause(kind="env", message=f"another env: the {words}'s branch is not what this model makes of its text")


def _recorded_digests(source: Source) -> dict[str, str | None]:
    record = source.rollout.sampling
    return {"pos_cond_kwargs": record.pos_cond_sha256, "neg_cond_kwargs": record.neg_cond_sha256}


def _weights_beside_env(evidence: Evidence) -> Iterator[Cause]:
    """Whether the weights differ as well: with the env that the model makes, the recorded velocities are still missed."""
    source, debug = evidence.source, evidence.source.rollout.debug_tensors
    if evidence.encode is None or debug is None:
        return
    step = next(iter(evidence.scores))
    right = replace(source, env=evidence.encode(source.rollout))
    velocity = run_pair(evidence.transformer, right, step, evidence.place).velocity.float().cpu()
    if (off := _relative(velocity, debug.model_output[step])) > _rounding(source):
        shown = f"with the env that this model makes, the velocity of step {step} is off by {off:.1e} of its norm"
        yield Cause(kind="weights", message=f"other weights: {shown}")


def _same(a: EnvValue | Mapping[str, EnvValue], b: EnvValue | Mapping[str, EnvValue] | None) -> bool:
    """Whether two branches are of the same text; other kernels may have rounded them differently."""
    if isinstance(a, Tensor):
        if not isinstance(b, Tensor) or (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        left, right = a.float().cpu(), b.float().cpu()
        return torch.equal(left, right) or _relative(left, right) < (1e-4 if a.dtype == torch.float32 else 1e-2)
    if isinstance(a, Mapping):
        return isinstance(b, Mapping) and a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return bool(a == b)


def _velocity_cause(evidence: Evidence) -> Cause:
    """What explains the step whose velocity differs most."""
    source, debug = evidence.source, evidence.source.rollout.debug_tensors
    if debug is None:
        env = "" if source.rollout.sampling.pos_cond_sha256 else ", another env"
        message = f"other weights{env} or another guidance: without debug tensors they cannot be told apart"
        return Cause(kind="weights", message=message)
    differences = {
        step: _relative(score.velocity.float().cpu(), debug.model_output[step]) for step, score in evidence.scores.items()
    }
    step = max(differences, key=lambda step: differences[step])
    if differences[step] == 0:
        return Cause(kind="log_probs", message="other log-probs: every velocity is the recorded one, the log-probs are not")
    shown = f"the velocity of step {step} is off by {differences[step]:.1e} of its norm"
    if differences[step] < _rounding(source):
        words = "other kernels (thread count, library versions), or weights that have hardly moved"
        return Cause(kind="kernels", message=f"{words}: {shown}")
    guidance = source.recipe.guidance
    if guidance.is_active:
        outputs = _outputs(evidence, step)
        recorded = debug.model_output[step].to(evidence.place.device)
        scale = fitted_scale(source, outputs, recorded)
        if scale is not None:
            fit = f"the record says {guidance.scale:g}, the recorded velocities fit {scale:g}"
            return Cause(kind="guidance", message=f"another guidance scale: {fit}")
        if source.family.fits_conditional(outputs, recorded, guidance):
            fit = "the prompt's branch fits the recorded velocities, the negative prompt's does not"
            return Cause(kind="env", message=f"another env: {fit}")
    if evidence.encode is not None:
        message = f"other weights: {shown}, and the env is what this model makes of the prompts"
    elif source.rollout.sampling.pos_cond_sha256 is not None:
        # An altered env would have been found before.
        message = f"other weights: {shown}, and the env is the one that the rollout was made with"
    else:
        message = f"other weights (or another prompt's env, which only the text encoder can tell): {shown}"
    return Cause(kind="weights", message=message)


def _rounding(source: Source) -> float:
    """Below this relative difference it may be kernels that differ."""
    eps = torch.finfo(source.recipe.dtype).eps
    return 64 * eps if source.recipe.dtype == torch.float32 else eps


def _outputs(evidence: Evidence, step: int) -> list[Output]:
    source, place = evidence.source, evidence.place
    recipe, env = source.recipe, source.env_on(place)
    latents, timestep = source.state(step, place.device), recipe.timesteps[step : step + 1]
    calls = source.family.forward_inputs(latents, timestep, env, recipe.guidance, recipe.dtype)
    return run_in_turn(evidence.transformer, calls)


def fitted_scale(source: Source, outputs: Sequence[Output], velocity: Tensor) -> float | None:
    """The guidance scale, other than the recorded one, with which these outputs give a velocity; None if none does."""
    guidance, family = source.recipe.guidance, source.family

    def error(scale: Number) -> float:
        return _relative(family.apply_guidance(list(outputs), Guidance(rule=guidance.rule, scale=scale)).float(), velocity)

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


def _relative(value: Tensor, expected: Tensor) -> float:
    return float((value - expected).norm() / expected.norm())
