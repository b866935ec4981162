"""What rank 0 tells the other ranks, and what it keeps from them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.guiding import PicturedEngine, in_words_of
from tests.rollouts import assert_same_bits

from flowroll import Rollout
from flowroll.engine import Engine
from flowroll.engine.runner import sample as samples
from flowroll.errors import CancelledRequestError, EngineError, InvalidRequestError
from flowroll.families import FAMILIES
from flowroll.types import Layout

# 144 image tokens: two ranks share them.
REQUEST: dict[str, Any] = {"prompt": "a cat", "seed": 3, "height": 192, "width": 192, "num_inference_steps": 2}


@pytest.fixture(scope="module")
def expected(z_image_checkpoint: Path) -> Rollout:
    with Engine(z_image_checkpoint, device="cpu") as engine:
        return engine.rollout(**REQUEST)[0]


@pytest.fixture(scope="module")
def sp2(z_image_checkpoint: Path) -> Iterator[Engine]:
    with Engine(z_image_checkpoint, device="cpu", layout=Layout(sp=2), rank_timeout_s=30.0) as engine:
        yield engine


def test_an_engine_starts_its_ranks_and_answers_with_the_bits_of_one_rank(sp2: Engine, expected: Rollout) -> None:
    assert list(sp2.rank_pids) == [1]
    before = sp2.received_bytes.get("sp", 0)
    assert_same_bits(sp2.rollout(**REQUEST)[0], expected)
    assert sp2.received_bytes["sp"] > before
    assert torch.equal(sp2.generate(**REQUEST)[0].image, sp2.rollout(**REQUEST, rollout=False)[0].image)


def test_requests_one_after_the_other_leave_nothing_in_the_store(sp2: Engine, expected: Rollout) -> None:
    keys = sp2._peers._store.num_keys()
    for _ in range(3):
        assert_same_bits(sp2.rollout(**REQUEST)[0], expected)
    assert sp2._peers._store.num_keys() <= keys + 1


@pytest.mark.parametrize("fields", [{"height": 100}, {"num_inference_steps": 2000}, {"sde_step_indices": (9,)}])
def test_a_bad_request_never_reaches_the_other_ranks(
    sp2: Engine, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any]
) -> None:

    def send(command: object) -> None:
        raise AssertionError("a command was sent")

    with monkeypatch.context() as patch:
        patch.setattr(sp2._peers, "send", send)
        with pytest.raises(InvalidRequestError):
            sp2.rollout(**{**REQUEST, **fields})


def test_ranks_that_come_to_other_latents_fail_the_request_and_the_next_one_is_answered(
    sp2: Engine, expected: Rollout, monkeypatch: pytest.MonkeyPatch
) -> None:
    take = samples.recorded_step

    def drift(sample: samples.Sample, velocity: torch.Tensor) -> None:
        take(sample, velocity)
        sample.latents = sample.latents + 1e-3

    with monkeypatch.context() as patch:
        # On rank 0 alone.
        patch.setattr(samples, "recorded_step", drift)
        with pytest.raises(EngineError, match="every rank must come to the same latents, got others on rank 1"):
            sp2.rollout(**REQUEST)
    assert_same_bits(sp2.rollout(**REQUEST)[0], expected)


def test_a_sample_that_leaves_early_leaves_on_every_rank_and_the_next_one_is_answered(
    sp2: Engine, expected: Rollout, monkeypatch: pytest.MonkeyPatch
) -> None:
    take = samples.recorded_step

    def abort(sample: samples.Sample, velocity: torch.Tensor) -> None:
        take(sample, velocity)
        sp2.scheduler.abort("leaves")

    with monkeypatch.context() as patch:
        # On rank 0 alone: the other one waits for the second step, and would for ever.
        patch.setattr(samples, "recorded_step", abort)
        with pytest.raises(CancelledRequestError):
            sp2.rollout(**REQUEST, request_id="leaves")
    assert_same_bits(sp2.rollout(**REQUEST)[0], expected)


def answers_of_one_rank(checkpoint: Path, **guidance: Any) -> list[tuple[dict[str, Any], list[Rollout]]]:
    """Requests that begin, end or fork elsewhere than at the first and last step, and their answers."""
    options = {**REQUEST, **guidance, "num_inference_steps": 3, "return_dit_trajectory": True}
    with PicturedEngine(checkpoint, device="cpu") as engine:
        group = engine.rollout(**options, init_seed=8, num_outputs_per_prompt=2)
        states = torch.stack([one.dit_trajectory.latents[1] for one in group if one.dit_trajectory is not None])
        requests: list[dict[str, Any]] = [
            {**options, "init_seed": 8, "sde_seed": (1, 2)},
            {**options, "latents": states, "start_step": 1, "num_outputs_per_prompt": 2},
            {**options, "latents": states[0], "start_step": 1, "stop_step": 2},
            {**options, "fork": {0: 2, 2: 2}},
            {**options, "latents": states[1], "start_step": 1, "fork": {1: 2}},
            # With a history at a fork.
            {
                **options,
                "num_inference_steps": 5,
                "rollout_steps": ({}, {"noise_level": 0.3}, {"dynamics": "dpmpp2m"}, {"dynamics": "cps"}, {"dynamics": "ode"}),
                "fork": {1: 2},
                "log_prob": {"reduce": "sum", "constants": False},
            },
            {
                **{name: value for name, value in options.items() if name not in ("guidance_scale", "true_cfg_scale")},
                "negative_prompt": "blurry",
                "guidance_scales": (3.0, 0.0, 6.5),
                "return_fields": ("x0", "velocity", "mean", "std", "noise"),
                "return_step_indices": (0, 2),
                "decode_step_indices": (1,),
            },
        ]
        return [(request, engine.rollout(**request)) for request in requests]


def assert_answers(engine: Engine, expected: list[tuple[dict[str, Any], list[Rollout]]]) -> None:
    for request, answer in expected:
        for ours, theirs in zip(engine.rollout(**request), answer, strict=True):
            assert_same_bits(ours, theirs)


def test_starts_stops_and_forks_have_the_bits_of_one_rank(sp2: Engine, z_image_checkpoint: Path) -> None:
    assert_answers(sp2, answers_of_one_rank(z_image_checkpoint))


@pytest.mark.slow
@pytest.mark.parametrize("layout", [Layout(cfg_parallel=True), Layout(tp=2), Layout(sp=2)], ids=["cfg2", "tp2", "sp2"])
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "z_image"])
def test_so_they_have_in_other_families_and_layouts(checkpoints: dict[str, Path], family: str, layout: Layout) -> None:
    expected = answers_of_one_rank(checkpoints[family], **in_words_of(family, {"guidance_scale": 3.0}))
    with PicturedEngine(checkpoints[family], device="cpu", layout=layout, rank_timeout_s=60.0) as engine:
        before = dict(engine.received_bytes)
        assert_answers(engine, expected)
        axis = "cfg" if layout.cfg_parallel else "tp" if layout.tp > 1 else "sp"
        assert engine.received_bytes[axis] > before.get(axis, 0)
