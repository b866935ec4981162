"""An engine as a Ray actor: everything that it returns has the bits of an engine in this process."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.rollouts import assert_same_bits
from tests.weights import WEIGHTS

from flowroll import Engine
from flowroll.checkpoints import shapes_checkpoint
from flowroll.cluster import EngineActor, pack
from flowroll.errors import AsleepError, CancelledRequestError, InvalidRequestError

ASKED: dict[str, Any] = {
    "prompt": "a red circle in the center",
    "seed": 3,
    "num_outputs_per_prompt": 3,
    "num_inference_steps": 3,
    "return_denoising_env": True,
    "return_dit_trajectory": True,
}


@pytest.fixture(scope="module")
def local() -> Iterator[Engine]:
    with Engine(shapes_checkpoint("z_image"), device="cpu") as engine:
        yield engine


@pytest.fixture(scope="module")
def actor(ray: Any) -> Iterator[Any]:
    kind = ray.remote(EngineActor).options(num_cpus=1)
    handle = kind.remote(str(shapes_checkpoint("z_image")), device="cpu", num_threads=1)
    ray.get(handle.facts.remote())
    yield handle
    ray.get(handle.close.remote())
    ray.kill(handle)


def test_rollouts_have_the_bits_of_a_local_engine(ray: Any, actor: Any, local: Engine):
    found = ray.get(actor.rollout.remote(**ASKED))
    for one, expected in zip(found, local.rollout(**ASKED), strict=True):
        assert_same_bits(one, expected)
        # What Ray's memory holds must not be written to; a caller's tensors may be.
        one.log_probs.add_(1)


def test_log_probs_and_images_are_those_of_a_local_engine(ray: Any, actor: Any, local: Engine):
    rollouts = local.rollout(**ASKED)
    scores = ray.get(actor.recompute_log_probs.remote(rollouts))
    assert torch.equal(scores.log_probs, torch.stack([rollout.log_probs for rollout in rollouts]))
    image = ray.get(actor.generate.remote("a blue square", seed=1, num_inference_steps=2))[0]
    assert torch.equal(image.image, local.generate("a blue square", seed=1, num_inference_steps=2)[0].image)


def test_errors_are_those_of_an_engine(ray: Any, actor: Any):
    with pytest.raises(InvalidRequestError, match="num_inference_steps"):
        ray.get(actor.rollout.remote("a red circle", num_inference_steps=0))


def test_weights_of_the_object_store_are_taken_whole(ray: Any, actor: Any, local: Engine):
    folder = shapes_checkpoint("z_image") / "transformer"
    weights = {name: tensor * 1.01 for name, tensor in load_file(folder / WEIGHTS).items()}
    before = ray.get(actor.weights_checksum.remote())
    stored = ray.put(pack(weights))
    assert ray.get(actor.update_weights.remote(stored)).weight_version == "1"
    local.update_weights_from_tensors(weights)
    assert ray.get(actor.weights_checksum.remote()) == local.weights_checksum() != before
    for one, expected in zip(ray.get(actor.rollout.remote(**ASKED)), local.rollout(**ASKED), strict=True):
        assert_same_bits(one, expected)
        assert one.weight_version == "1"
    for engine_back in (ray.get(actor.update_weights_from_disk.remote(str(folder))), local.update_weights_from_disk(folder)):
        assert engine_back.weight_version == "2"
    assert ray.get(actor.weights_checksum.remote()) == before


def test_policies_and_adapters_are_reached(ray: Any, actor: Any):
    ray.get(actor.copy_policy.remote("old"))
    assert [policy.name for policy in ray.get(actor.policies.remote())] == ["old"]
    ray.get(actor.average_policy.remote("old", decay=0.5))
    ray.get(actor.drop_policy.remote("old"))
    assert ray.get(actor.policies.remote()) == () == ray.get(actor.lora_adapters.remote())


def test_an_engine_that_sleeps_refuses_and_wakes_unchanged(ray: Any, actor: Any):
    before = ray.get(actor.weights_checksum.remote())
    ray.get(actor.sleep.remote("disk"))
    assert ray.get(actor.status.remote()).is_asleep
    with pytest.raises(AsleepError):
        ray.get(actor.rollout.remote(**ASKED))
    ray.get(actor.wake.remote())
    assert ray.get(actor.weights_checksum.remote()) == before
    assert ray.get(actor.health.remote()) in ("recent", "probe")


def test_a_cancelled_call_ends_its_request(ray: Any, actor: Any):
    running = actor.rollout.remote("a red circle", num_inference_steps=1000, num_outputs_per_prompt=64)
    while not ray.get(actor.status.remote()).counts.running:
        pass
    ray.cancel(running)
    with pytest.raises((ray.exceptions.TaskCancelledError, CancelledRequestError)):
        ray.get(running)
    while ray.get(actor.status.remote()).counts.running:
        pass


def test_requests_can_be_aborted(ray: Any, actor: Any):
    running = actor.rollout.remote("a red circle", num_inference_steps=1000, num_outputs_per_prompt=64, request_id="one")
    while not ray.get(actor.abort.remote("one")):
        pass
    with pytest.raises(CancelledRequestError):
        ray.get(running)
