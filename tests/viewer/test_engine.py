"""The viewer with an engine: steps that are decoded now, and ratios under the weights in memory."""

import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from tests.serving.servers import serving
from tests.viewer.reading import text_of

from flowroll import Rollout, RolloutStore, SamplingParams
from flowroll.engine import Engine
from flowroll.engine.service import EngineService
from flowroll.types.pictures import encode_png
from flowroll.viewer import Pages, viewer_router

REQUEST = {
    "prompt": "a red fox",
    "height": 32,
    "width": 32,
    "num_inference_steps": 3,
    "guidance_scale": 0.0,
    "return_denoising_env": True,
    "return_dit_trajectory": True,
}


@pytest.fixture(scope="module")
def engine(z_image_checkpoint: Path) -> Iterator[Engine]:
    with Engine(z_image_checkpoint, device="cpu") as engine:
        yield engine


@pytest.fixture(scope="module")
def service(engine: Engine) -> Iterator[EngineService]:
    # For the last tests: the engine is the service's own from now on.
    with EngineService(engine, max_queue=4) as service:
        yield service


@pytest.fixture(scope="module")
def rollouts(engine: Engine) -> list[Rollout]:
    # The first has the pictures that the engine made at once, the second what they are made of.
    return [
        *engine.rollout(SamplingParams(**REQUEST, seed=5, decode_step_indices=(0, 2), image_format="png")),
        *engine.rollout(SamplingParams(**REQUEST, seed=5, return_fields=("x0",), image_format="png")),
        *engine.rollout(SamplingParams(**REQUEST, seed=5, debug_mode=True, image_format="png")),
        *engine.rollout(SamplingParams(**{**REQUEST, "return_denoising_env": False}, seed=2, image_format="png")),
    ]


@pytest.fixture
def store(rollouts: list[Rollout], tmp_path: Path) -> RolloutStore:
    store = RolloutStore(tmp_path / "runs")
    store.append(rollouts)
    return store


@pytest.fixture
def client(store: RolloutStore, engine: Engine) -> TestClient:
    app = FastAPI()
    app.include_router(viewer_router(Pages(store, model=engine)))
    return TestClient(app)


def test_what_a_step_predicted_is_decoded_as_the_engine_would_have_at_once(client: TestClient, rollouts: list[Rollout]) -> None:
    assert rollouts[0].step_images is not None
    for place, step in enumerate((0, 2)):
        expected = encode_png(rollouts[0].step_images.images[place])
        for sample in range(3):
            assert client.get(f"/picture/000000-00{sample}/{step}.png").content == expected, (sample, step)
    assert "/picture/000000-001/1.png" in client.get("/sample/000000-001").text
    assert client.get("/picture/000000-003/1.png").status_code == 404


def test_the_ratio_is_1_with_the_same_weights_and_not_with_others(client: TestClient, engine: Engine) -> None:
    page = client.post("/sample/000000-001").text
    assert "Exact: with the weights 0 the ratio is 1 at all 3 steps." in text_of(page) and page.count("<svg") == 3
    assert "Ratio per step" in page and len(re.findall(r"<td>1</td></tr>", page)) == 3
    weights = engine._model.transformer.state_dict()
    changed = {name: (tensor * 1.01 if tensor.is_floating_point() else tensor) for name, tensor in weights.items()}
    kept = {name: tensor.clone() for name, tensor in weights.items()}
    engine.update_weights_from_tensors(changed.items(), weight_version="after")
    try:
        said = text_of(client.post("/sample/000000-001").text)
        assert "Not exact: with the weights after the largest |ratio - 1| of 3 steps is" in said
        assert "the sample was made with the weights 0." in said
    finally:
        engine.update_weights_from_tensors(kept.items(), weight_version="0")


def test_a_rollout_that_cannot_be_replayed_says_why(client: TestClient) -> None:
    answer = client.post("/sample/000000-003")
    assert answer.status_code == 422 and "return_denoising_env" in text_of(answer.text)


@pytest.mark.parametrize("key", [None, "a key"])
def test_a_server_shows_a_store_and_lends_it_its_engine(
    service: EngineService, rollouts: list[Rollout], store: RolloutStore, key: str | None
) -> None:
    auth = None if key is None else httpx.BasicAuth("me", key)
    with serving(service, viewer=str(store.path), api_key=key) as client:
        assert "4 samples" in client.get("/viewer", auth=auth).text
        said = text_of(client.post("/viewer/sample/000000-001", auth=auth).text)
        assert "the ratio is 1 at all 3 steps" in said
        assert rollouts[0].step_images is not None
        found = client.get("/viewer/picture/000000-001/2.png", auth=auth).content
        assert found == encode_png(rollouts[0].step_images.images[1])
        refused = client.get("/viewer")
        assert refused.status_code == (200 if key is None else 401)
        # The key opens the pages alone in this way.
        assert key is None or client.get("/server_info", auth=auth).status_code == 401
        assert client.get("/viewers", auth=auth).status_code == (404 if key is None else 401)


def test_a_server_without_the_flag_has_no_such_pages(service: EngineService) -> None:
    with serving(service) as client:
        assert client.get("/viewer").status_code == 404
