"""A sample's bits do not depend on what else was in the batch, when it joined, or what left.

Each example is a random order of arrivals, cancellations and work over a mixture of requests. Whatever order: every sample that
comes to its end equals, in every tensor, the same request run alone, one sample at a time.
"""

import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
from tests.guiding import in_words_of
from tests.pairs import FAMILY_WITH_DTYPE
from tests.rollouts import assert_same_bits
from tests.unit.engine.scheduler.hand import Hand

from flowroll import Rollout, SamplingParams
from flowroll.engine import Engine, RequestFuture
from flowroll.families import FAMILIES

NAMES = list(FAMILIES)
ORDERS = 4
BASE: dict[str, Any] = {
    "prompt": "a bowl",
    "height": 64,
    "width": 64,
    "return_denoising_env": True,
    "return_dit_trajectory": True,
    "guidance_scale": 4.0,
}
# Requests that share forwards in part: sizes, text lengths, guidance, steps, schedules, dynamics, noise levels, groups.
MIXTURE: list[dict[str, Any]] = [
    {"seed": 1, "num_inference_steps": 3},
    {"seed": 2, "num_inference_steps": 4, "sde_type": "cps", "noise_level": 0.9},
    {"seed": 3, "num_inference_steps": 2, "rollout": False, "return_denoising_env": False, "return_dit_trajectory": False},
    {"seed": 4, "num_inference_steps": 3, "num_outputs_per_prompt": 3, "sde_step_indices": (1,)},
    {"seed": 5, "num_inference_steps": 3, "sigmas": (1.0, 0.8, 0.3, 0.0), "sde_type": "ode"},
    {"seed": 6, "num_inference_steps": 2, "guidance_scale": 0.0},
    {"seed": 7, "num_inference_steps": 3, "guidance_scale": 0.0, "prompt": "a photo of two wine glasses"},
    {"seed": 8, "num_inference_steps": 2, "height": 48, "width": 80, "num_outputs_per_prompt": 2},
    {"seed": 1, "num_inference_steps": 3},
    {"seed": 10, "num_inference_steps": 3, "sde_type": "dance"},
    {"seed": 9, "num_inference_steps": 3, "guidance_scale": 2.0, "noise_level": 1.3, "debug_mode": False},
]


def request_of(family: str, number: int) -> dict[str, Any]:
    """A request of the mixture."""
    return in_words_of(family, {**BASE, **MIXTURE[number]})


@pytest.fixture(scope="module")
def alone_of(engine_of: Callable[[str, str], Engine]) -> Callable[[str, str, int], list[Rollout]]:
    """What a request of the mixture gives alone; each is run once."""
    known: dict[tuple[str, str, int], list[Rollout]] = {}

    def get(family: str, dtype: str, number: int) -> list[Rollout]:
        if (family, dtype, number) not in known:
            known[family, dtype, number] = Hand(engine_of(family, dtype)).alone(**request_of(family, number))
        return known[family, dtype, number]

    return get


@pytest.mark.parametrize(("family", "dtype"), FAMILY_WITH_DTYPE)
def test_every_sample_has_the_bits_that_it_has_alone_in_any_order_of_arrivals(
    engine_of: Callable[[str, str], Engine], alone_of: Callable[[str, str, int], list[Rollout]], family: str, dtype: str
) -> None:
    shared = 0
    for order in range(ORDERS):
        source = random.Random(order)
        hand = Hand(engine_of(family, dtype), max_batch_samples=source.choice([2, 3, 16]), max_running_samples=8)
        accepted = _arrive(hand, family, source)
        for number, request in accepted:
            if request.exception(0) is None:
                for ours, expected in zip(request.result(0), alone_of(family, dtype, number), strict=True):
                    assert_same_bits(ours, expected)
        stats = hand.stats()
        assert stats["accepted"] == len(accepted) and stats["pending"] == stats["running"] == 0
        assert stats["completed"] >= len(accepted) // 2
        shared += sum(count for samples, count in hand.scheduler.load().batches.items() if samples > 1)
    assert shared > 5 * ORDERS


def _arrive(hand: Hand, family: str, source: random.Random) -> list[tuple[int, RequestFuture[Any]]]:
    """A random order of arrivals, cancellations and work, until nothing is left."""
    arrivals = source.sample(range(len(MIXTURE)), source.randint(4, len(MIXTURE)))
    accepted: list[tuple[int, RequestFuture[Any]]] = []
    pieces = [hand.encode, hand.step, hand.decode]
    while arrivals:
        if source.random() < 0.3:
            number = arrivals.pop()
            accepted.append((number, hand.submit(**request_of(family, number))))
        elif source.random() < 0.03 and accepted:
            hand.cancel(source.choice(accepted)[1])
        else:
            source.choice(pieces)()
    hand.drain()
    return accepted


@pytest.mark.parametrize("family", NAMES)
def test_callers_on_several_threads_share_forwards_and_each_gets_its_bits(
    engine_of: Callable[[str, str], Engine], alone_of: Callable[[str, str, int], list[Rollout]], family: str
) -> None:
    engine = engine_of(family, "float32")
    before = engine.scheduler.load()
    answers: dict[int, list[Rollout]] = {}
    together = threading.Barrier(len(MIXTURE))

    def call(number: int) -> None:
        together.wait()
        answers[number] = engine.rollout(SamplingParams(**request_of(family, number)))

    threads = [threading.Thread(target=call, args=(number,)) for number in range(len(MIXTURE))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == len(MIXTURE)
    for number, rollouts in answers.items():
        for ours, expected in zip(rollouts, alone_of(family, "float32", number), strict=True):
            assert_same_bits(ours, expected)
    after = engine.scheduler.load()
    assert sum(after.batches[size] - before.batches.get(size, 0) for size in after.batches if size > 1) > 0
