"""Shared forwards without the model's Python code: the same bits, and only where nothing else can be missed."""

import gc
import random
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tests.pairs import FAMILY_WITH_DTYPE
from tests.unit.exact.shared import Model, Stacking, random_inputs
from tests.unit.exact.test_merged import DTYPES, NAMES, Load, alone, load, make_input
from torch import Tensor, nn

from flowroll.exact import Merged
from flowroll.exact.layout import same_bits
from flowroll.exact.sharing import SharedForwards
from flowroll.families import FAMILIES

__all__ = ["load"]
# The analysis, one forward that repeats it, two that are written down; later ones run the program.
BEFORE = 4


class Net(nn.Module):
    """A small model; `calls` counts how often its Python code ran."""

    def __init__(self, extra: Callable[["Net", Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(12, 12), nn.LayerNorm(12)
        self.extra, self.calls, self.factor = extra, 0, 2.0
        self.register_buffer("offset", torch.ones(12))

    def forward(self, x: Tensor, *, return_dict: bool) -> tuple[Tensor]:
        self.calls += 1
        x = F.silu(self.norm(self.linear(x))).unflatten(-1, (3, 4)).transpose(-1, -2).flatten(-2) * self.factor + self.offset
        first, second = x.chunk(2, dim=-1)
        x = torch.cat([second, first.clone()], dim=-1)
        return (x if self.extra is None else self.extra(self, x),)


def sharing() -> SharedForwards:
    return SharedForwards(cast(Any, Stacking()), with_programs=True)


def run(shared: SharedForwards, model: Net, seed: int, *, width: int = 12, count: int = 3, rows: int = 5) -> int:
    """Checks the bits of samples that share a forward, and returns how often the model's Python code ran for them."""
    inputs = random_inputs(count, 1, rows, width, seed=seed)
    before = model.calls
    together = shared.outputs(model, cast(Any, inputs))
    calls = model.calls - before
    for one, own in zip(inputs, together, strict=True):
        assert same_bits(cast(Tensor, own), model(one["x"], return_dict=False)[0])
    return calls


@torch.no_grad()
def test_a_forward_that_is_known_runs_without_the_models_code() -> None:
    shared, model = sharing(), Net()
    for seed in range(BEFORE):
        assert run(shared, model, seed)
    assert [run(shared, model, seed) for seed in range(9, 12)] == [0, 0, 0]
    assert run(shared, model, 20, count=4) and run(shared, model, 21, rows=6), "another kind of forward has no program yet"
    assert run(shared, model, 22) == 0


@torch.no_grad()
def test_another_number_of_threads_has_programs_of_its_own() -> None:
    """The ways that were found with one thread may be wrong with two, and the shapes are the same."""
    shared, model = sharing(), Net()
    for seed in range(BEFORE):
        run(shared, model, seed)
    before = torch.get_num_threads()
    torch.set_num_threads(3 - before if before < 3 else 1)
    try:
        assert all(run(shared, model, seed) for seed in range(BEFORE)) and run(shared, model, 8) == 0
    finally:
        torch.set_num_threads(before)


def test_a_forward_with_gradients_runs_the_models_code() -> None:
    shared, model = sharing(), Net()
    for seed in range(BEFORE + 3):
        assert run(shared, model, seed)


@torch.no_grad()
def test_without_leave_there_are_no_programs() -> None:
    shared, model = SharedForwards(cast(Any, Stacking())), Net()
    for seed in range(BEFORE + 3):
        assert run(shared, model, seed)


def reads_a_weight(net: Net, x: Tensor) -> Tensor:
    return x * net.linear.weight.abs().max().item()


def decides_by_a_weight(net: Net, x: Tensor) -> Tensor:
    return x * 2 if bool(net.linear.bias.sum() > 1e9) else x


def chooses_by_a_mask(net: Net, x: Tensor) -> Tensor:
    bias = net.linear.bias
    return x * len(bias[bias > bias.mean()])


def finds_places(net: Net, x: Tensor) -> Tensor:
    return x * len(torch.nonzero(net.linear.bias > 0))


def cuts_at_a_number(net: Net, x: Tensor) -> Tensor:
    return x * len(net.linear.bias[: (net.linear.bias > 0).sum()])


def counts_to_a_number(net: Net, x: Tensor) -> Tensor:
    return x * len(torch.arange((net.linear.bias > 0).sum()))


def leaves_torch(net: Net, x: Tensor) -> Tensor:
    return x * torch.from_numpy(np.array([float(net.factor)], dtype=np.float32))


def num_positive(net: Net) -> Any:
    """A size that is the number of a tensor."""
    return (net.linear.bias > 0).sum()


# Each returns what is as long, or as many, as the numbers of the model's bias say.
SIZED: dict[str, Callable[[Net], Any]] = {
    "zeros": lambda net: torch.zeros((num_positive(net), 1)),
    "zeros by name": lambda net: torch.zeros(size=(num_positive(net),)),
    "arange by name": lambda net: torch.arange(end=num_positive(net)),
    "new_zeros": lambda net: net.linear.bias.new_zeros(num_positive(net)),
    "new_ones": lambda net: net.linear.bias.new_ones((num_positive(net), 2)),
    "repeat": lambda net: net.linear.bias.repeat(num_positive(net)),
    "tile": lambda net: net.linear.bias.tile((num_positive(net),)),
    "repeat_interleave by name": lambda net: torch.repeat_interleave(net.linear.bias, repeats=(net.linear.bias > 0).long()),
    "where by name": lambda net: torch.where(condition=net.linear.bias > 0)[0],
    "expand": lambda net: net.linear.bias[:1].expand(num_positive(net)),
    "narrow": lambda net: net.linear.bias.narrow(0, 0, num_positive(net)),
    "tensor_split": lambda net: net.linear.bias.tensor_split(num_positive(net).reshape(1))[0],
    "pad": lambda net: F.pad(net.linear.bias, (0, num_positive(net))),
    "topk": lambda net: net.linear.bias.topk(num_positive(net))[0],
    "unflatten": lambda net: net.linear.bias.new_zeros(27720).unflatten(0, (num_positive(net), -1)),
    "diagonal": lambda net: net.linear.weight.diagonal(num_positive(net)),
    "interpolate": lambda net: F.interpolate(net.linear.weight[None], size=num_positive(net))[0].T,
    "version": lambda net: range(net.linear.bias._version),
    "requires_grad": lambda net: range(1 + net.linear.weight.requires_grad),
}


@pytest.mark.parametrize("sized", SIZED.values(), ids=SIZED)
@torch.no_grad()
def test_a_size_that_is_a_number_of_a_tensor_is_never_written_down(sized: Callable[[Net], Any]) -> None:
    """Wherever it stands among the arguments: the shape that the model's code reads may be another one in the next forward."""
    shared, model = sharing(), Net(lambda net, x: x * len(sized(net)))
    for seed in range(BEFORE + 4):
        assert run(shared, model, seed)
        if seed > BEFORE:
            model.linear.bias.copy_(torch.where(torch.arange(12) < 3 + seed % 2, 1.0, -1.0))
            model.linear.weight.requires_grad_(seed % 2 == 0)


@pytest.mark.parametrize(
    "extra",
    [
        reads_a_weight,
        decides_by_a_weight,
        chooses_by_a_mask,
        finds_places,
        cuts_at_a_number,
        counts_to_a_number,
        leaves_torch,
    ],
    ids=lambda one: one.__name__,
)
@torch.no_grad()
def test_what_may_read_numbers_is_never_written_down(extra: Callable[[Net, Tensor], Tensor]) -> None:
    shared, model = sharing(), Net(extra)
    for seed in range(BEFORE + 4):
        assert run(shared, model, seed)
        if seed > BEFORE:
            # What a program of this forward would have kept.
            model.linear.bias.copy_(torch.randn(12).abs() * (seed % 2 * 2 - 1))
            model.linear.weight.mul_(1.5)


@torch.no_grad()
def test_a_number_that_changes_from_forward_to_forward_is_not_kept() -> None:
    shared, model = sharing(), Net()
    for seed in range(12):
        model.factor = 1.0 + seed
        assert run(shared, model, seed)


@torch.no_grad()
def test_a_table_that_is_made_anew_for_each_forward_is_not_kept() -> None:
    shared, model = sharing(), Net(lambda net, x: x * net.table)
    for seed in range(12):
        model.__dict__["table"] = torch.full((12,), float(seed))
        assert run(shared, model, seed)


@torch.no_grad()
def test_a_program_whose_output_has_other_bits_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    from flowroll.exact import programs

    shared, model = sharing(), Net()
    monkeypatch.setattr(programs, "same_outputs", lambda *_: False)
    for seed in range(BEFORE + 3):
        assert run(shared, model, seed)


@torch.no_grad()
def test_programs_follow_the_weights() -> None:
    shared, model = sharing(), Net()
    for seed in range(BEFORE):
        run(shared, model, seed)
    model.linear.weight.mul_(1.25)
    model.norm.weight.data = torch.randn(12)
    assert run(shared, model, 9) == 0


def replaced_parameter(model: Net) -> None:
    model.linear.weight = nn.Parameter(torch.randn(12, 12))


def replaced_buffer(model: Net) -> None:
    model.offset = torch.randn(12)


def replaced_module(model: Net) -> None:
    model.norm = nn.LayerNorm(12, bias=False)


def hooked(model: Net) -> None:
    model.linear.register_forward_hook(lambda module, args, output: output * 2)


def patched(model: Net) -> None:
    linear = model.linear
    linear.forward = lambda x: F.linear(x, linear.weight)  # type: ignore[method-assign]


@pytest.mark.parametrize("change", [replaced_parameter, replaced_buffer, replaced_module, hooked, patched, Net.train])
@torch.no_grad()
def test_a_changed_model_runs_its_own_code_again(change: Callable[[Net], object]) -> None:
    shared, model = sharing(), Net()
    model.eval()
    for seed in range(BEFORE):
        run(shared, model, seed)
    assert run(shared, model, 8) == 0
    change(model)
    assert run(shared, model, 9)
    for seed in range(BEFORE + 1):
        run(shared, model, 10 + seed)
    assert bool(run(shared, model, 30)) == (change in (hooked, patched)), "hooks may do more than compute"


@torch.no_grad()
def test_the_least_recently_used_programs_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    from flowroll.exact import programs

    monkeypatch.setattr(programs, "_PROGRAMS", 1)
    shared, model = sharing(), Net()
    for seed in range(BEFORE):
        run(shared, model, seed)
    assert run(shared, model, 8) == 0
    run(shared, model, 9, count=4), run(shared, model, 10, count=4)
    assert run(shared, model, 11)


@torch.no_grad()
def test_a_model_that_nobody_needs_is_not_kept() -> None:
    shared, model = sharing(), Net()
    for seed in range(BEFORE + 1):
        run(shared, model, seed)
    kept = [weakref.ref(model), weakref.ref(model.linear), weakref.ref(model.linear.weight)]
    del model
    gc.collect()
    assert [one() for one in kept] == [None, None, None] and not shared._known


@torch.no_grad()
def test_an_object_of_which_nothing_is_known_is_not_kept() -> None:
    class Handing(Stacking):
        def collate_key(self, forward_input: Any) -> Any:
            return forward_input["x"].shape

        def collate(self, forward_inputs: Any) -> Any:
            return {"x": torch.cat([one["x"] for one in forward_inputs]), "kept": forward_inputs[0]["kept"]}

    shared, kept = SharedForwards(cast(Any, Handing()), with_programs=True), object()
    model = Model(lambda x, kept: x * 2)
    for seed in range(BEFORE + 2):
        before = len(model.lengths)
        inputs = [{**one, "kept": kept} for one in random_inputs(3, 1, 5, 12, seed=seed)]
        shared.outputs(model, cast(Any, inputs))
        assert len(model.lengths) > before


@torch.no_grad()
def test_two_arguments_that_are_one_tensor_are_not_taken_for_each_other() -> None:
    """In the next forward they may be two."""

    class Twins(Stacking):
        def collate(self, forward_inputs: Any) -> Any:
            x = torch.cat([one["x"] for one in forward_inputs])
            is_one = all(one["x"] is one["y"] for one in forward_inputs)
            return {"x": x, "y": x if is_one else torch.cat([one["y"] for one in forward_inputs])}

    shared, model = SharedForwards(cast(Any, Twins()), with_programs=True), Model(lambda x, y: x * 2 + y)
    for seed in range(BEFORE + 4):
        inputs = [
            {"x": one["x"], "y": one["x"] if seed < BEFORE else one["x"] * 3} for one in random_inputs(3, 1, 5, 12, seed=seed)
        ]
        for one, own in zip(inputs, shared.outputs(model, cast(Any, inputs)), strict=True):
            assert same_bits(cast(Tensor, own), one["x"] * 2 + one["y"])


@pytest.mark.parametrize(
    "pack", [lambda one: {"one": one}, lambda one: (one,), lambda one: [[one]]], ids=("dict", "tuple", "lists")
)
@torch.no_grad()
def test_a_tensor_inside_of_another_argument_is_not_kept(pack: Callable[[Tensor], Any]) -> None:
    """Samples of one request share it, and so it looks like a part of the model; those of the next request have another one."""

    class Packing(Stacking):
        def collate_key(self, forward_input: Any) -> Any:
            return forward_input["x"].shape

        def collate(self, forward_inputs: Any) -> Any:
            return {"x": torch.cat([one["x"] for one in forward_inputs]), "kept": forward_inputs[0]["kept"]}

    def factor(kept: Any) -> Tensor:
        return kept if isinstance(kept, Tensor) else factor(next(iter(kept.values() if isinstance(kept, dict) else kept)))

    shared = SharedForwards(cast(Any, Packing()), with_programs=True)
    model = Model(lambda x, kept: x * factor(kept))
    for request in range(3):
        kept = pack(torch.tensor(2.0 + request))
        for seed in range(BEFORE + 2):
            inputs = [{**one, "kept": kept} for one in random_inputs(3, 1, 5, 12, seed=seed)]
            for one, own in zip(inputs, shared.outputs(model, cast(Any, inputs)), strict=True):
                assert same_bits(cast(Tensor, own), one["x"] * (2.0 + request))


@pytest.mark.parametrize(("name", "dtype"), [row for row in FAMILY_WITH_DTYPE if row[0] in NAMES])
@torch.no_grad()
def test_every_family_keeps_its_bits(load: Load, name: str, dtype: str) -> None:
    """A forward that was written down with a group, whose samples share their prompt, also runs samples of other prompts."""
    family, transformer = FAMILIES[name], load(name, dtype)
    generator = torch.Generator().manual_seed(3)
    strategy = Merged(family, DTYPES[dtype], with_programs=True)
    for number in range(BEFORE + 4):
        inputs = [make_input(family, generator, DTYPES[dtype], sigma=0.3 + 0.1 * number) for _ in range(3)]
        if number < BEFORE + 2:
            inputs = [replace(one, env=inputs[0].env) for one in inputs]
        expected = alone(family, transformer, inputs, DTYPES[dtype])
        assert all(map(torch.equal, strategy.velocities(transformer, inputs), expected))
    candidates = strategy._shared._known[transformer].programs
    assert candidates is not None
    assert all(candidate.is_confirmed for candidate in candidates._candidates.values())


@pytest.mark.parametrize(("name", "dtype"), [row for row in FAMILY_WITH_DTYPE if row[0] in NAMES])
@torch.no_grad()
def test_whatever_samples_of_one_shape_share_they_keep_their_bits(load: Load, name: str, dtype: str) -> None:
    """Prompts and noise levels are drawn from a few, so that samples have them in common in one forward and not in the next."""
    family, transformer, source = FAMILIES[name], load(name, dtype), random.Random(7)
    generator = torch.Generator().manual_seed(7)
    strategy = Merged(family, DTYPES[dtype], with_programs=True)
    pool = [make_input(family, generator, DTYPES[dtype], scale=source.choice((0.0, 4.0))) for _ in range(4)]
    sigmas = [make_input(family, generator, DTYPES[dtype], sigma=sigma).timestep for sigma in (0.2, 0.7)]
    for _ in range(24):
        drawn = [replace(source.choice(pool), timestep=source.choice(sigmas)) for _ in range(source.choice((2, 3)))]
        inputs = [replace(one, latents=torch.randn(one.latents.shape, generator=generator).to(one.latents)) for one in drawn]
        expected = alone(family, transformer, inputs, DTYPES[dtype])
        assert all(map(torch.equal, strategy.velocities(transformer, inputs), expected))
