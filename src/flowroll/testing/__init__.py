"""Checkpoints for tests, demos and benchmarks: real diffusers pipelines with random weights, made offline."""

from flowroll.extras import extra_for

with extra_for("flowroll.testing", "engine"):
    from flowroll.testing.checkpoints import FamilyName, Size, make_checkpoint

__all__ = ["FamilyName", "Size", "make_checkpoint"]
