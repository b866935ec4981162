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
