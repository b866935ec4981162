"""verl-omni's sampling parameters as a request, and a rollout as the fields of its `DiffusionOutput`.

It needs neither verl nor Ray. Reference: verl_omni/agent_loop/diffusion_agent_loop.py, workers/config/diffusion/rollout.py,
workers/rollout/vllm_rollout/vllm_omni_async_server.py, and the rollout pipelines `qwen_image_*` and `sd3_*` of
verl-project/verl-omni at a1139baf.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flowroll.integrations.seeds import fold_seed
from flowroll.integrations.verl_omni.windows import window_of
from flowroll.types import Rollout, SamplingParams
from flowroll.types.plain import plain
from flowroll.types.rules import is_int, require
from flowroll.wire.files import flatten

if TYPE_CHECKING:
    from flowroll.engine.facts import ModelFacts

# The algorithms of verl-omni whose rollouts are made here, by model family. The first two have log-probs.
STOCHASTIC = ("flow_grpo", "mix_grpo")
ALGORITHMS: Mapping[str, tuple[str, ...]] = {
    "qwen_image": ("flow_grpo", "mix_grpo", "diffusion_nft", "dpo"),
    "sd3": ("flow_grpo",),
}
# The names under which verl-omni sends the prompt of Stable Diffusion 3 for its encoders; both CLIP encoders have one list.
_SD3_ENCODERS = {"tokenizer": "clip", "tokenizer_2": "clip", "tokenizer_3": "t5"}
_USED = frozenset(
    {
        "height",
        "width",
        "num_inference_steps",
        "output_type",
        "true_cfg_scale",
        "guidance_scale",
        "max_sequence_length",
        "noise_level",
        "sde_type",
        "sde_window_size",
        "sde_window_range",
        "sample_strategy",
        "iters_per_group",
        "sde_window_seed",
        "logprobs",
        "global_steps",
        "seed",
    }
)
# Fields of verl-omni's configuration that say nothing about a picture, with the values that they may have: None for any.
_OF_VIDEO: Mapping[str, tuple[object, ...] | None] = {
    "num_frames": (None, 1),
    "aspect_ratio": (None,),
    "frame_rate": None,
    "video_flow_shift": None,
    "sde_contiguous": (None, True),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptIds:
    """A prompt as verl-omni's agent loop sends it.

    Attributes:
        ids: The token ids of the model's own tokenizer, with the chat template.
        negative_ids: Those of the negative prompt; None: there is none.
        extra: The token ids for each text encoder, of a model with several.
        negative_extra: Those of the negative prompt.
    """

    ids: Any
    negative_ids: Any = None
    extra: Mapping[str, Any] | None = None
    negative_extra: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRequest:
    """One sample that verl-omni asks for.

    Attributes:
        params: The request without its seed, which is equal for the samples of one prompt.
        seed: The seed that was sent; None: there was none.
        noise_seed: The seed of 32 bits that the noise is drawn from.
        window: The steps whose log-probs and latents are returned; None: the algorithm takes none.
        wants_log_probs: Whether log-probs are returned.
        wants_clean: Whether the final latents are returned beside the picture.
        wants_timesteps: Whether the timesteps of all steps are returned.
    """

    params: SamplingParams
    seed: int | None
    noise_seed: int
    window: range | None
    wants_log_probs: bool
    wants_clean: bool
    wants_timesteps: bool

    @property
    def wants_latents(self) -> bool:
        """Whether the final latents are returned in the place of a picture."""
        return self.params.image_format == "none"


def sample_request(
    prompt: PromptIds, sampling: Mapping[str, Any], *, facts: ModelFacts, algorithm: str = "flow_grpo"
) -> SampleRequest:
    """Returns the request for one sample.

    Args:
        prompt: The prompt.
        sampling: The sampling parameters, as verl-omni's agent loop sends them.
        facts: The facts about the model.
        algorithm: The algorithm of the model's configuration.

    Raises:
        InvalidRequestError: A value has no meaning for this model, or breaks a rule.
    """
    family = facts.family.name
    known = ALGORITHMS.get(family, ())
    require(algorithm in known, "algorithm", f"be one of {', '.join(known)} for {family}", algorithm, "choose one of these")
    _check_names(sampling)
    seed = plain(sampling.get("seed"))
    noise_seed = secrets.randbelow(2**32) if seed is None else fold_seed(seed)
    kind = sampling.get("output_type") or "image"
    kinds = ("image", "latent", "both") if family == "sd3" else ("image", "latent")
    require(kind in kinds, "output_type", f"be one of {', '.join(kinds)} for {family}", kind, "choose one of these")
    steps = plain(sampling.get("num_inference_steps"))
    num_steps = facts.defaults.num_inference_steps if steps is None else steps
    require(is_int(num_steps) and num_steps >= 1, "num_inference_steps", "be an integer >= 1", num_steps, "use 1 or more")
    is_stochastic = algorithm in STOCHASTIC
    window = window_of(sampling, algorithm=algorithm, num_steps=num_steps, noise_seed=noise_seed) if is_stochastic else None
    wants_clean = kind == "both" or not is_stochastic
    params = SamplingParams(
        **_prompts(prompt, sampling, facts),
        **{name: plain(sampling.get(name)) for name in ("height", "width")},
        num_inference_steps=num_steps,
        **_dynamics(sampling, window),
        rollout_return_denoising_env=True,
        rollout_return_dit_trajectory=True,
        rollout_return_step_indices=_states(window, num_steps, wants_clean),
        image_format="none" if kind == "latent" else "uint8",
    )
    return SampleRequest(
        params=params,
        seed=seed,
        noise_seed=noise_seed,
        window=window,
        wants_log_probs=is_stochastic and bool(sampling.get("logprobs")),
        wants_clean=wants_clean,
        wants_timesteps=algorithm == "diffusion_nft",
    )


def group_request(params: SamplingParams, noise_seeds: Sequence[int]) -> SamplingParams:
    """Returns the request for several samples that differ in their seeds alone."""
    return replace(params, seeds=tuple(noise_seeds))


def output_fields(rollout: Rollout, request: SampleRequest, *, global_steps: int | None) -> dict[str, Any]:
    """Returns the fields of a `DiffusionOutput`; tensors have no batch dimension.

    What verl-omni's trainer reads has its names there. Beside it, names that begin with `flowroll_` say where the sample comes
    from; `flowroll_rollout` is what `rollout_of` needs to make the rollout again.

    Args:
        rollout: The finished sample.
        request: What it was made for.
        global_steps: The training step whose weights made it; None: the trainer has named none.
    """
    assert rollout.denoising_env is not None and rollout.dit_trajectory is not None and rollout.log_probs is not None
    trajectory, window, record = rollout.dit_trajectory, request.window, rollout.sampling
    rows = {state: row for row, state in enumerate(trajectory.latent_step_indices)}
    extra: dict[str, Any] = {"global_steps": global_steps}
    if window is not None:
        states = [rows[state] for state in range(window.start, window.stop + 1)]
        extra["all_latents"] = trajectory.latents[states].float()
        extra["all_timesteps"] = trajectory.timesteps[window.start : window.stop].clone()
    for prefix, branch in (
        ("", rollout.denoising_env.pos_cond_kwargs),
        ("negative_", rollout.denoising_env.neg_cond_kwargs),
    ):
        extra |= _embeds(prefix, branch, has_pooled=record.family == "sd3")
    if request.wants_clean and not request.wants_latents:
        extra["latents_clean"] = trajectory.latents[rows[record.num_inference_steps]].float()
    elif request.wants_clean:
        assert rollout.latents is not None
        extra["latents_clean"] = rollout.latents.float()
    if request.wants_timesteps:
        extra["train_timesteps"] = trajectory.timesteps.clone()
    return {
        "diffusion_output": _picture(rollout),
        "log_probs": None
        if window is None or not request.wants_log_probs
        else rollout.log_probs[window.start : window.stop].clone(),
        "stop_reason": "completed",
        "num_preempted": None,
        "extra_fields": extra | _provenance(rollout, request),
    }


def aborted_fields(sampling: Mapping[str, Any], *, global_steps: int | None) -> dict[str, Any]:
    """Returns the fields of the `DiffusionOutput` of a sample that was given up, which verl-omni's client asks for again."""
    dtype = torch.float32 if sampling.get("output_type") == "latent" else torch.uint8
    return {
        "diffusion_output": torch.empty(0, dtype=dtype),
        "log_probs": None,
        "stop_reason": "aborted",
        "num_preempted": None,
        "extra_fields": {"global_steps": global_steps},
    }


def _check_names(sampling: Mapping[str, Any]) -> None:
    for name, value in sampling.items():
        if name in _USED or value is None:
            continue
        is_known = name in _OF_VIDEO
        require(is_known, str(name)[:80], "be known to flowroll", value, "leave it out of pipeline and algo")
        allowed = _OF_VIDEO[name]
        if allowed is not None:
            rule = f"be {' or '.join(map(str, allowed))} for pictures"
            require(plain(value) in allowed, name, rule, value, "leave it at its default")


def _prompts(prompt: PromptIds, sampling: Mapping[str, Any], facts: ModelFacts) -> dict[str, Any]:
    """Returns the token ids of both branches, and the guidance scale."""
    make = _prompts_of_sd3 if facts.family.name == "sd3" else _prompts_of_qwen_image
    return make(prompt, sampling, facts)


def _prompts_of_qwen_image(prompt: PromptIds, sampling: Mapping[str, Any], facts: ModelFacts) -> dict[str, Any]:
    embedded, rule = sampling.get("guidance_scale"), "be left out, since Qwen-Image takes no scale as an input"
    require(embedded is None, "guidance_scale", rule, embedded, "set pipeline.true_cfg_scale")
    (tokenizer,) = facts.tokenizers
    length = plain(sampling.get("max_sequence_length"))
    # The pipeline leaves out the embeddings of the template first, and cuts then. A causal text encoder gives the embeddings
    # that are left the same values if the ids are cut instead.
    most = None if length is None else len(tokenizer.template) + _length(length)
    found: dict[str, Any] = {"prompt_token_ids": (_ids("prompt_ids", prompt.ids)[:most],)}
    given = plain(sampling.get("true_cfg_scale"))
    scale = 4.0 if given is None else given
    # Without a negative prompt verl-omni runs without guidance, whatever the scale is.
    if prompt.negative_ids is None:
        return found | {"true_cfg_scale": 1.0}
    if scale > 1:
        found["negative_prompt_token_ids"] = (_ids("negative_prompt_ids", prompt.negative_ids)[:most],)
    return found | {"true_cfg_scale": scale}


def _prompts_of_sd3(prompt: PromptIds, sampling: Mapping[str, Any], facts: ModelFacts) -> dict[str, Any]:
    own = facts.spec.widths["text_tokens"] - facts.tokenizers[0].max_tokens
    length = plain(sampling.get("max_sequence_length"))
    remedy = f"set pipeline.max_sequence_length={own} and max_prompt_embed_length={facts.spec.widths['text_tokens']}"
    require(length is None or length == own, "max_sequence_length", f"be {own} for sd3", length, remedy)
    scale = plain(sampling.get("true_cfg_scale"))
    require(scale in (None, 0, 1), "true_cfg_scale", "be 1 for sd3", scale, "set pipeline.guidance_scale")
    guidance = plain(sampling.get("guidance_scale")) or 0.0
    found: dict[str, Any] = {"prompt_token_ids": _ids_by_encoder("extra_prompt_ids", prompt.extra, facts)}
    if guidance > 1 and prompt.negative_extra is not None:
        ids = _ids_by_encoder("negative_extra_prompt_ids", prompt.negative_extra, facts)
        found["negative_prompt_token_ids"] = ids
    return found | {"guidance_scale": guidance}


def _ids_by_encoder(field: str, given: Mapping[str, Any] | None, facts: ModelFacts) -> tuple[tuple[int, ...], ...]:
    wanted = [_SD3_ENCODERS[one.name] for one in facts.tokenizers]
    missing = sorted(set(wanted) - set(given or {}))
    remedy = (
        "set model.extra_tokenizers, e.g. {clip: {path: tokenizer, max_length: 77}, t5: {path: tokenizer_3, max_length: 256}}"
    )
    require(not missing, field, f"hold the token ids {' and '.join(sorted(set(wanted)))}", sorted(given or {}), remedy)
    assert given is not None
    return tuple(_ids(f"{field}.{name}", given[name]) for name in wanted)


def _ids(field: str, given: Any) -> tuple[int, ...]:
    if isinstance(given, Tensor) or getattr(given, "ndim", None) is not None:
        given = given.tolist()
    rows = list(given) if isinstance(given, list | tuple) else None
    if rows is not None and len(rows) == 1 and isinstance(rows[0], list | tuple):
        rows = list(rows[0])
    ids = None if rows is None else plain(rows)
    require(ids is not None and len(ids) > 0 and all(map(is_int, ids)), field, "hold token ids", given, "send one list of ids")
    assert ids is not None
    return tuple(ids)


def _length(value: object) -> int:
    ok = is_int(value) and isinstance(value, int) and value >= 1
    require(ok, "max_sequence_length", "be an integer >= 1", value, "leave it out for the model's own")
    assert isinstance(value, int)
    return value


def _dynamics(sampling: Mapping[str, Any], window: range | None) -> dict[str, Any]:
    if window is None:
        return {"rollout_sde_type": "ode", "rollout_noise_level": 0}
    kind = sampling.get("sde_type") or "sde"
    kinds = ("sde", "cps", "dance_sde")
    require(kind in kinds, "sde_type", f"be one of {', '.join(kinds)}", kind, "choose one of these")
    given = plain(sampling.get("noise_level"))
    level = 0.7 if given is None else given
    silent = level == 0 and bool(sampling.get("logprobs"))
    require(not silent, "noise_level", "be above 0 where log-probs are asked for", level, "set calculate_log_probs=False")
    return {
        "rollout_sde_type": kind,
        "rollout_noise_level": level,
        "rollout_sde_step_indices": tuple(window),
        # verl-omni's CPS has the squared distance alone as its log-prob, without scale and constants.
        "rollout_log_prob_no_const": kind == "cps",
    }


def _states(window: range | None, num_steps: int, wants_clean: bool) -> tuple[int, ...]:
    wanted = set() if window is None else set(range(window.start, window.stop + 1))
    return tuple(sorted(wanted | ({num_steps} if wants_clean else set())))


def _embeds(prefix: str, branch: Mapping[str, Any] | None, *, has_pooled: bool) -> dict[str, Any]:
    embeds = None if branch is None else branch["encoder_hidden_states"]
    mask = None if branch is None else branch.get("encoder_hidden_states_mask")
    if embeds is not None and mask is None:
        mask = torch.ones(len(embeds), dtype=torch.int64)
    found = {f"{prefix}prompt_embeds": embeds, f"{prefix}prompt_embeds_mask": None if mask is None else mask.long()}
    if has_pooled:
        found[f"{prefix}pooled_prompt_embeds"] = None if branch is None else branch["pooled_projections"]
    return found


def _picture(rollout: Rollout) -> Tensor:
    if rollout.image is None:
        assert rollout.latents is not None
        return rollout.latents.float()
    assert isinstance(rollout.image, Tensor)
    return rollout.image[:, 0]


def _provenance(rollout: Rollout, request: SampleRequest) -> dict[str, Any]:
    text, _ = flatten(rollout)
    return {
        "flowroll_seed": request.seed,
        "flowroll_noise_seed": rollout.seed,
        "flowroll_window_start": None if request.window is None else request.window.start,
        "flowroll_adapter": None if rollout.sampling.lora is None else rollout.sampling.lora.name,
        "flowroll_weight_version": rollout.weight_version,
        "flowroll_weights_sha256": None if rollout.provenance is None else rollout.provenance.weights_sha256,
        "flowroll_sigmas": torch.tensor(rollout.sampling.sigmas, dtype=torch.float32),
        "flowroll_rollout": text,
    }
