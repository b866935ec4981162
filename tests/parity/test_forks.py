"""Forks: samples that share the beginning of their trajectory, each the bits of a request of its own from the shared state."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.guiding import in_words_of
from tests.pairs import FAMILY_WITH_DTYPE
from tests.parity.test_starts import assert_is_the_rest, states
from tests.rollouts import tensors_of

from flowroll import Rollout, SamplingParams, replay
from flowroll.engine import Engine
from flowroll.errors import InvalidRequestError
from flowroll.sampling.noise import child_seed, step_seed

REQUEST: dict[str, Any] = {"prompt": "a green bottle", "height": 64, "width": 64, "num_inference_steps": 4}
ALL: dict[str, Any] = {"debug_mode": True, "return_denoising_env": True, "return_dit_trajectory": True}
EngineOf = Callable[[str, str], Engine]
PipelineOf = Callable[[str, str], Any]


class Counting:
    """A transformer that counts its forwards."""

    def __init__(self, transformer: Any) -> None:
        self._transformer, self.count = transformer, 0

    def __call__(self, *args: Any, **values: Any) -> Any:
        self.count += 1
        return self._transformer(*args, **values)


def branches(rollout: Rollout) -> Any:
    assert rollout.sampling.branches is not None
    return rollout.sampling.branches


@pytest.mark.parametrize(("family", "dtype"), FAMILY_WITH_DTYPE)
def test_a_child_is_a_request_of_its_own_from_the_shared_state(engine_of: EngineOf, family: str, dtype: str) -> None:
    engine = engine_of(family, dtype)
    request = in_words_of(family, {**REQUEST, **ALL, "guidance_scale": 3.0})
    before = engine.scheduler.load().steps
    leaves = engine.rollout(**request, seed=5, fork={2: 3})
    # Steps 0, 1 and the forward of step 2 are taken once, step 3 by each child.
    assert engine.scheduler.load().steps - before == 3 + 3
    for child, leaf in enumerate(leaves):
        (branch,) = branches(leaf)
        seed = (step_seed(5, 2) + 1 + child) % 2**32
        assert (branch.step, branch.parent, branch.id, branch.sde_seed) == (2, "0", f"0/{child}", seed)
        assert (leaf.seed, leaf.sampling.sde_seed, leaf.sampling.init_seed) == (5, 5, 5)
        assert torch.equal(states(leaf)[:3], states(leaves[0])[:3])
        (alone,) = engine.rollout(**request, latents=states(leaf)[2], start_step=2, sde_seed=seed)
        assert_is_the_rest(alone, leaf, 2)
    # Before the fork they are the sample without one.
    (whole,) = engine.rollout(**request, seed=5)
    assert torch.equal(states(leaves[0])[:3], states(whole)[:3]) and not torch.equal(states(leaves[0])[3], states(whole)[3])
    assert not torch.equal(states(leaves[0])[3], states(leaves[1])[3])


def test_every_level_of_a_tree_has_seeds_of_its_own_parent(engine_of: EngineOf) -> None:
    engine = engine_of("z_image", "float32")
    forks = {1: 2, 3: 3}
    leaves = engine.rollout(**REQUEST, **ALL, seeds=(5, 9), sde_seed=(70, 71), fork=forks)
    places = [(root, one, two) for root in range(2) for one in range(2) for two in range(3)]
    for (root, one, two), leaf in zip(places, leaves, strict=True):
        outer, inner = branches(leaf)
        first = (step_seed(70 + root, 1) + 1 + one) % 2**32
        second = (step_seed(first, 3) + 1 + two) % 2**32
        assert (outer.step, outer.parent, outer.id, outer.sde_seed) == (1, f"{root}", f"{root}/{one}", first)
        assert (inner.step, inner.parent, inner.id, inner.sde_seed) == (3, f"{root}/{one}", f"{root}/{one}/{two}", second)
        # The root's noise up to the first fork, its child's up to the second one, then the grandchild's.
        for start, seed in ((0, 70 + root), (1, first), (3, second)):
            (alone,) = engine.rollout(**REQUEST, **ALL, latents=states(leaf)[start], start_step=start, sde_seed=seed)
            stop = {0: 1, 1: 3, 3: 4}[start]
            assert torch.equal(states(alone)[: stop - start + 1], states(leaf)[start : stop + 1])
            assert torch.equal(alone.log_probs[start:stop], leaf.log_probs[start:stop])


TREES: dict[str, tuple[dict[str, Any], int]] = {
    # Options, and the steps that all of it takes.
    "two levels": ({"fork": {1: 2, 3: 2}}, 2 * (2 + 2 * 2)),
    "from the start, to the end": ({"fork": {0: 2, 3: 3}}, 2 * (1 + 2 * 3)),
    "window": ({"fork": {1: 4}, "sde_step_indices": (1,)}, 2 * (2 + 4 * 2)),
    "stopped": ({"fork": {1: 2}, "stop_step": 2}, 2 * 2),
    "cps": ({"fork": {0: 2, 1: 2}, "sde_type": "cps"}, 2 * (1 + 2 + 4 * 2)),
    "solver after": (
        {"fork": {1: 2}, "rollout_steps": ({}, {}, {"dynamics": "dpmpp2m"}, {"dynamics": "dpmpp2m"})},
        2 * (2 + 2 * 2),
    ),
}


@pytest.mark.parametrize("tree", TREES)
def test_every_leaf_replays_and_shared_forwards_are_run_once(engine_of: EngineOf, pipeline_of: PipelineOf, tree: str) -> None:
    options, num_steps = TREES[tree]
    engine, transformer = engine_of("z_image", "bfloat16"), pipeline_of("z_image", "bfloat16").transformer
    before = engine.scheduler.load().steps
    leaves = engine.rollout(**REQUEST, **ALL, **options, seed=5, num_outputs_per_prompt=2, guidance_scale=0.0)
    assert engine.scheduler.load().steps - before == num_steps
    assert [branches(leaf)[-1].id for leaf in leaves] == sorted({branches(leaf)[-1].id for leaf in leaves})
    recorded = torch.stack([leaf.log_probs for leaf in leaves if leaf.log_probs is not None])
    counting = Counting(transformer)
    scores = replay.score(counting, leaves, micro_batch=3, device="cpu", dtype=torch.bfloat16)
    # The solver's first step, of four leaves, runs the step before again.
    assert counting.count == num_steps + (4 if tree == "solver after" else 0)
    assert torch.equal(scores.log_probs.detach(), recorded[:, list(scores.steps)])
    for sample, leaf in enumerate(leaves):
        assert leaf.debug_tensors is not None
        assert torch.equal(scores.means[sample].detach(), leaf.debug_tensors.prev_sample_mean[list(scores.steps)])
    counting.count = 0
    merged = replay.log_prob(counting, leaves, micro_batch=4, device="cpu", dtype=torch.bfloat16, merge="exact")
    assert torch.equal(merged.detach(), recorded[:, list(scores.steps)])
    ratio = replay.ratio(replay.log_prob(transformer, leaves), recorded[:, list(scores.steps)])
    assert torch.equal(ratio.detach(), torch.ones_like(ratio))
    assert replay.audit(transformer, leaves).is_exact


def test_micro_batches_bring_every_pair_once_with_its_gradient(engine_of: EngineOf, pipeline_of: PipelineOf) -> None:
    transformer = pipeline_of("z_image", "float32").transformer
    leaves = engine_of("z_image", "float32").rollout(**REQUEST, **ALL, seed=5, fork={2: 3})
    batches = list(replay.micro_batches(transformer, leaves, micro_batch=2))
    pairs = [pair for batch in batches for pair in zip(batch.samples, batch.steps, strict=True)]
    assert sorted(pairs) == [(sample, step) for sample in range(3) for step in range(4)]
    assert [(len(batch.samples), batch.weight) for batch in batches] == [(6, 6 / 12), (4, 4 / 12), (2, 2 / 12)]
    weight = next(parameter for parameter in transformer.parameters() if parameter.ndim == 2)
    together = torch.autograd.grad(sum((batch.log_probs.sum() for batch in batches), torch.zeros(())), weight)[0]
    lone = [replace(leaf, sampling=replace(leaf.sampling, branches=None)) for leaf in leaves]
    apart = torch.autograd.grad(replay.log_prob(transformer, lone).sum(), weight)[0]
    assert torch.allclose(together, apart, rtol=1e-4, atol=1e-6)


def test_two_trees_of_one_name_share_nothing(engine_of: EngineOf, pipeline_of: PipelineOf) -> None:
    engine = engine_of("z_image", "float32")
    mixed = [engine.rollout(**REQUEST, **ALL, seed=seed, fork={2: 2}, request_id="mine")[0] for seed in (5, 6)]
    counting = Counting(pipeline_of("z_image", "float32").transformer)
    log_probs = replay.log_prob(counting, mixed, device="cpu", dtype=torch.float32)
    assert counting.count == 2 * 4
    assert torch.equal(log_probs.detach(), torch.stack([one.log_probs for one in mixed if one.log_probs is not None]))
    # Of the same record, as other weights would have made it.
    trajectory = mixed[0].dit_trajectory
    assert trajectory is not None
    moved = replace(mixed[0], dit_trajectory=replace(trajectory, latents=trajectory.latents + 0.1))
    counting.count = 0
    replay.log_prob(counting, [mixed[0], moved], device="cpu", dtype=torch.float32)
    assert counting.count == 2 * 4


def test_what_is_recorded_and_how_much_room_there_is_change_no_leaf(engine_of: EngineOf, checkpoints: Any) -> None:
    from flowroll.engine import BatchLimits

    options = {**REQUEST, "seed": 5, "num_outputs_per_prompt": 2, "fork": {0: 3, 2: 2}}
    leaves = engine_of("z_image", "float32").rollout(**options, **ALL)
    info = engine_of("z_image", "float32").info
    with Engine(checkpoints["z_image"], device=info.device, batching=BatchLimits(max_running_samples=2)) as small:
        again = small.rollout(**options)
    assert len(leaves) == len(again) == 12
    for one, other in zip(leaves, again, strict=True):
        for name in ("image", "log_probs"):
            assert torch.equal(dict(tensors_of(one))[name], dict(tensors_of(other))[name])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"fork": {4: 2}}, "fork must be at steps that are run and draw noise, .*, got 4; leave it out"),
        ({"fork": {0: 2}, "sde_step_indices": (2,)}, "got 0; fork at step 2"),
        ({"fork": {0: 2}, "sde_type": "ode"}, "got 0; leave it out"),
        ({"fork": {3: 2}, "sde_type": "cps"}, "got 3; leave it out"),
        ({"fork": {2: 2}, "stop_step": 2}, "got 2; leave it out"),
        ({"fork": {0: 8, 1: 8}, "num_outputs_per_prompt": 2}, "ask for at most 64 samples, got 2 with 64 leaves each"),
        ({"fork": {0: 2}, "rollout": False}, "be left out of an evaluation"),
    ],
)
def test_a_fork_that_cannot_be_is_refused(engine_of: EngineOf, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message) as caught:
        engine_of("z_image", "float32").plan(SamplingParams(**REQUEST, **fields))
    assert caught.value.field == "fork"


def test_the_seeds_of_children_are_their_own() -> None:
    seeds = [child_seed(parent, step, child) for parent in range(50) for step in range(10) for child in range(8)]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**32 for seed in seeds)
    assert child_seed(2**32 - 1, 3, 1023) == (step_seed(2**32 - 1, 3) + 1024) % 2**32
