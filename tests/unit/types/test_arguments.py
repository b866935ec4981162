"""How a request may be given: as text, by name, with the numbers of other libraries."""

import inspect
import json
import subprocess
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from tests.unit.test_client import sent_by

from flowroll import SamplingParams
from flowroll.client import AsyncClient, Client
from flowroll.engine import Engine
from flowroll.errors import InvalidRequestError
from flowroll.sampling.transition import LogProbForm
from flowroll.types import ALIASES, ROLLOUT_FIELDS, ImageFields, RolloutFields, StepField, StepOptions
from flowroll.types.arguments import Integer, Integers, Real, Reals
from flowroll.types.forks import Fork

KINDS = ("sync", "async")
WIDER = {
    tuple[StepField, ...]: Sequence[StepField],
    LogProbForm: LogProbForm | Mapping[str, Any],
    int: Integer,
    int | float: Real,
    tuple[int, ...]: Integers,
    int | tuple[int, ...]: Integer | Integers,
    Fork | Mapping[int, int]: Mapping[int, int] | Sequence[tuple[int, int]],
    tuple[int | float, ...]: Reals,
    tuple[tuple[int, ...], ...]: Sequence[Integers],
    tuple[bytes, ...]: Sequence[bytes | str],
    tuple[StepOptions, ...]: Sequence[StepOptions | Mapping[str, Any]],
}
ARRAYS = [lambda values: np.array(values), lambda values: torch.tensor(values), lambda values: list(np.array(values))]


def widened(hint: Any) -> Any:
    """What a caller may give for a field of this type."""
    is_optional = isinstance(hint, types.UnionType) and type(None) in typing.get_args(hint)
    members = [member for member in typing.get_args(hint) if member is not type(None)] if is_optional else [hint]
    bare = typing.Union[tuple(members)]  # noqa: UP007
    wide = next((wide for narrow, wide in WIDER.items() if narrow == bare), bare)
    return wide | None if is_optional else wide


def test_the_typed_arguments_are_the_fields_of_sampling_params() -> None:
    hints = typing.get_type_hints(SamplingParams)
    fields_by_name = {field.name: field.name for field in fields(SamplingParams)} | dict(ALIASES)
    expected = {name: widened(hints[field]) for name, field in fields_by_name.items()}
    assert typing.get_type_hints(RolloutFields) == expected
    plain = {name: hint for name, hint in expected.items() if fields_by_name[name] not in ROLLOUT_FIELDS}
    assert typing.get_type_hints(ImageFields) == plain


@pytest.mark.parametrize("owner", [Client, AsyncClient, Engine])
@pytest.mark.parametrize(("method", "named"), [("rollout", RolloutFields), ("generate", ImageFields)])
def test_editors_are_told_the_names(owner: type, method: str, named: type) -> None:
    function = getattr(owner, method)
    assert typing.get_type_hints(inspect.unwrap(function))["values"] == typing.Unpack[named]  # type: ignore[valid-type]
    assert list(inspect.signature(function).parameters)[-2:] == ["request", "values"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["rollout", "generate"])
def test_the_prompt_is_the_first_argument(kind: str, method: str) -> None:
    sent = json.loads(sent_by(kind, method, "a red circle").content)
    assert sent == {"prompt": "a red circle", **({"rollout_debug_mode": False} if method == "rollout" else {})}
    assert json.loads(sent_by(kind, method, "a red circle", seed=3).content) == {**sent, "seed": 3}


@pytest.mark.parametrize("method", ["rollout", "generate"])
@pytest.mark.parametrize(
    ("args", "values", "message"),
    [
        (("a",), {"prompt": "b"}, "prompt must be given once"),
        ((SamplingParams(prompt="a"),), {"seed": 3}, "params must be given alone"),
        ((), {"seed": 3}, "prompt must be given"),
    ],
)
def test_a_request_given_twice_or_not_at_all_is_refused(method: str, args: Any, values: Any, message: str) -> None:
    for kind in KINDS:
        with pytest.raises(InvalidRequestError, match=message):
            sent_by(kind, method, *args, **values)


NUMPY = {
    "seed": np.int64(7),
    "width": np.uint16(64),
    "height": np.int32(80),
    "num_inference_steps": torch.tensor(3),
    "num_outputs_per_prompt": np.int8(2),
    "guidance_scale": np.float64(2.5),
    "true_cfg_scale": np.float32(0.5),
    "noise_level": torch.tensor(0.25),
    "debug_mode": np.bool_(False),
}
PLAIN = {
    "seed": 7,
    "width": 64,
    "height": 80,
    "num_inference_steps": 3,
    "num_outputs_per_prompt": 2,
    "guidance_scale": 2.5,
    "true_cfg_scale": 0.5,
    "noise_level": 0.25,
    "debug_mode": False,
}


@pytest.mark.parametrize("array", ARRAYS, ids=["array", "tensor", "list"])
def test_numbers_and_arrays_of_other_libraries_are_taken(array: Any) -> None:
    given = {"seeds": array([7, 9]), "sigmas": array([1.0, 0.5, 0.0]), "sde_step_indices": array([0, 1])}
    sent = json.loads(sent_by("sync", "rollout", "x", **given).content)
    assert sent == {
        "prompt": "x",
        "rollout_debug_mode": False,
        "seeds": [7, 9],
        "rollout_sde_step_indices": [0, 1],
        "extra_sampling_params": {"sigmas": [1.0, 0.5, 0.0]},
    }
    assert json.loads(sent_by("sync", "rollout", "x", **NUMPY).content) == json.loads(
        sent_by("sync", "rollout", "x", **PLAIN).content
    )


def test_ranges_are_lists() -> None:
    assert json.loads(sent_by("sync", "rollout", "x", seeds=range(3, 6)).content)["seeds"] == [3, 4, 5]


REFUSED = {
    "seeds=np.array([[1, 2]])": "seeds must be a tuple",
    "seeds=torch.tensor(3)": "seeds must be a tuple",
    "seeds=np.array([1.5])": "seeds must hold integers",
    "seeds=torch.tensor([1, 2], device='meta')": "seeds must be a tuple",
    "seeds={1, 2}": "seeds must be a tuple",
    "seed=np.array([1])": "seed must be >= 0",
    "seed=np.float64(1.0)": "seed must be >= 0",
    "seed='3'": "seed must be >= 0",
    "width=torch.tensor(True)": "width must be an integer",
    "sde_step_indices=torch.tensor([True, False])": "sde_step_indices must hold integers",
    "guidance_scale=np.float32('nan')": "guidance_scale must be a number",
}


def test_what_is_no_number_or_list_is_refused() -> None:
    # In a process without the tests' type checks, which would come first.
    program = f"""
import numpy as np, torch
from flowroll import FlowrollError, SamplingParams
from flowroll.client import Client
client = Client("http://far:1")
def said(make, *args, **values):
    try:
        make(*args, **values)
    except FlowrollError as error:
        print(type(error).__name__, error)
{"".join(f"said(SamplingParams, prompt='x', {given}); said(client.rollout, 'x', {given})" + chr(10) for given in REFUSED)}
said(client.rollout, 3); said(client.generate, ["a", "b"])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    expected = [message for message in REFUSED.values() for _ in range(2)]
    expected += [f"the first argument must be a prompt or SamplingParams, got {kind}" for kind in ("int", "list")]
    lines = done.stdout.splitlines()
    assert len(lines) == len(expected), done.stderr
    for line, message in zip(lines, expected, strict=True):
        assert line.startswith(f"InvalidRequestError {message}")


def test_sampling_params_hold_plain_values_whatever_they_are_given() -> None:
    program = """
import numpy as np, torch
from flowroll import SamplingParams
given = SamplingParams(prompt="x", seeds=np.array([1, 2]), width=np.int64(64), sigmas=torch.tensor([1.0, 0.5, 0.0]),
                       guidance_scale=np.float64(2.5), debug_mode=np.bool_(False), sde_step_indices=[np.int32(0)])
plain = SamplingParams(prompt="x", seeds=(1, 2), width=64, sigmas=(1.0, 0.5, 0.0), guidance_scale=2.5, debug_mode=False,
                       sde_step_indices=(0,))
assert given == plain and hash(given) == hash(plain)
print(repr(given) == repr(plain), type(given.guidance_scale) is float)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.split() == ["True", "True"], done.stderr
