"""What proves where a sample comes from: digests that a trainer computes itself, and the engine that made it."""

import hashlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.guiding import PicturedEngine, in_words_of
from tests.weights import with_other

from flowroll import Rollout
from flowroll.engine import Engine, Limits
from flowroll.families import FAMILIES
from flowroll.types import Layout

REQUEST: dict[str, Any] = {"prompt": "a cat", "seed": 3, "height": 192, "width": 192, "num_inference_steps": 3}
EVERYTHING: dict[str, Any] = {"debug_mode": True, "return_dit_trajectory": True}


@pytest.fixture(scope="module")
def other_weights(z_image_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint with other weights."""
    return with_other(z_image_checkpoint, tmp_path_factory.mktemp("other") / "z_image")


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def proof(rollout: Rollout) -> Any:
    assert rollout.provenance is not None
    return rollout.provenance


@pytest.mark.parametrize("family", list(FAMILIES))
def test_digests_are_those_of_the_tensors(family: str, checkpoints: dict[str, Path]) -> None:
    with PicturedEngine(checkpoints[family], device="cpu") as engine:
        request = in_words_of(family, {**REQUEST, "sde_step_indices": (0, 2)})
        group = engine.rollout(**request, **EVERYTHING, num_outputs_per_prompt=2)
        bare = engine.rollout(**request, num_outputs_per_prompt=2)
    for one, other in zip(group, bare, strict=True):
        noises, states = one.debug_tensors, one.dit_trajectory
        assert noises is not None and states is not None
        expected = (digest(noises.variance_noise[0]), None, digest(noises.variance_noise[2]))
        assert proof(one).noise_sha256 == proof(other).noise_sha256 == expected
        assert proof(one).start_sha256 == proof(other).start_sha256
        # Where states differ in their dtype, the trajectory has the wider one.
        assert proof(one).start_sha256 in {digest(states.latents[0].to(dtype)) for dtype in (torch.float32, torch.bfloat16)}
        assert one.sampling.pos_cond_sha256 == other.sampling.pos_cond_sha256 is not None
    assert proof(group[0]).noise_sha256 != proof(group[1]).noise_sha256
    assert proof(group[0]).start_sha256 != proof(group[1]).start_sha256


def test_starts_forks_and_evaluations(z_image_checkpoint: Path) -> None:
    with Engine(z_image_checkpoint, device="cpu") as engine:
        whole = engine.rollout(**REQUEST, **EVERYTHING)[0]
        assert whole.dit_trajectory is not None
        state = whole.dit_trajectory.latents[1]
        later = engine.rollout(**REQUEST, latents=state, start_step=1)[0]
        leaves = engine.rollout(**REQUEST, fork={1: 2})
        evaluation = engine.rollout(**REQUEST, rollout=False)[0]
    assert proof(later).start_sha256 == digest(state)
    assert proof(later).noise_sha256 == (None, *proof(whole).noise_sha256[1:])
    first, second = (proof(leaf).noise_sha256 for leaf in leaves)
    assert first[0] == second[0] == proof(whole).noise_sha256[0]
    assert first[1] != second[1] and first[2] != second[2]
    assert proof(evaluation).start_sha256 is proof(evaluation).noise_sha256 is None
    assert proof(evaluation).strategy == "merged"


def test_every_rollout_carries_the_checksum_of_the_weights_that_made_it(z_image_checkpoint: Path, other_weights: Path) -> None:
    with Engine(z_image_checkpoint, device="cpu") as engine:
        first = proof(engine.rollout(**REQUEST)[0])
        checksum = engine.weights_checksum()
        engine.copy_policy("old")
        held = proof(engine.rollout(**REQUEST, policy="old")[0])
        engine.update_weights_from_disk(other_weights)
        updated = proof(engine.rollout(**REQUEST)[0])
        other_checksum = engine.weights_checksum()
    assert (first.layout, first.strategy) == ("single", "merged")
    assert first.versions == {name: version(name) for name in ("flowroll", "torch", "diffusers", "transformers")}
    assert first.weights_sha256 == checksum != other_checksum == updated.weights_sha256
    assert held.weights_sha256 is None


def test_the_checksum_of_weights_above_the_bound_is_carried_once_somebody_asked(z_image_checkpoint: Path) -> None:
    with Engine(z_image_checkpoint, device="cpu", limits=Limits(max_hashed_bytes=1000)) as engine:
        before = proof(engine.rollout(**REQUEST)[0])
        checksum = engine.weights_checksum()
        after = proof(engine.rollout(**REQUEST)[0])
        engine.update_weights_from_disk(z_image_checkpoint)
        updated = proof(engine.rollout(**REQUEST)[0])
    assert before.weights_sha256 is updated.weights_sha256 is None and after.weights_sha256 == checksum


@pytest.mark.slow
def test_layouts_have_the_same_digests(z_image_checkpoint: Path, other_weights: Path) -> None:
    proofs = []
    for layout in (Layout(), Layout(tp=2)):
        with Engine(z_image_checkpoint, device="cpu", layout=layout, rank_timeout_s=60.0) as engine:
            started = proof(engine.rollout(**REQUEST)[0])
            engine.update_weights_from_disk(other_weights)
            proofs.append((started, proof(engine.rollout(**REQUEST)[0])))
    for alone, shared in zip(*proofs, strict=True):
        assert (alone.start_sha256, alone.noise_sha256) == (shared.start_sha256, shared.noise_sha256)
        assert alone.weights_sha256 is not None and alone.weights_sha256 == shared.weights_sha256
        assert shared.layout == "tp2"
