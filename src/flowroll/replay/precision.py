"""How a trainer holds and runs a model: sharded weights, and dtypes of a forward that its weights are not kept in."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from flowroll.errors import InvalidRequestError
from flowroll.exact import eager_modules

# What may become of a call under torch.autocast.
_CHOICES = ("refuse", "measure")


def forward_dtypes(transformer: nn.Module) -> set[torch.dtype]:
    """Returns the float dtypes that weights have in a forward: under FSDP's mixed precision not those that they are kept in."""
    kept = {weight.dtype for weight in transformer.parameters() if weight.is_floating_point()}
    policies = [policy for module in transformer.modules() if (policy := _policy_of(module)) is not None]
    if not policies:
        return kept
    return {dtype for policy in policies for dtype in ([policy.param_dtype] if policy.param_dtype else kept)}


def is_sharded(transformer: nn.Module) -> bool:
    """Tells whether ranks hold a part of the weights each: of FSDP's two kinds, or as distributed tensors."""
    is_wrapped = any(hasattr(module, "_fsdp_wrapped_module") for module in transformer.modules())
    return is_wrapped or any(hasattr(weight, "device_mesh") for weight in transformer.parameters())


def check_autocast_option(autocast: object) -> None:
    """Refuses what is no option.

    Raises:
        InvalidRequestError: It is neither of the two.
    """
    if autocast not in _CHOICES:
        raise InvalidRequestError(
            f"autocast must be {' or '.join(_CHOICES)}, got {autocast!r}; choose one of the two.", field="autocast"
        )


@contextmanager
def noticed_autocast(transformer: object, device: torch.device) -> Iterator[set[torch.dtype]]:
    """Gives the dtypes to which autocast is on inside the forwards of the block, also where a wrapper turns it on there."""
    seen: set[torch.dtype] = set()

    def look(*_: object) -> None:
        if torch.is_autocast_enabled(device.type):
            seen.add(torch.get_autocast_dtype(device.type))

    with ExitStack() as hooks:
        # Not in compiled blocks, which would be compiled again with the hooks.
        for module in eager_modules(transformer) if isinstance(transformer, nn.Module) else ():
            if not any(module.children()):
                hooks.callback(module.register_forward_pre_hook(look).remove)
        yield seen


def warn_of_autocast(dtypes: set[torch.dtype], ratio_error: float) -> None:
    """Says how far autocast takes the ratio from 1, and why."""
    warnings.warn(
        f"torch.autocast to {', '.join(sorted(map(str, dtypes)))} is on in the forward: linears run in that dtype, and norms, "
        "sums and softmax in float32. These are not the kernels of the engine's rollout, so that the ratio need not be 1 "
        f"before any update. In this call's first micro-batch it is up to {ratio_error:.3g} off.",
        stacklevel=4,
    )


def _policy_of(module: nn.Module) -> Any:
    """Returns the mixed precision of FSDP, which has no public reader in FSDP2; None if the module has none."""
    if (first := getattr(module, "mixed_precision", None)) is not None and hasattr(first, "param_dtype"):
        return first
    state = getattr(module, "_get_fsdp_state", None)
    return getattr(state(), "_mp_policy", None) if callable(state) else None
