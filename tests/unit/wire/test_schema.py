"""Every line of the request tables: what is accepted, what is refused, and what is said then."""

import base64
import dataclasses
import json
import re
from typing import Any

import msgspec
import pytest
import torch

from flowroll import SamplingParams
from flowroll.errors import InvalidRequestError, MalformedRequestError, PayloadTooLargeError
from flowroll.sampling.dynamics import DYNAMICS, NAMES
from flowroll.sampling.transition import LogProbForm
from flowroll.types import ALIASES, MAX_PROMPT_CHARS, MAX_SEED, StepOptions
from flowroll.types.params import TENSORS
from flowroll.types.prompts import ALL_PROMPT_TENSORS
from flowroll.types.tensors import tensor_bytes
from flowroll.wire.describe import components
from flowroll.wire.fields import Request
from flowroll.wire.group import UpdateFromGroupRequest
from flowroll.wire.messages import TENSOR_EXAMPLE
from flowroll.wire.safetensors import safetensors_prefix
from flowroll.wire.schema import (
    ExtraGenerateParams,
    ExtraSamplingParams,
    GenerateRequest,
    ImagesRequest,
    RolloutRequest,
    parse,
    parse_json_body,
)
from flowroll.wire.validation import parse_msgpack_body
from flowroll.wire.vllm import FinishUpdateRequest
from flowroll.wire.weight_updates import BeginUpdateRequest, BodyUpdateRequest, UpdateFromTensorRequest
from flowroll.wire.weights import LoadAdapterRequest, UnloadAdapterRequest, UpdateFromDiskRequest

PROMPT = {"prompt": "a red fox"}
TOO_LARGE = 10**30
MODELS = (RolloutRequest, GenerateRequest, ImagesRequest)


def params(model: Any, body: dict[str, Any]) -> SamplingParams:
    """What a server makes of a body."""
    return parse(model, parse_json_body(json.dumps(body).encode())).to_params()


def refusal(model: Any, body: dict[str, Any]) -> InvalidRequestError:
    """The one error that a server makes of a body; complete, whatever it is about."""
    with pytest.raises(InvalidRequestError) as caught:
        params(model, body)
    error = caught.value
    assert error.field is not None
    assert re.fullmatch(rf"{re.escape(error.field)} must .+, got .+; .+\.", error.message, re.DOTALL), error.message
    assert len(error.message) < 1100
    return error


# Wire name -> name in SamplingParams, accepted values, refused values.
ROWS: dict[str, tuple[str, list[Any], list[Any]]] = {
    "prompt": ("prompt", ["", "x" * MAX_PROMPT_CHARS, "猫が好き 🦊"], [None, 3, ["a"], "x" * (MAX_PROMPT_CHARS + 1)]),
    "negative_prompt": ("negative_prompt", [None, "", "blurry"], [3, False, "x" * (MAX_PROMPT_CHARS + 1)]),
    "prompt_token_ids": (
        "prompt_token_ids",
        [None, [[0]], [[5, 6], [7]]],
        [[], [[]], [5], 5, [[-1]], [["5"]], [[True]], [[0.5]]],
    ),
    "negative_prompt_token_ids": (
        "negative_prompt_token_ids",
        [None, [[0]], [[5, 6], [7]]],
        [[], [[]], [5], 5, [[-1]], [None]],
    ),
    "seed": ("seed", [None, 0, MAX_SEED], [-1, MAX_SEED + 1, "4", True, 4.0, 4.5, TOO_LARGE, [1]]),
    "seeds": ("seeds", [None, [7], [7, 7, MAX_SEED]], [[], 7, [-1], [MAX_SEED + 1], ["4"], [True], [4.0], [None], [[1]]]),
    "init_seed": ("init_seed", [None, 0, MAX_SEED, [7], [7, MAX_SEED]], [[], -1, [-1], MAX_SEED + 1, "4", True, 4.5, [None]]),
    "start_step": ("start_step", [None, 0], [-1, "4", True, 4.5, [1]]),
    "generator_device": ("generator_device", ["cuda", "cpu"], [None, "mps", "cuda:0", 0, ["cpu"]]),
    "width": ("width", [None, 1, 1024], [0, -16, "512", 512.0, True, [512]]),
    "height": ("height", [None, 1, 1024], [0, -16, "512", 512.0, True, [512]]),
    "num_inference_steps": ("num_inference_steps", [None, 1, 200], [0, -1, "4", True, 4.0]),
    "num_outputs_per_prompt": ("num_outputs_per_prompt", [None, 1, 16], [0, -1, "4", True, 4.0]),
    "num_frames": ("num_frames", [None, 1], [0, 2, -1, "1", True, [1]]),
    "fps": ("fps", [None, 0, 24, 29.97, -1], ["24", True, [24]]),
    "guidance_scales": (
        "guidance_scales",
        [None, [4], [0, 3.5, 1000]],
        [[], [-0.1], [1000.1], ["4"], [True], [None], 4, TOO_LARGE**12, [[4]]],
    ),
    "guidance_scale": ("guidance_scale", [None, 0, 4, 3.5, 1000], [-0.1, 1000.1, "4", True, TOO_LARGE**12, [4]]),
    "true_cfg_scale": ("true_cfg_scale", [None, 0, 4, 3.5, 1000], [-0.1, 1000.1, "4", True, TOO_LARGE**12, [4]]),
    "suppress_logs": ("suppress_logs", [True, False], [None, 0, 1, "true"]),
    "request_id": ("request_id", [None, "a", "x" * 256], ["", "x" * 257, 7, True]),
    "min_weight_version": ("min_weight_version", [None, "0", "step-120"], ["", "x" * 129, "a\nb", 7, True]),
    "max_staleness": ("max_staleness", [None, 0, 3], [-1, "1", True, 0.5, [1]]),
    "policy": ("policy", [None, "default", "old", "x" * 128], ["", "x" * 129, "a\nb", 7, True]),
    "lora_name": ("lora_name", [None, "old", "x" * 128], ["", "x" * 129, "a\nb", 7, True]),
}
ROLLOUT_ROWS: dict[str, tuple[str, list[Any], list[Any]]] = {
    "rollout": ("rollout", [True, False], [None, 0, 1, "true"]),
    "sde_seed": ("sde_seed", [None, 0, MAX_SEED, [7], [7, MAX_SEED]], [[], -1, [-1], MAX_SEED + 1, "4", True, 4.5, [None]]),
    "stop_step": ("stop_step", [None, 1, 7], [0, -1, "4", True, 4.5, [1]]),
    "fork": (
        "fork",
        [None, {"2": 4}, {"5": 2, "2": 4}],
        [{}, 3, [2], {"2": 1}, {"2": "4"}, {"-1": 2}, {"x": 2}, {"1": 2, "01": 2}],
    ),
    "rollout_sde_type": ("sde_type", [*DYNAMICS], [None, "SDE", "ddim", 1, ["sde"]]),
    "rollout_noise_level": ("noise_level", [0, 1e-4, 0.7, 1, 10], [None, -0.1, 9e-5, 10.1, "0.7", True, TOO_LARGE]),
    "rollout_log_prob_no_const": ("log_prob_no_const", [True, False], [None, 0, 1, "no"]),
    "log_prob": (
        "log_prob",
        [None, {}, {"reduce": "sum"}, {"constants": False, "inverse_variance": False}],
        [True, "sum", [], {"reduce": "max"}, {"constants": 1}, {"scale": True}],
    ),
    "rollout_debug_mode": ("debug_mode", [True, False], [None, 0, 1, "no"]),
    "rollout_return_denoising_env": ("return_denoising_env", [True, False], [None, 0, 1, "no"]),
    "rollout_return_dit_trajectory": ("return_dit_trajectory", [True, False], [None, 0, 1, "no"]),
    "rollout_sde_step_indices": ("sde_step_indices", [None, [], [0, 3]], [0, [-1], [0, 0], ["0"], [True], [0.0], [[0]]]),
    "rollout_steps": (
        "rollout_steps",
        [None, [{}], [{"dynamics": "ode"}, {"noise_level": 0.4}, {"dynamics": "dance_sde", "noise_level": 0}]],
        [[], 4, ["sde"], [None], [{"dynamics": "x"}], [{"noise_level": -1}], [{"noise_level": 1e-9}], [{"n": 0.7}], {}],
    ),
    "rollout_noise_levels": ("noise_levels", [None, [0.7], [0, 1e-4, 10]], [[], 0.7, [-0.1], [9e-5], [10.1], ["0.7"], [None]]),
    "rollout_return_step_indices": ("return_step_indices", [None, [], [0, 4]], [0, [-1], [4, 4], ["0"], [True], [0.0]]),
    "return_fields": (
        "return_fields",
        [None, ["x0"], ["velocity", "mean", "std", "noise"]],
        [[], "x0", ["x1"], ["x0", "x0"]],
    ),
    "decode_step_indices": ("decode_step_indices", [None, [], [0, 3]], [0, [-1], [1, 1], ["0"], [True], [0.0]]),
    "image_format": ("image_format", [None, "tensor", "uint8", "png", "none"], ["jpeg", 8, ["png"]]),
}
SIGMA_ROW: dict[str, tuple[str, list[Any], list[Any]]] = {
    "sigmas": (
        "sigmas",
        [None, [1, 0], [0.9, 0.5, 0.0]],
        [[], [0], [1, 0.5], [0.5, 0.5, 0], [0.5, 0.6, 0], [1.1, 0], [1, -0.1, 0], ["1", 0], [True, 0], 1, "1,0"],
    )
}


def cases(rows: dict[str, tuple[str, list[Any], list[Any]]], accepted: bool) -> list[Any]:
    return [
        pytest.param(name, row[0], value, id=f"{name}={str(value)[:20]}")
        for name, row in rows.items()
        for value in row[1 if accepted else 2]
    ]


def stored(value: Any) -> Any:
    if isinstance(value, dict):
        is_fork = bool(value) and all(name.isdecimal() for name in value)
        return tuple(sorted((int(step), n) for step, n in value.items())) if is_fork else LogProbForm(**value)
    if isinstance(value, list):
        return tuple(StepOptions(**item) if isinstance(item, dict) else stored(item) for item in value)
    return value


@pytest.mark.parametrize(("name", "param", "value"), cases(ROWS | ROLLOUT_ROWS, accepted=True))
def test_a_rollout_request_accepts(name: str, param: str, value: Any) -> None:
    assert getattr(params(RolloutRequest, PROMPT | {name: value}), param) == stored(value)


@pytest.mark.parametrize(("name", "param", "value"), cases(ROWS | ROLLOUT_ROWS, accepted=False))
def test_a_rollout_request_refuses(name: str, param: str, value: Any) -> None:
    assert refusal(RolloutRequest, PROMPT | {name: value}).field == name


@pytest.mark.parametrize(("name", "param", "value"), cases(ROWS, accepted=True))
def test_a_generate_request_accepts(name: str, param: str, value: Any) -> None:
    assert getattr(params(GenerateRequest, PROMPT | {name: value}), param) == stored(value)


@pytest.mark.parametrize(("name", "param", "value"), cases(ROWS, accepted=False))
def test_a_generate_request_refuses(name: str, param: str, value: Any) -> None:
    assert refusal(GenerateRequest, PROMPT | {name: value}).field == name


FURTHER = {name: row for name, row in (ROWS | ROLLOUT_ROWS | SIGMA_ROW).items() if name != "prompt"}
SHORT = {row[0]: row for name, row in ROLLOUT_ROWS.items() if row[0] != name}


@pytest.mark.parametrize(("name", "param", "value"), cases(FURTHER | SHORT, accepted=True))
def test_extra_sampling_params_accept_every_field_by_both_names(name: str, param: str, value: Any) -> None:
    assert getattr(params(RolloutRequest, PROMPT | {"extra_sampling_params": {name: value}}), param) == stored(value)


@pytest.mark.parametrize(("name", "param", "value"), cases(FURTHER | SHORT, accepted=False))
def test_extra_sampling_params_refuse_what_the_top_level_refuses(name: str, param: str, value: Any) -> None:
    error = refusal(RolloutRequest, PROMPT | {"extra_sampling_params": {name: value}})
    assert error.field == f"extra_sampling_params.{name}"


def test_every_parameter_can_be_sent() -> None:
    reachable = {ALIASES.get(row[0], row[0]) for row in (ROWS | ROLLOUT_ROWS | SIGMA_ROW).values()}
    # Tensors and images are sent by the tests below.
    assert reachable | {*TENSORS, "images"} == {field.name for field in dataclasses.fields(SamplingParams)}


TENSOR = torch.arange(6, dtype=torch.float32).reshape(2, 3)


def sent_tensor(tensor: torch.Tensor = TENSOR, **changes: Any) -> dict[str, Any]:
    """A tensor as JSON carries it."""
    blob = base64.b64encode(bytes(safetensors_prefix({"t": tensor})) + bytes(tensor_bytes(tensor))).decode()
    return {"__tensor__": True, "data": blob, "shape": list(tensor.shape), "dtype": str(tensor.dtype), **changes}


@pytest.mark.parametrize("model", [RolloutRequest, GenerateRequest])
@pytest.mark.parametrize("nested", [False, True])
def test_latents_are_sent_as_a_tensor(model: Any, nested: bool) -> None:
    fields = {"latents": sent_tensor(), "start_step": 3}
    found = params(model, PROMPT | ({"extra_sampling_params": fields} if nested else fields))
    assert found.latents is not None and torch.equal(found.latents, TENSOR) and found.start_step == 3


@pytest.mark.parametrize("nested", [False, True])
def test_a_prompt_may_be_sent_as_tensors(nested: bool) -> None:
    mask = torch.tensor([True, False])
    fields = {name: sent_tensor(mask if name.endswith("mask") else TENSOR) for name in ALL_PROMPT_TENSORS}
    for model in (RolloutRequest, GenerateRequest):
        found = params(model, {"extra_sampling_params": fields} if nested else fields)
        assert found.prompt is None
        for name in ALL_PROMPT_TENSORS:
            assert torch.equal(getattr(found, name), mask if name.endswith("mask") else TENSOR)
        for name in ("prompt", "negative_prompt"):
            error = refusal(model, {name: "a cup"} | ({"extra_sampling_params": fields} if nested else fields))
            assert error.field == f"{'extra_sampling_params.' if nested else ''}{name}_embeds"


def test_a_json_body_may_be_large_in_its_tensors_alone() -> None:
    fields = {"prompt_embeds": sent_tensor(torch.randn(200, 100)), "seed": 3}
    for body in (fields, {"extra_sampling_params": fields}):
        found = parse(RolloutRequest, parse_json_body(json.dumps(body).encode(), max_plain_bytes=4096)).to_params()
        assert found.prompt_embeds is not None and found.prompt_embeds.shape == (200, 100)
        with pytest.raises(PayloadTooLargeError, match="at most 4096 bytes beside those of tensors and images"):
            parse_json_body(json.dumps({**body, "prompt": "a cat " * 1000}).encode(), max_plain_bytes=4096)


@pytest.mark.parametrize("num_chars", [5_000, 65_536, 1_000_000])
@pytest.mark.parametrize("nested", [False, True])
def test_a_long_prompt_is_no_data(num_chars: int, nested: bool) -> None:
    fields = {"prompt": "a" * num_chars}
    body = json.dumps({"extra_sampling_params": fields} if nested else fields).encode()
    with pytest.raises(PayloadTooLargeError, match="at most 4096 bytes beside those of tensors and images"):
        parse_json_body(body, max_plain_bytes=4096)


@pytest.mark.parametrize(
    "value",
    [
        [1.0, 2.0],
        "AAAA",
        {},
        sent_tensor(data="AAAA"),
        sent_tensor(data="no base64"),
        sent_tensor(shape=[3, 2]),
        sent_tensor(dtype="torch.float16"),
        sent_tensor(extra=1),
        sent_tensor(torch.arange(3)),
    ],
)
def test_latents_that_are_no_tensor_of_floats_are_refused(value: Any) -> None:
    for body in ({"latents": value}, {"extra_sampling_params": {"latents": value}}):
        assert refusal(RolloutRequest, PROMPT | body).field.endswith("latents")


def test_a_msgpack_body_says_the_same_and_keeps_its_tensors_bytes_where_they_are() -> None:
    large = torch.randn(200, 100)
    blob = bytes(safetensors_prefix({"t": large})) + bytes(tensor_bytes(large))
    tensor = {"__tensor__": True, "data": blob, "shape": [200, 100], "dtype": "torch.float32"}
    for fields in ({"latents": tensor, "seed": 3}, {"extra_sampling_params": {"latents": tensor, "seed": 3}}):
        body = msgspec.msgpack.encode(PROMPT | fields)
        found = parse(RolloutRequest, parse_msgpack_body(body, max_plain_bytes=4096)).to_params()
        assert found.latents is not None and torch.equal(found.latents, large) and found.seed == 3


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc1",
        msgspec.msgpack.encode([1]),
        msgspec.msgpack.encode({1: 2}),
        msgspec.msgpack.encode({"seeds": [1] * 5000}),
        msgspec.msgpack.encode({"seeds": [1] * 100_000}),
        msgspec.msgpack.encode({"latents": {"a": {"a": {"a": {"a": [1] * 100_000}}}}}),
        msgspec.msgpack.encode({f"name {number}": "x" * 100 for number in range(100)}),
        b"\x81\xa7latents" + b"\x91" * 200_000,
    ],
)
def test_a_msgpack_body_that_is_large_in_anything_but_tensors_is_refused(body: bytes) -> None:
    with pytest.raises(MalformedRequestError, match="body must"):
        parse_msgpack_body(body, max_plain_bytes=4096)


FILES = (b"\x89PNG" + bytes(70_000), b"\xff\xd8", b"RIFF")


def test_images_come_as_base64_or_as_bytes() -> None:
    in_json = [base64.b64encode(file).decode() for file in FILES]
    for fields in ({"images": in_json}, {"extra_sampling_params": {"images": in_json}}):
        for model in (RolloutRequest, GenerateRequest):
            assert params(model, PROMPT | fields).images == FILES
        body = json.dumps(PROMPT | fields).encode()
        assert parse(RolloutRequest, parse_json_body(body, max_plain_bytes=4096)).to_params().images == FILES
    for fields in ({"images": FILES}, {"extra_sampling_params": {"images": FILES}}):
        body = msgspec.msgpack.encode(PROMPT | fields)
        assert parse(RolloutRequest, parse_msgpack_body(body, max_plain_bytes=4096)).to_params().images == FILES
    assert params(RolloutRequest, PROMPT | {"images": None}).images is None


@pytest.mark.parametrize("value", ["QUJD", {"a": 1}, [], 3, True, [None], ["no base64"], ["QUJ"], [3], [["QUJD"]], [{}]])
def test_images_that_are_none_are_refused(value: Any) -> None:
    for body in ({"images": value}, {"extra_sampling_params": {"images": value}}):
        assert refusal(RolloutRequest, PROMPT | body).field.partition("[")[0].endswith("images")


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 5000,
        b'{"images": [' + b"1," * 5000 + b"1]}",
        b'{"images": "' + b"a" * 70_000 + b'", "seeds": [' + b"1," * 2500 + b"1]}",
        b'{"latents": {"a": {"a": {"a": {"a": "' + b"a" * 70_000 + b'"}}}}}',
        b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}",
        b"{" + b",".join(b'"%d": "%s"' % (at, b"x" * 1000) for at in range(20)) + b"}",
        b'{"images": ["' + b"a" * 70_000,
        b'"' + b"a" * 70_000 + b'"',
    ],
)
def test_a_json_body_that_is_large_in_anything_but_data_is_refused(body: bytes) -> None:
    with pytest.raises((MalformedRequestError, PayloadTooLargeError), match="body must"):
        parse_json_body(body, max_plain_bytes=4096)


@pytest.mark.parametrize("model", MODELS)
def test_a_minimal_request_is_the_defaults(model: Any) -> None:
    is_rollout = model is RolloutRequest
    # SGLang's default; Python's own is that nothing large is returned unasked.
    plain = SamplingParams(prompt="a red fox", rollout=is_rollout, rollout_debug_mode=is_rollout)
    assert params(model, PROMPT) == plain


def test_an_evaluation_has_no_debug_tensors_whatever_the_default_says() -> None:
    for further in ({}, {"rollout_debug_mode": True}, {"extra_sampling_params": {"debug_mode": True}}):
        body = PROMPT | {"rollout": False} | further
        assert params(RolloutRequest, body) == SamplingParams(prompt="a red fox", rollout=False)


def test_documented_defaults_are_the_real_ones() -> None:
    real = SamplingParams(prompt="", rollout_debug_mode=True)
    properties = components([RolloutRequest])["RolloutRequest"]["properties"]
    for name, (param, _, _) in (ROWS | ROLLOUT_ROWS).items():
        if name != "prompt":
            assert properties[name]["default"] == getattr(real, param)


def test_a_request_that_spells_out_every_null_is_a_minimal_one() -> None:
    nullable = {name: None for name, row in (ROWS | ROLLOUT_ROWS).items() if None in row[1]}
    others = dict.fromkeys(("extra_sampling_params", "image_path"))
    assert len(nullable) == 32
    assert params(RolloutRequest, PROMPT | nullable | others) == SamplingParams(prompt="a red fox", rollout_debug_mode=True)


@pytest.mark.parametrize("value", [0, 1, "", "cat.png", False, []])
def test_an_image_input_must_be_null(value: Any) -> None:
    error = refusal(RolloutRequest, PROMPT | {"image_path": value})
    assert error.field == "image_path" and "send the files themselves as images" in error.message


def test_an_alias_of_a_dynamics_is_accepted_and_shown() -> None:
    assert params(RolloutRequest, PROMPT | {"rollout_sde_type": "dance_sde"}).rollout_sde_type == "dance"
    shown = json.dumps(components([RolloutRequest])["RolloutRequest"]["properties"]["rollout_sde_type"])
    assert all(f'"{name}"' in shown for name in NAMES) and all(found.summary in shown for found in DYNAMICS.values())


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"rollout_return_denoising_env": True}, "rollout_return_denoising_env"),
        ({"rollout_return_dit_trajectory": True}, "rollout_return_dit_trajectory"),
        ({"rollout_sde_step_indices": [0]}, "rollout_sde_step_indices"),
        ({"extra_sampling_params": {"return_step_indices": [0]}}, "extra_sampling_params.return_step_indices"),
        ({"extra_sampling_params": {"rollout_noise_level": 0.3}}, "extra_sampling_params.rollout_noise_level"),
    ],
)
def test_an_evaluation_refuses_rollout_options_by_the_name_that_was_sent(body: dict[str, Any], field: str) -> None:
    error = refusal(RolloutRequest, PROMPT | {"rollout": False} | body)
    assert error.field == field and error.message.startswith(f"{field} must be left out of an evaluation")


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"seed": 1, "seeds": [1]}, "seeds"),
        ({"seeds": [1, 2], "num_outputs_per_prompt": 3}, "seeds"),
        ({"seed": MAX_SEED, "num_outputs_per_prompt": 2}, "seed"),
        ({"rollout_sde_type": "cps", "rollout_noise_level": 2}, "rollout_noise_level"),
        ({"extra_sampling_params": {"sigmas": [1, 0.999995, 0.5, 0]}}, "extra_sampling_params.sigmas"),
        ({"extra_sampling_params": {"sigmas": [1, 0.5, 0]}, "num_inference_steps": 3}, "extra_sampling_params.sigmas"),
        ({"extra_sampling_params": {"seeds": [1]}, "seed": 2}, "extra_sampling_params.seeds"),
        ({"extra_sampling_params": {"noise_level": 2}, "rollout_sde_type": "cps"}, "extra_sampling_params.noise_level"),
    ],
)
def test_values_that_do_not_go_together_are_named_as_they_were_sent(body: dict[str, Any], field: str) -> None:
    assert refusal(RolloutRequest, PROMPT | body).field == field


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"seed": 1, "extra_sampling_params": {"seed": 1}}, "seed"),
        ({"rollout_noise_level": 0.5, "extra_sampling_params": {"noise_level": 0.5}}, "noise_level"),
        ({"rollout": True, "extra_sampling_params": {"rollout": False}}, "rollout"),
        ({"extra_sampling_params": {"sde_type": "cps", "rollout_sde_type": "cps"}}, "sde_type"),
    ],
)
def test_a_field_given_twice_is_refused(body: dict[str, Any], field: str) -> None:
    error = refusal(RolloutRequest, PROMPT | body)
    assert error.field == f"extra_sampling_params.{field}" and "must be given once" in error.message


def test_a_null_beside_a_value_is_not_given_twice() -> None:
    body = {"seed": None, "num_inference_steps": 7, "extra_sampling_params": {"seed": 5, "num_inference_steps": None}}
    found = params(RolloutRequest, PROMPT | body)
    assert (found.seed, found.num_inference_steps) == (5, 7)


@pytest.mark.parametrize("value", [[], [1], "sigmas", 3, True])
def test_extra_sampling_params_must_be_an_object(value: Any) -> None:
    assert refusal(RolloutRequest, PROMPT | {"extra_sampling_params": value}).field == "extra_sampling_params"


@pytest.mark.parametrize(
    ("model", "body", "field", "remedy"),
    [
        (RolloutRequest, {"promt": "x"}, "promt", "use prompt if that is meant"),
        (RolloutRequest, {**PROMPT, "num_inference_step": 4}, "num_inference_step", "use num_inference_steps if"),
        (RolloutRequest, {**PROMPT, "sigmas": [1, 0]}, "sigmas", "send it inside extra_sampling_params"),
        (RolloutRequest, {**PROMPT, "noise_level": 0.5}, "noise_level", "use rollout_noise_level"),
        (RolloutRequest, {**PROMPT, "zzz": 1}, "zzz", "use one of prompt, "),
        (RolloutRequest, {**PROMPT, "x" * 5000: 1}, "x" * 80, "use one of prompt, "),
        (RolloutRequest, {**PROMPT, "extra_sampling_params": {"sigma": []}}, "extra_sampling_params.sigma", "use sigmas if"),
        (
            RolloutRequest,
            {**PROMPT, "extra_sampling_params": {"prompt": "x"}},
            "extra_sampling_params.prompt",
            "send it at the top level",
        ),
        (GenerateRequest, {**PROMPT, "sigmas": [1, 0]}, "sigmas", "send it inside extra_sampling_params"),
        (ImagesRequest, {**PROMPT, "negativ_prompt": ""}, "negativ_prompt", "use negative_prompt if that is meant"),
    ],
)
def test_an_unknown_field_is_named_with_its_remedy(model: Any, body: dict[str, Any], field: str, remedy: str) -> None:
    error = refusal(model, body)
    assert error.field == field and f"; {remedy}" in error.message


@pytest.mark.parametrize("model", [GenerateRequest, ImagesRequest])
@pytest.mark.parametrize("name", [*ROLLOUT_ROWS, *SHORT])
def test_generic_routes_refuse_rollout_fields_and_name_the_rollout_route(model: Any, name: str) -> None:
    value = (ROLLOUT_ROWS | SHORT)[name][1][0]
    error = refusal(model, PROMPT | {name: value})
    assert error.field == name and "POST /rollout/generate" in error.message


def test_generate_refuses_rollout_fields_among_its_extra_parameters() -> None:
    error = refusal(GenerateRequest, PROMPT | {"extra_sampling_params": {"sde_type": "cps"}})
    assert error.field == "extra_sampling_params.sde_type" and "POST /rollout/generate" in error.message
    assert params(GenerateRequest, PROMPT | {"extra_sampling_params": {"sigmas": [1, 0]}}).sigmas == (1, 0)


def test_a_missing_prompt_is_named() -> None:
    for model in MODELS:
        error = refusal(model, {})
        assert error.field == "prompt" and "got nothing" in error.message


IMAGE_ROWS: dict[str, tuple[list[Any], list[Any]]] = {
    "model": ([None, "Qwen-Image"], [3, []]),
    "prompt": (["", "猫"], [None, 3, "x" * (MAX_PROMPT_CHARS + 1)]),
    "n": ([None, 1, 4], [0, -1, "1", True, 1.0]),
    "size": ([None, "auto", "64x32", "1024x768"], ["64", "64X32", "0x64", "064x64", "-1x2", "64x32\n", 64, [64, 32]]),
    "response_format": ([None, "b64_json"], ["url", 1]),
    "user": ([None, "me"], [1]),
    "quality": ([None, "auto", "standard"], ["hd", "high", 1]),
    "style": ([None], ["vivid", "natural"]),
    "background": ([None, "auto", "opaque"], ["transparent"]),
    "output_format": ([None, "png"], ["jpeg", "webp"]),
    "output_compression": ([None, 100], [50, "100"]),
    "moderation": ([None, "auto", "low"], ["high"]),
    "stream": ([None, False], [True, "no"]),
    "partial_images": ([None, 0], [1]),
    "seed": ROWS["seed"][1:],
    "negative_prompt": ROWS["negative_prompt"][1:],
    "num_inference_steps": ROWS["num_inference_steps"][1:],
    "guidance_scale": ROWS["guidance_scale"][1:],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, row in IMAGE_ROWS.items() for value in row[0]])
def test_an_images_request_accepts(name: str, value: Any) -> None:
    params(ImagesRequest, PROMPT | {name: value})


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, row in IMAGE_ROWS.items() for value in row[1]])
def test_an_images_request_refuses(name: str, value: Any) -> None:
    assert refusal(ImagesRequest, PROMPT | {name: value}).field == name


def test_an_images_request_becomes_plain_generation() -> None:
    assert set(IMAGE_ROWS) == set(ImagesRequest.__struct_fields__)
    body = {
        **PROMPT,
        "model": "Qwen-Image",
        "n": 2,
        "size": "64x32",
        "seed": 5,
        "negative_prompt": "",
        "num_inference_steps": 3,
        "guidance_scale": 2.5,
    }
    assert params(ImagesRequest, body) == SamplingParams(
        prompt="a red fox",
        rollout=False,
        num_outputs_per_prompt=2,
        width=64,
        height=32,
        seed=5,
        negative_prompt="",
        num_inference_steps=3,
        guidance_scale=2.5,
    )


@pytest.mark.parametrize(
    ("model", "body", "param", "wire"),
    [
        (RolloutRequest, {}, "sde_step_indices", "rollout_sde_step_indices"),
        (RolloutRequest, {}, "height", "height"),
        (RolloutRequest, {"extra_sampling_params": {"height": 9}}, "height", "extra_sampling_params.height"),
        (
            RolloutRequest,
            {"extra_sampling_params": {"sde_step_indices": [9]}},
            "sde_step_indices",
            "extra_sampling_params.sde_step_indices",
        ),
        (ImagesRequest, {}, "width", "size"),
        (ImagesRequest, {}, "num_outputs_per_prompt", "n"),
    ],
)
def test_errors_of_the_engine_get_the_names_of_the_request(model: Any, body: dict[str, Any], param: str, wire: str) -> None:
    request = parse(model, PROMPT | body)
    error = request.as_wire_error(InvalidRequestError(f"{param} must be small, got 9; use 1.", field=param))
    assert (error.message, error.field) == (f"{wire} must be small, got 9; use 1.", wire)
    nameless = InvalidRequestError("all must be well.")
    assert request.as_wire_error(nameless) is nameless


@pytest.mark.parametrize("model", MODELS)
def test_every_request_field_is_described_with_valid_examples(model: type[Request]) -> None:
    found = components([model, ExtraSamplingParams, ExtraGenerateParams])
    schema = found[model.__name__]
    assert schema["examples"]
    for example in schema["examples"]:
        params(model, example)
    extra = json.dumps(schema["properties"].get("extra_sampling_params")).partition("schemas/")[2].partition('"')[0]
    for part in (schema, *([found[extra]] if extra else ())):
        assert part["additionalProperties"] is False
        nested = part is not schema
        for name, field in part["properties"].items():
            assert field["description"] and field["examples"], name
            # A prompt as tensors stands in the place of a text, and the others go with its embedding.
            prefix = name.partition("p")[0]
            beside = {f"{prefix}prompt_embeds": TENSOR_EXAMPLE} if name in ALL_PROMPT_TENSORS else {}
            others = {} if "prompt_embeds" in beside else PROMPT
            for example in field["examples"]:
                given = beside | {name: example}
                params(model, others | ({"extra_sampling_params": given} if nested else given))


def test_the_limits_are_in_the_openapi_document() -> None:
    properties = components([RolloutRequest])["RolloutRequest"]["properties"]
    limits = {name: json.dumps(properties[name]) for name in properties}
    assert '"maximum": 4294967295' in limits["seed"] and '"minimum": 0' in limits["seed"]
    assert '"minItems": 1' in limits["seeds"] and '"maximum": 4294967295' in limits["seeds"]
    assert '"maximum": 10.0' in limits["rollout_noise_level"]
    assert '"minimum": 1' in limits["num_frames"] and '"maximum": 1' in limits["num_frames"]
    assert properties["rollout_sde_type"]["enum"] == sorted(NAMES)
    assert f'"maxLength": {MAX_PROMPT_CHARS}' in limits["prompt"]
    for name in ("width", "height", "num_inference_steps", "num_outputs_per_prompt"):
        assert '"minimum": 1' in limits[name]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" ",
        b"{",
        b'{"prompt": "x"',
        b'{"prompt": "x"} {}',
        b'{"prompt": NaN}',
        b'{"guidance_scale": Infinity}',
        b'{"guidance_scale": 1e999}',
        b'{"seed": 1' + b"0" * 5000 + b"}",
        b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud800"}',
        b"\xff\xfe{\x00}\x00",
        b"{'prompt': 'x'}",
        b"[" * 200_000,
        b'{"a":' * 200_000,
        b"[]",
        b'"prompt"',
        b"null",
        b"3",
    ],
    ids=lambda body: repr(body[:24]),
)
def test_a_body_that_is_no_json_object_is_malformed(body: bytes) -> None:
    with pytest.raises(MalformedRequestError, match=r"body must be .*JSON.*, got .+; .+\.") as caught:
        parse_json_body(body)
    assert len(caught.value.message) < 400


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt": "x", "seed": 1' + b"0" * 300 + b"}",
        b'{"prompt": "x", "guidance_scale": 1' + b"0" * 400 + b"}",
        b'{"prompt": "x", "seeds": [' + b"1" * 400 + b"]}",
        b'{"prompt": ' + b"[" * 900 + b"]" * 900 + b"}",
        b'{"prompt": "x", "seeds": ' + b"[" * 900 + b"]" * 900 + b"}",
        b'{"prompt": {"a": ' + b'{"b":' * 300 + b"1" + b"}" * 301 + b"}",
        b'{"prompt": "x", "extra_sampling_params": {"extra_sampling_params": {}}}',
        b'{"": 1}',
    ],
    ids=lambda body: repr(body[:40]),
)
def test_hostile_values_end_in_one_short_error(body: bytes) -> None:
    with pytest.raises((InvalidRequestError, MalformedRequestError)) as caught:
        parse(RolloutRequest, parse_json_body(body)).to_params()
    assert len(caught.value.message) < 1000


@pytest.mark.parametrize("data", [None, [], "x", 3, {1: 2}, {"prompt": 10**5000}, {"prompt": "x", "seed": 10**5000}])
def test_python_data_that_no_json_gives_is_refused_too(data: Any) -> None:
    with pytest.raises(InvalidRequestError):
        parse(RolloutRequest, data)


def test_not_a_number_is_refused_wherever_a_number_goes() -> None:
    for name in ("guidance_scale", "true_cfg_scale", "rollout_noise_level"):
        for value in (float("nan"), float("inf"), float("-inf")):
            with pytest.raises(InvalidRequestError, match=f"{name} must "):
                parse(RolloutRequest, PROMPT | {name: value})


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"seed": -1}, "seed must be null or an integer from 0 to 4294967295, got -1; leave it out for a drawn seed."),
        (
            {"seeds": [1, "4"]},
            "seeds must be null or a list of integers from 0 to 4294967295, got '4'; send one seed per output.",
        ),
        (
            {"prompt": None},
            "prompt must be given, got nothing; send one prompt as text, or its prompt_token_ids or prompt_embeds.",
        ),
        (
            {"generator_device": "mps"},
            'generator_device must be "cuda" or "cpu", got \'mps\'; leave it out for the engine\'s device.',
        ),
        ({"width": 0}, "width must be null or an integer >= 1, got 0; leave it out for the family's width."),
        ({"guidance_scale": 2000}, "guidance_scale must be null or a number from 0 to 1000, got 2000; use 0 for no guidance."),
        ({"rollout": 1}, "rollout must be true or false, got 1; leave it out for true."),
        (
            {"request_id": ""},
            "request_id must be null or a string of 1 to 256 characters, got ''; leave it out for a generated one.",
        ),
        (
            {"extra_sampling_params": {"sde_step_indices": [0, [1]]}},
            "extra_sampling_params.sde_step_indices must be null or a list of integers >= 0, got [1]; count steps from 0.",
        ),
        (
            {"extra_sampling_params": 3},
            "extra_sampling_params must be null or an object, got 3; send further sampling parameters by name.",
        ),
    ],
)
def test_a_refusal_says_field_rule_value_and_remedy_word_for_word(body: dict[str, Any], message: str) -> None:
    assert refusal(RolloutRequest, PROMPT | body).message == message


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (UpdateFromDiskRequest, {"model_path": "/runs/1"}),
        (LoadAdapterRequest, {"lora_name": "a", "lora_path": "/runs/1"}),
        (UnloadAdapterRequest, {"lora_name": "a"}),
        (BeginUpdateRequest, {}),
        (BodyUpdateRequest, {}),
        (UpdateFromTensorRequest, {"serialized_named_tensors": ["gASV"]}),
        (UpdateFromGroupRequest, {"names": ["x"], "dtypes": ["float32"], "shapes": [[1]]}),
        (FinishUpdateRequest, {}),
    ],
)
def test_a_version_or_a_name_that_cannot_be_one_is_refused_with_its_message(
    kind: type[Request], fields: dict[str, Any]
) -> None:
    assert parse(kind, {**fields, "weight_version": "120"}).weight_version == "120"
    wrong = [{"weight_version": "1\n2"}, *([{"lora_name": "a\tb"}] if "lora_name" in fields else [])]
    for values in wrong:
        (name,) = values
        with pytest.raises(InvalidRequestError, match=f"{name} must be printable text") as raised:
            parse(kind, {**fields, **values})
        assert raised.value.field == name
