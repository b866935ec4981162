"""What of a rollout replay needs, checked before any model work.

Owns every reason why a rollout cannot be replayed, and which (sample, step) pairs a call is about.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from flowroll.exact import EAGER, kernels_of, use_exact_kernels
from flowroll.families import FAMILIES, Family, Recipe, Transformer
from flowroll.families.alignment import unaligned_weights
from flowroll.families.recipe import dtype_named
from flowroll.replay.precision import check_autocast_option, forward_dtypes
from flowroll.types import DenoisingEnv, Rollout, Trajectory
from flowroll.types.arguments import Integers
from flowroll.types.plain import plain
from flowroll.types.rules import refuse


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where and in what a transformer runs.

    Attributes:
        device: Its device.
        dtype: The dtype of its inputs; None: as each rollout records.
        autocast: What becomes of a call under `torch.autocast`.
    """

    device: torch.device
    dtype: torch.dtype | None
    autocast: str = "refuse"

    @property
    def is_autocast(self) -> bool:
        """Whether autocast is on for the transformer's device."""
        return torch.is_autocast_enabled(self.device.type)


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One rollout that can be replayed.

    Attributes:
        index: Its place among the rollouts of the call.
        rollout: The rollout.
        family: Its family.
        recipe: How its steps are taken.
        trajectory: Its latents.
        env: Its environment, as it came.
    """

    index: int
    rollout: Rollout
    family: Family
    recipe: Recipe
    trajectory: Trajectory
    env: DenoisingEnv

    @property
    def num_steps(self) -> int:
        """The number of transitions T."""
        return len(self.recipe.transitions)

    @property
    def steps_run(self) -> range:
        """The steps that were run, counted from the beginning of the grid."""
        return self.rollout.sampling.steps_run

    def states_of(self, step: int) -> list[int]:
        """Returns the states from which a step is replayed: before and after it, and before the step that it may need."""
        return [step - 1, step, step + 1] if self.recipe.transitions[step].needs_previous else [step, step + 1]

    def has_states(self, step: int) -> bool:
        """Returns whether the latents were returned from which this step is replayed."""
        return set(self.states_of(step)) <= set(self.trajectory.latent_step_indices)

    def state(self, state: int, device: torch.device) -> Float[Tensor, " *latent"]:
        """Returns the latents of one state (0..T) on a device."""
        # Copied, because a decoded tensor may lie anywhere in its message, and bits can depend on that.
        return self.trajectory.latents[self.trajectory.latent_step_indices.index(state)].to(device, copy=True)

    def env_on(self, place: Place) -> DenoisingEnv:
        """Returns the environment where the transformer runs; in its dtype where that is not the recorded one."""
        env = self.env.to(place.device)
        if place.dtype is None or str(place.dtype) == self.rollout.sampling.model_dtype:
            return env
        return self.family.conditioning.cast(env, place.dtype)


def place_of(
    transformer: Transformer,
    rollouts: Sequence[Rollout],
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    autocast: str = "refuse",
) -> Place:
    """Resolves device and dtype once, and puts torch's settings to the kernels that the engine computes with.

    Raises:
        InvalidRequestError: No dtype is given, and the module's forward has another one than the rollouts record.
    """
    check_autocast_option(autocast)
    module = transformer if isinstance(transformer, nn.Module) else None
    if device is None:
        device = next((weight.device for weight in module.parameters()), "cpu") if module else "cpu"
    place = Place(device=torch.device(device), dtype=dtype, autocast=autocast)
    use_exact_kernels(place.device)
    dtypes = forward_dtypes(module) if module else set()
    if autocast == "measure" and place.is_autocast:
        dtypes.add(torch.get_autocast_dtype(place.device.type))
    recorded = {dtype_named(rollout.sampling.model_dtype) for rollout in rollouts}
    if dtype is None and dtypes and not recorded <= dtypes:
        shown = ", ".join(sorted(map(str, dtypes)))
        wanted = ", ".join(sorted(map(str, recorded)))
        refuse(
            "dtype",
            f"be that of the rollouts, {wanted}",
            f"a transformer in {shown}",
            "convert the transformer, let FSDP's mixed precision cast its weights, or pass dtype= and accept other bits",
        )
    return place


def sources_of(rollouts: Sequence[Rollout], place: Place) -> list[Source]:
    """Checks every rollout.

    Raises:
        InvalidRequestError: One cannot be replayed; the message names the remedy.
    """
    check_any(rollouts)
    names = sorted({rollout.sampling.family for rollout in rollouts})
    if len(names) > 1:
        refuse("rollouts", "be of one model family", " and ".join(names), "replay each family with its own transformer")
    sources = [source_of(index, rollout, place) for index, rollout in enumerate(rollouts)]
    for source in sources:
        if fault := grid_fault(source.rollout):
            refuse(
                "dit_trajectory", "have the record's grid", f"rollout {source.index}, where {fault}", "use it as it was sent"
            )
    return sources


def check_any(rollouts: Sequence[Rollout]) -> None:
    """Refuses an empty list, of which everything would be true.

    Raises:
        InvalidRequestError: There is no rollout.
    """
    if not rollouts:
        refuse("rollouts", "hold at least one rollout", "none", "pass the rollouts of a request")


def check_weights(transformer: Transformer) -> None:
    """Refuses weights whose place in memory changes bits.

    Raises:
        InvalidRequestError: Some lie where no allocation would put them.
    """
    names = unaligned_weights(transformer) if isinstance(transformer, nn.Module) else []
    if names:
        refuse(
            "transformer",
            "have its float32 weights at multiples of 16 bytes, as allocated memory is",
            f"{len(names)} that a file's mapping put elsewhere, such as {names[0]}",
            "call flowroll.replay.align_weights(transformer) once after loading",
        )


def check_kernels(transformer: Transformer, rollouts: Sequence[Rollout], merge: str) -> None:
    """Refuses another set of kernels than the one that made the rollouts: eager and compiled ones are not known to be equal.

    Those of a fast engine are nobody else's, so its rollouts are refused unless the caller asks for no exact ratio.

    Raises:
        InvalidRequestError: The transformer runs other kernels, or the settings that it was compiled with are not known; or a
            rollout was made fast, and `merge` is not "fast".
    """
    own = kernels_of(transformer)
    for index, rollout in enumerate(rollouts):
        if parts := fast_parts_of(rollout):
            if merge != "fast":
                refuse(
                    "rollouts",
                    "be of an exact engine for an exact replay",
                    f"rollout {index} of a fast one ({', '.join(parts)})",
                    'pass merge="fast", which warns how far off the ratios are, or roll out without --exactness fast',
                )
        elif (made_by := kernels_that_made(rollout)) != own:
            remedy = (
                "use a transformer that is not compiled, or start the engine with compile"
                if made_by == EAGER
                else "prepare it with flowroll.replay.compile_blocks, on the engine's versions of torch and of the C++ compiler"
            )
            shown = f"{own or 'kernels compiled with settings that are not known'}, where rollout {index} was made by {made_by}"
            refuse("transformer", "run the kernels that made the rollouts", shown, remedy)


def kernels_that_made(rollout: Rollout) -> str:
    """Returns the name of the kernels that made a rollout; eager ones for files from before compiled ones."""
    return (rollout.provenance.compiled if rollout.provenance else None) or EAGER


def fast_parts_of(rollout: Rollout) -> tuple[str, ...]:
    """Returns what made the rollout's engine fast; nothing for an exact one."""
    made = rollout.provenance
    return () if made is None or made.exactness == "exact" else made.fast_parts or ("unknown parts",)


def check_autocast(place: Place) -> None:
    """Refuses kernels of other dtypes than the engine's, unless the caller asked for them.

    It is not turned off here instead: a trainer that relies on it for speed or memory would not notice that it lost both.

    Raises:
        InvalidRequestError: Autocast is on for the transformer's device.
    """
    if place.autocast == "refuse" and place.is_autocast:
        kind = place.device.type
        refuse(
            "autocast",
            "be off, since the engine rolls out without it",
            f"torch.autocast to {torch.get_autocast_dtype(kind)} on {kind}",
            f'put replay in torch.autocast("{kind}", enabled=False), or pass autocast="measure" and accept other bits',
        )


def check_noticed_autocast(place: Place, dtypes: set[torch.dtype]) -> None:
    """Refuses autocast that the transformer's own forward has turned on, as accelerate's `prepare` makes it do.

    Raises:
        InvalidRequestError: There was some, and the caller did not ask for it.
    """
    if place.autocast == "refuse" and dtypes:
        refuse(
            "autocast",
            "be off, since the engine rolls out without it",
            f"a transformer whose forward turns on torch.autocast to {', '.join(sorted(map(str, dtypes)))}",
            "pass the model without that wrapper (accelerate: unwrap_model(model, keep_fp32_wrapper=False)), or "
            'autocast="measure" and accept other bits',
        )


def grid_fault(rollout: Rollout) -> str | None:
    """Says where the trajectory's grid is not the record's; None where they agree."""
    trajectory, record = rollout.dit_trajectory, rollout.sampling
    assert trajectory is not None
    if trajectory.sigmas.tolist() != list(record.sigmas):
        return "the sigmas of dit_trajectory are not those of the record"
    if trajectory.timesteps.tolist() != list(record.timesteps):
        return "the timesteps of dit_trajectory are not those of the record"
    return None


def steps_of(sources: Sequence[Source], steps: Integers | None) -> tuple[int, ...]:
    """Returns the steps of a call: the given ones, or all that were run.

    Raises:
        InvalidRequestError: A step is out of range or was not run, or the rollouts differ in their steps and none are given.
    """
    lengths = sorted({source.num_steps for source in sources})
    if steps is None:
        if len(lengths) > 1:
            shown = f"rollouts of {' and '.join(map(str, lengths))} steps"
            refuse("steps", "be given for rollouts of different lengths", shown, "name the steps, or call once per length")
        runs = sorted({(source.steps_run.start, source.steps_run.stop) for source in sources})
        if len(runs) > 1:
            shown = " and ".join(f"steps {start} to {stop - 1}" for start, stop in runs)
            refuse("steps", "be given for rollouts of different runs", shown, "name the steps, or call once per run")
        return tuple(range(*runs[0]))
    chosen = tuple(plain(steps))
    if not chosen:
        refuse("steps", "hold at least one step", "none", "leave it out for all steps")
    for step in chosen:
        if not isinstance(step, int) or not 0 <= step < lengths[0]:
            refuse("steps", f"lie in 0..{lengths[0] - 1}", step, "count steps from 0")
        for source in sources:
            if step not in source.steps_run:
                run = source.steps_run
                shown = f"{step}, where rollout {source.index} ran {run.start} to {run.stop - 1}"
                refuse("steps", "be among the steps that were run", shown, "leave that step out")
    if len(set(chosen)) != len(chosen):
        refuse("steps", "hold each step once", list(chosen), "remove the duplicates")
    return chosen


def check_states(source: Source, step: int) -> None:
    """Refuses a step whose latents were not returned.

    Raises:
        InvalidRequestError: The trajectory lacks the state before or after it, or one that the step before needs.
    """
    if not source.has_states(step):
        states = " and ".join(map(str, source.states_of(step)))
        refuse(
            "dit_trajectory",
            f"hold the states {states} to replay step {step}",
            f"the states {list(source.trajectory.latent_step_indices)} in rollout {source.index}",
            f"roll out with {states} in return_step_indices, or leave that out",
        )


def pairs_of(sources: Sequence[Source], steps: Sequence[int], *, stochastic_only: bool) -> Iterator[tuple[Source, int]]:
    """Returns the (sample, step) pairs of a call, sample by sample, each checked."""
    for source in sources:
        for step in steps:
            if source.recipe.transitions[step].is_stochastic or not stochastic_only:
                check_states(source, step)
                yield source, step


def source_of(index: int, rollout: Rollout, place: Place) -> Source:
    """Checks one rollout, but for its trajectory's own copy of the grid.

    Raises:
        InvalidRequestError: It cannot be replayed; the message names the remedy.
    """
    record = rollout.sampling
    family = FAMILIES.get(record.family)
    if family is None:
        refuse("family", f"be one of {', '.join(FAMILIES)}", record.family, "use the flowroll that made the rollout")
    if rollout.log_probs is None or rollout.sde_step_indices is None:
        refuse("rollouts", "have log-probs", f"an evaluation at index {index}", "roll out with rollout=True")
    if rollout.denoising_env is None:
        refuse("denoising_env", "be there to replay", f"none in rollout {index}", "roll out with return_denoising_env=True")
    if rollout.dit_trajectory is None:
        refuse("dit_trajectory", "be there to replay", f"none in rollout {index}", "roll out with return_dit_trajectory=True")
    recipe = Recipe.of(record, family, sde_step_indices=rollout.sde_step_indices, device=place.device, dtype=place.dtype)
    recipe.check_env(rollout.denoising_env, where=f" in rollout {index}")
    return Source(
        index=index,
        rollout=rollout,
        family=family,
        recipe=recipe,
        trajectory=rollout.dit_trajectory,
        env=rollout.denoising_env,
    )
