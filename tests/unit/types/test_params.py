import pytest

from flowroll import SamplingParams
from flowroll.errors import InvalidRequestError


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("prompt", {"prompt": "\ud800"}),
        ("prompt", {"prompt": "x" * 100_001}),
        ("seed", {"seed": -1}),
        ("seed", {"seed": 2**32}),
        ("seed", {"seed": 2**32 - 1, "num_outputs_per_prompt": 2}),
        ("seed", {"seed": True}),
        ("seeds", {"seeds": (1, 2), "seed": 1}),
        ("seeds", {"seeds": ()}),
        ("seeds", {"seeds": (1, -2)}),
        ("seeds", {"seeds": (1, 2), "num_outputs_per_prompt": 3}),
        ("width", {"width": 0}),
        ("num_inference_steps", {"num_inference_steps": 0}),
        ("num_outputs_per_prompt", {"num_outputs_per_prompt": 0}),
        ("guidance_scale", {"guidance_scale": -0.1}),
        ("true_cfg_scale", {"true_cfg_scale": float("inf")}),
        ("true_cfg_scale", {"true_cfg_scale": 1000.1}),
        ("seed", {"seed": 10**5000}),
        ("true_cfg_scale", {"true_cfg_scale": float("nan")}),
        ("sigmas", {"sigmas": (1.0,)}),
        ("sigmas", {"sigmas": (1.0, 0.5)}),
        ("sigmas", {"sigmas": (1.1, 0.0)}),
        ("sigmas", {"sigmas": (1.0, 0.5, 0.5, 0.0)}),
        ("sigmas", {"sigmas": (1.0, float("nan"), 0.0)}),
        ("sigmas", {"sigmas": (1.0, 0.5, 0.0), "num_inference_steps": 3}),
        ("noise_level", {"noise_level": 9e-5}),
        ("noise_level", {"noise_level": 10.1}),
        ("noise_level", {"noise_level": -1.0}),
        ("noise_level", {"noise_level": float("nan")}),
        ("noise_level", {"noise_level": 1.01, "sde_type": "cps"}),
        ("sde_step_indices", {"sde_step_indices": (0, 0)}),
        ("sde_step_indices", {"sde_step_indices": (-1,)}),
        ("return_step_indices", {"return_step_indices": (1, 1)}),
    ],
)
def test_a_bad_value_is_refused_by_name(field: str, values: dict) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(**{"prompt": "a cat", **values})
    assert caught.value.field == field
    assert caught.value.message.startswith(f"{field} must ")
    assert ", got " in caught.value.message and "; " in caught.value.message


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"prompt": ""},
        {"seed": 2**32 - 1},
        {"seeds": (5, 5)},
        {"noise_level": 0},
        {"noise_level": 1e-4},
        {"noise_level": 10},
        {"noise_level": 1, "sde_type": "cps"},
        {"sigmas": (0.999995, 0.5, 0), "num_inference_steps": 2},
        {"sde_step_indices": ()},
        {"guidance_scale": 0},
        {"guidance_scale": 1000},
    ],
)
def test_values_at_the_limits_are_accepted(values: dict) -> None:
    SamplingParams(**{"prompt": "a cat", **values})
