"""Sigma grids are the bits of diffusers' scheduler."""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tests.unit.sampling.golden import DATA

from flowroll.errors import CheckpointError, FlowrollError, InvalidRequestError, UnsupportedModelError
from flowroll.sampling.schedule import (
    ScheduleConfig,
    explicit_schedule,
    linspace_float32,
    linspace_float64,
    shifted_schedule,
)

QWEN_IMAGE = ScheduleConfig(
    use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift=1.0, shift_terminal=0.02
)
Z_IMAGE = ScheduleConfig(shift=3.0)
GRIDS = load_file(DATA / "sigma_grids.safetensors")


@pytest.mark.parametrize("key", [key for key in GRIDS if key.startswith("qwen-image") and key.endswith("sigmas.diffusers")])
def test_qwen_image_grids_are_bit_equal(key: str) -> None:
    _, tokens, steps, _ = key.split("/")
    schedule = shifted_schedule(QWEN_IMAGE, linspace_float64(int(steps[1:])), num_tokens=int(tokens[1:]))
    assert torch.equal(schedule.sigmas, GRIDS[key])
    assert torch.equal(schedule.timesteps, GRIDS[key.replace("sigmas", "timesteps")])


@pytest.mark.parametrize("key", [key for key in GRIDS if key.endswith("sigmas.diffusers_pipeline")])
def test_z_image_grids_are_bit_equal(key: str) -> None:
    steps = int(key.split("/")[1][1:])
    assert torch.equal(shifted_schedule(Z_IMAGE, linspace_float32(steps), num_tokens=256).sigmas, GRIDS[key])


@given(
    steps=st.integers(2, 300),
    tokens=st.integers(1, 20_000),
    shift=st.floats(0.1, 10),
    base_shift=st.floats(0.1, 1),
    max_shift=st.floats(1, 2),
    terminal=st.none() | st.floats(0.001, 0.5),
    kind=st.sampled_from(["static", "exponential", "linear"]),
)
@settings(max_examples=150, deadline=None)
def test_any_configuration_gives_the_schedulers_bits(
    steps: int, tokens: int, shift: float, base_shift: float, max_shift: float, terminal: float | None, kind: str
) -> None:
    options = {
        "shift": shift,
        "use_dynamic_shifting": kind != "static",
        "base_shift": base_shift,
        "max_shift": max_shift,
        "shift_terminal": terminal,
        "time_shift_type": "linear" if kind == "linear" else "exponential",
    }
    scheduler = FlowMatchEulerDiscreteScheduler(**options)
    config = ScheduleConfig.from_scheduler_config(scheduler.config)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=config.mu(tokens))
    if not (scheduler.sigmas[1:] < scheduler.sigmas[:-1]).all():
        # A linear shift below 0, far below the sizes that it is calibrated for.
        with pytest.raises(InvalidRequestError, match="sigmas must descend"):
            shifted_schedule(config, linspace_float64(steps), num_tokens=tokens)
        return
    schedule = shifted_schedule(config, linspace_float64(steps), num_tokens=tokens)
    assert torch.equal(schedule.sigmas, scheduler.sigmas)
    assert torch.equal(schedule.timesteps, scheduler.timesteps)


@pytest.mark.parametrize("config", [QWEN_IMAGE, Z_IMAGE])
@pytest.mark.parametrize("base_grid", [linspace_float32, linspace_float64])
def test_one_step_goes_from_noise_to_data(config: ScheduleConfig, base_grid) -> None:
    # diffusers divides 0 by 0 in the terminal span of a one-step grid.
    assert shifted_schedule(config, base_grid(1), num_tokens=256).sigmas.tolist() == [1.0, 0.0]


def test_explicit_sigmas_are_used_verbatim() -> None:
    schedule = explicit_schedule(QWEN_IMAGE, (0.9, 0.3, 0.1, 0))
    assert torch.equal(schedule.sigmas, torch.tensor([0.9, 0.3, 0.1, 0.0]))
    assert torch.equal(schedule.timesteps, torch.tensor([0.9, 0.3, 0.1]) * 1000)


@pytest.mark.parametrize(
    "options",
    [{"use_karras_sigmas": True}, {"use_exponential_sigmas": True}, {"invert_sigmas": True}, {"stochastic_sampling": True}],
)
def test_a_grid_that_is_not_computed_is_refused(options: dict) -> None:
    with pytest.raises(UnsupportedModelError, match=next(iter(options))):
        ScheduleConfig.from_scheduler_config(FlowMatchEulerDiscreteScheduler(**options).config)


@pytest.mark.parametrize(
    ("option", "value", "dynamic"),
    [
        ("max_image_seq_len", 256, True),
        ("base_image_seq_len", float("nan"), True),
        ("max_shift", float("inf"), True),
        ("base_shift", "0.5", True),
        ("shift", 0, False),
        ("shift", -1.0, False),
        ("shift", 10**400, False),
        ("num_train_timesteps", 0, False),
        ("num_train_timesteps", 1000.0, False),
        ("num_train_timesteps", 10**9, False),
        ("shift_terminal", 1.0, False),
        ("shift_terminal", -0.1, True),
        ("time_shift_type", "quadratic", True),
        ("use_dynamic_shifting", "false", False),
    ],
)
def test_a_value_that_gives_no_grid_is_named(option: str, value: object, dynamic: bool) -> None:
    with pytest.raises(CheckpointError, match=f"scheduler option {option} must .*, got .*; "):
        ScheduleConfig.from_scheduler_config({"use_dynamic_shifting": dynamic, option: value})


def test_equal_lengths_matter_only_where_the_shift_depends_on_them() -> None:
    # diffusers divides by zero for the one and never looks at the lengths for the other.
    equal = {"base_image_seq_len": 4096, "max_image_seq_len": 4096, "shift": 3.0}
    static = ScheduleConfig.from_scheduler_config({**equal, "use_dynamic_shifting": False})
    scheduler = FlowMatchEulerDiscreteScheduler(**equal)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / 4, 4))
    assert torch.equal(shifted_schedule(static, linspace_float64(4), num_tokens=16).sigmas, scheduler.sigmas)
    with pytest.raises(ZeroDivisionError):
        calculate_shift(16, 4096, 4096)
    with pytest.raises(CheckpointError, match="differ from base_image_seq_len"):
        ScheduleConfig.from_scheduler_config({**equal, "use_dynamic_shifting": True})


_NUMBERS = st.sampled_from([-1e7, -2.0, 0.0, 1e-30, 0.5, 1.0, 3.0, 256, 4096, 1e6, float("nan"), float("inf")])


@given(
    options=st.fixed_dictionaries(
        {},
        optional={
            "num_train_timesteps": st.sampled_from([-1, 0, 1, 1000]),
            "shift": _NUMBERS,
            "use_dynamic_shifting": st.booleans(),
            "base_shift": _NUMBERS,
            "max_shift": _NUMBERS,
            "base_image_seq_len": _NUMBERS,
            "max_image_seq_len": _NUMBERS,
            "shift_terminal": _NUMBERS | st.none(),
            "time_shift_type": st.sampled_from(["exponential", "linear"]),
        },
    ),
    tokens=st.sampled_from([1, 256, 300, 4096, 100_000]),
    steps=st.integers(2, 20),
)
@settings(max_examples=400, deadline=None)
def test_whatever_is_configured_gives_the_schedulers_descending_grid_or_a_clear_error(
    options: dict, tokens: int, steps: int
) -> None:
    try:
        config = ScheduleConfig.from_scheduler_config(options)
        schedule = shifted_schedule(config, linspace_float64(steps), num_tokens=tokens)
    except FlowrollError as error:
        assert "; " in error.message
        return
    assert schedule.sigmas[0] <= 1 + 1e-6 and (schedule.sigmas[1:] < schedule.sigmas[:-1]).all()
    scheduler = FlowMatchEulerDiscreteScheduler(**options)
    scheduler.set_timesteps(
        sigmas=np.linspace(1.0, 1 / steps, steps), mu=config.mu(tokens) if config.use_dynamic_shifting else 0
    )
    assert torch.equal(schedule.sigmas, scheduler.sigmas)
    assert torch.equal(schedule.timesteps, scheduler.timesteps)


@pytest.mark.parametrize("max_shift", [1e6, -1e6])
def test_a_size_at_which_the_shift_leaves_float32_is_refused(max_shift: float) -> None:
    config = ScheduleConfig.from_scheduler_config({"use_dynamic_shifting": True, "max_shift": max_shift})
    assert shifted_schedule(config, linspace_float64(4), num_tokens=256).num_steps == 4
    with pytest.raises(InvalidRequestError, match="at 4096 image tokens; send explicit sigmas") as refused:
        shifted_schedule(config, linspace_float64(4), num_tokens=4096)
    assert refused.value.field == "sigmas"


def test_another_scheduler_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="FlowMatchEulerDiscreteScheduler"):
        ScheduleConfig.from_scheduler_config({"_class_name": "DDIMScheduler"})
