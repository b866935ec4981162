"""UniRL's samples as fields of flowroll's requests, and flowroll's rollouts as samples of UniRL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from unirl.rollout.engine.sigma_verify import verify_engine_used_sigmas
from unirl.sde.noise import derive_denoise_step_seed
from unirl.types.conditions.text import TextEmbedCondition
from unirl.types.primitives import Images
from unirl.types.sampling import DiffusionSamplingParams, compute_trajectory_positions, is_forward_process
from unirl.types.segments.latent import make_image_segment

from flowroll.errors import InvalidRequestError, ServerConnectionError
from flowroll.types import Number, Rollout
from flowroll.types.rules import require

NAME = "flowroll"
# The dynamics by the names of UniRL's strategies; their mathematics is compared in the tests.
_SDE_TYPES = {"flow": "sde", "cps": "cps", "dance": "dance"}
# Options that change pictures or costs, and that flowroll has no counterpart of.
_NOT_OFFERED = (
    "max_sequence_length",
    "taylor_cache_interval",
    "taylor_cache_order",
    "distilled_guidance_scale",
    "guidance_scale_2",
    "strength",
)
# Models whose latents are patches in a row, and the pixels along a side of one.
PACKED, _PATCH_PIXELS = ("qwen_image",), 16
_SAMPLER_KWARGS = ("negative_prompt", "return_negative_prompt_embeds")


def common_fields(diffusion: Any, strategy: Any) -> dict[str, Any]:
    """Returns the fields that the requests for all samples of these parameters have in common."""
    for name in _NOT_OFFERED:
        value = getattr(diffusion, name)
        require(value is None, name, "be left out with flowroll", value, "remove it from the sampling parameters")
    further = dict(diffusion.sampler_kwargs or {})
    unknown = sorted(set(further) - set(_SAMPLER_KWARGS))
    require(not unknown, "sampler_kwargs", f"hold {' and '.join(_SAMPLER_KWARGS)} alone", unknown, "remove the others")
    sigmas: Tensor = diffusion.sigmas.detach().to("cpu", torch.float32)
    num_steps = int(diffusion.num_inference_steps)
    require(sigmas.shape == (num_steps + 1,), "sigmas", f"be {num_steps + 1} values", tuple(sigmas.shape), "pin T + 1")
    fields: dict[str, Any] = {
        "sigmas": sigmas.tolist(),
        "height": int(diffusion.height),
        "width": int(diffusion.width),
        "guidance_scale": float(diffusion.guidance_scale),
        "rollout_return_dit_trajectory": True,
        "rollout_return_step_indices": _kept_states(diffusion, num_steps),
    }
    if (negative := further.get("negative_prompt")) is not None:
        fields["negative_prompt"] = negative
    return fields | _dynamics_fields(diffusion, strategy)


def _dynamics_fields(diffusion: Any, strategy: Any) -> dict[str, Any]:
    steps = None if diffusion.sde_indices is None else sorted(int(step) for step in diffusion.sde_indices)
    if steps is not None and is_forward_process(steps):
        return {"rollout_sde_type": "ode"}
    name = None if strategy is None else type(strategy).canonical_name.strip().lower()
    require(name in _SDE_TYPES, "strategy", f"be one of {', '.join(_SDE_TYPES)} for stochastic steps", name, "choose one")
    assert name is not None
    eta: Number = float(diffusion.eta)
    require(eta > 0, "eta", "be above 0 for stochastic steps", eta, "use sde_indices=[] for a forward process")
    return {
        "rollout_sde_type": _SDE_TYPES[name],
        "rollout_noise_level": eta,
        "rollout_log_prob_no_const": bool(strategy.log_prob_no_const),
        "rollout_sde_step_indices": steps,
    }


def filled(sample: Any, rollouts: Sequence[Rollout], *, has_conditions: bool) -> Any:
    """Returns the sample with these rollouts of it, and with the text conditions of their environments if asked for."""
    gen = sample.frontier_gen_part(DiffusionSamplingParams)
    diffusion, first = gen.sampling_params, rollouts[0]
    sigmas: Tensor = diffusion.sigmas.detach().to("cpu", torch.float32)
    for rollout in rollouts:
        verify_sigmas(rollout, sigmas)
    trajectories = [rollout.dit_trajectory for rollout in rollouts]
    states = torch.stack([trajectory.latents for trajectory in trajectories if trajectory is not None]).float()
    assert first.dit_trajectory is not None and first.log_probs is not None
    stochastic = diffusion.sde_indices is None or not is_forward_process(diffusion.sde_indices)
    chosen = list(range(len(sigmas) - 1)) if diffusion.sde_indices is None else sorted(map(int, diffusion.sde_indices))
    log_probs = [rollout.log_probs[chosen] for rollout in rollouts if rollout.log_probs is not None]
    segment = make_image_segment(
        latents=unpack_latents(states, int(diffusion.height), int(diffusion.width)),
        sigmas=sigmas,
        indices=torch.tensor(first.dit_trajectory.latent_step_indices, dtype=torch.long),
        sde_logp=torch.stack(log_probs) if stochastic else None,
        sde_indices=torch.tensor(chosen, dtype=torch.long),
    )
    pictures = [rollout.image[:, 0] for rollout in rollouts if isinstance(rollout.image, Tensor)]
    found = sample.with_filled_frontier(
        segment=segment,
        primitives={"image": Images.from_dense(torch.stack(pictures))},
        conditions=_conditions(rollouts) if has_conditions else {},
    )
    return found.replace_frontier(replace(found.parts[-1], metadata=_metadata(gen, rollouts)))


def _metadata(gen: Any, rollouts: Sequence[Rollout]) -> list[dict[str, Any]]:
    base_seed = int(gen.sampling_params.seed) if gen.sampling_params.seed is not None else 0
    before = gen.metadata or [{}] * len(rollouts)
    return [
        {
            **(own or {}),
            NAME: {
                "request_id": rollout.request_id,
                "weight_version": rollout.weight_version,
                "sde_seed": rollout.seed,
                "unfolded_sde_seed": derive_denoise_step_seed(base_seed, 0, sample_id),
            },
        }
        for own, sample_id, rollout in zip(before, gen.sample_ids, rollouts, strict=True)
    ]


def fold_seed(seed: int) -> int:
    """Returns the lower 32 bits of a seed: generators on a CPU use no more."""
    return int(seed) & 0xFFFFFFFF


def verify_sigmas(rollout: Rollout, expected: Tensor) -> None:
    """Checks by UniRL's own verifier, and then bit for bit, that a rollout was made with the driver's sigmas.

    Raises:
        RuntimeError: It was not.
    """
    trajectory = rollout.dit_trajectory
    used = None if trajectory is None else trajectory.sigmas
    verify_engine_used_sigmas(used, expected=expected, engine_name=NAME)
    if used is None or not torch.equal(used, expected):
        raise RuntimeError(f"{NAME}: the sigmas of {rollout.request_id} must be the driver's in every bit.")


def pack_latents(latents: Tensor, height: int, width: int, *, packed: bool) -> Tensor:
    """Returns x_T [batch, channels, rows, columns] as flowroll takes it: as it is, or in Qwen-Image's patches of 2 x 2.

    Raises:
        InvalidRequestError: It has not four dimensions.
    """
    if latents.ndim != 4:
        raise InvalidRequestError(
            f"x_T must be [batch, channels, rows, columns] at {width} x {height}, got {list(latents.shape)}; set "
            "init_noise_latent_shape to [channels, rows, columns].",
            field="init_noise_latent_shape",
        )
    plain = latents.detach().to("cpu", torch.float32)
    if not packed:
        return plain
    batch, channels, rows, columns = plain.shape
    patches = plain.reshape(batch, channels, rows // 2, 2, columns // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(batch, rows * columns // 4, channels * 4)


def unpack_latents(states: Tensor, height: int, width: int) -> Tensor:
    """Returns trajectories [batch, states, channels, rows, columns], in which UniRL keeps them, also of packed models.

    Raises:
        InvalidRequestError: There are not as many patches as the picture has.
    """
    if states.ndim == 5:
        return states
    batch, count, tokens, width_of_token = states.shape
    rows, columns = height // _PATCH_PIXELS, width // _PATCH_PIXELS
    ok = tokens == rows * columns
    require(ok, "latents", f"be {rows} x {columns} patches of {_PATCH_PIXELS} pixels", tokens, "use a model of 8 x 2 pixels")
    channels = width_of_token // 4
    patches = states.reshape(batch, count, rows, columns, channels, 2, 2).permute(0, 1, 4, 2, 5, 3, 6)
    return patches.reshape(batch, count, channels, rows * 2, columns * 2)


def _kept_states(diffusion: Any, num_steps: int) -> list[int] | None:
    """Returns the states that replay needs and the last one; None: all of them."""
    steps = diffusion.sde_indices
    if steps is None or len(steps) >= num_steps:
        return None
    return sorted({*compute_trajectory_positions({int(step) for step in steps}, num_steps), num_steps})


def _conditions(rollouts: Sequence[Rollout]) -> dict[str, Any]:
    branches: dict[str, list[Any]] = {"text": [], "negative_text": []}
    for rollout in rollouts:
        env = rollout.denoising_env
        if env is None:
            raise ServerConnectionError("the answer must hold the denoising environment, got none; check the server.")
        for name, values in (("text", env.pos_cond_kwargs), ("negative_text", env.neg_cond_kwargs)):
            if values is not None:
                branches[name].append(_text_condition(values))
    return {name: TextEmbedCondition.concat(found) for name, found in branches.items() if found}


def _text_condition(values: Mapping[str, Any]) -> Any:
    embeds = values.get("encoder_hidden_states", values.get("cap_feats"))
    assert isinstance(embeds, Tensor)
    mask = values.get("encoder_hidden_states_mask")
    pooled = values.get("pooled_projections")
    if mask is None and "cap_feats" in values:
        mask = embeds.new_ones(embeds.shape[0], dtype=torch.long)
    return TextEmbedCondition(
        embeds=embeds[None],
        pooled=None if pooled is None else pooled[None],
        attn_mask=None if mask is None else mask[None],
    )
