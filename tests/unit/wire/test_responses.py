import json
from typing import Any

import jsonschema_rs
import msgspec
import pytest
from tests.factories import make_evaluation, make_image, make_rollout

from flowroll.wire.codec import encode_images, encode_rollouts
from flowroll.wire.describe import components
from flowroll.wire.messages import (
    SentEnv,
    WireEnv,
    WireImage,
    WireSample,
    WireSampleScores,
    WireScoreAnswer,
    WireScoreRequest,
    WireSteps,
    WireTensor,
    WireTrajectory,
)

ANSWERS = (WireSample, WireEnv, WireTrajectory, WireImage, WireScoreAnswer, WireSampleScores)
REQUESTS = (WireScoreRequest, WireSteps, SentEnv)


def documented() -> dict[str, Any]:
    answers = components((kind[WireTensor[str]] for kind in ANSWERS), is_answer=True)  # type: ignore[index]
    return components(kind[WireTensor[str]] for kind in REQUESTS) | answers  # type: ignore[index]


def check(kind: type, sample: object) -> None:
    """Validates a JSON value against the documented schema, in which no other names are allowed."""
    schema = {"$ref": f"#/components/schemas/{kind.__name__}", "components": {"schemas": documented()}}
    jsonschema_rs.validate(schema, sample)


@pytest.mark.parametrize("dialect", ["native", "sglang"])
@pytest.mark.parametrize("rollout", [make_rollout(), make_rollout(family="z_image", guided=False), make_evaluation()])
def test_the_documented_answer_is_what_the_codec_writes(dialect: Any, rollout: Any) -> None:
    body = b"".join(encode_rollouts([rollout], wire_format="json", dialect=dialect).chunks())
    (sample,) = msgspec.json.decode(body)
    check(WireSample, sample)
    for name in sample:
        with pytest.raises(jsonschema_rs.ValidationError):
            check(WireSample, {**sample, f"{name}_": 1})
        with pytest.raises(jsonschema_rs.ValidationError):
            check(WireSample, {other: value for other, value in sample.items() if other != name})


def test_the_documented_image_is_what_the_codec_writes() -> None:
    (sample,) = msgspec.json.decode(b"".join(encode_images([make_image()], wire_format="json").chunks()))
    check(WireImage, sample)
    with pytest.raises(jsonschema_rs.ValidationError):
        check(WireImage, {**sample, "seed": "1"})


def test_every_field_of_a_message_with_tensors_is_described() -> None:
    for name, part in documented().items():
        assert part["description"] and "Attributes" not in part["description"], name
        assert part["additionalProperties"] is False
        for field, schema in part["properties"].items():
            assert schema.get("description"), (name, field)
    assert "WireTensor" in documented() and "[" not in json.dumps(list(documented()))[1:-1]
