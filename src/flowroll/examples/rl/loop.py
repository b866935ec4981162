"""The loop of online reinforcement learning, over HTTP: roll out, reward, update, push the weights, again.

Owns the server process, the policy, the prompts and the rewards. What is asked for and what an update does is the learner's:
`train` hands it the policy and a batch of rollouts with their advantages.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import diffusers
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from flowroll import Rollout, replay
from flowroll.checkpoints import shapes_checkpoint
from flowroll.client import Client
from flowroll.engine.loading import silence_model_libraries
from flowroll.examples.rl.journal import Journal, Row, plot
from flowroll.examples.rl.learner import Batch, Learner
from flowroll.examples.rl.options import Options, Reward, reward_named
from flowroll.examples.rl.publishing import publisher_of, with_adapter
from flowroll.examples.rl.saving import load, save
from flowroll.examples.rl.spoiling import SPOIL_REWARDS, SPOIL_ROLLOUTS
from flowroll.examples.server import running_server
from flowroll.examples.shapes.world import SCENES
from flowroll.plots import ContactRow, contact_sheet

_SHOWN_PROMPTS = 8
# One forward per step, as Flow-GRPO trains: at this scale no family runs guidance.
_UNGUIDED = 0.0


def train(options: Options, learner: Learner, *, title: str) -> Journal:
    """Trains the shapes policy; CSV, curve and pictures go to `options.out`, what was learned to `options.save`.

    Args:
        options: The run.
        learner: What is asked of the server, and what a round does to the policy.
        title: Above the curve.
    """
    silence_model_libraries()
    # As many as the server has: on the CPU, bits depend on it.
    torch.set_num_threads(1)
    reward = reward_named(options.reward)
    options.out.mkdir(parents=True, exist_ok=True)
    checkpoint = shapes_checkpoint(options.family)
    policy = load_policy(checkpoint)
    if options.lora_rank is not None:
        torch.manual_seed(options.seed)
        policy = with_adapter(policy, options.lora_rank)
    with (
        Journal(options.out / "rewards.csv", track=options.track, name=title) as journal,
        running_server(checkpoint, options.out / "server.log") as server,
        Client(server.url) as client,
        _progress() as progress,
    ):
        run = _Run(options, learner, reward, client, policy, journal)
        task = progress.add_task("", total=options.rounds)
        for number in range(run.begin(), options.rounds):
            run.round(number)
            if options.save is not None:
                save(options.save, checkpoint, policy, run.saved_state(number + 1), options)
            progress.update(task, completed=number + 1, description=run.state)
        run.finish(title)
    start, end = journal.evaluations[0][1], journal.evaluations[-1][1]
    Console().print(f"mean reward {start:.3f} -> {end:.3f}; {options.out}/rewards.csv, rewards.png, pictures.png", markup=False)
    return journal


def load_policy(checkpoint: Path) -> nn.Module:
    """The checkpoint's transformer in float32, to be trained."""
    name = diffusers.DiffusionPipeline.load_config(checkpoint)["transformer"][1]
    policy: nn.Module = getattr(diffusers, name).from_pretrained(
        checkpoint / "transformer", dtype=torch.float32, local_files_only=True
    )
    replay.align_weights(policy)
    return policy


class _Run:
    """The state of a run."""

    def __init__(
        self, options: Options, learner: Learner, reward: Reward, client: Client, policy: nn.Module, journal: Journal
    ) -> None:
        self._options, self._learner, self._reward, self._client = options, learner, reward, client
        self._policy, self._journal = policy, journal
        self._publisher = publisher_of(options.lora_rank)
        self._generator = torch.Generator().manual_seed(options.seed)
        self._started_s = time.perf_counter()
        self._before: Sequence[Tensor] = ()
        self.state = ""

    def begin(self) -> int:
        """Gives the server what the run starts from; returns the number of the first round."""
        options, learner, publisher, number = self._options, self._learner, self._publisher, 0
        source = publisher.request.get("lora_name")
        if options.resume is not None:
            state = load(options.resume, self._policy, options)
            number = state["rounds"]
            self._generator.set_state(state["generator"])
            self._journal.restore([Row(**row) for row in state["rows"]])
            learner.restore(state["learner"], self._policy)
        if learner.old is not None and learner.old.module is not None:
            # Sent as the policy, and kept beside it once the policy itself is sent.
            publisher.publish(self._client, learner.old.module, number)
            learner.old.begin(self._client, source)
        if number or options.lora_rank is not None:
            publisher.publish(self._client, self._policy, number)
        if learner.old is not None and learner.old.module is None:
            learner.old.begin(self._client, source)
        return number

    def saved_state(self, rounds: int) -> dict[str, Any]:
        """What a later run needs to go on after so many rounds, beside the policy."""
        return {
            "rounds": rounds,
            "generator": self._generator.get_state(),
            "rows": [asdict(row) for row in self._journal.rows],
            "learner": self._learner.state(),
        }

    def round(self, number: int) -> None:
        """One round: rollouts from the server, an update of the policy, its weights to the server."""
        evaluation = None
        if number % self._options.evaluate_every == 0 or not self._before:
            evaluation, pictures = self._evaluate()
            self._before = self._before or pictures
        batch, mean = self._collect(number)
        ratio_error = self._learner.update(self._policy, batch)
        self._publisher.publish(self._client, self._policy, number + 1)
        if self._learner.old is not None:
            self._learner.old.follow(self._client, self._publisher.request.get("lora_name"))
        seconds = time.perf_counter() - self._started_s
        self._journal.add(
            Row(round=number, reward=mean, evaluation=evaluation, ratio_error=ratio_error, seconds=round(seconds, 1))
        )
        self.state = f"reward {mean:.3f}, evaluation {self._journal.evaluations[-1][1]:.3f}"

    def finish(self, title: str) -> None:
        """The last evaluation, the curve, the pictures."""
        evaluation, after = self._evaluate()
        seconds = time.perf_counter() - self._started_s
        self._journal.add(Row(round=self._options.rounds, evaluation=evaluation, seconds=round(seconds, 1)))
        plot({f"seed {self._options.seed}": self._journal.rows}, self._options.out / "rewards.png", title=title)
        step = len(SCENES) // _SHOWN_PROMPTS
        rows = [
            ContactRow(label=label, images=images[::step]) for label, images in (("before", self._before), ("after", after))
        ]
        contact_sheet(
            rows,
            [scene.prompt.replace(" at ", "\nat ").replace(" in ", "\nin ") for scene in SCENES[::step]],
            self._options.out / "pictures.png",
            title=title,
        )

    def _collect(self, number: int) -> tuple[Batch, float]:
        """The rollouts of a round, and their mean reward."""
        options, generator, old = self._options, self._generator, self._learner.old
        chosen = torch.randperm(len(SCENES), generator=generator)[: options.prompts].tolist()
        policy = self._publisher.request if old is None else {"policy": old.name}
        # A learner that makes trees says itself how many samples there are.
        fields = {"num_outputs_per_prompt": options.group_size, **policy, **self._learner.request(number)}
        rollouts: list[Rollout] = []
        for index in chosen:
            rollouts += self._client.rollout(
                prompt=SCENES[index].prompt,
                seed=int(torch.randint(2**31, (), generator=generator)),
                num_inference_steps=options.num_steps,
                guidance_scale=_UNGUIDED,
                debug_mode=False,
                return_denoising_env=True,
                return_dit_trajectory=True,
                **fields,
            )
        rewards = [self._reward(picture_of(rollout), rollout.prompt or "") for rollout in rollouts]
        mean = sum(rewards) / len(rewards)
        if spoil_rewards := SPOIL_REWARDS.get(options.mistake or ""):
            rewards = spoil_rewards(rewards, generator)
        if spoil_rollouts := SPOIL_ROLLOUTS.get(options.mistake or ""):
            rollouts = spoil_rollouts(rollouts)
        groups = torch.arange(len(chosen)).repeat_interleave(len(rollouts) // len(chosen))
        found = torch.tensor(rewards)
        advantages = replay.group_advantages(found, groups, std="global")
        return Batch(rollouts=rollouts, rewards=found, groups=groups, advantages=advantages, generator=generator), mean

    def _evaluate(self) -> tuple[float, list[Tensor]]:
        """Mean reward of one deterministic sample of every prompt, always from the same noise, and the samples."""
        images = [
            self._client.generate(
                prompt=scene.prompt,
                seed=index,
                num_inference_steps=self._options.num_steps,
                guidance_scale=_UNGUIDED,
                **self._publisher.request,
            )[0].image
            for index, scene in enumerate(SCENES)
        ]
        rewards = [self._reward(image, scene.prompt) for image, scene in zip(images, SCENES, strict=True)]
        return sum(rewards) / len(rewards), images


def picture_of(rollout: Rollout) -> Tensor:
    """A rollout's picture, float32 in [0, 1]."""
    assert isinstance(rollout.image, Tensor)
    return rollout.image


def _progress() -> Progress:
    return Progress(
        TextColumn("round {task.completed:.0f} of {task.total:.0f}"),
        BarColumn(),
        TextColumn("{task.description}"),
        TimeRemainingColumn(),
    )
