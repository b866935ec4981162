"""What is recorded leaves a GPU without the loop waiting for it."""

import pytest
import torch

from flowroll import SamplingParams
from flowroll.engine import Engine
from flowroll.engine.runner.sample import Sample

REQUEST = {"prompt": "a cat", "height": 64, "width": 64, "seed": 1, "num_inference_steps": 3, "return_dit_trajectory": True}


@pytest.mark.gpu
def test_a_recorded_step_waits_for_no_copy(z_image_checkpoint):
    with Engine(z_image_checkpoint, device="cuda") as engine, torch.no_grad():
        plan = engine.plan(SamplingParams(**REQUEST))
        sample = Sample.start(engine._executor.encode(plan).handed_over(), plan.samples[0])
        velocities = [torch.randn_like(sample.latents) for _ in range(3)]
        try:
            # Whatever makes the host wait for the device raises from here on.
            torch.cuda.set_sync_debug_mode("error")
            for velocity in velocities:
                sample.take_step(velocity)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        recorder = sample.recorder
        recorder.wait()
        kept = recorder.trajectory().latents
        assert kept.device.type == "cpu" and torch.equal(kept[-1], sample.latents.cpu())
        assert torch.equal(recorder.debug_tensors().model_output, torch.stack(velocities).float().cpu())
