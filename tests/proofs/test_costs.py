"""What was not asked for is not kept: a running sample holds its latents, and of earlier steps what its answer will have."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from tests.guiding import pictured
from tests.pairs import pairs, rest_slow
from tests.proofs.cases import DYNAMICS, FAMILIES, evaluation
from tests.proofs.conftest import EngineOf
from torch import Tensor, nn

from flowroll.sampling.dynamics import dynamics_named

STEPS = 5
REQUEST: dict[str, Any] = {"prompt": "a cat", "seed": 3, "height": 128, "width": 128, "num_inference_steps": STEPS}
NOTHING: dict[str, Any] = {"debug_mode": False, "return_dit_trajectory": False, "return_denoising_env": False}
# What is asked for, and how many tensors of the latents' size are kept for it, beside log-probs alone, at least and at most.
# The debug tensors are the velocity, the mean and the noise, which is zeros where none was drawn.
OPTIONS: dict[str, tuple[dict[str, Any], int, int]] = {
    "log-probs alone": ({}, 0, 0),
    "evaluation": ({}, 0, 0),
    "environment": ({"return_denoising_env": True}, 0, 0),
    "first state alone": ({"return_dit_trajectory": True, "return_step_indices": (0,)}, 1, 1),
    "trajectory": ({"return_dit_trajectory": True}, STEPS + 1, STEPS + 1),
    "debug tensors": ({"debug_mode": True}, 3 * STEPS, 3 * STEPS),
}


@contextmanager
def bytes_alive_at_each_step() -> Iterator[list[int]]:
    """The bytes of the tensors that were made in this block and are alive when the transformer is called, once a call."""
    found: list[int] = []

    def count(module: nn.Module, _: object) -> None:
        if type(module).__name__.endswith("Transformer2DModel"):
            gc.collect()
            alive = [thing.untyped_storage() for thing in gc.get_objects() if type(thing) is Tensor]
            found.append(sum({storage.data_ptr(): storage.nbytes() for storage in alive}.values()))

    # What is there already is not looked at again: that would take seconds.
    gc.collect()
    gc.freeze()
    handle = nn.modules.module.register_module_forward_pre_hook(count)
    try:
        yield found
    finally:
        handle.remove()
        gc.unfreeze()


@pytest.mark.parametrize("row", rest_slow(pairs(family=FAMILIES, dynamics=DYNAMICS, options=tuple(OPTIONS))))
def test_what_was_asked_for_is_kept_and_nothing_else(row: dict[str, str], engine_of: EngineOf) -> None:
    options, least, most = OPTIONS[row["options"]]
    engine = engine_of(row["family"], "float32")
    request = pictured(row["family"], {**REQUEST, **NOTHING, "guidance_scale": 0.0, "sde_type": row["dynamics"]})
    (first,) = engine.rollout(**{**request, "return_dit_trajectory": True, "return_step_indices": (0,)})
    assert first.dit_trajectory is not None
    latents = first.dit_trajectory.latents[0].nbytes
    alive_of, env = {}, 0
    for name, asked in (("little", request), ("much", {**request, **options})):
        with bytes_alive_at_each_step() as alive:
            (rollout,) = engine.rollout(**(evaluation(asked) if name == "much" and row["options"] == "evaluation" else asked))
        assert len(alive) == STEPS
        alive_of[name] = alive
        if rollout.denoising_env is not None:
            # The answer's copy, one for all samples.
            env = sum(tensor.nbytes for _, tensor in rollout.denoising_env.tensors())
    # The clean prediction of the step before, which comes and goes.
    history = int(dynamics_named(row["dynamics"]).needs_history)
    # Not from the first call to the second, since caches may be filled then. What is recorded has its memory from the start.
    for before, after in itertools.pairwise(alive_of["much"][1:]):
        assert after - before < (history + 0.1) * latents
    for little, much in zip(alive_of["little"][1:], alive_of["much"][1:], strict=True):
        assert (least - history - 0.1) * latents < much - little - env < (most + history + 0.1) * latents
