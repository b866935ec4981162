"""The mode that is fast and not exact: what it turns on, and how far that takes the log-probs of a probe from the exact ones.

An exact engine runs nothing of this. torch's settings for exact kernels hold here too, because they are the whole process's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, Literal, TypeAlias, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from flowroll.engine.config import FastMode, Limits, Mismatch
from flowroll.engine.images import blank_image
from flowroll.engine.loading import LoadedModel
from flowroll.engine.plan import plan_request
from flowroll.engine.policies.store import PolicyStore
from flowroll.engine.runner.pipeline import PipelineRunner
from flowroll.engine.runner.sample import Conditioning, Sample
from flowroll.engine.weights.offload import WeightOffload
from flowroll.engine.weights.versions import WeightVersions
from flowroll.errors import EngineError, FlowrollError
from flowroll.exact import Alone, PlainBatch, Strategy
from flowroll.families import Recipe
from flowroll.types import Exactness, Layout, SamplingParams
from flowroll.types.rules import refuse

FastPart: TypeAlias = Literal["batch", "attention", "compile", "fp8"]
PARTS: tuple[FastPart, ...] = get_args(FastPart)
# diffusers' names for kernels of attention, the better one first. Those of the Hugging Face hub are left out: they are code
# that is downloaded and run.
_BACKENDS = ("_flash_3", "sage")
# The probe: some samples of a prompt that has no other use, of few tokens.
_PROMPT, _SEED, _NUM_SAMPLES, _NUM_STEPS, _TOKENS = "a red circle", 0, 4, 4, 8
# How often a block may be compiled: for one sample and for several, with and without guidance.
_MOST_COMPILATIONS = 64


def check_fast(exactness: Exactness, parts: Sequence[str] | None, *, layout: Layout, compile: bool) -> None:
    """Refuses options that contradict each other, before anything is loaded.

    Raises:
        InvalidRequestError: The mode or a part is not known, parts are named for an exact engine, there are several ranks, or
            the exact kind of compiled blocks is asked for beside the mode, or two parts exclude each other.
    """
    if exactness not in get_args(Exactness):
        refuse("exactness", f"be one of {', '.join(get_args(Exactness))}", exactness, "leave it out for exact")
    if exactness == "exact":
        if parts is not None:
            refuse("fast_parts", "be left out of an exact engine", _listed(parts), 'set exactness to "fast"')
        return
    for part in parts or ():
        if part not in PARTS:
            refuse("fast_parts", f"be among {', '.join(PARTS)}", part, "leave it out for what the device has")
    if parts is not None and not parts:
        refuse("fast_parts", "name at least one part", "none", "leave it out for what the device has")
    if layout.num_ranks > 1:
        refuse("exactness", "be exact for several ranks", f"the layout {layout.name}", "start one rank a replica")
    if compile:
        refuse("compile", "be off for a fast engine, which compiles with torch's defaults", "on", "leave it out")
    if {"compile", "fp8"} <= set(parts or ()):
        refuse("fast_parts", "hold fp8 or compile", "both", "choose one: casts of weights break the compiled graphs")


def turn_fast(model: LoadedModel, pipeline: Any, parts: Sequence[str] | None) -> tuple[LoadedModel, FastMode]:
    """Turns the parts of the fast mode on, and measures how far it is from exact.

    Args:
        model: The model, exact so far. Its transformer is changed in place.
        pipeline: The diffusers pipeline that holds its modules.
        parts: The parts, from `check_fast`; None: what the device has. That is never float8, which saves memory and no time.

    Returns:
        The model that shares forwards in the chosen way, and what was turned on.

    Raises:
        InvalidRequestError: A part that was named is not to be had here, or none is.
        EngineError: The probe failed.
    """
    probe = _Probe.roll_out(model, pipeline)
    strategy, named = _turn_on(probe, _Choice(model=model, wanted=parts))
    if not named:
        refuse(
            "exactness", f"be exact for {model.family.name} on {model.device}", "fast, with no part to turn on", "leave it out"
        )
    try:
        mismatch = probe.compare(strategy)
    except FlowrollError:
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        raise EngineError(
            f"the fast mode must run its probe with {_listed(named)}, got {type(error).__name__}: {reason}; choose other parts "
            "with fast_parts."
        ) from error
    return replace(model, strategy=strategy), FastMode(parts=tuple(named), mismatch=mismatch)


def _turn_on(probe: _Probe, chosen: _Choice) -> tuple[Strategy, list[str]]:
    """Turns on what was chosen; returns how samples share forwards, and the names of the parts."""
    named, model = [], chosen.model
    family, transformer = model.family, model.transformer
    if chosen.takes("batch", "" if family.shares_forwards else f"{family.name}, whose samples share no forward"):
        named.append("batch")
    strategy = (PlainBatch if named else Alone)(family, model.dtype)
    if chosen.is_wanted("attention"):
        backend = _choose_attention(probe, strategy)
        if chosen.takes("attention", "" if backend else f"none of {_listed(_BACKENDS)} that is installed and runs here"):
            named.append(f"attention={backend}")
    # A class of diffusers says which of its layers keep their precision when the others are cast.
    has_fp8 = getattr(transformer, "_skip_layerwise_casting_patterns", None) is not None
    if chosen.takes("fp8", "" if has_fp8 else f"{type(transformer).__name__}, which does not say what can be cast"):
        transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=model.dtype)
        named.append("fp8=float8_e4m3fn")
    if chosen.takes("compile", ""):
        _compile(transformer)
        named.append("compile")
    return strategy, named


@dataclass(frozen=True, slots=True, kw_only=True)
class _Choice:
    """Which parts are wanted: those that were named, or those of the device."""

    model: LoadedModel
    wanted: Sequence[str] | None

    def is_wanted(self, part: FastPart) -> bool:
        if self.wanted is not None:
            return part in self.wanted
        # A C++ compiler takes minutes for a model's blocks.
        return part == "batch" or (part != "fp8" and self.model.device.type == "cuda")

    def takes(self, part: FastPart, lacks: str) -> bool:
        """Returns whether a part is turned on, given what stands in its way.

        Raises:
            InvalidRequestError: It was named, and something does.
        """
        if lacks and self.wanted is not None and part in self.wanted:
            refuse("fast_parts", f"hold what there is for {part}", lacks, f"leave {part} out")
        return self.is_wanted(part) and not lacks


def _choose_attention(probe: _Probe, strategy: Strategy) -> str | None:
    """Sets the first backend that is installed and runs the probe's first step, and returns its name; None if there is none."""
    from diffusers.models.attention_dispatch import attention_backend

    transformer = probe.conditioning.transformer
    # Of a class whose attention is not diffusers' dispatched one, no backend would be used.
    if not any(hasattr(getattr(module, "processor", None), "_attention_backend") for module in transformer.modules()):
        return None
    for name in (*_BACKENDS, "native"):
        # Whatever it raises, it does not run here. The context puts the process's own choice back, which
        # `set_attention_backend` changes too.
        with attention_backend("native"), contextlib.suppress(Exception):
            transformer.set_attention_backend(name)
            probe.velocities(strategy, 0)
            return None if name == "native" else name
    return None


def _compile(transformer: nn.Module) -> None:
    """Makes the repeated blocks run compiled with torch's own settings, as diffusers' `compile_repeated_blocks` does."""
    # Stable Diffusion 3's class does not name its blocks.
    lists = (child for child in transformer.children() if isinstance(child, nn.ModuleList))
    for block in (block for one in lists for block in one):
        block.compile(dynamic=True, recompile_limit=_MOST_COMPILATIONS)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Probe:
    """Some samples that the exact engine has rolled out, each alone.

    Attributes:
        conditioning: What they share.
        recipe: How their steps are taken.
        states: The latents at every state, and in each the samples.
        log_probs: The exact log-probs of every step, and in each the samples.
    """

    conditioning: Conditioning
    recipe: Recipe
    states: tuple[tuple[Float[Tensor, " *latent"], ...], ...]
    log_probs: Float[Tensor, " steps samples"]

    @classmethod
    @torch.no_grad()
    def roll_out(cls, model: LoadedModel, pipeline: Any) -> _Probe:
        """Rolls the samples out with the model as it is, in forwards of their own."""
        side, has_images = _TOKENS * model.spec.pixel_unit, model.spec.max_images > 0
        params = SamplingParams(
            prompt=_PROMPT,
            images=(blank_image(),) if has_images else None,
            height=side,
            width=side,
            seed=_SEED,
            num_outputs_per_prompt=_NUM_SAMPLES,
            num_inference_steps=_NUM_STEPS,
        )
        awake, versions = WeightOffload(tuple, tuple), WeightVersions()
        encoder = PipelineRunner(model, pipeline, versions, awake, PolicyStore(model.adapters, awake, versions, max_policies=0))
        conditioning = encoder.encode(plan_request(params, model, Limits())).handed_over()
        samples = [Sample.start(conditioning, planned) for planned in conditioning.plan.samples]
        alone, states = Alone(model.family, model.dtype), [tuple(one.latents for one in samples)]
        for _ in conditioning.plan.steps:
            for one in samples:
                (velocity,) = alone.velocities(conditioning.transformer, [one.next_input()])
                one.take_step(velocity)
            states.append(tuple(one.latents for one in samples))
        for one in samples:
            assert one.recorder is not None
            one.recorder.wait()
        transitions = conditioning.plan.transitions or ()
        chosen = [step for step, this in enumerate(transitions) if this.is_stochastic]
        return cls(
            conditioning=conditioning,
            recipe=Recipe.of(samples[0].record, model.family, sde_step_indices=chosen, device=model.device),
            states=tuple(states),
            log_probs=torch.stack([one.recorder.log_probs() for one in samples if one.recorder], dim=1),
        )

    @torch.no_grad()
    def velocities(self, strategy: Strategy, step: int) -> list[Tensor]:
        """Computes the velocities of one step of all samples together, with nothing that exact forwards have left."""
        inputs = [self.recipe.step_input(latents, step, self.conditioning.env) for latents in self.states[step]]
        return strategy.velocities(self.conditioning.transformer, inputs)

    def compare(self, strategy: Strategy) -> Mismatch:
        """Computes the log-prob of every recorded step again, and compares it with the exact one."""
        rows = []
        for step in self.conditioning.plan.steps:
            found = zip(self.velocities(strategy, step), self.states[step], self.states[step + 1], strict=True)
            rows.append(torch.stack([self.recipe.evaluate(*one, step).log_prob for one in found]).cpu())
        off = torch.stack(rows).double() - self.log_probs.double()
        stochastic = torch.tensor([this.is_stochastic for this in self.recipe.transitions])
        errors, ratios = off[stochastic].abs(), torch.expm1(off[stochastic]).abs()
        geometry = self.conditioning.plan.geometry
        return Mismatch(
            num_samples=_NUM_SAMPLES,
            num_steps=len(errors),
            height=geometry.height,
            width=geometry.width,
            max_log_prob_by_step=tuple(errors.amax(1).tolist()),
            max_log_prob=errors.max().item(),
            mean_log_prob=fmean(errors.flatten().tolist()),
            max_ratio=ratios.max().item(),
            mean_ratio=fmean(ratios.flatten().tolist()),
        )


def _listed(parts: Sequence[str]) -> str:
    return ", ".join(parts) or "none"
