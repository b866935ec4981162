"""The training examples: what they write, how they can be spoiled, and that they learn, or do not."""

import copy
import sys
import types
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from PIL import Image
from tests.factories import make_rollout

import flowroll.examples.branch_grpo as branch_grpo
import flowroll.examples.diffusion_nft as diffusion_nft
import flowroll.examples.flow_grpo as flow_grpo
from flowroll import Rollout, replay
from flowroll.engine import Engine
from flowroll.errors import InvalidRequestError
from flowroll.examples.rl import loop
from flowroll.examples.rl.journal import Journal, Row, plot, read_rows
from flowroll.examples.rl.learner import Batch
from flowroll.examples.rl.loop import load_policy
from flowroll.examples.rl.options import Options, reward_named
from flowroll.examples.rl.spoiling import SPOIL_ROLLOUTS, permuted_latents, shuffled, wrong_env, wrong_sigmas
from flowroll.examples.shapes.world import SCENES
from flowroll.plots import ContactRow

REQUEST = {
    "prompt": "a red circle at the top left",
    "height": 64,
    "width": 64,
    "seed": 3,
    "num_inference_steps": 3,
    "num_outputs_per_prompt": 4,
    "guidance_scale": 0.0,
    "return_denoising_env": True,
    "return_dit_trajectory": True,
}


def test_a_journal_reads_back_what_it_wrote_also_of_a_run_that_was_cut_off(tmp_path):
    journal = Journal(tmp_path / "rewards.csv")
    rows = [Row(round=0, reward=0.25, evaluation=0.5, ratio_error=0.0, seconds=1.5), Row(round=1, evaluation=0.75, seconds=2.0)]
    for number, row in enumerate(rows):
        journal.add(row)
        assert read_rows(journal.path) == rows[: number + 1]
    assert journal.evaluations == [(0, 0.5), (1, 0.75)]
    plot({"one": rows, "two": rows}, tmp_path / "rewards.png", title="a title")
    assert min(Image.open(tmp_path / "rewards.png").size) > 300


class Idle:
    """Learns nothing."""

    old = None

    def update(self, policy, batch):
        return 0.0


class Nowhere:
    """Publishes nothing."""

    request: ClassVar[dict[str, str]] = {}

    def publish(self, client, policy, version):
        pass


def test_the_pictures_of_before_are_those_of_the_first_evaluation(tmp_path, monkeypatch):
    taken = [torch.full((3, 1, 8, 8), 0.1 * number) for number in range(4)]
    evaluations = iter((float(number), [picture] * len(SCENES)) for number, picture in enumerate(taken))
    shown: list[ContactRow] = []
    monkeypatch.setattr(loop._Run, "_evaluate", lambda self: next(evaluations))
    monkeypatch.setattr(loop._Run, "_collect", lambda self, number: (None, 0.5))
    monkeypatch.setattr(loop, "contact_sheet", lambda rows, captions, path, title: shown.extend(rows))
    monkeypatch.setattr(loop, "publisher_of", lambda rank: Nowhere())
    options = Options(out=tmp_path, rounds=3, evaluate_every=1)
    run = loop._Run(options, Idle(), None, None, None, Journal(tmp_path / "rewards.csv"))
    for number in range(run.begin(), 3):
        run.round(number)
    run.finish("a run")
    assert [row.label for row in shown] == ["before", "after"]
    assert torch.equal(shown[0].images[0], taken[0]) and torch.equal(shown[1].images[0], taken[3])


def test_a_reward_is_named_by_its_module_and_function():
    assert reward_named("math:sqrt")(4.0) == 2.0
    for path, words in (
        ("math", "must be module:function, got math"),
        ("no.such:thing", "must be module:function, got no.such:thing"),
        ("math:pi", "must name a function, got math:pi, a float"),
    ):
        with pytest.raises(SystemExit, match=words):
            reward_named(path)


def test_rows_go_to_tensorboard_where_that_is_installed_and_the_remedy_is_named_where_not(tmp_path, monkeypatch):
    written, closed = [], []

    class SummaryWriter:
        def __init__(self, folder):
            assert folder == str(tmp_path)

        def add_scalar(self, name, value, number):
            written.append((name, value, number))

        def close(self):
            closed.append(True)

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    with Journal(tmp_path / "rewards.csv", track=["tensorboard"]) as journal:
        journal.add(Row(round=3, reward=0.5, seconds=2.0))
    assert written == [("reward", 0.5, 3), ("seconds", 2.0, 3)] and closed == [True]
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SystemExit, match="pip install wandb"):
        Journal(tmp_path / "rewards.csv", track=["wandb"])


def test_a_window_moves_along_and_begins_again():
    learner = flow_grpo.FlowGrpo(Options(out=Path(), num_steps=4), updates=1, window=2, move_every=3)
    windows = [learner.request(number)["sde_step_indices"] for number in range(12)]
    assert windows == [(0, 1)] * 3 + [(1, 2)] * 3 + [(2, 3)] * 3 + [(0, 1)] * 3


def groups() -> list[Rollout]:
    """Two groups of two."""
    return [make_rollout(seed=seed, family="z_image", prompt="ab"[seed // 2], guided=False) for seed in range(4)]


def test_shuffled_rewards_are_the_same_rewards():
    rewards = [0.1, 0.2, 0.3, 0.4, 0.5]
    mixed = shuffled(rewards, torch.Generator().manual_seed(0))
    assert mixed != rewards and sorted(mixed) == rewards


def test_a_wrong_env_is_that_of_another_prompt():
    rollouts = groups()
    spoilt = wrong_env(rollouts)
    for index, rollout in enumerate(spoilt):
        donor = rollouts[(index + 2) % 4]
        assert rollout.denoising_env is donor.denoising_env and rollout.prompt != donor.prompt
        assert rollout.dit_trajectory is rollouts[index].dit_trajectory


def test_wrong_sigmas_are_those_of_the_next_step():
    rollout = groups()[0]
    spoilt = wrong_sigmas([rollout])[0]
    before, after = rollout.dit_trajectory.sigmas, spoilt.dit_trajectory.sigmas
    assert torch.equal(after[:-2], before[1:-1]) and after[-1] == 0 and (after.diff() < 0).all()
    assert spoilt.sampling.sigmas == tuple(after.tolist())


def test_permuted_latents_pair_no_state_with_its_own_next():
    rollouts = groups()
    for index, spoilt in enumerate(permuted_latents(rollouts)):
        own, other = rollouts[index].dit_trajectory.latents, rollouts[(index + 1) % 4].dit_trajectory.latents
        assert torch.equal(spoilt.dit_trajectory.latents[::2], own[::2])
        assert torch.equal(spoilt.dit_trajectory.latents[1::2], other[1::2])


@pytest.fixture(scope="module")
def engine(z_image_checkpoint):
    with Engine(z_image_checkpoint) as engine:
        yield engine


@pytest.fixture
def policy(z_image_checkpoint):
    return load_policy(z_image_checkpoint)


def batch_of(rollouts: list[Rollout], advantages: list[float]) -> Batch:
    found = torch.tensor(advantages)
    groups = torch.zeros(len(rollouts), dtype=torch.long)
    generator = torch.Generator().manual_seed(0)
    return Batch(rollouts=rollouts, rewards=found, groups=groups, advantages=found, generator=generator)


@pytest.mark.parametrize("window", [None, (0, 1)])
def test_a_policy_gradient_step_starts_at_one_and_favours_the_better_samples(engine, policy, window):
    rollouts = engine.rollout(**REQUEST, sde_step_indices=window)
    learner = flow_grpo.FlowGrpo(Options(out=Path(), num_steps=3, learning_rate=1e-3), updates=1)
    assert learner.update(policy, batch_of(rollouts, [1.0, -1.0, 1.0, -1.0])) == 0
    moved = (replay.log_prob(policy, rollouts) - torch.stack([one.log_probs for one in rollouts])).sum(dim=1)
    assert moved[0] > moved[1] and moved[2] > moved[3] and moved.abs().min() > 0


@pytest.mark.parametrize("mistake", SPOIL_ROLLOUTS)
def test_a_ratio_that_is_not_one_stops_the_run_unless_it_was_asked_for(engine, policy, mistake):
    rollouts = engine.rollout(**REQUEST) + engine.rollout(**{**REQUEST, "prompt": "a blue square in the center"})
    batch = batch_of(SPOIL_ROLLOUTS[mistake](rollouts), [1.0, -1.0] * 4)
    before = copy.deepcopy(policy.state_dict())
    with pytest.raises(RuntimeError, match="exactly 1 before the first update"):
        flow_grpo.FlowGrpo(Options(out=Path(), num_steps=3), updates=1).update(policy, batch)
    assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())
    assert flow_grpo.FlowGrpo(Options(out=Path(), num_steps=3, mistake=mistake), updates=1).update(policy, batch) > 0


def test_nft_pulls_towards_good_samples_and_away_from_bad_ones(engine, policy):
    rollouts = engine.rollout(**REQUEST, sde_type="ode", return_step_indices=(3,))
    learner = diffusion_nft.DiffusionNft(Options(out=Path(), learning_rate=1e-3), strength=1.0, noise_levels=3, updates=1)

    def losses() -> torch.Tensor:
        """How far the policy's velocities are from each sample, over fixed noise."""
        found = []
        for rollout in rollouts:
            clean = rollout.dit_trajectory.latents[-1]
            noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(9))
            mixed = [torch.lerp(clean, noise, rollout.sampling.sigmas[step]) for step in range(3)]
            velocities = torch.stack(replay.velocities(policy, rollout, mixed, steps=[0, 1, 2]))
            found.append((velocities - (noise - clean)).square().mean())
        return torch.stack(found).detach()

    before = losses()
    learner.update(policy, batch_of(rollouts, [1.0, -1.0, 1.0, -1.0]))
    moved = losses() - before
    assert moved[0] < moved[1] and moved[2] < moved[3]


def test_the_optimality_is_a_probability_with_a_mean_of_one_half():
    advantages = torch.tensor([-3.0, 0.5, 0.5, 0.5, 0.25])
    found = diffusion_nft.optimality_of(advantages)
    assert found.min() == 0 and found.max() <= 1 and found.mean() == pytest.approx(0.5)
    assert found[1] == found[2] > found[4] > found[0]
    assert torch.equal(diffusion_nft.optimality_of(torch.zeros(3)), torch.full((3,), 0.5))


def test_nft_needs_no_more_than_the_last_state_and_the_env(engine, policy):
    rollouts = engine.rollout(**REQUEST, sde_type="ode", return_step_indices=(3,), debug_mode=False)
    learner = diffusion_nft.DiffusionNft(Options(out=Path()), strength=1.0, noise_levels=1, updates=2)
    before = copy.deepcopy(policy.state_dict())
    learner.update(policy, batch_of(rollouts, [1.0, -1.0, 0.0, 0.0]))
    assert any(not torch.equal(value, before[name]) for name, value in policy.state_dict().items())
    with pytest.raises(InvalidRequestError):
        replay.score(policy, rollouts)


def test_what_a_node_drew_is_rewarded_by_what_came_of_it(engine):
    """A tree of two branches from the first step, each of two from the third."""
    leaves = engine.rollout(**{**REQUEST, "num_outputs_per_prompt": 1, "fork": {0: 2, 2: 2}})
    found = branch_grpo.node_advantages(leaves, torch.tensor([1.0, 3.0, 5.0, 7.0]))
    # Before the second fork two nodes, with mean rewards 2 and 6; then four leaves of std sqrt(5).
    root = 5**0.5
    expected = torch.tensor([[-1.0, -1.0, -3 / root], [-1.0, -1.0, -1 / root], [1.0, 1.0, 1 / root], [1.0, 1.0, 3 / root]])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)


def test_the_gradient_of_a_tree_goes_by_its_branches(engine, policy):
    leaves = engine.rollout(**{**REQUEST, "num_outputs_per_prompt": 1, "fork": {0: 2, 2: 2}})
    options = Options(out=Path(), num_steps=3, learning_rate=1e-3)
    learner = branch_grpo.BranchGrpo(options, updates=1, noise_level=0.7, fork={0: 2, 2: 2})
    assert learner.request(0)["fork"] == {0: 2, 2: 2} and learner.request(0)["num_outputs_per_prompt"] == 1
    # The leaves of a branch differ, and their means do not: only the last step has an advantage.
    batch = batch_of(leaves, [1.0, -1.0, 1.0, -1.0])
    assert learner.update(policy, batch) == 0
    moved = replay.log_prob(policy, leaves) - torch.stack([one.log_probs for one in leaves])
    assert moved[0, 2] > moved[1, 2] and moved[2, 2] > moved[3, 2]
    assert not learner.advantages(batch)[:, :2].any()
