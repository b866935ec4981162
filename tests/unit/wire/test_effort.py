"""A bad body costs no more than a good one: one error is made, however much is wrong."""

import importlib
import pkgutil
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

import flowroll.wire
from flowroll.errors import InvalidRequestError
from flowroll.wire.schema import RolloutRequest, Strict, parse

MANY = 1000
UNKNOWN = {f"name_{number}": None for number in range(100_000)}


def requests_of(model: type[BaseModel] = Strict) -> Iterator[type[BaseModel]]:
    """Every request of the wire."""
    for module in pkgutil.iter_modules(flowroll.wire.__path__):
        importlib.import_module(f"flowroll.wire.{module.name}")
    for kind in model.__subclasses__():
        yield kind
        yield from requests_of(kind)


LISTED = sorted({(model, name) for model in requests_of() for name in model.model_fields}, key=str)


@pytest.mark.parametrize("data", [UNKNOWN, {"prompt": "a", "extra_sampling_params": UNKNOWN}], ids=["top", "nested"])
def test_unknown_names_are_refused_before_any_value_is_looked_at(monkeypatch: pytest.MonkeyPatch, data: Any) -> None:
    looked = []
    monkeypatch.setattr(RolloutRequest, "model_validate", looked.append)
    with pytest.raises(InvalidRequestError) as caught:
        parse(RolloutRequest, data)
    assert not looked and caught.value.field in ("name_0", "extra_sampling_params.name_0")


@pytest.mark.parametrize(
    "wrong", [[[]] * MANY, [[-1.5] * MANY], {str(number): 0 for number in range(MANY)}], ids=["list", "inner", "object"]
)
def test_many_wrong_items_make_one_error(wrong: Any) -> None:
    assert LISTED
    for model, name in LISTED:
        if name == "extra_sampling_params":
            # Its names are checked before; its fields are among those here.
            continue
        with pytest.raises(ValidationError) as caught:
            model.model_validate({name: wrong})
        ours = [detail for detail in caught.value.errors() if detail["loc"][0] == name]
        assert len(ours) <= 1, (model, name)
