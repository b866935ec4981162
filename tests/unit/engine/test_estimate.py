"""What a server says at its start of the memory that samples can take."""

from pathlib import Path

from flowroll.engine import BatchLimits, Engine
from flowroll.engine.estimate import describe_memory
from flowroll.engine.plan import plan_geometry

_GIB = 2**30


def test_the_estimate_follows_from_the_limits(z_image_checkpoint: Path) -> None:
    with Engine(z_image_checkpoint, device="cpu", batching=BatchLimits(max_running_samples=6, max_batch_samples=4)) as engine:
        defaults, model = engine.info.defaults, engine._model
        size = f"{defaults.width} x {defaults.height}"
        geometry = plan_geometry(model, height=defaults.height, width=defaults.width)
        latent = 4.0
        for length in geometry.latent_shape:
            latent *= length
        tensors = 4 * defaults.num_inference_steps + 1
        text = engine.describe_memory()
        assert f"6 samples of {size}: {6 * latent / _GIB:.2f} GiB of latents" in text
        assert f"or {6 * latent * tensors / _GIB:.2f} GiB with every tensor recorded" in text
        assert f"transformer {engine.info.transformer_bytes / _GIB:.2f} GiB" in text and text.endswith("a forward of 4")
        pixels = defaults.width * defaults.height
        few = describe_memory(engine.info, geometry, BatchLimits(max_running_pixels=3 * pixels - 1, max_batch_samples=4))
        assert f"2 samples of {size}" in few and few.endswith("a forward of 2")
        one = describe_memory(engine.info, geometry, BatchLimits(max_running_pixels=1))
        assert f"1 samples of {size}" in one and one.endswith("a forward of 1")
