"""Weights and adapters in a Hugging Face cache, whose names are links: read over HTTP, and never from outside the root."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.adapters import policy, saved
from tests.hub import as_hub_cache
from tests.serving.servers import serving
from tests.weights import WEIGHTS, with_other

from flowroll import replay
from flowroll.client import Client
from flowroll.engine import Engine
from flowroll.engine.service import EngineService
from flowroll.errors import ForbiddenError, WeightsRejectedError


@pytest.fixture(scope="module")
def cache(z_image_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def snapshot(cache: Path, z_image_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return as_hub_cache(with_other(z_image_checkpoint, tmp_path_factory.mktemp("other") / "z_image"), cache)


@pytest.fixture(scope="module")
def service(z_image_checkpoint: Path) -> Iterator[EngineService]:
    with Engine(z_image_checkpoint, device="cpu") as engine, EngineService(engine, max_queue=4) as service:
        yield service


@pytest.fixture(scope="module")
def client(service: EngineService, cache: Path) -> Iterator[Client]:
    with serving(service, weights_roots=(str(cache),)) as server, Client(str(server.base_url)) as client:
        yield client


@pytest.mark.parametrize("path", ["", "transformer", f"transformer/{WEIGHTS}"])
def test_a_snapshot_or_a_file_in_it_is_an_update(path: str, client: Client, snapshot: Path, z_image_checkpoint: Path) -> None:
    client.update_weights_from_disk(snapshot / path)
    with Engine(snapshot, device="cpu") as fresh:
        assert client.weights_checksum() == fresh.weights_checksum()


def test_an_adapter_in_a_cache_is_loaded(client: Client, service: EngineService, cache: Path, tmp_path: Path) -> None:
    model = policy(service.engine._model.transformer)
    folder = as_hub_cache(saved(model, tmp_path / "adapter"), cache)
    change = client.load_lora_adapter(folder, name="cached")
    assert change.adapter is not None and change.adapter.sha256 == replay.adapter_checksum(model)
    client.unload_lora_adapter("cached")


def test_a_file_of_another_kind_is_named_as_it_was_given(client: Client, snapshot: Path) -> None:
    with pytest.raises(WeightsRejectedError, match=r"transformer/config\.json must be a \.safetensors file or a folder"):
        client.update_weights_from_disk(snapshot / "transformer" / "config.json")


def test_links_out_of_the_root_are_refused_whatever_they_are_called(
    service: EngineService, snapshot: Path, tmp_path: Path
) -> None:
    # The names are inside, and the files beside: in the cache's blobs.
    with serving(service, weights_roots=(str(snapshot),)) as server, Client(str(server.base_url)) as client:
        before = client.weights_checksum()
        for path in ("", "transformer", f"transformer/{WEIGHTS}"):
            with pytest.raises(ForbiddenError, match="must lead into a folder of --weights-root"):
                client.update_weights_from_disk(snapshot / path)
        with pytest.raises(ForbiddenError, match="must lead into a folder of --weights-root"):
            client.load_lora_adapter(snapshot.parent, name="outside")
        assert client.weights_checksum() == before
