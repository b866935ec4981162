import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flowroll import SamplingParams
from flowroll.engine import Engine
from flowroll.errors import InvalidRequestError
from flowroll.sampling.transition import LogProbForm
from flowroll.types import ALIASES, ROLLOUT_FIELDS, StepOptions

# Values other than the defaults, by field.
CHOSEN = {
    "rollout_sde_type": "cps",
    "rollout_noise_level": 0.5,
    "rollout_log_prob_no_const": True,
    "log_prob": LogProbForm(reduce="sum"),
    "rollout_debug_mode": True,
    "rollout_return_denoising_env": True,
    "rollout_return_dit_trajectory": True,
    "rollout_sde_step_indices": (0, 1),
    "rollout_steps": (StepOptions(noise_level=0.4), StepOptions(dynamics="dance")),
    "rollout_noise_levels": (0.4, 0),
    "rollout_return_step_indices": (2,),
    "return_fields": ("x0", "std"),
    "decode_step_indices": (1,),
    "sde_seed": 3,
    "stop_step": 2,
    "fork": {1: 2},
    "image_format": "uint8",
}


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
        ("init_seed", {"init_seed": -1}),
        ("init_seed", {"init_seed": True}),
        ("init_seed", {"init_seed": ()}),
        ("init_seed", {"init_seed": (1, 2**32)}),
        ("init_seed", {"init_seed": (1, 2), "num_outputs_per_prompt": 3}),
        ("init_seed", {"init_seed": (1, 2), "seeds": (1, 2, 3)}),
        ("sde_seed", {"sde_seed": 2**32}),
        ("stop_step", {"stop_step": 0}),
        ("fork", {"fork": {}}),
        ("fork", {"fork": {-1: 2}}),
        ("fork", {"fork": {1: 1}}),
        ("fork", {"fork": {1: 1025}}),
        ("fork", {"fork": {1: True}}),
        ("fork", {"fork": {"one": 2}}),
        ("fork", {"fork": ((1, 2), (1, 3))}),
        ("fork", {"fork": ((2, 2), (1, 3))}),
        ("stop_step", {"stop_step": True}),
        ("start_step", {"start_step": 1}),
        ("start_step", {"start_step": -1}),
        ("sde_seed", {"sde_seed": (1, 2, 3), "init_seed": (1, 2)}),
        ("seed", {"seed": 2**32 - 1, "sde_seed": (1, 2)}),
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
        ("noise_level", {"noise_level": 2, "sde_type": "cps"}),
        ("rollout_noise_level", {"rollout_noise_level": 2.5, "sde_type": "cps"}),
        ("sde_type", {"sde_type": "flow-sde"}),
        ("rollout_sde_type", {"rollout_sde_type": "flow-sde", "noise_level": 0}),
        ("sigmas", {"sigmas": (1.0, 0.999995, 0.5, 0.0)}),
        ("pooled_prompt_embeds", {"pooled_prompt_embeds": torch.ones(3)}),
        ("negative_prompt_embeds_mask", {"negative_prompt_embeds_mask": torch.ones(3, dtype=torch.bool)}),
        ("prompt_embeds", {"prompt_embeds": torch.ones(2, 3)}),
        ("prompt_embeds", {"prompt": None, "prompt_embeds": torch.ones(2, 3), "prompt_token_ids": ((1,),)}),
        ("prompt_embeds", {"prompt": None, "prompt_embeds": torch.ones(2, 3, dtype=torch.int64)}),
        ("prompt_embeds", {"prompt": None, "prompt_embeds": ((1.0, 2.0),)}),
        ("negative_prompt_embeds", {"negative_prompt_embeds": torch.ones(2, 3), "negative_prompt": ""}),
        ("num_frames", {"num_frames": 0}),
        ("num_frames", {"num_frames": 2}),
        ("num_frames", {"num_frames": True}),
        ("fps", {"fps": float("nan")}),
        ("fps", {"fps": True}),
        ("sde_step_indices", {"sde_step_indices": (0, 0)}),
        ("sde_step_indices", {"sde_step_indices": (-1,)}),
        ("return_step_indices", {"return_step_indices": (1, 1)}),
        ("rollout_steps", {"rollout_steps": ()}),
        ("rollout_steps", {"rollout_steps": ({"noise_level": 0.4}, {}), "num_inference_steps": 3}),
        ("rollout_steps", {"rollout_steps": ({}, {}), "sigmas": (1.0, 0.0)}),
        ("rollout_steps", {"rollout_steps": ({"noise_level": 2}, {"noise_level": 2, "dynamics": "cps"})}),
        ("rollout_steps", {"rollout_steps": ({"dynamics": "cps"},), "noise_level": 2}),
        ("rollout_steps", {"rollout_steps": ({"level": 0.4},)}),
        ("rollout_steps", {"rollout_steps": (0.4,)}),
        ("rollout_steps", {"rollout_steps": ({},), "noise_levels": (0.4,)}),
        ("rollout_steps", {"rollout_steps": ({},), "sde_step_indices": (0,)}),
        ("noise_levels", {"noise_levels": (0.4,), "sde_step_indices": (0,)}),
        ("noise_levels", {"noise_levels": (0.4, 10.1)}),
        ("noise_levels", {"noise_levels": (0.4, True)}),
        ("sde_step_indices", {"sde_type": "dpmpp2m", "sde_step_indices": (0,)}),
        ("sigmas", {"rollout_steps": ({}, {"noise_level": 0.3}), "sigmas": (1.0, 0.999995, 0.0)}),
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
        {"noise_level": 1.3, "sde_type": "cps"},
        {"noise_level": math.nextafter(2, 0), "sde_type": "cps"},
        {"rollout_noise_level": 10, "rollout_sde_type": "dance_sde"},
        {"sigmas": (1.0, 0.999995, 0.5, 0.0), "sde_type": "cps"},
        {"sigmas": (1.0, 0.999995, 0.5, 0.0), "sde_step_indices": (0, 2)},
        {"sigmas": (1.0, 0.999995, 0.5, 0.0), "noise_level": 0},
        {"sigmas": (1.0, 0.999995, 0.5, 0.0), "rollout": False},
        {"num_frames": 1, "fps": 24},
        {"fps": 0},
        {"fps": -29.97},
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


def test_every_field_with_the_prefix_but_the_steps_has_a_short_name() -> None:
    assert {*CHOSEN, "rollout"} == ROLLOUT_FIELDS
    named = {name for name in CHOSEN if name.startswith("rollout_")} - {"rollout_steps"}
    assert {field: short for short, field in ALIASES.items()} == {name: name.removeprefix("rollout_") for name in named}


@pytest.mark.parametrize(("short", "field"), ALIASES.items())
def test_a_short_name_is_the_field(short: str, field: str) -> None:
    params = SamplingParams(prompt="a cat", **{short: CHOSEN[field]})
    assert params == SamplingParams(prompt="a cat", **{field: CHOSEN[field]})
    assert getattr(params, short) == getattr(params, field) == CHOSEN[field]
    assert getattr(replace(params, seed=3), short) == CHOSEN[field]


@pytest.mark.parametrize(("short", "field"), ALIASES.items())
def test_a_value_given_by_both_names_is_refused_with_both(short: str, field: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"{field} must be given once, got {short} beside it; remove one") as caught:
        SamplingParams(prompt="a cat", **{field: CHOSEN[field], short: CHOSEN[field]})
    assert caught.value.field == field


def test_an_alias_of_a_dynamics_becomes_its_name() -> None:
    params = SamplingParams(prompt="a cat", sde_type="dance_sde")
    assert params.rollout_sde_type == "dance" and params == SamplingParams(prompt="a cat", rollout_sde_type="dance")


@pytest.mark.parametrize("field", sorted(set(CHOSEN) - {"image_format"}))
def test_an_evaluation_refuses_what_only_a_rollout_has(field: str) -> None:
    # The server answered null where an environment was asked for.
    for name in {field, next((short for short, full in ALIASES.items() if full == field), field)}:
        with pytest.raises(InvalidRequestError, match=rf"{name} must be left out of an evaluation \(rollout=False\)") as caught:
            SamplingParams(prompt="a cat", rollout=False, **{name: CHOSEN[field]})
        assert caught.value.field == name


def test_an_evaluation_may_say_that_it_wants_nothing() -> None:
    nothing = {"return_denoising_env": False, "return_step_indices": None, "debug_mode": False}
    SamplingParams(prompt="a cat", rollout=False, **nothing, sde_type="ode", noise_level=0)
    SamplingParams(prompt="a cat", rollout=False, sde_type="sde", noise_level=0.7)
    SamplingParams(prompt="a cat", rollout=False, image_format="uint8")


def test_a_sigma_near_one_is_refused_with_its_step_and_what_to_do() -> None:
    with pytest.raises(InvalidRequestError, match="at step 1; remove it, or leave step 1 out of rollout_sde_step_indices"):
        SamplingParams(prompt="a cat", sigmas=(1, 0.999995, 0.5, 0))
