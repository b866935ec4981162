"""Any small computation as a model whose forwards several samples share."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowroll.exact.layout import same_bits
from flowroll.exact.mode import Notes
from flowroll.exact.sharing import SharedForwards


class Stacking:
    """The part of a family that sharing needs: every argument has the sample's entries along its first dimension.

    The argument `text` may be padded along its second one.
    """

    def collate_key(self, forward_input: dict[str, Tensor]) -> Any:
        return tuple(tensor.shape for tensor in forward_input.values())

    def run_in_turn(self, transformer: Any, forward_inputs: Sequence[dict[str, Tensor]]) -> list[Tensor]:
        return [transformer(**one, return_dict=False)[0] for one in forward_inputs]

    def collate(self, forward_inputs: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {name: torch.cat([one[name] for one in forward_inputs]) for name in forward_inputs[0]}

    def uncollate(self, output: Tensor, num_inputs: int) -> list[Tensor]:
        return list(torch.split(output, len(output) // num_inputs))

    def num_text_rows(self, forward_input: dict[str, Tensor]) -> int:
        return forward_input["text"].shape[1] if "text" in forward_input else 0

    def pad_text(self, forward_input: dict[str, Tensor], num_rows: int) -> dict[str, Tensor]:
        text = forward_input["text"]
        return {**forward_input, "text": F.pad(text, (0, 0, 0, num_rows - text.shape[1]))}


class Model(nn.Module):
    """A function of its arguments; `rows` is how many of its forwards were given more than one sample's rows."""

    def __init__(self, compute: Callable[..., Tensor]) -> None:
        super().__init__()
        self.compute = compute
        self.lengths: list[int] = []

    def forward(self, *, return_dict: bool, **arguments: Tensor) -> tuple[Tensor]:
        self.lengths.append(len(next(iter(arguments.values()))))
        return (self.compute(**arguments),)


class Sharing:
    """Samples of one model, alone and sharing forwards."""

    def __init__(self, compute: Callable[..., Tensor]) -> None:
        self.model = Model(compute)
        self.forwards = SharedForwards(cast(Any, Stacking()))

    @property
    def analyses(self) -> list[Notes]:
        """Of all kinds of forwards that samples shared."""
        (known,) = self.forwards._known.values()
        return [notes for some in known.notes.values() for notes in some or []]

    def is_exact(self, inputs: list[dict[str, Tensor]]) -> bool:
        """Whether every sample has its bits, in the forward that is analysed and in those that repeat it."""
        alone = [self.model.compute(**{name: value.clone() for name, value in one.items()}) for one in inputs]
        for _ in range(3):
            together = self.forwards.outputs(self.model, cast(Any, inputs))
            if not all(same_bits(cast(Tensor, one), other) for one, other in zip(together, alone, strict=True)):
                return False
        return True

    def shares(self) -> bool:
        """Whether the last forward was one for all samples."""
        return bool(self.analyses)


def random_inputs(count: int, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[dict[str, Tensor]]:
    """Samples with one argument, x."""
    generator = torch.Generator().manual_seed(seed)
    return [{"x": torch.randn(shape, generator=generator).to(dtype)} for _ in range(count)]
