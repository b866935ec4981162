"""POST /generate and the OpenAI routes: plain images, and no rollout fields."""

import base64
import io
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from tests.serving.servers import SMALL, error_of, serving
from torch import Tensor

from flowroll import SamplingParams
from flowroll.engine.service import EngineService
from flowroll.types import ROLLOUT_FIELDS
from flowroll.wire.codec import decode_images

OPENAI = {"prompt": SMALL["prompt"], "seed": 7, "size": "64x64", "num_inference_steps": 2}
VALUES = {
    "rollout_sde_type": "sde",
    "rollout_noise_level": 0.7,
    "rollout_sde_step_indices": [0],
    "rollout_return_step_indices": [0],
}


@pytest.fixture(scope="module")
def expected(service: EngineService) -> Tensor:
    params = SamplingParams(prompt=SMALL["prompt"], seed=7, height=64, width=64, num_inference_steps=2, rollout=False)
    (image,) = service.engine.generate(params)
    return image.image


def pixels(png: bytes) -> Tensor:
    with Image.open(io.BytesIO(png)) as picture:
        assert picture.format == "PNG"
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[:, None]


def eight_bit(image: Tensor) -> Tensor:
    return (image * 255).round().to(torch.uint8)


@pytest.mark.parametrize("media_type", ["application/json", "application/msgpack"])
def test_generate_returns_the_engines_image_and_latents(server: httpx.Client, expected: Tensor, media_type: str) -> None:
    response = server.post("/generate", json=SMALL, headers={"accept": media_type})
    assert response.headers["content-type"] == media_type
    (image,) = decode_images(bytearray(response.content), media_type)
    assert torch.equal(image.image, expected)
    assert image.seed == 7 and image.latents.isfinite().all()
    assert image.request_id == response.headers["x-request-id"]


def test_generate_returns_one_png_when_asked_for_a_picture(server: httpx.Client, expected: Tensor) -> None:
    response = server.post("/generate", json=SMALL, headers={"accept": "image/png"})
    assert response.headers["content-type"] == "image/png"
    assert response.headers["x-flowroll-seed"] == "7"
    assert torch.equal(pixels(response.content), eight_bit(expected))


def test_several_outputs_as_one_png_are_refused(server: httpx.Client) -> None:
    response = server.post("/generate", json={**SMALL, "num_outputs_per_prompt": 2}, headers={"accept": "image/*"})
    assert response.status_code == 422
    assert error_of(response)["field"] == "num_outputs_per_prompt"


def test_openai_images_are_base64_pngs_of_the_engines_images(server: httpx.Client, expected: Tensor) -> None:
    response = server.post("/v1/images/generations", json={**OPENAI, "n": 2, "response_format": "b64_json"})
    body = response.json()
    assert body.keys() == {"created", "data"}
    assert len(body["data"]) == 2
    assert torch.equal(pixels(base64.b64decode(body["data"][0]["b64_json"])), eight_bit(expected))


def test_openai_model_list_names_the_model_that_image_requests_may_name(server: httpx.Client) -> None:
    listed = server.get("/v1/models").json()
    (model,) = listed["data"]
    assert (listed["object"], model["object"]) == ("list", "model")
    assert server.post("/v1/images/generations", json={**OPENAI, "model": model["id"]}).status_code == 200
    refused = server.post("/v1/images/generations", json={**OPENAI, "model": "dall-e-3"})
    assert refused.status_code == 404
    assert error_of(refused) == {**error_of(refused), "code": "not_found", "field": "model"}


@pytest.mark.parametrize(("size", "field"), [("100x64", "size"), ("64by64", "size"), ("1024x1024", "size")])
def test_openai_sizes_are_checked_and_called_size(server: httpx.Client, size: str, field: str) -> None:
    response = server.post("/v1/images/generations", json={**OPENAI, "size": size})
    assert response.status_code == 422
    error = error_of(response)
    assert error["field"] == field and "size" in error["message"]


@pytest.mark.parametrize("route", ["/generate", "/v1/images/generations"])
@pytest.mark.parametrize("name", sorted(ROLLOUT_FIELDS))
def test_generic_routes_refuse_every_rollout_field(server: httpx.Client, route: str, name: str) -> None:
    body: dict[str, Any] = dict(SMALL if route == "/generate" else OPENAI)
    response = server.post(route, json={**body, name: VALUES.get(name, True)})
    assert response.status_code == 422
    error = error_of(response)
    assert error["field"] == name and "/rollout/generate" in error["message"]


def test_generate_follows_the_servers_format(service: EngineService) -> None:
    with serving(service, wire_format="msgpack") as client:
        assert client.post("/generate", json=SMALL).headers["content-type"] == "application/msgpack"
