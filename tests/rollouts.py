"""Walks the tensors of a rollout, for tests that compare all of them."""

from collections.abc import Iterator

import torch
from torch import Tensor

from flowroll import Rollout


def tensors_of(rollout: Rollout) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that a rollout returns, by name."""
    for name in ("image", "latents", "log_probs"):
        if isinstance(value := getattr(rollout, name), Tensor):
            yield "final_latents" if name == "latents" else name, value
    for part in (rollout.debug_tensors, rollout.dit_trajectory):
        if part is not None:
            for name in part.__dataclass_fields__:
                value = getattr(part, name)
                if isinstance(value, Tensor):
                    yield name, value
    if rollout.step_tensors is not None:
        yield from ((f"step_tensors.{name}", tensor) for name, tensor in rollout.step_tensors.tensors.items())
    if rollout.step_images is not None:
        steps = rollout.step_images.step_indices
        pairs = zip(steps, rollout.step_images.images, strict=True)
        yield from ((f"step_images.{step}", image) for step, image in pairs if isinstance(image, Tensor))
    if rollout.denoising_env is not None:
        for branch in ("pos_cond_kwargs", "neg_cond_kwargs"):
            for name, value in (getattr(rollout.denoising_env, branch) or {}).items():
                if isinstance(value, Tensor):
                    yield f"{branch}.{name}", value


def assert_same_bits(a: Rollout, b: Rollout) -> None:
    """Same tensors, same dtypes, same bits; and the same record of how they were made."""
    left, right = dict(tensors_of(a)), dict(tensors_of(b))
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert torch.equal(tensor, right[name]), name
    assert isinstance(a.image, Tensor) or a.image == b.image
    assert a.sampling == b.sampling
    assert a.sde_step_indices == b.sde_step_indices
