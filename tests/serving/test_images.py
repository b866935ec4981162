"""Reference images over HTTP: as a field of a request, and as a form on POST /v1/images/edits."""

import base64
import io
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import torch
from PIL import Image
from tests.guiding import image_file
from tests.serving.servers import error_of, serving
from tests.serving.test_image_routes import eight_bit, pixels

from flowroll import SamplingParams
from flowroll.client import Client
from flowroll.engine import Engine, Limits
from flowroll.engine.service import EngineService
from flowroll.serving.forms import parse_form_body
from flowroll.testing import make_checkpoint
from flowroll.wire.messages import IMAGE_EXAMPLE
from flowroll.wire.schema import ImageEditsRequest, parse

FILES = (image_file(40, 60), image_file(60, 40, seed=1, kind="JPEG"))
SMALL: dict[str, Any] = {"prompt": "a red fox in snow", "seed": 7, "height": 32, "width": 64, "num_inference_steps": 1}
FORM = {"prompt": SMALL["prompt"], "seed": "7", "size": "64x32", "num_inference_steps": "1"}
ROUTE = "/v1/images/edits"
# So that a body with some large files is longer than one without may be.
MOST_BYTES = 128 * 1024


def noise(seed: int) -> bytes:
    """A file of about 100 KB."""
    buffer = io.BytesIO()
    Image.frombytes("RGB", (180, 180), random.Random(seed).randbytes(180 * 180 * 3)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineService]:
    folder = make_checkpoint("qwen_image_edit", tmp_path_factory.mktemp("edit"))
    limits = Limits(max_images=3, max_image_bytes=2**20, max_image_pixels=256 * 256)
    with Engine(folder, device="cpu", limits=limits) as engine, EngineService(engine, max_queue=4) as made:
        yield made


@pytest.fixture(scope="module")
def server(service: EngineService) -> Iterator[httpx.Client]:
    with serving(service, max_body_bytes=MOST_BYTES) as client:
        yield client


@pytest.fixture(scope="module")
def expected(service: EngineService) -> Any:
    (rollout,) = service.engine.rollout(**SMALL, images=FILES, return_denoising_env=True)
    return rollout


@pytest.mark.parametrize("wire_format", ["json", "msgpack"])
def test_a_client_sends_files_and_gets_the_engines_rollout(server: httpx.Client, expected: Any, wire_format: Any) -> None:
    with Client(str(server.base_url), wire_format=wire_format) as client:
        (found,) = client.rollout(**SMALL, images=FILES, return_denoising_env=True)
        (plain,) = client.generate(**SMALL, images=[base64.b64encode(file).decode() for file in FILES])
    assert found.sampling == expected.sampling and len(found.sampling.images) == 2
    assert torch.equal(found.log_probs, expected.log_probs)
    latents = [one.denoising_env.image_kwargs["image_latents"] for one in (found, expected)]
    assert torch.equal(*latents)
    assert plain.sampling.images == expected.sampling.images


def test_a_rollout_that_came_over_http_is_scored(server: httpx.Client, expected: Any) -> None:
    with Client(str(server.base_url)) as client:
        rollouts = client.rollout(**SMALL, images=FILES, return_denoising_env=True, return_dit_trajectory=True)
        assert torch.equal(client.score(rollouts).log_probs[0], expected.log_probs)


def test_files_do_not_count_as_the_rest_of_a_body_does(server: httpx.Client) -> None:
    """A body may be as long as its files in base64, and no longer in anything else."""
    large = [base64.b64encode(noise(seed)).decode() for seed in range(3)]
    assert sum(map(len, large)) > 2 * MOST_BYTES
    body = {**SMALL, "images": large}
    assert server.post("/generate", json=body).status_code == 200
    nested = {**SMALL, "extra_sampling_params": {"images": large}}
    assert server.post("/rollout/generate", json=nested).status_code == 200
    for other in ({"seeds": [1] * MOST_BYTES}, {"extra_sampling_params": {"seeds": [1] * MOST_BYTES}}):
        refused = server.post("/rollout/generate", json={**body, **other})
        assert (refused.status_code, error_of(refused)["code"]) == (413, "payload_too_large"), refused.text
    for images in ([[1] * 200_000], [{"a": "b"}] * 100_000, [["[" * 100] * 100_000]):
        refused = server.post("/generate", content=json.dumps({**SMALL, "images": images}).encode(), headers=JSON)
        assert refused.status_code in (400, 413), refused.text


JSON = {"content-type": "application/json"}
BAD: dict[str, tuple[Any, str]] = {
    "a path": ("/etc/passwd", "images[1] must be the bytes of an image file, or base64 of them, got '/etc/passwd'"),
    "a URL": ("https://example.org/cat.png", "images[1] must be the bytes of an image file, or base64 of them, got 'https"),
    "a data URL": ("data:image/png;base64,AAAA", "send what is behind the comma"),
    "no base64": ("A", "images[1] must be the bytes of an image file, or base64 of them"),
    "base64 of something else": (base64.b64encode(b"GIF89a").decode(), "images[1] must be a whole PNG, JPEG or WebP file"),
    "a number": (7, "images[1] must be the bytes of an image file, or base64 of them, got 'int'"),
    "null": (None, "images[1] must be the bytes of an image file"),
    "too many pixels": (base64.b64encode(image_file(257, 256)).decode(), "images[1] must have at most 65536 pixels"),
    "cut short": (base64.b64encode(FILES[0][:-30]).decode(), "images[1] must be a whole PNG, JPEG or WebP file"),
}


@pytest.mark.parametrize("route", ["/rollout/generate", "/generate"])
@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_a_422_that_says_which(server: httpx.Client, route: str, name: str) -> None:
    value, words = BAD[name]
    good = base64.b64encode(FILES[0]).decode()
    for body, place in (
        ({**SMALL, "images": [good, value, good]}, ""),
        ({**SMALL, "extra_sampling_params": {"images": [good, value]}}, "extra_sampling_params."),
    ):
        refused = server.post(route, json=body)
        assert refused.status_code == 422, refused.text
        error = error_of(refused)
        assert error["field"] == f"{place}images[1]" and words in error["message"], error


@pytest.mark.parametrize("images", [[], "AAAA", {}, 7, True])
def test_what_is_no_list_of_files_is_refused(server: httpx.Client, images: Any) -> None:
    refused = server.post("/generate", json={**SMALL, "images": images})
    assert (refused.status_code, error_of(refused)["field"]) == (422, "images")


def test_msgpack_bodies_have_the_bytes(server: httpx.Client) -> None:
    body = msgspec.msgpack.encode({**SMALL, "images": [*FILES, noise(1)]})
    headers = {"content-type": "application/msgpack"}
    assert server.post("/generate", content=body, headers=headers).status_code == 200
    refused = server.post("/generate", content=msgspec.msgpack.encode({**SMALL, "images": FILES * 2}), headers=headers)
    assert "images must hold at most 3 files, got 4" in error_of(refused)["message"]


def test_the_servers_own_look_at_whether_it_generates_has_an_image(server: httpx.Client) -> None:
    assert server.get("/health_generate").status_code == 200
    assert server.get("/server_info").json()["max_images"] == 3


Parts = list[tuple[str, tuple[str, bytes, str]]]
NAMES: dict[str, Callable[[int], str]] = {
    "image": lambda _: "image",
    "image[]": lambda _: "image[]",
    "image[0]": lambda place: f"image[{place}]",
}


@pytest.mark.parametrize("name", NAMES)
def test_edits_are_the_engines_pictures(server: httpx.Client, service: EngineService, name: str) -> None:
    files: Parts = [(NAMES[name](at), (f"{at}.png", file, "image/png")) for at, file in enumerate(FILES)]
    answer = server.post(ROUTE, data={**FORM, "n": "2", "response_format": "b64_json"}, files=files)
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert body.keys() == {"created", "data"} and len(body["data"]) == 2
    expected = service.engine.generate(**SMALL, images=FILES, num_outputs_per_prompt=2)
    for found, image in zip(body["data"], expected, strict=True):
        assert torch.equal(pixels(base64.b64decode(found["b64_json"])), eight_bit(image.image))


def test_text_of_a_form_stands_for_numbers_and_booleans(server: httpx.Client, service: EngineService) -> None:
    fields = {**FORM, "negative_prompt": "12", "guidance_scale": "2.5", "stream": "false", "partial_images": "0", "user": "7"}
    fields |= {"quality": "auto", "background": "opaque", "output_format": "png", "output_compression": "100", "prompt": "null"}
    answer = server.post(ROUTE, data=fields, files=[("image", ("a.png", FILES[0], "image/png"))])
    assert answer.status_code == 200, answer.text
    asked = {**SMALL, "prompt": "null", "negative_prompt": "12", "guidance_scale": 2.5}
    (expected,) = service.engine.generate(**asked, images=FILES[:1])
    found = pixels(base64.b64decode(answer.json()["data"][0]["b64_json"]))
    assert torch.equal(found, eight_bit(expected.image))


RECORDED = json.loads((Path(__file__).parents[1] / "data" / "openai_edits.json").read_text())
PIXEL = base64.b64decode(IMAGE_EXAMPLE)
ASKED: list[dict[str, Any]] = [
    {"prompt": "make it a red fox 🦊", "images": (PIXEL,), "num_outputs_per_prompt": 1},
    {"prompt": "a red fox", "images": (PIXEL, PIXEL), "guidance_scale": 2.5, "negative_prompt": "blurry"},
]


@pytest.mark.parametrize("number", [0, 1])
def test_what_openais_package_sends_is_understood(server: httpx.Client, number: int) -> None:
    sent, asked = RECORDED[number], ASKED[number]
    body, headers = base64.b64decode(sent["body"]), {"content-type": sent["content_type"]}
    found = parse(ImageEditsRequest, parse_form_body(body, sent["content_type"], ImageEditsRequest, "image")).to_params()
    size = {"width": 64, "height": 32, "num_inference_steps": 1, "seed": 7}
    assert found == SamplingParams(**asked, **size, rollout=False)
    assert sent["path"] == ROUTE
    if number == 0:
        assert server.post(ROUTE, content=body, headers=headers).json()["data"]


GOOD: Parts = [("image", ("a.png", FILES[0], "image/png"))]
WRONG: dict[str, tuple[dict[str, Any], Parts, str, str]] = {
    "no image": ({}, [("mask", ("a.png", b"", "image/png"))], "image", "image must be one or more image files, got nothing"),
    "a mask": ({}, [*GOOD, ("mask", ("m.png", FILES[0], "image/png"))], "mask", "the whole picture is edited"),
    "a bad image": ({}, [*GOOD, ("image", ("b.png", b"nothing", "image/png"))], "image[1]", "whole PNG, JPEG or WebP"),
    "no picture": ({"image": "text"}, [], "image[0]", "whole PNG, JPEG or WebP"),
    "an unknown field": ({"strength": "0.5"}, GOOD, "strength", "must be a known field"),
    "a number that is none": ({"n": "two"}, GOOD, "n", "n must be null or an integer >= 1, got 'two'"),
    "a number that is too small": ({"n": "0"}, GOOD, "n", "n must be null or an integer >= 1, got 0"),
    "streaming": ({"stream": "true"}, GOOD, "stream", "the answer comes whole"),
    "other output": ({"output_format": "webp"}, GOOD, "output_format", "images are PNG"),
    "a size off the grid": ({"size": "100x64"}, GOOD, "size", "must be a multiple of 32"),
    "too many images": ({}, GOOD * 4, "image", "image must hold at most 3 files, got 4"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_form_is_refused_by_the_name_of_its_field(server: httpx.Client, name: str) -> None:
    fields, files, field, words = WRONG[name]
    content: dict[str, Any] = {"data": {**FORM, **fields}, "files": files or [("x", ("x", b"", ""))]}
    if not files:
        content = {"data": {**FORM, **fields}, "files": {"prompt": (None, FORM["prompt"])}}
        content["data"].pop("prompt")
    refused = server.post(ROUTE, **content)
    assert refused.status_code == 422, refused.text
    error = error_of(refused)
    assert error["field"] == field and words in error["message"], error


def test_a_field_twice_is_refused(server: httpx.Client) -> None:
    refused = server.post(ROUTE, data={**FORM, "seed": ["7", "8"]}, files=GOOD)
    assert "seed must be given once, got it twice" in error_of(refused)["message"]


BROKEN: dict[str, tuple[str, bytes]] = {
    "no boundary": ("multipart/form-data", b""),
    "nothing": ("multipart/form-data; boundary=x", b""),
    "another boundary": (
        "multipart/form-data; boundary=x",
        b'--y\r\nContent-Disposition: form-data; name="a"\r\n\r\n1\r\n--y--',
    ),
    "no end": ("multipart/form-data; boundary=x", b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n1'),
    "no name": ("multipart/form-data; boundary=x", b"--x\r\nContent-Disposition: form-data\r\n\r\n1\r\n--x--\r\n"),
    "no header": ("multipart/form-data; boundary=x", b"--x\r\n\r\n1\r\n--x--\r\n"),
    "a long header": ("multipart/form-data; boundary=x", b"--x\r\nA: " + b"b" * 10_000 + b"\r\n\r\n1\r\n--x--\r\n"),
    "many headers": ("multipart/form-data; boundary=x", b"--x\r\n" + b"A: b\r\n" * 1000 + b"\r\n1\r\n--x--\r\n"),
    "many parts": (
        "multipart/form-data; boundary=x",
        b"".join(b'--x\r\nContent-Disposition: form-data; name="a%d"\r\n\r\n\r\n' % at for at in range(300)) + b"--x--\r\n",
    ),
    "no text": (
        "multipart/form-data; boundary=x",
        b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n\xff\r\n--x--\r\n',
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_form_is_a_400(server: httpx.Client, name: str) -> None:
    content_type, content = BROKEN[name]
    refused = server.post(ROUTE, content=content, headers={"content-type": content_type})
    assert (refused.status_code, error_of(refused)["code"]) == (400, "malformed_request"), refused.text


def test_other_kinds_of_bodies_are_refused(server: httpx.Client) -> None:
    refused = server.post(ROUTE, json={"prompt": "a"})
    assert refused.status_code == 415 and "multipart/form-data" in error_of(refused)["message"]
    large = [("image", ("a.png", b"\0" * (2**20 + MOST_BYTES), "image/png"))]
    assert server.post(ROUTE, data=FORM, files=large).status_code == 413


def test_a_model_that_edits_nothing_refuses_images(z_service: EngineService) -> None:
    with serving(z_service) as client:
        refused = client.post(ROUTE, data={"prompt": "a"}, files=GOOD)
        assert refused.status_code == 422 and error_of(refused)["field"] == "image"
        assert "must be left out for z_image" in error_of(refused)["message"]
