"""The requests that every layout has to answer with the bits of one rank, with everything recorded."""

from typing import Any

FAMILIES = ("qwen_image", "z_image")
DTYPES = ("float32", "bfloat16")
_EVERYTHING = {"debug_mode": True, "return_denoising_env": True, "return_dit_trajectory": True}
# 156, 319 and 1,056 image tokens. With their text, the first two end in an attention block of one row for Qwen-Image.
_SIZES = {"small": (192, 208), "odd": (464, 176), "large": (512, 528)}
# The short prompts make pairs of captions of different padded lengths for Z-Image.
_SHORT, _LONG = "a cat", "a red car beside a wooden table, " * 4


def _request(size: tuple[int, int], prompt: str, **fields: Any) -> dict[str, Any]:
    height, width = size
    return {"prompt": prompt, "seed": 40, "height": height, "width": width, "num_inference_steps": 2, **_EVERYTHING, **fields}


CASES: dict[str, dict[str, Any]] = {
    "tiny": _request((64, 64), _SHORT, sde_type="sde", num_outputs_per_prompt=4),
    "small, four, window, no guidance": _request(
        _SIZES["small"], _SHORT, num_inference_steps=3, sde_step_indices=(1,), guidance_scale=0.0, num_outputs_per_prompt=4
    ),
    **{f"odd, {kind}": _request(_SIZES["odd"], _LONG, sde_type=kind, noise_level=0.6) for kind in ("sde", "cps", "ode")},
    **{f"large, {kind}": _request(_SIZES["large"], _SHORT, sde_type=kind, noise_level=0.6) for kind in ("sde", "cps", "ode")},
}
