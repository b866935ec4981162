"""replay == engine: a trainer that holds the weights recomputes every velocity, mean and log-prob of a rollout bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.guiding import in_words_of
from tests.pairs import pairs, rest_slow
from tests.proofs.cases import DTYPES, DYNAMICS, EVERYTHING, FAMILIES, SHAPES, Request
from tests.proofs.conftest import EngineOf, PipelineOf, ServerOf
from tests.proofs.doors import assert_same_samples

from flowroll import Rollout, replay
from flowroll.client import Client
from flowroll.wire.files import load_rollout, save_rollout

OPTIONS: dict[str, dict[str, Any]] = {
    "every step": {},
    "window": {"sde_step_indices": (1,)},
    "last step alone, no constants": {"sde_step_indices": (2,), "log_prob_no_const": True},
    "a rule for each step": {
        "num_inference_steps": 5,
        # The solver's step takes its history from a stochastic one.
        "rollout_steps": (
            {"noise_level": 0.3},
            {"dynamics": "cps", "noise_level": 0.9},
            {"dynamics": "dpmpp2m"},
            {},
            {"dynamics": "ode"},
        ),
    },
    "own sigmas, summed": {
        "num_inference_steps": None,
        "sigmas": (1.0, 0.8, 0.3, 0.0),
        "log_prob": {"reduce": "sum", "constants": False},
    },
}
CARRIERS = ("engine", "file", "json", "msgpack")
ROWS = [
    # A solver without stochastic steps has no window.
    {**row, "options": "every step"} if row["dynamics"] == "dpmpp2m" and "sde_step_indices" in OPTIONS[row["options"]] else row
    for row in pairs(
        family=FAMILIES,
        dtype=DTYPES,
        dynamics=DYNAMICS,
        shape=("small", "odd", "small, unguided"),
        options=tuple(OPTIONS),
        carrier=CARRIERS,
    )
]


def carried(group: list[Rollout], carrier: str, server: str, request: Request, folder: Path) -> list[Rollout]:
    """The rollouts as a trainer receives them."""
    if carrier == "file":
        for rollout in group:
            save_rollout(folder / str(rollout.seed), rollout)
        return [load_rollout(folder / str(rollout.seed)) for rollout in group]
    with Client(server, wire_format="json" if carrier == "json" else "msgpack") as client:
        return client.rollout(**request)


def recorded(rollouts: list[Rollout]) -> torch.Tensor:
    return torch.stack([rollout.log_probs for rollout in rollouts if rollout.log_probs is not None])


@pytest.mark.parametrize("row", rest_slow(ROWS))
def test_the_ratio_is_exactly_one(
    row: dict[str, str], engine_of: EngineOf, server_of: ServerOf, pipeline_of: PipelineOf, tmp_path: Path
) -> None:
    key = (row["family"], row["dtype"])
    options = {"seed": 5, "num_inference_steps": 3, "guidance_scale": 4.0, **SHAPES[row["shape"]], **OPTIONS[row["options"]]}
    request = {**in_words_of(row["family"], options), **EVERYTHING, "sde_type": row["dynamics"], "num_outputs_per_prompt": 2}
    transformer = pipeline_of(*key).transformer
    group = received = engine_of(*key).rollout(**request)
    if row["carrier"] != "engine":
        received = carried(group, row["carrier"], "" if row["carrier"] == "file" else server_of(*key), request, tmp_path)
        assert_same_samples(received, group)
    # As a trainer has it: with gradients.
    assert next(transformer.parameters()).requires_grad and torch.is_grad_enabled()
    log_probs = replay.log_prob(transformer, received, micro_batch=4).cpu()
    assert torch.equal(log_probs.detach(), recorded(group))
    assert torch.equal(replay.ratio(log_probs, recorded(received)).detach(), torch.ones_like(log_probs))
    scores = replay.score(transformer, received)
    for sample, rollout in enumerate(group):
        assert rollout.debug_tensors is not None
        assert torch.equal(scores.velocities[sample].detach().cpu(), rollout.debug_tensors.model_output)
        assert torch.equal(scores.means[sample].detach().cpu(), rollout.debug_tensors.prev_sample_mean)
        assert torch.equal(scores.stds[sample].cpu(), rollout.debug_tensors.noise_std_dev[:, 0])


@pytest.mark.parametrize("family", FAMILIES)
def test_another_policy_has_another_ratio(family: str, engine_of: EngineOf, pipeline_of: PipelineOf) -> None:
    """The proof above can fail: a trainer whose weights are off by a thousandth does not get a ratio of one."""
    request = in_words_of(family, {"seed": 5, "num_inference_steps": 2, **SHAPES["small"], **EVERYTHING})
    group = engine_of(family, "float32").rollout(**request)
    transformer = pipeline_of(family, "float32").transformer
    weight = next(parameter for parameter in transformer.parameters() if parameter.ndim == 2)
    with torch.no_grad():
        kept = weight.clone()
        weight.mul_(1.001)
        log_probs = replay.log_prob(transformer, group).cpu()
        weight.copy_(kept)
    assert not torch.equal(log_probs, recorded(group))
