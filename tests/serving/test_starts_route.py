"""Latents over HTTP: a run that starts from the states of an answer, in both formats and through the engine's own process."""

from typing import Any

import pytest
import torch
from tests.rollouts import assert_same_bits
from tests.serving.servers import serving

from flowroll.client import Client
from flowroll.engine.service import EngineService

SMALL: dict[str, Any] = {"prompt": "a bowl", "height": 32, "width": 32, "num_inference_steps": 3, "seed": 4}
ALL: dict[str, Any] = {"return_denoising_env": True, "return_dit_trajectory": True}


@pytest.mark.parametrize("wire_format", ["json", "msgpack"])
def test_a_recorded_state_sent_back_is_the_rest_of_the_run(z_service: EngineService, wire_format: Any) -> None:
    with serving(z_service) as client:
        trainer = Client(str(client.base_url), wire_format=wire_format)
        whole = trainer.rollout(**SMALL, **ALL, num_outputs_per_prompt=2)
        latents = torch.stack([rollout.dit_trajectory.latents[1] for rollout in whole if rollout.dit_trajectory is not None])
        options = {**SMALL, **ALL, "num_outputs_per_prompt": 2, "latents": latents, "start_step": 1}
        parts = trainer.rollout(**options)
        picture = trainer.generate(**SMALL, latents=latents[0], start_step=1)
        wrong = client.post("/rollout/generate", content=b"\xc1", headers={"content-type": "application/msgpack"})
    for part, rollout, ours in zip(parts, whole, z_service.engine.rollout(**options), strict=True):
        assert_same_bits(part, ours)
        assert torch.equal(part.image, rollout.image)
        assert part.dit_trajectory is not None and part.dit_trajectory.latent_step_indices == (1, 2, 3)
    assert picture[0].sampling.start_step == 1 and picture[0].sampling.latents_sha256 == parts[0].sampling.latents_sha256
    assert wrong.status_code == 400 and wrong.json()["error"]["message"].startswith("body must be msgpack")


@pytest.mark.parametrize("wire_format", ["json", "msgpack"])
def test_forks_and_stops_travel_with_the_ids_of_their_tree(z_service: EngineService, wire_format: Any) -> None:
    options = {**SMALL, **ALL, "num_outputs_per_prompt": 2, "fork": {0: 2, 1: 2}}
    with serving(z_service) as client:
        trainer = Client(str(client.base_url), wire_format=wire_format)
        leaves = trainer.rollout(**options)
        (stopped,) = trainer.rollout(**SMALL, **ALL, stop_step=2)
        scores = trainer.score(leaves, log_probs_only=True)
        sent = client.post("/rollout/generate", json={**SMALL, "fork": {"1": 2}, "image_format": "none"})
        counted = trainer.metrics()
    for leaf, ours in zip(leaves, z_service.engine.rollout(**options), strict=True):
        assert_same_bits(leaf, ours)
    ids = [leaf.sampling.branches[-1].id for leaf in leaves if leaf.sampling.branches is not None]
    assert ids == [f"{root}/{one}/{two}" for root in range(2) for one in range(2) for two in range(2)]
    assert torch.equal(scores.log_probs, torch.stack([leaf.log_probs for leaf in leaves if leaf.log_probs is not None]))
    assert stopped.image is None and stopped.latents is not None and stopped.sampling.stop_step == 2
    assert sent.status_code == 200 and [one["sampling"]["branches"][0]["parent"] for one in sent.json()] == ["0", "0"]
    # Forwards by level of the tree, 2 x (1 + 2 + 4); 2; 2 + 2. And draws: 2 x (2 + 4 + 4); 2; 1 + 2 + 2.
    assert 'flowroll_denoising_steps_total{kind="rollout"} 20.0' in counted
    assert "flowroll_sde_steps_total 27.0" in counted


@pytest.mark.parametrize("wire_format", ["json", "msgpack"])
def test_what_is_said_of_single_steps_travels_and_is_scored_again(z_service: EngineService, wire_format: Any) -> None:
    options: dict[str, Any] = {
        **SMALL,
        **ALL,
        "num_inference_steps": 5,
        "rollout_steps": ({}, {"noise_level": 0.3}, {"dynamics": "dpmpp2m"}, {"dynamics": "cps"}, {"dynamics": "ode"}),
        "guidance_scales": (3.0, 0.0, 6.5, 1.0, 3.0),
        "log_prob": {"reduce": "sum", "constants": False},
        "return_fields": ("x0", "velocity", "mean", "std", "noise"),
        "return_step_indices": (0, 1, 2, 3, 4, 5),
        "decode_step_indices": (1, 3),
        "fork": {1: 2},
        "policy": "default",
    }
    with serving(z_service) as client:
        trainer = Client(str(client.base_url), wire_format=wire_format)
        leaves = trainer.rollout(**options)
        scores = trainer.score(leaves)
    for sample, (leaf, ours) in enumerate(zip(leaves, z_service.engine.rollout(**options), strict=True)):
        assert_same_bits(leaf, ours)
        assert leaf.sde_step_indices == (0, 1, 3) and leaf.sampling.guidance_scales == options["guidance_scales"]
        assert leaf.step_tensors is not None and torch.equal(scores.means[sample], leaf.step_tensors.tensors["mean"])
        assert leaf.log_probs is not None and torch.equal(scores.log_probs[sample], leaf.log_probs)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"fork": {"3": 2}}, "fork must be at steps that are run and draw noise"),
        ({"fork": {"1": 65}}, "fork must ask for at most 64 samples, got 1 with 65 leaves each"),
        ({"stop_step": 4}, "stop_step must be at most 3 for 3 steps, got 4"),
        ({"start_step": 1}, "start_step must be given with latents"),
        ({"init_seed": [1, 2], "seeds": [1]}, "init_seed must hold as many values as seeds, 1, got 2"),
    ],
)
def test_what_cannot_be_is_a_422_that_names_its_field(z_service: EngineService, fields: dict[str, Any], message: str) -> None:
    with serving(z_service) as client:
        answers = [
            client.post("/rollout/generate", json={**SMALL, **body} if "seeds" not in fields else {"prompt": "x", **body})
            for body in (fields, {"extra_sampling_params": fields})
        ]
    for answer, prefix in zip(answers, ("", "extra_sampling_params."), strict=True):
        error = answer.json()["error"]
        assert answer.status_code == 422 and error["message"].startswith(prefix + message), error
