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
# What is asked for, and how many tensors of the latents' size a step keeps for it, at least and at most. The debug tensors are
# the velocity and the mean, and the noise where any was drawn.
OPTIONS: dict[str, tuple[dict[str, Any], int, int]] = {
    "log-probs alone": ({}, 0, 0),
    "evaluation": ({}, 0, 0),
    "environment": ({"return_denoising_env": True}, 0, 0),
    "first state alone": ({"return_dit_trajectory": True, "return_step_indices": (0,)}, 0, 0),
    "trajectory": ({"return_dit_trajectory": True}, 1, 1),
    "debug tensors": ({"debug_mode": True}, 2, 3),
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
def test_a_step_keeps_what_was_asked_for_and_nothing_else(row: dict[str, str], engine_of: EngineOf) -> None:
    options, least, most = OPTIONS[row["options"]]
    engine = engine_of(row["family"], "float32")
    request = pictured(row["family"], {**REQUEST, **NOTHING, "guidance_scale": 0.0, "sde_type": row["dynamics"]})
    (first,) = engine.rollout(**{**request, "return_dit_trajectory": True, "return_step_indices": (0,)})
    assert first.dit_trajectory is not None
    latents = first.dit_trajectory.latents[0].nbytes
    with bytes_alive_at_each_step() as alive:
        engine.rollout(**(evaluation(request) if row["options"] == "evaluation" else {**request, **options}))
    assert len(alive) == STEPS
    # Not from the first call to the second, since caches may be filled then. A log-prob takes a few bytes.
    # The clean prediction of the step before, which comes and goes.
    history = int(dynamics_named(row["dynamics"]).needs_history)
    for before, after in itertools.pairwise(alive[1:]):
        assert (least - history) * latents <= after - before < (most + history + 0.1) * latents
