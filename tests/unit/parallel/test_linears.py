"""Columns of a product on several ranks, without processes: a mesh that knows the parts of all."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from flowroll.errors import InvalidRequestError
from flowroll.parallel.linears import ColumnParallelLinear, check_columns, count_parameters, shard_columns_of
from flowroll.parallel.mesh import Axis, Mesh


class KnowingMesh(Mesh):
    """Stands for the mesh of one rank; what the others would send is put in by the test."""

    def __init__(self, rank: int, degree: int) -> None:
        self._rank, self._degree = rank, degree
        self.others: list[ColumnParallelLinear] = []
        self.inputs: Tensor | None = None
        self.gathered: list[int] = []

    def degree(self, axis: Axis) -> int:
        return self._degree

    def coordinate(self, axis: Axis) -> int:
        return self._rank

    def gather(self, part: Tensor, *, axis: Axis, dim: int, sizes: Sequence[int]) -> Tensor:
        assert axis == "tp" and sum(sizes) == self._degree * part.shape[dim]
        self.gathered.append(dim)
        if dim == -1:
            return torch.cat([nn.functional.linear(self.inputs, rank.weight, rank.bias) for rank in self.others], dim=-1)
        return torch.cat([(rank.weight if part.ndim == 2 else rank.bias).detach() for rank in self.others])


def sharded(linear: nn.Linear, degree: int) -> tuple[list[ColumnParallelLinear], list[KnowingMesh]]:
    meshes = [KnowingMesh(rank, degree) for rank in range(degree)]
    parts = [ColumnParallelLinear(linear, mesh) for mesh in meshes]
    for part in parts:
        part.weight.data = linear.weight[part.own_columns].clone()
        if part.bias is not None:
            part.bias.data = linear.bias[part.own_columns].clone()
    for mesh in meshes:
        mesh.others = parts
    return parts, meshes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("inputs", "outputs", "degree"), [(64, 64, 2), (64, 170, 2), (64, 384, 4), (170, 64, 2), (512, 1536, 3)]
)
def test_every_rank_returns_the_bits_of_the_whole_product(
    inputs: int, outputs: int, degree: int, bias: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(inputs, outputs, bias=bias).to(dtype)
    parts, meshes = sharded(linear, degree)
    with torch.no_grad():
        for shape in [
            (1, inputs),
            (2, inputs),
            *((1, rows, inputs) for rows in (1, 2, 3, 5, 9, 31, 63, 64, 65, 100, 319, 1056)),
        ]:
            tokens = torch.randn(shape).to(dtype)
            whole = linear(tokens)
            for part, mesh in zip(parts, meshes, strict=True):
                mesh.inputs = tokens
                assert torch.equal(part(tokens), whole), shape


def test_few_rows_fetch_the_weights_where_columns_end_between_blocks() -> None:
    (part, _), (mesh, _) = sharded(nn.Linear(64, 170), 2)
    with torch.no_grad():
        for rows, dims in ((63, [0, 0]), (64, [-1])):
            mesh.inputs = torch.randn(rows, 64)
            mesh.gathered.clear()
            part(mesh.inputs)
            assert mesh.gathered == dims
    (part, _), (mesh, _) = sharded(nn.Linear(64, 64), 2)
    with torch.no_grad():
        mesh.inputs = torch.randn(1, 64)
        part(mesh.inputs)
    assert mesh.gathered == [-1]


class Kernels(TorchDispatchMode):
    """Notes the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_a_product_with_fetched_weights_runs_the_kernel_of_the_whole_linear() -> None:
    # torch folds a strided batch into one `mm` only where the weight needs a gradient, as a linear's does.
    linear = nn.Linear(64, 170, bias=False)
    (part, _), _ = sharded(linear, 2)
    tokens = torch.randn(9, 2, 64).transpose(0, 1)
    kernels = []
    for module in (linear, part):
        with torch.no_grad(), Kernels() as noted:
            module(tokens)
        kernels.append(noted.names & {"mm", "bmm"})
    assert kernels == [{"mm"}, {"mm"}]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 12), nn.Linear(12, 4)) for _ in range(2)])
        self.head = nn.Linear(4, 3)


def test_planned_linears_are_replaced_and_all_parameters_are_counted() -> None:
    model: Any = Model()
    whole = sum(parameter.numel() for parameter in model.parameters())
    assert count_parameters(model) == whole
    shard_columns_of(model, ("blocks.*.0", "blocks.-1.1"), KnowingMesh(1, 2))
    replaced = {name for name, module in model.named_modules() if isinstance(module, ColumnParallelLinear)}
    assert replaced == {"blocks.0.0", "blocks.1.0", "blocks.1.1"}
    assert model.blocks[0][0].weight.shape == (6, 4) and model.blocks[0][0].own_columns == slice(6, 12)
    assert count_parameters(model) == whole
    assert sum(parameter.numel() for parameter in model.parameters()) < whole


def test_a_degree_that_does_not_divide_is_refused_with_those_that_do() -> None:
    check_columns(Model(), ("blocks.*.0", "blocks.*.1"), 4)
    with pytest.raises(InvalidRequestError, match=r"got 3 for the 4 columns of blocks\.0\.1; use 1 or 2 or 4"):
        check_columns(Model(), ("blocks.*.0", "blocks.*.1"), 3)
