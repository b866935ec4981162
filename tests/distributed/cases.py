"""The requests that every layout has to answer with the bits of one rank, with everything recorded."""

from typing import Any

from flowroll.sampling.dynamics import DYNAMICS

FAMILIES = ("qwen_image", "z_image")
DTYPES = ("float32", "bfloat16")
_EVERYTHING = {"debug_mode": True, "return_denoising_env": True, "return_dit_trajectory": True}
# 156, 319 and 1,056 image tokens. Attention computes a last block of 1 to 3 queries otherwise than a larger one. Qwen-Image's
# text of 7 tokens makes the small sequence end in one, and that of 33 would make the ranks' shares of the odd one end in one.
_SIZES = {"small": (192, 208), "odd": (464, 176), "large": (512, 528)}
# For Z-Image the captions of a pair have different padded lengths: the empty one has 32, the long one 64.
_SHORT, _LONG = "a cat", "a red car beside a wooden table, " * 3 + "a red car beside"


def _request(size: tuple[int, int], prompt: str, **fields: Any) -> dict[str, Any]:
    height, width = size
    return {"prompt": prompt, "seed": 40, "height": height, "width": width, "num_inference_steps": 2, **_EVERYTHING, **fields}


CASES: dict[str, dict[str, Any]] = {
    **{f"tiny, four, {kind}": _request((64, 64), _SHORT, sde_type=kind, num_outputs_per_prompt=4) for kind in DYNAMICS},
    "small, four, window, no guidance": _request(
        _SIZES["small"], _SHORT, num_inference_steps=3, sde_step_indices=(1,), guidance_scale=0.0, num_outputs_per_prompt=4
    ),
    **{f"odd, {kind}": _request(_SIZES["odd"], _LONG, sde_type=kind, noise_level=0.6) for kind in DYNAMICS},
    # The dynamics are no business of the ranks': one is enough where a forward takes long.
    "large, sde": _request(_SIZES["large"], _SHORT, sde_type="sde", noise_level=0.6),
}
