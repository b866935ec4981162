"""The addresses of a module's weights in memory, on which the bits of its products depend.

Measured on a CPU (torch 2.13, float32): a product of one row changes in its last bits when the weight does not lie at a
multiple of 16 bytes. Allocated memory always does. Weights that a library maps from a safetensors file do or do not, by the
length of the file's header. Both families have one-row products (the timestep's embedding and the modulation), so the engine
and a trainer agree only if the weights of both lie as an allocation would put them. bfloat16 does not care.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

# torch's allocator puts every tensor at a multiple of this many bytes; the bits of products were found to depend on it.
_ALLOCATED, _NEEDED = 64, 16


def align_weights(module: nn.Module) -> int:
    """Moves weights on the CPU to the alignment that an allocation would give them; values stay, addresses change.

    A trainer calls it once after loading, before an optimizer or a wrapper takes views of the weights.

    Returns:
        The number of weights that were moved.
    """
    moved = 0
    for weight in _on_cpu(module):
        if weight.data_ptr() % _ALLOCATED:
            weight.data = weight.data.clone()
            moved += 1
    return moved


def unaligned_weights(module: nn.Module) -> list[str]:
    """Returns the names of the float32 weights whose address changes bits."""
    names = {id(weight): name for name, weight in module.named_parameters()}
    found = [weight for weight in _on_cpu(module) if weight.dtype == torch.float32 and weight.data_ptr() % _NEEDED]
    return [names[id(weight)] for weight in found]


def _on_cpu(module: nn.Module) -> list[Tensor]:
    """Returns a module's plain parameters on the CPU; sharded ones are gathered into allocated memory anyway."""
    return [weight for weight in module.parameters() if weight.device.type == "cpu" and type(weight.data) is Tensor]
