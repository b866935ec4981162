"""Changes in two halves, by which several engines change together, and plans of a part of a request."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.rollouts import assert_same_bits
from tests.weights import REQUEST, with_other

from flowroll import Engine
from flowroll.engine.service import EngineService
from flowroll.engine.weights.staged import find_weights
from flowroll.engine.weights.versions import VersionState
from flowroll.errors import NotFoundError, OutdatedWeightsError, WeightsRejectedError
from flowroll.types import params_of


@pytest.fixture(scope="module")
def service(z_image_checkpoint: Path) -> Iterator[EngineService]:
    with Engine(z_image_checkpoint, device="cpu") as engine, EngineService(engine, max_queue=4) as service:
        yield service


@pytest.fixture(scope="module")
def other(z_image_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_other(z_image_checkpoint, tmp_path_factory.mktemp("other") / "weights")


def test_what_is_staged_changes_nothing_until_it_is_committed(service: EngineService, other: Path):
    engine = service.engine
    before, version = engine.weights_checksum(), engine.weight_version
    staged = service.stage_from_disk(find_weights(other, "transformer"))
    assert (engine.weights_checksum(), engine.weight_version) == (before, version)
    service.drop_staged(staged)
    with pytest.raises(NotFoundError, match="staged_id"):
        service.commit_staged(staged, None, "drain")
    staged = service.stage_from_disk(find_weights(other, "transformer"))
    assert service.commit_staged(staged, "next", "drain").weight_version == "next"
    assert engine.weights_checksum() != before
    with pytest.raises(NotFoundError):
        service.commit_staged(staged, None, "drain")


def test_one_change_is_staged_at_a_time(service: EngineService, other: Path):
    first, second = (service.stage_from_disk(find_weights(other, "transformer")) for _ in range(2))
    with pytest.raises(NotFoundError):
        service.commit_staged(first, None, "drain")
    service.drop_staged(first)
    service.commit_staged(second, None, "drain")


def test_an_update_that_lacks_tensors_stays_open(service: EngineService):
    opened = service.open_update("transformer", partial=False)
    with pytest.raises(WeightsRejectedError):
        service.stage_update(opened.update_id)
    assert service.is_open(opened.update_id)
    service.drop_update(opened.update_id)


def test_versions_are_taken_over(service: EngineService):
    numbers = {"0": 0, "eleven": 11, "twelve": 12}
    service.restore_versions(VersionState(current="twelve", number=12, newest=12, highest=40, numbers=numbers))
    assert service.engine.weight_version == "twelve" and service.status().version_number == 12
    service.engine.plan(params_of(None, {**REQUEST, "min_weight_version": "eleven"}))
    with pytest.raises(OutdatedWeightsError):
        service.engine.plan(params_of(None, {**REQUEST, "min_weight_version": "thirteen"}))


@pytest.mark.parametrize("fork", [None, {1: 2}])
def test_parts_of_a_request_have_the_samples_of_the_whole(service: EngineService, fork: dict[int, int] | None):
    values = {**REQUEST, "num_outputs_per_prompt": 3, "fork": fork, "request_id": "one"}
    plan = service.engine.plan(params_of(None, values))
    whole = service.engine.rollout(plan)
    parts = [service.engine.rollout(plan.part(samples)) for samples in (range(1), range(1, 3))]
    for one, expected in zip([rollout for part in parts for rollout in part], whole, strict=True):
        assert_same_bits(one, expected)
        assert (one.seed, one.request_id) == (expected.seed, "one")
