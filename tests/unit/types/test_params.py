import json
import subprocess
import sys
from pathlib import Path

import pytest

from flowroll import SamplingParams
from flowroll.engine import Engine
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
        ("guidance_scale", {"guidance_scale": 10**400}),
        ("noise_level", {"noise_level": 10**400}),
        ("sigmas", {"sigmas": (1.0, 10**400, 0.5, 0.0)}),
        ("sigmas", {"sigmas": (1.0, -(10**400), 0.0)}),
        ("sde_step_indices", {"sde_step_indices": (10**5000, 10**5000)}),
        ("request_id", {"request_id": ""}),
        ("request_id", {"request_id": "x" * 257}),
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
        {"request_id": "x" * 256},
    ],
)
def test_values_at_the_limits_are_accepted(values: dict) -> None:
    SamplingParams(**{"prompt": "a cat", **values})


# Values of the wrong type, as JSON. The suite's type checks would refuse them before `SamplingParams` sees them.
WRONG_TYPES = [
    *(
        (name, {name: value})
        for name in (
            "rollout",
            "debug_mode",
            "log_prob_no_const",
            "return_denoising_env",
            "return_dit_trajectory",
            "suppress_logs",
        )
        for value in (1, "false", None)
    ),
    *(
        (name, {name: value})
        for name in ("seeds", "sigmas", "sde_step_indices", "return_step_indices")
        for value in (3, "10", {"1": 0})
    ),
    *(
        (name, {name: "2"})
        for name in ("width", "num_inference_steps", "num_outputs_per_prompt", "noise_level", "true_cfg_scale")
    ),
    *((name, {name: 5}) for name in ("prompt", "negative_prompt", "request_id", "sde_type", "generator_device")),
    ("num_outputs_per_prompt", {"seed": 1, "num_outputs_per_prompt": "2"}),
    ("seed", {"seed": "1"}),
    ("seeds", {"seeds": [1.5]}),
    ("sigmas", {"sigmas": ["a", "b"]}),
]
PROGRAM = """
import json, sys
from flowroll import SamplingParams
from flowroll.errors import InvalidRequestError

for values in json.load(sys.stdin):
    try:
        SamplingParams(**{"prompt": "a cat", **values})
    except InvalidRequestError as error:
        print(json.dumps([error.field, error.message]))
    except Exception as error:
        print(json.dumps(["not refused but raised", repr(error)]))
    else:
        print(json.dumps(["accepted", ""]))
names = ("seeds", "sigmas", "sde_step_indices", "return_step_indices")
given = dict(zip(names, ([5, 6], [1.0, 0.0], [0], [1])))
as_tuples = SamplingParams(prompt="a cat", **{name: tuple(value) for name, value in given.items()})
print(json.dumps(SamplingParams(prompt="a cat", **given) == as_tuples))
"""


def test_values_of_a_wrong_type_are_refused_by_name_and_lists_become_tuples() -> None:
    sent = json.dumps([values for _, values in WRONG_TYPES])
    done = subprocess.run([sys.executable, "-c", PROGRAM], input=sent, check=True, capture_output=True, text=True)
    *outcomes, lists_are_tuples = map(json.loads, done.stdout.splitlines())
    for (field, values), (refused, message) in zip(WRONG_TYPES, outcomes, strict=True):
        assert refused == field, (values, refused, message)
        assert message.startswith(f"{field} must ")
    assert lists_are_tuples


def test_fields_without_a_prompt_are_refused_by_the_engine(z_image_checkpoint: Path) -> None:
    with Engine(z_image_checkpoint) as engine:
        for method in (engine.rollout, engine.generate):
            with pytest.raises(InvalidRequestError, match="prompt must be given") as caught:
                method(height=32)
            assert caught.value.field == "prompt"
