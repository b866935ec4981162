"""Rollouts of flowroll for miles' diffusion trainer: `--custom-generate-function-path flowroll.integrations.miles.generate`.

miles calls `generate` where it would post to SGLang-Diffusion itself. The request is built by miles' own builder, from its own
flags, and the samples are filled in by miles' own parser, so that their fields are those of whichever miles is installed; what
is different is the way in between: flowroll's client, with its errors, its retries and msgpack. This module must not know what
miles does with the samples.

Source: radixark/miles_diffusion, `miles/rollout/sglang_diffusion_rollout.py` and `miles/utils/diffusion_rollout_response.py`.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import os
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from flowroll.client import AsyncClient
from flowroll.errors import InvalidRequestError, MissingExtraError, QueueFullError, ServerConnectionError
from flowroll.integrations.seeds import fold_seed
from flowroll.types import Rollout
from flowroll.types.results import replace_tensors
from flowroll.wire.dialects import rollout_to_wire
from flowroll.wire.names import EXTRA

URL_VARIABLE, KEY_VARIABLE = "FLOWROLL_URL", "FLOWROLL_API_KEY"
# Seconds: the longest silence of a server, how long one that is full or cannot be reached is asked again, and pauses between.
_TIMEOUT_S, _MAX_WAIT_S, _MAX_PAUSE_S, _RECONNECT_S = 3600.0, 600.0, 60.0, 1.0
# Fields of miles' requests that are about videos.
_OF_VIDEOS = ("rollout_video_dtype",)


async def generate(
    args: Namespace, microgroup: list[Any], sampling_params: dict[str, Any], *, evaluation: bool = False
) -> list[Any]:
    """Makes the rollouts of a microgroup, which is some samples of one prompt, and fills them in.

    The server is that of the environment variable FLOWROLL_URL, or else miles' router (`args.sglang_router_ip` and
    `args.sglang_router_port`); FLOWROLL_API_KEY is its key, if it has one.

    Args:
        args: miles' arguments.
        microgroup: The samples, `miles.utils.types.Sample`, with the prompt; the first one's counts.
        sampling_params: What miles' `build_rollout_sampling_params` made of its flags, with the `seed` of the first sample.
        evaluation: Whether only pictures are wanted.

    Returns:
        The samples as miles' own `apply_rollout_image_response` fills them in, on the CPU. Each has its own seed, the version
        of its weights at the end of `weight_versions`, and, if it is no evaluation, `train_metadata["sde_step_indices"]`.
        Where seeds do not fit into 32 bits, `seed` is the folded one and `train_metadata["trainer_seed"]` the one that was
        asked for.

    Raises:
        MissingExtraError: miles is not installed.
        InvalidRequestError: The flags ask for what the server's model cannot do.
        FlowrollError: The server raised any other error, or could not be reached for ten minutes.
    """
    if not microgroup:
        return []
    trainer = _import("miles.rollout.sglang_diffusion_rollout")
    given = dict(sampling_params)
    if not evaluation:
        given.update(_step_indices(args, trainer.GenerateState(args), microgroup[0], given))
    payload = trainer.build_rollout_generate_payload(given, microgroup[0].prompt, num_outputs_per_prompt=len(microgroup))
    async with AsyncClient(_url(args), api_key=os.environ.get(KEY_VARIABLE), timeout_s=_TIMEOUT_S) as client:
        rollouts = await _roll_out(client, request_fields(payload))
    if len(rollouts) != len(microgroup):
        raise ServerConnectionError(
            f"the server must answer with {len(microgroup)} samples, got {len(rollouts)}; check what is at {_url(args)}."
        )
    if not evaluation:
        _check_guidance(payload, rollouts[0])
    filled = [fill_sample(sample, rollout) for sample, rollout in zip(microgroup, rollouts, strict=True)]
    if folded_seeds(payload) is not None:
        for index, sample in enumerate(filled):
            sample.train_metadata = {**(sample.train_metadata or {}), "trainer_seed": payload["seed"] + index}
    return filled


def request_fields(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of `SamplingParams` in a request as miles sends it to POST /rollout/generate.

    Args:
        payload: The JSON body. null is the same as nothing; `extra_sampling_params` holds further fields.

    Raises:
        InvalidRequestError: A further field is given twice.
    """
    fields = {name: value for name, value in payload.items() if value is not None and name not in _OF_VIDEOS}
    further = fields.pop(EXTRA, {})
    for name in further:
        if name in fields:
            raise InvalidRequestError(f"{name} must be given once, got it in {EXTRA} too; remove it there.", field=name)
    fields |= further
    if (seeds := folded_seeds(fields)) is not None:
        fields["seeds"] = seeds
        del fields["seed"]
        fields.pop("num_outputs_per_prompt", None)
    if not fields.get("rollout", True):
        # The builder leaves them out of evaluations, and a rollout's defaults are not asked for.
        fields = {name: value for name, value in fields.items() if name == "rollout" or not name.startswith("rollout_")}
    return fields


def folded_seeds(fields: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Returns the engine's seeds of a request whose own do not all fit into 32 bits, each folded by `fold_seed`; else None."""
    seed, count = fields.get("seed"), fields.get("num_outputs_per_prompt") or 1
    if not isinstance(seed, int) or seed + count <= 2**32:
        return None
    return tuple(fold_seed(seed + index) for index in range(count))


def fill_sample(sample: Any, rollout: Rollout) -> Any:
    """Fills in a sample of miles by miles' own parser, without a detour through bytes.

    Args:
        sample: The `miles.utils.types.Sample` to fill in.
        rollout: Its rollout.

    Returns:
        The sample.

    Raises:
        MissingExtraError: miles is not installed.
    """
    response = _import("miles.utils.diffusion_rollout_response")
    sample = response.apply_rollout_image_response(sample, response_body(rollout), deserialize_func=_tensor_of)
    trajectory = sample.dit_trajectory
    if hasattr(trajectory, "latent_step_indices") and rollout.dit_trajectory is not None:
        assert trajectory.latent_step_indices.tolist() == list(rollout.dit_trajectory.latent_step_indices)
    sample.weight_versions.append(rollout.weight_version)
    if rollout.sde_step_indices is not None:
        sample.train_metadata = {**(sample.train_metadata or {}), "sde_step_indices": list(rollout.sde_step_indices)}
    return sample


def response_body(rollout: Rollout) -> dict[str, Any]:
    """Returns the answer's object in the names of SGLang-Diffusion, whose tensors lie in the place of their bytes."""
    sent = rollout_to_wire(rollout, "sglang")

    def leaf(tensor: Tensor) -> dict[str, Any]:
        return {"__tensor__": True, "data": tensor, "shape": list(tensor.shape), "dtype": str(tensor.dtype)}

    env, trajectory = sent.denoising_env, sent.dit_trajectory
    parts: dict[str, Any] = {
        "generated_output": sent.generated_output,
        "rollout_log_probs": sent.rollout_log_probs,
        "rollout_debug_tensors": sent.rollout_debug_tensors,
        "denoising_env": None if env is None else {name: getattr(env, name) for name in env.__struct_fields__},
        "dit_trajectory": None
        if trajectory is None
        else {name: getattr(trajectory, name) for name in trajectory.__struct_fields__},
    }
    return {
        "request_id": sent.request_id,
        "prompt": sent.prompt,
        "seed": sent.seed,
        "inference_time_s": sent.inference_time_s,
        "peak_memory_mb": sent.peak_memory_mb,
        **{name: replace_tensors(value, leaf) for name, value in parts.items()},
    }


def _tensor_of(value: Any) -> Tensor | None:
    """Reads what `response_body` has in the place of a serialized tensor; one release of miles looks inside it first."""
    if value is None or isinstance(value, Tensor):
        return value
    tensor = value["data"]
    assert isinstance(tensor, Tensor)
    return tensor


def _check_guidance(payload: Mapping[str, Any], rollout: Rollout) -> None:
    """Refuses what miles' `cfg_combine` would compute in another way than the rollout was made."""
    record = rollout.sampling
    if record.family == "qwen_image" and record.guidance_rule != "none" and payload.get("true_cfg_scale") is None:
        raise InvalidRequestError(
            f"diffusion_true_cfg_scale must be given for guided Qwen-Image, got guidance_scale {record.guidance_scale:g} "
            "alone, with which miles leaves out the norm rescaling of the pipeline; use --diffusion-true-cfg-scale.",
            field="true_cfg_scale",
        )


def _step_indices(args: Namespace, state: Any, sample: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns which steps are stochastic and which latents come back, as `--diffusion-step-strategy-path` chooses them."""
    strategy = state.step_strategy_fn
    if strategy is None:
        return {}
    further = {}
    if "rollout_id" in inspect.signature(strategy).parameters:
        further["rollout_id"] = int(getattr(state, "rollout_id", 0) or 0)
    stochastic, returned = strategy(args, sample, int(given["num_inference_steps"]), int(given["seed"]), **further)
    if getattr(args, "rollout_return_full_trajectory", False):
        returned = None
    return {"rollout_sde_step_indices": stochastic, "rollout_return_step_indices": returned}


async def _roll_out(client: AsyncClient, fields: Mapping[str, Any]) -> Sequence[Rollout]:
    until_s = time.monotonic() + _MAX_WAIT_S
    while True:
        try:
            return await client.rollout(**fields)
        except (QueueFullError, ServerConnectionError) as error:
            pause_s = min(getattr(error, "retry_after_s", _RECONNECT_S), _MAX_PAUSE_S)
            if time.monotonic() + pause_s > until_s:
                raise
            await asyncio.sleep(pause_s)


def _url(args: Namespace) -> str:
    return os.environ.get(URL_VARIABLE) or f"http://{args.sglang_router_ip}:{args.sglang_router_port}"


def _import(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "miles":
            raise
        raise MissingExtraError(
            f"flowroll.integrations.miles must have miles, got none ({module}); install github.com/radixark/miles_diffusion."
        ) from error
