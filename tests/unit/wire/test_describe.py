"""The OpenAPI document and the parser agree: a value is allowed by the one exactly where the other takes it."""

import importlib
import pkgutil
from collections.abc import Iterator
from typing import Any

import jsonschema_rs
import msgspec
import pytest
from msgspec import structs

import flowroll.wire
from flowroll.errors import InvalidRequestError
from flowroll.wire.describe import components
from flowroll.wire.fields import Request
from flowroll.wire.schema import ExtraGenerateParams, ExtraSamplingParams, parse

# JSON values at and beyond limits. No float that is whole: a schema's "integer" takes 1.0, the parser does not.
TEXTS = ("", "x", "x" * 32, "x" * 33, "x" * 64, "x" * 65, "x" * 128, "x" * 129, "x" * 256, "x" * 257, "x" * 4097, "x" * 100_001)
NUMBERS = (-1, 0, 1, 2, 100, 4096, 4097, 65535, 65536, 2**32 - 1, 2**32, 10**30, -0.5, 0.5, 1.5, 10.5, 999.5, 1000.5)
WORDS = ("cuda", "cpu", "sde", "dance_sde", "auto", "64x32", "64x32\n", "0x64", "png", "drain", "freeze", "vae", "text_encoder")
LISTS: tuple[Any, ...] = (
    *([], [0], [1, 0.5, 0], [-1], [2**32], [True], ["x"]),
    *(["vae"], ["vae", "vae"], [[1]], [[1] * 17], [None]),
)
OBJECTS: tuple[Any, ...] = ({}, {"a": "b"}, {"a": 1}, {"seed": 1}, {"seed": -1}, {"sde_type": "cps"}, {"prompt": "x"})
VALUES: tuple[Any, ...] = (None, True, False, *TEXTS, *NUMBERS, *WORDS, *LISTS, *OBJECTS)


def requests(kind: type[Request] = Request) -> Iterator[type[Request]]:
    for module in pkgutil.iter_modules(flowroll.wire.__path__):
        importlib.import_module(f"flowroll.wire.{module.name}")
    for below in kind.__subclasses__():
        yield below
        yield from requests(below)


KINDS = sorted({kind for kind in requests() if kind.EXAMPLES}, key=str)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_the_document_allows_what_the_parser_takes_and_nothing_else(kind: type[Request]) -> None:
    schemas = components([kind, ExtraSamplingParams, ExtraGenerateParams])
    allowed = jsonschema_rs.validator_for(
        {"$ref": f"#/components/schemas/{kind.__name__}", "components": {"schemas": schemas}}
    ).is_valid
    required = {field.name: field.type.__metadata__[-1].examples[0] for field in structs.fields(kind) if field.required}
    verdicts = []
    bodies = [{**required, name: value} for name in (*kind.__struct_fields__, "no_field") for value in VALUES]
    for body in (
        *kind.EXAMPLES,
        *bodies,
        *({other: required[other] for other in required if other != name} for name in required),
    ):
        try:
            msgspec.convert(body, kind)
            taken = True
        except msgspec.ValidationError:
            taken = False
            with pytest.raises(InvalidRequestError):
                parse(kind, body)
        assert allowed(body) is taken, body
        verdicts.append(taken)
    assert set(verdicts) == {True, False}


def test_there_is_a_kind_for_every_route_with_a_body() -> None:
    assert len(KINDS) == 29
