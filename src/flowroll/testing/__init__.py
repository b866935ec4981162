"""Checkpoints for tests, demos and benchmarks: real diffusers pipelines with random weights, made offline."""

from flowroll.extras import extra_for

with extra_for("flowroll.testing", "engine"):
    from flowroll.testing.checkpoints import BUILDERS, make_checkpoint
    from flowroll.testing.inputs import random_images, random_input, random_text
    from flowroll.testing.parts import Size

__all__ = ["BUILDERS", "Size", "make_checkpoint", "random_images", "random_input", "random_text"]
