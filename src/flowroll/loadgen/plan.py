"""What a load generator sends and when. Nothing here does input or output, and the same seed gives the same load."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flowroll.errors import InvalidRequestError
from flowroll.types import MAX_SEED, SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """The values that requests are drawn from. Each field is drawn independently of the others.

    Every request that can be drawn is checked here, before the first one is sent.

    Attributes:
        prompts: Prompts.
        sizes: Pairs of width and height in pixels.
        steps: Numbers of denoising steps.
        group_sizes: Numbers of samples per request.
        dynamics: Dynamics of the stochastic steps, as `SamplingParams.sde_type` takes them.
        fixed: Further fields of `SamplingParams`, which are the same in every request.
        seed: The same seed gives the same requests.

    Raises:
        InvalidRequestError: A field has no values, or a request that can be drawn breaks a rule.
    """

    prompts: tuple[str, ...]
    sizes: tuple[tuple[int, int], ...]
    steps: tuple[int, ...]
    group_sizes: tuple[int, ...]
    dynamics: tuple[str, ...]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("prompts", "sizes", "steps", "group_sizes", "dynamics"):
            if not getattr(self, name):
                raise InvalidRequestError(f"{name} must hold at least one value, got none; give one.", field=name)
        choices = (self.prompts[:1], self.sizes, self.steps, self.group_sizes, self.dynamics)
        # The rules for prompts depend on no other field.
        other_prompts = ((prompt, *(values[0] for values in choices[1:])) for prompt in self.prompts[1:])
        for values in itertools.chain(itertools.product(*choices), other_prompts):
            SamplingParams(**self._request(values, 0))

    def requests(self, *, seed: int | None = None) -> Iterator[dict[str, Any]]:
        """Draws requests without end: every field that a request sends, by the names of `SamplingParams`.

        Args:
            seed: Another seed than that of the mix.
        """
        rng = random.Random(f"requests {self.seed if seed is None else seed}")
        choices: tuple[Sequence[Any], ...] = (self.prompts, self.sizes, self.steps, self.group_sizes, self.dynamics)
        # The samples of a group take the seeds that follow the first one.
        last_seed = MAX_SEED - max(self.group_sizes)
        while True:
            yield self._request([rng.choice(values) for values in choices], rng.randrange(last_seed))

    def _request(self, values: Sequence[Any], seed: int) -> dict[str, Any]:
        prompt, (width, height), steps, group_size, dynamics = values
        # All of it is sent, since servers differ in their defaults.
        return {
            "prompt": prompt,
            "width": width,
            "height": height,
            "num_inference_steps": steps,
            "num_outputs_per_prompt": group_size,
            "rollout_sde_type": dynamics,
            "seed": seed,
            **self.fixed,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """How requests are sent: at a rate (open loop), or a number of them at a time (closed loop).

    Attributes:
        rate: Arrivals per second of a Poisson process, whatever the server does; None: closed loop.
        concurrency: Number of requests in flight; None: open loop.
        num_requests: How many requests are sent; None: as many as start within `duration_s`.
        duration_s: Seconds during which requests are started; None: until `num_requests` are sent.
        warmup: Number of requests that are sent first, one at a time, and not counted.
        retries: How often a request is sent again that the server refused with 429, after the server's Retry-After.
        max_in_flight: An open loop does not send a request that is due while so many are unanswered; it counts as failed.

    Raises:
        InvalidRequestError: The values contradict each other, or are out of range.
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


def arrivals(rate: float, seed: int) -> Iterator[float]:
    """Draws without end the seconds from the start at which the requests of a Poisson process arrive."""
    rng = random.Random(f"arrivals {seed}")
    return itertools.accumulate(rng.expovariate(rate) for _ in itertools.count())
