"""Linear layers whose output columns are spread over the tensor-parallel ranks.

    y = x W^T + b,   W = [W_0; ...; W_{n-1}] by output columns,   y = [x W_0^T + b_0, ..., x W_{n-1}^T + b_{n-1}]

Each rank holds one W_i, computes its columns and gathers the others': no sum runs across ranks, so every element is the dot
product that one rank computes. Usual tensor parallelism adds up partial sums after every second linear; that is not the same in
floating point.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from flowroll.errors import InvalidRequestError
from flowroll.parallel.mesh import Mesh
from flowroll.parallel.paths import find_modules
from flowroll.parallel.shards import MIN_ROWS

# Columns of a product are computed in blocks of this many; parts that end between blocks can change bits where there are few
# rows (measured with torch 2.13 on CPU, float32: products of up to 5 rows in parts of 30 or 85 columns; none in parts of whole
# blocks).
COLUMN_BLOCK = 16


class ColumnParallelLinear(nn.Module):
    """A linear layer that holds the output columns of its rank and returns all columns.

    Args:
        whole: The linear layer that it replaces; only the shape is used.
        mesh: The mesh of the ranks.
    """

    def __init__(self, whole: nn.Linear, mesh: Mesh) -> None:
        super().__init__()
        self._mesh = mesh
        self.in_features, self.out_features = whole.in_features, whole.out_features
        # `check_columns` has refused all other degrees.
        assert whole.out_features % mesh.degree("tp") == 0
        self.columns = whole.out_features // mesh.degree("tp")
        device, dtype = whole.weight.device, whole.weight.dtype
        self.weight = nn.Parameter(torch.empty(self.columns, self.in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(self.columns, device=device, dtype=dtype)) if whole.bias is not None else None

    @property
    def own_columns(self) -> slice:
        """The rows of the whole weight, and of the bias, that this rank holds."""
        start = self._mesh.coordinate("tp") * self.columns
        return slice(start, start + self.columns)

    def forward(self, inputs: Float[Tensor, "... inputs"]) -> Float[Tensor, "... outputs"]:
        """Returns all columns, bit for bit as the whole linear layer does."""
        num_rows = inputs.numel() // self.in_features
        if num_rows >= MIN_ROWS or self.columns % COLUMN_BLOCK == 0:
            return self._gather(nn.functional.linear(inputs, self.weight, self.bias), dim=-1)
        # With so few rows any split of the columns may change bits, so the weights are gathered and the product is computed
        # whole.
        bias = None if self.bias is None else self.gather_whole(self.bias)
        # Requires a gradient as a parameter does: torch uses another kernel for some products whose weight needs no gradient.
        weight = self.gather_whole(self.weight).requires_grad_()
        return nn.functional.linear(inputs, weight, bias)

    def gather_whole(self, part: Tensor) -> Tensor:
        """Gathers a whole weight or bias, of which every rank has a part."""
        return self._gather(part.detach(), dim=0)

    def _gather(self, part: Tensor, *, dim: int) -> Tensor:
        return self._mesh.gather(part, axis="tp", dim=dim, sizes=[self.columns] * self._mesh.degree("tp"))


def check_columns(transformer: nn.Module, paths: Sequence[str], degree: int) -> None:
    """Refuses a degree that does not divide the columns of every planned linear.

    Raises:
        InvalidRequestError: The degree does not fit; the message lists the degrees that fit.
    """
    widths = {path: linear.out_features for path, linear in planned_linears(transformer, paths)}
    misfits = [path for path, width in widths.items() if width % degree]
    if misfits:
        fitting = [str(n) for n in range(1, 65) if not any(width % n for width in widths.values())]
        raise InvalidRequestError(
            f"tp must divide the output columns of every sharded linear, got {degree} for the {widths[misfits[0]]} columns of "
            f"{misfits[0]}; use {' or '.join(fitting)}.",
            field="tp",
        )


def shard_columns_of(transformer: nn.Module, paths: Sequence[str], mesh: Mesh) -> None:
    """Replaces the planned linear layers by `ColumnParallelLinear` without weights, which the loading of the model fills."""
    for path, linear in planned_linears(transformer, paths):
        parent, _, name = path.rpartition(".")
        setattr(transformer.get_submodule(parent), name, ColumnParallelLinear(linear, mesh))


def count_parameters(transformer: nn.Module) -> int:
    """Counts the parameters of the whole transformer, including the columns that other ranks hold."""
    elsewhere = 0
    for module in transformer.modules():
        if isinstance(module, ColumnParallelLinear):
            own = sum(parameter.numel() for parameter in module.parameters())
            elsewhere += own * (module.out_features // module.columns - 1)
    return elsewhere + sum(parameter.numel() for parameter in transformer.parameters())


def whole_tensors(module: nn.Module, names: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Yields the names and tensors of a module in the order of the names; each sharded tensor is gathered when it is due.

    If any tensor is sharded, every rank has to iterate to the end, with the same names.

    Args:
        module: The module, or this rank's part of it.
        names: The tensors to yield; None: all of them.
    """
    for name, tensor in sorted(module.state_dict().items()):
        if names is not None and name not in names:
            continue
        owner = module.get_submodule(name.rpartition(".")[0])
        yield name, owner.gather_whole(tensor) if isinstance(owner, ColumnParallelLinear) else tensor


def planned_linears(transformer: nn.Module, paths: Sequence[str]) -> list[tuple[str, nn.Linear]]:
    """Returns the linears, with their paths, whose columns a plan distributes."""
    found = [(path, module) for pattern in paths for path, module in find_modules(transformer, pattern)]
    assert all(isinstance(module, nn.Linear) for _, module in found)
    return found  # type: ignore[return-value]
