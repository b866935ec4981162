"""Where the host may wait for the device, and why. In a step, once the first one has run, and in a capture it may nowhere."""

from __future__ import annotations

from collections.abc import Mapping

_TO_DEVICE = "weights go to the device once"
_TEXT = "tokens and masks of a prompt go to the device, and decide how many rows there are; once a prompt"
_FINITE = "a value that is not finite ends the request before anything is made of it"
_SCHEDULE = "the timesteps of a request go to the device once"
_TABLE = "the model's own table of positions goes to the device at its first forward"
_RECORD = "a recorded tensor goes to the trainer's device"
_QWEN = "diffusers.pipelines.qwenimage.pipeline_qwenimage"
_SD3 = "diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3"

_ENCODE: Mapping[str, str] = {
    f"{_QWEN}:_extract_masked_hidden": _TEXT,
    f"{_QWEN}:encode_prompt": _TEXT,
    f"{_SD3}:_get_clip_prompt_embeds": _TEXT,
    f"{_SD3}:_get_t5_prompt_embeds": _TEXT,
    "diffusers.pipelines.z_image.pipeline_z_image:_encode_prompt": _TEXT,
    "transformers.tokenization_utils_base:<dictcomp>": _TEXT,
    "transformers.cache_utils:lazy_initialization": "the encoders of transformers make a cache of keys, from an empty list",
}

# By stage, then by place.
WAITS: Mapping[str, Mapping[str, str]] = {
    "load": {
        **_ENCODE,
        "transformers.modeling_utils:to": _TO_DEVICE,
        "diffusers.models.modeling_utils:to": _TO_DEVICE,
        "flowroll.engine.loading:<genexpr>": "a test prompt must give finite embeddings",
    },
    "encode": {
        **_ENCODE,
        "flowroll.engine.outputs:check_encoded": _FINITE,
        "flowroll.types.results:<lambda>": "the environment goes to the host, once for all samples; digests are of its bytes",
        "flowroll.engine.runner.sample:build": _SCHEDULE,
    },
    "first step": {
        "diffusers.models.transformers.transformer_qwenimage:_get_device_freqs": _TABLE,
        "diffusers.models.transformers.transformer_z_image:<listcomp>": _TABLE,
    },
    "record": {"flowroll.exact.layout:same_bits": "the first replay of a recording is compared with the eager forward"},
    "compare": {"flowroll.parallel.mesh:_digest": "ranks compare the latents of a sample after its last step"},
    "decode": {
        "flowroll.engine.outputs:check_denoised": _FINITE,
        "flowroll.engine.runner.pipeline:_picture": f"{_FINITE}; the picture goes to the host",
        "flowroll.families.qwen_image:vae_input": "the VAE's constants go to the device, twice a sample",
    },
    "finish": {
        "flowroll.engine.outputs:as_image": "the final latents go to the host",
    },
    "replay": {
        "flowroll.families.recipe:of": _SCHEDULE,
        "flowroll.types.results:<lambda>": _RECORD,
        "flowroll.replay.sources:state": _RECORD,
        "flowroll.replay.scoring:_micro_batch": _RECORD,
    },
    "update": {
        "flowroll.engine.weights.staged:_fits": "a new weight must be finite, which the device finds out, beside the steps",
        "flowroll.engine.weights.staged:waiting": "a new weight is cast and checked on the device, and waits on the host, "
        "beside the steps of requests",
    },
}
