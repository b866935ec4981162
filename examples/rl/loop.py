"""The loop of online reinforcement learning, over HTTP: roll out, reward, update, push the weights, again.

Owns the server process, the policy, the prompts and the rewards. What an update does is the caller's: `train` hands it the
policy and a batch of rollouts with their advantages.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from jaxtyping import Float
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from examples.rl.journal import Journal, Row, plot
from examples.rl.publishing import Adapter, Publisher, Weights, with_adapter
from examples.rl.spoiling import MISTAKES, SPOIL_REWARDS, SPOIL_ROLLOUTS
from examples.server import running_server
from examples.shapes.reward import reward
from examples.shapes.world import SCENES
from flowroll import Rollout, replay
from flowroll.checkpoints import SHAPES_FAMILIES, shapes_checkpoint
from flowroll.cli.options import quiet_model_libraries
from flowroll.cli.plots import ContactRow, contact_sheet
from flowroll.client import Client

_FAMILIES = SHAPES_FAMILIES
_SHOWN_PROMPTS = 8
# One forward per step, as Flow-GRPO trains: at this scale no family runs guidance.
_UNGUIDED = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """One training run.

    Attributes:
        out: Folder for everything that the run writes.
        family: Whose shapes checkpoint is trained.
        seed: Of prompts, noise and updates.
        rounds: Rollouts, update, push.
        prompts: Per round.
        group_size: Samples of one prompt.
        num_steps: Denoising steps.
        learning_rate: Of AdamW.
        lora_rank: Of the adapter that is trained; None: all weights are.
        evaluate_every: Rounds between evaluations.
        mistake: One of `MISTAKES`, to see that nothing is learned; None: none.
    """

    out: Path
    family: str = "qwen_image"
    seed: int = 0
    rounds: int = 20
    prompts: int = 8
    group_size: int = 8
    num_steps: int = 6
    learning_rate: float = 1e-3
    lora_rank: int | None = None
    evaluate_every: int = 5
    mistake: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The rollouts of one round.

    Attributes:
        rollouts: Groups side by side.
        advantages: Of each, within its group.
        generator: For what the update draws.
    """

    rollouts: Sequence[Rollout]
    advantages: Float[Tensor, " samples"]
    generator: torch.Generator


# Changes the policy; returns the largest |ratio - 1| before the first change, None where there is no ratio.
Update = Callable[[nn.Module, Batch], float | None]


def add_arguments(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """The flags of `Options`; `defaults` replace its own."""
    of = {**{name: field.default for name, field in Options.__dataclass_fields__.items()}, **defaults}
    parser.add_argument("--out", type=Path, required=True, help="folder for everything that the run writes")
    parser.add_argument("--family", choices=_FAMILIES, default=of["family"])
    for name in ("seed", "rounds", "prompts", "group_size", "num_steps", "evaluate_every"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=of[name])
    parser.add_argument("--learning-rate", type=float, default=of["learning_rate"])
    parser.add_argument("--lora-rank", type=int, default=None, help="train a LoRA adapter of this rank; default: all weights")
    parser.add_argument("--mistake", choices=MISTAKES, default=None, help="spoil the run on purpose: it must not learn")


def options_of(arguments: argparse.Namespace) -> Options:
    """The options that the flags of `add_arguments` say."""
    return Options(**{name: getattr(arguments, name) for name in Options.__dataclass_fields__})


def train(options: Options, request: Mapping[str, Any], update: Update, *, title: str) -> Journal:
    """Trains the shapes policy; CSV, curve and pictures go to `options.out`.

    Args:
        options: The run.
        request: Fields of the rollout requests beyond prompts, seeds and steps: the dynamics and what is returned.
        update: What a round does to the policy.
        title: Above the curve.
    """
    quiet_model_libraries()
    # As many as the server has: on the CPU, bits depend on it.
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    journal = Journal(options.out / "rewards.csv")
    checkpoint = shapes_checkpoint(options.family)
    policy = load_policy(checkpoint)
    publisher: Publisher = Weights()
    if options.lora_rank is not None:
        policy, publisher = with_adapter(policy, options.lora_rank), Adapter()
    with (
        running_server(checkpoint, options.out / "server.log") as server,
        Client(server.url) as client,
        _progress() as progress,
    ):
        run = _Run(options, {**request, **publisher.request}, client, policy, journal, publisher)
        task = progress.add_task("", total=options.rounds)
        if options.lora_rank is not None:
            publisher.publish(client, policy)
        for number in range(options.rounds):
            run.round(number, update)
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
        self,
        options: Options,
        request: Mapping[str, Any],
        client: Client,
        policy: nn.Module,
        journal: Journal,
        publisher: Publisher,
    ) -> None:
        self._options, self._request, self._client = options, request, client
        self._policy, self._journal, self._publisher = policy, journal, publisher
        self._generator = torch.Generator().manual_seed(options.seed)
        self._started_s = time.perf_counter()
        self._before: Sequence[Tensor] = ()
        self.state = ""

    def round(self, number: int, update: Update) -> None:
        """One round: rollouts from the server, an update of the policy, its weights to the server."""
        evaluation = None
        if number % self._options.evaluate_every == 0:
            evaluation, pictures = self._evaluate()
            self._before = self._before or pictures
        batch, mean = self._collect()
        ratio_error = update(self._policy, batch)
        self._publisher.publish(self._client, self._policy)
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

    def _collect(self) -> tuple[Batch, float]:
        """The rollouts of a round, and their mean reward."""
        options, generator = self._options, self._generator
        chosen = torch.randperm(len(SCENES), generator=generator)[: options.prompts].tolist()
        rollouts: list[Rollout] = []
        for index in chosen:
            rollouts += self._client.rollout(
                prompt=SCENES[index].prompt,
                seed=int(torch.randint(2**31, (), generator=generator)),
                num_outputs_per_prompt=options.group_size,
                num_inference_steps=options.num_steps,
                guidance_scale=_UNGUIDED,
                debug_mode=False,
                return_denoising_env=True,
                return_dit_trajectory=True,
                **self._request,
            )
        rewards = [reward(rollout.image, rollout.prompt) for rollout in rollouts]
        mean = sum(rewards) / len(rewards)
        if options.mistake in SPOIL_REWARDS:
            rewards = SPOIL_REWARDS[options.mistake](rewards, generator)
        if options.mistake in SPOIL_ROLLOUTS:
            rollouts = SPOIL_ROLLOUTS[options.mistake](rollouts)
        groups = torch.arange(len(chosen)).repeat_interleave(options.group_size)
        advantages = replay.group_advantages(torch.tensor(rewards), groups, std="global")
        return Batch(rollouts=rollouts, advantages=advantages, generator=generator), mean

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
        return sum(reward(image, scene.prompt) for image, scene in zip(images, SCENES, strict=True)) / len(SCENES), images


def _progress() -> Progress:
    return Progress(
        TextColumn("round {task.completed:.0f} of {task.total:.0f}"),
        BarColumn(),
        TextColumn("{task.description}"),
        TimeRemainingColumn(),
    )
