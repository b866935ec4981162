from typing import Any

import msgspec
import pytest
from pydantic import BaseModel
from tests.factories import make_evaluation, make_image, make_rollout

from flowroll.wire import responses
from flowroll.wire.codec import encode_images, encode_rollouts


@pytest.mark.parametrize("dialect", ["native", "sglang"])
@pytest.mark.parametrize("rollout", [make_rollout(), make_rollout(family="z_image", guided=False), make_evaluation()])
def test_the_documented_answer_is_what_the_codec_writes(dialect: Any, rollout: Any) -> None:
    body = b"".join(encode_rollouts([rollout], wire_format="json", dialect=dialect).chunks())
    (sample,) = msgspec.json.decode(body)
    documented = responses.RolloutObject.model_validate(sample)
    assert set(sample) == set(type(documented).model_fields)


def test_the_documented_image_is_what_the_codec_writes() -> None:
    (sample,) = msgspec.json.decode(b"".join(encode_images([make_image()], wire_format="json").chunks()))
    documented = responses.GeneratedImageObject.model_validate(sample)
    assert set(sample) == set(type(documented).model_fields)


@pytest.mark.parametrize(
    "model",
    [
        responses.RolloutObject,
        responses.GeneratedImageObject,
        responses.ImagesObject,
        responses.ScoreRequestObject,
        responses.ScoreAnswerObject,
    ],
    ids=lambda m: m.__name__,
)
def test_every_response_field_is_described(model: type[BaseModel]) -> None:
    schema = model.model_json_schema()
    for part in (schema, *schema["$defs"].values()):
        assert part["description"]
        for name, field in part["properties"].items():
            assert field.get("description"), name
