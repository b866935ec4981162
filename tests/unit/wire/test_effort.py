"""A bad body costs no more than a good one: one error is made, however much is wrong."""

import importlib
import itertools
import pkgutil
import re
from collections.abc import Iterator
from typing import Any

import pytest
from msgspec import structs

import flowroll.wire
from flowroll.errors import InvalidRequestError
from flowroll.types import SamplingParams
from flowroll.wire.fields import Request
from flowroll.wire.schema import RolloutRequest, parse

MANY = 1000
UNKNOWN = {f"name_{number}": None for number in range(100_000)}


def requests_of(kind: type[Request] = Request) -> Iterator[type[Request]]:
    """Every request of the wire."""
    for module in pkgutil.iter_modules(flowroll.wire.__path__):
        importlib.import_module(f"flowroll.wire.{module.name}")
    for below in kind.__subclasses__():
        yield below
        yield from requests_of(below)


KINDS = sorted(set(requests_of()), key=str)


@pytest.mark.parametrize("data", [UNKNOWN, {"prompt": "a", "extra_sampling_params": UNKNOWN}], ids=["top", "nested"])
def test_unknown_names_are_refused_before_any_value_is_looked_at(monkeypatch: pytest.MonkeyPatch, data: Any) -> None:
    looked = []
    monkeypatch.setattr("flowroll.wire.validation.convert", lambda *values: looked.append(values))
    with pytest.raises(InvalidRequestError) as caught:
        parse(RolloutRequest, data)
    assert not looked and caught.value.field in ("name_0", "extra_sampling_params.name_0")


@pytest.mark.parametrize(
    "wrong", [[[]] * MANY, [[-1.5] * MANY], {str(number): 0 for number in range(MANY)}], ids=["list", "inner", "object"]
)
def test_many_wrong_items_make_one_short_error_and_the_first_of_them_is_shown(wrong: Any) -> None:
    assert len(KINDS) > 20
    refused = 0
    for kind in KINDS:
        for field in structs.fields(kind):
            # Fields before it are there and right, as far as they must be: the error is about this one.
            before = itertools.takewhile(lambda other: other.name != field.name, structs.fields(kind))  # noqa: B023
            data = {other.name: other.type.__metadata__[-1].examples[0] for other in before if other.required}
            is_files = field.name in ("image", "images") and isinstance(wrong, list)
            if is_files and kind.__name__.startswith("_"):
                continue  # a base, of which no body is made
            with pytest.raises(InvalidRequestError) as caught:
                parse(kind, {**data, field.name: wrong})
                # Files are read, and refused, where the request becomes `SamplingParams`.
                assert is_files and SamplingParams(prompt="a", images=tuple(wrong))
            named = re.split(r"[.\[]", caught.value.field or "")[0]
            assert named == ("images" if is_files else field.name), (kind, field.name)
            assert len(caught.value.message) < 1000
            refused += 1
    assert refused > 100


@pytest.mark.parametrize("value", ["a.b[0]", "x - at `$.a.b[3]`", "x - at `$[...].c`"])
def test_a_value_that_reads_like_a_place_is_shown_as_it_is(value: str) -> None:
    with pytest.raises(InvalidRequestError, match="generator_device must") as caught:
        parse(RolloutRequest, {"prompt": "a", "generator_device": value})
    assert value in caught.value.message


def test_an_item_inside_a_nested_object_is_found() -> None:
    tensor = {"__tensor__": 7, "shape": [1], "data": ""}
    with pytest.raises(InvalidRequestError, match=r"extra_sampling_params\.latents must .* got 7;"):
        parse(RolloutRequest, {"prompt": "a", "extra_sampling_params": {"latents": tensor}})
