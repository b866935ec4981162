"""Modulations that are kept by timestep leave every bit as it was, and end with the weights that made them."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.adapters import policy, saved
from tests.tape import TapeRecorder

from flowroll.engine.adapters.files import find_adapter, read_adapter
from flowroll.engine.checkpoint import examine_checkpoint
from flowroll.engine.loading import load_model
from flowroll.exact import Alone, GraphedForwards, Modulations
from flowroll.exact.layout import same_bits
from flowroll.families import FAMILIES
from flowroll.testing import random_input

KEEPING = [name for name, family in FAMILIES.items() if family.modulation]


class Model:
    """A tiny model, its strategy with kept modulations, and the plain one."""

    def __init__(self, folder: Path, dtype: torch.dtype, graphs: bool = False, max_bytes: int = 2**30) -> None:
        self.dtype = dtype
        self.loaded, _ = load_model(examine_checkpoint(folder, variant=None), device=torch.device("cpu"), dtype=dtype)
        self.family = self.loaded.family
        self.graphs = GraphedForwards(TapeRecorder(), max_bytes=2**30) if graphs else None
        self.kept = Modulations(self.family.modulation, self.family.conditioning.timestep, max_bytes=max_bytes)
        self.strategy = Alone(self.family, dtype, graphs=self.graphs, modulations=self.kept)

    def check(self, number: float, seed: int = 0, texts: tuple[int, int] = (9, 5)) -> None:
        """Velocities are those of plain forwards."""
        generator = torch.Generator().manual_seed(seed)
        one = random_input(
            self.family,
            self.loaded.spec,
            height=64,
            width=64,
            texts=texts,
            dtype=self.dtype,
            generator=generator,
            timestep=number,
        )
        geometry = self.family.geometry(self.loaded.spec, height=64, width=64)
        given = replace(one, number=number, geometry=geometry)
        (found,) = self.strategy.velocities(self.loaded.transformer, [given])
        assert same_bits(found, self.family.velocity(self.loaded.transformer, one, self.dtype))


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def model(z_image_checkpoint: Path) -> Model:
    return Model(z_image_checkpoint, torch.float32)


def forwards_of(model: Model) -> list[str]:
    """Notes the calls of the first layer that modulates."""
    calls: list[str] = []
    layer = next(iter(model.kept._modules(model.loaded.transformer).values()))
    linear = next(module for module in layer.modules() if isinstance(module, torch.nn.Linear))
    linear.register_forward_hook(lambda *_: calls.append("called"))
    return calls


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "recorded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", KEEPING)
def test_every_sample_and_branch_has_the_bits_of_a_forward_that_computes_them(
    family: str, dtype: torch.dtype, graphs: bool, checkpoints: dict[str, Path]
) -> None:
    model = Model(checkpoints[family], dtype, graphs)
    for seed in range(4):
        for number in (0.9, 0.3):
            model.check(number, seed, texts=(9 + seed // 2, 5))
    assert len(model.kept._kept) == 2
    if model.graphs is not None:
        assert model.graphs.counts.hits >= 2 and model.graphs.counts.dropped == {}


def test_layers_are_called_once_a_timestep(model: Model) -> None:
    calls = forwards_of(model)
    for seed in range(3):
        for number in (0.9, 0.3):
            model.check(number, seed)
    # And in each plain forward.
    assert len(calls) == 2 + 6


def test_new_weights_are_computed_with_once_it_is_said(model: Model) -> None:
    model.check(0.9)
    layer = next(iter(model.kept._modules(model.loaded.transformer).values()))
    for parameter in layer.parameters():
        parameter.data.copy_(parameter * 1.5)
    with pytest.raises(AssertionError):
        model.check(0.9)
    model.kept.forget()
    model.check(0.9)
    model.check(0.9)


def test_timesteps_that_were_used_longest_ago_make_room(model: Model) -> None:
    model.check(0.9)
    small = Modulations(model.family.modulation, model.family.conditioning.timestep, max_bytes=2 * model.kept.num_bytes)
    model.strategy.modulations = model.kept = small
    for number in (0.9, 0.8, 0.9, 0.7):
        model.check(number)
    assert [key[1] for key in small._kept] == [0.9, 0.7]  # type: ignore[index]


def test_a_model_that_writes_into_them_keeps_none(model: Model) -> None:
    model.check(0.9)
    (kept,) = model.kept._kept.values()
    kept.outputs.add_(0)
    for _ in range(3):
        model.check(0.9)
    assert not model.kept._kept


def test_layers_that_are_not_called_once_are_not_kept(model: Model) -> None:
    model.strategy.modulations = Modulations(["all_x_embedder", "layers.*.adaLN_modulation"], "t", max_bytes=2**30)
    for _ in range(2):
        model.check(0.9)
    assert not model.strategy.modulations._kept


def test_a_layer_whose_forward_was_replaced_keeps_its_replacement(model: Model) -> None:
    layer: Any = next(iter(model.kept._modules(model.loaded.transformer).values()))
    layer.forward = own = lambda x: type(layer).forward(layer, x)
    for _ in range(2):
        model.check(0.9)
    assert not model.kept._kept and layer.__dict__["forward"] is own


def test_with_gradients_they_are_computed(model: Model) -> None:
    model.check(0.9)
    calls = forwards_of(model)
    with torch.enable_grad():
        model.check(0.9)
    assert len(calls) == 2


def test_modules_are_left_as_they_were(model: Model) -> None:
    model.check(0.9)
    model.check(0.9)
    assert not any("forward" in module.__dict__ for module in model.loaded.transformer.modules())


def test_an_adapter_that_is_made_during_a_forward_has_layers_of_its_own(model: Model, tmp_path: Path) -> None:
    """It is staged on another thread, and copies the modules above the layers that it changes."""
    transformer = model.loaded.transformer
    trained = policy(transformer, targets=["0.adaLN_modulation.0"])
    files = find_adapter(saved(trained, tmp_path / "adapter"))
    made: list[Any] = []
    layer = transformer.layers[1]
    hook = layer.register_forward_hook(lambda *_: made.append(stage(model, files)))
    for _ in range(2):
        model.check(0.9)
    hook.remove()
    assert len(made) == 4
    for adapter in made:
        assert not any("forward" in module.__dict__ for module in adapter.transformer.modules())


def stage(model: Model, files: Any) -> Any:
    data = read_adapter(files, max_bytes=2**30)
    return model.loaded.adapters.stage(data, name="a", merged=False)


def test_a_forward_without_a_number_computes_them(model: Model) -> None:
    one: Any = random_input(
        model.family,
        model.loaded.spec,
        height=64,
        width=64,
        texts=(9, 5),
        dtype=model.dtype,
        generator=torch.Generator().manual_seed(0),
    )
    model.strategy.velocities(model.loaded.transformer, [one])
    assert not model.kept._kept
