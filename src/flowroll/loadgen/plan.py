"""What is sent and when: pure, and the same for the same seed."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from flowroll.errors import InvalidRequestError
from flowroll.types import SamplingParams
from flowroll.types.params import MAX_SEED, SdeType

# What a request draws. All of it is sent, since servers differ in what they take for granted.
DRAWN = ("prompt", "width", "height", "num_inference_steps", "num_outputs_per_prompt", "rollout_sde_type", "seed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """What requests are drawn from, each field on its own.

    Attributes:
        prompts: Texts.
        sizes: Width and height.
        steps: Numbers of denoising steps.
        group_sizes: Samples per request.
        dynamics: Of the stochastic steps.
        fixed: Further fields of `SamplingParams`, the same in every request.
        seed: Same seed, same requests.
    """

    prompts: tuple[str, ...]
    sizes: tuple[tuple[int, int], ...]
    steps: tuple[int, ...]
    group_sizes: tuple[int, ...]
    dynamics: tuple[SdeType, ...]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("prompts", "sizes", "steps", "group_sizes", "dynamics"):
            if not getattr(self, name):
                raise InvalidRequestError(f"{name} must hold at least one value, got none; give one.", field=name)
        # Every request that can be drawn is checked before the first one is sent.
        for prompt in self.prompts:
            self.request(prompt=prompt)
        for size, steps, samples, dynamics in itertools.product(self.sizes, self.steps, self.group_sizes, self.dynamics):
            self.request(size=size, steps=steps, samples=samples, dynamics=dynamics)

    def request(
        self,
        *,
        prompt: str | None = None,
        size: tuple[int, int] | None = None,
        steps: int | None = None,
        samples: int | None = None,
        dynamics: SdeType | None = None,
        seed: int = 0,
    ) -> SamplingParams:
        """A request; what is not given is the first of the mix.

        Raises:
            InvalidRequestError: Its values break a rule.
        """
        width, height = size or self.sizes[0]
        return SamplingParams(
            prompt=self.prompts[0] if prompt is None else prompt,
            width=width,
            height=height,
            num_inference_steps=self.steps[0] if steps is None else steps,
            num_outputs_per_prompt=self.group_sizes[0] if samples is None else samples,
            rollout_sde_type=dynamics or self.dynamics[0],
            seed=seed,
            **self.fixed,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """How requests are sent.

    Attributes:
        rate: Arrivals per second, whatever the server does (open loop); None: closed loop.
        concurrency: Requests in flight (closed loop); None: open loop.
        num_requests: How many are sent; None: as many as the duration takes.
        duration_s: For how long requests are started; None: until all are sent.
        warmup: Requests sent first, one at a time, that count nowhere.
        retries: How often a rejected request is sent again, after the server's Retry-After.
        max_in_flight: An open loop does not send a request that is due while so many are unanswered; it counts as failed.
    """

    rate: float | None = None
    concurrency: int | None = None
    num_requests: int | None = None
    duration_s: float | None = None
    warmup: int = 0
    retries: int = 0
    max_in_flight: int = 512

    def __post_init__(self) -> None:
        if (self.rate is None) == (self.concurrency is None):
            raise InvalidRequestError("rate must be given or else concurrency, got both or neither; choose one.", field="rate")
        if self.num_requests is None and self.duration_s is None:
            raise InvalidRequestError("num_requests must be given or else duration_s, got neither; give one.")
        for name in ("rate", "concurrency", "num_requests", "duration_s", "max_in_flight"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise InvalidRequestError(f"{name} must be above 0 and finite, got {value}; raise it.", field=name)


def requests(mix: Mix) -> Iterator[SamplingParams]:
    """Endless requests."""
    rng = random.Random(f"requests {mix.seed}")
    while True:
        yield mix.request(
            prompt=rng.choice(mix.prompts),
            size=rng.choice(mix.sizes),
            steps=rng.choice(mix.steps),
            samples=rng.choice(mix.group_sizes),
            dynamics=rng.choice(mix.dynamics),
            # Samples of a group take the seeds that follow.
            seed=rng.randrange(MAX_SEED - max(mix.group_sizes)),
        )


def values_of(params: SamplingParams, mix: Mix) -> dict[str, Any]:
    """The fields of a request that are sent."""
    return {name: getattr(params, name) for name in (*DRAWN, *mix.fixed)}


def warmup_requests(mix: Mix) -> Iterator[SamplingParams]:
    """Requests of the same kind with other draws, so that warming up does not change what is measured."""
    return requests(replace(mix, seed=~mix.seed))


def arrivals(rate: float, seed: int) -> Iterator[float]:
    """Seconds from the start at which requests of a Poisson process arrive."""
    rng = random.Random(f"arrivals {seed}")
    due_s = 0.0
    while True:
        due_s += rng.expovariate(rate)
        yield due_s
