"""Low-rank adapters on a transformer's linears, as adapter libraries put them there."""

import torch
from torch import Tensor, nn


class Adapter(nn.Module):
    """A frozen linear plus a trained product of rank 2 that starts at zero."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        options = {"dtype": base.weight.dtype, "device": base.weight.device}
        self.down = nn.Parameter(torch.ones(2, base.in_features, **options) / base.in_features)
        self.up = nn.Parameter(torch.zeros(base.out_features, 2, **options))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + nn.functional.linear(nn.functional.linear(x, self.down), self.up)


def add_adapters(transformer: nn.Module, names: tuple[str, ...] = ("to_q", "to_v")) -> list[Adapter]:
    """Wraps the linears of these names in the main blocks, in place."""
    blocks = getattr(transformer, "transformer_blocks", None) or transformer.layers
    adapters = []
    for block in blocks:
        for module in list(block.modules()):
            for name in names:
                if isinstance(getattr(module, name, None), nn.Linear):
                    adapter = Adapter(getattr(module, name))
                    setattr(module, name, adapter)
                    adapters.append(adapter)
    return adapters
