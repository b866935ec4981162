"""Several samples in one forward: every sample has the bits that it has alone."""

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.pairs import FAMILY_WITH_DTYPE
from tests.parity.adapters import add_adapters
from torch import Tensor

from flowroll.engine.checkpoint import examine_checkpoint
from flowroll.engine.loading import load_transformer
from flowroll.exact import Alone, Forward, Merged, probe
from flowroll.exact.mode import Notes
from flowroll.families import FAMILIES, Family, ModelSpec, Output, StepInput
from flowroll.testing import random_input

NAMES = [name for name, family in FAMILIES.items() if family.shares_forwards]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SPEC = ModelSpec(latent_channels=16, vae_scale_factor=8, widths={"text": 64, "pooled": 48, "text_tokens": 40})
OTHERS = {
    "flux2": ModelSpec(latent_channels=32, vae_scale_factor=8, widths={"text": 192}),
    "qwen_image_edit": ModelSpec(latent_channels=16, vae_scale_factor=8, widths={"text": 64, "packed": 64}),
}

Load = Callable[[str, str], Any]


@pytest.fixture(scope="module")
def load(checkpoints: dict[str, Path]) -> Load:
    loaded: dict[tuple[str, str], Any] = {}

    def get(family: str, dtype: str) -> Any:
        if (family, dtype) not in loaded:
            checkpoint = examine_checkpoint(checkpoints[family], variant=None)
            loaded[family, dtype] = load_transformer(checkpoint, DTYPES[dtype], None)
        return loaded[family, dtype]

    return get


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def make_input(
    family: Family,
    generator: torch.Generator,
    dtype: torch.dtype,
    *,
    grid: tuple[int, int] = (4, 6),
    texts: tuple[int, int] = (9, 5),
    sigma: float = 0.5,
    scale: float = 4.0,
) -> StepInput:
    height, width = (SPEC.pixel_unit * count for count in grid)
    options = {"height": height, "width": width, "texts": texts, "scale": scale, "embedded": 1.5 + scale}
    spec = OTHERS.get(family.name, SPEC)
    return random_input(family, spec, **options, dtype=dtype, generator=generator, timestep=sigma)


def random_mixture(family: Family, dtype: torch.dtype, source: random.Random) -> list[StepInput]:
    """Samples of one size, at a few noise levels, some or all or none of them guided.

    Their texts have one pair of lengths, or lengths of their own where texts may be padded.
    """
    generator = torch.Generator().manual_seed(source.getrandbits(32))
    grid = (source.randint(2, 9), source.randint(8, 14))
    texts = [source.randint(1, 40) for _ in range(2)]
    if source.random() < 0.3:
        # Both branches in one batch (Qwen-Image); a pair without a mask (Z-Image).
        texts[1] = texts[0]
    own_lengths = family.conditioning.embeds.may_be_padded and source.random() < 0.6
    sigmas = [source.random() for _ in range(3)]
    scales = source.choice([(0.0,), (3.5, 7.0), (0.0, 3.5)])
    return [
        make_input(
            family,
            generator,
            dtype,
            grid=grid,
            texts=(source.randint(1, 40), source.randint(1, 9)) if own_lengths else (texts[0], texts[1]),
            sigma=source.choice(sigmas),
            scale=source.choice(scales),
        )
        for _ in range(source.randint(1, 6))
    ]


def alone(family: Family, transformer: Any, inputs: list[StepInput], dtype: torch.dtype) -> list[Tensor]:
    return Alone(family, dtype).velocities(transformer, inputs)


def notes_of(strategy: Merged) -> list[Notes]:
    """The analyses of all forwards that samples shared; none may have been given up."""
    kinds = [analyses for known in strategy._shared._known.values() for analyses in known.notes.values()]
    assert None not in kinds
    return [notes for analyses in kinds for notes in analyses or []]


def assert_exact(name: str, transformer: Any, dtype: str, seed: int, mixtures: int) -> None:
    family, source = FAMILIES[name], random.Random(seed)
    strategy = Merged(family, DTYPES[dtype])
    for number in range(mixtures):
        inputs = random_mixture(family, DTYPES[dtype], source)
        expected = alone(family, transformer, inputs, DTYPES[dtype])
        # Twice: a forward that is analysed, and one that repeats it.
        for attempt in range(2):
            together = strategy.velocities(transformer, inputs)
            assert len(together) == len(inputs)
            for index, (one, other) in enumerate(zip(together, expected, strict=True)):
                assert one.dtype == other.dtype and torch.equal(one, other), (seed, number, attempt, index)
    assert not [function for notes in notes_of(strategy) for function in notes.without_rule]


@pytest.mark.parametrize(("name", "dtype"), [row for row in FAMILY_WITH_DTYPE if row[0] in NAMES])
@torch.no_grad()
def test_a_sample_in_any_batch_is_the_sample_alone(load: Load, name: str, dtype: str, threads: int) -> None:
    assert_exact(name, load(name, dtype), dtype, seed=threads, mixtures=6)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_many_mixtures(load: Load, name: str, dtype: str, seed: int, threads: int) -> None:
    assert_exact(name, load(name, dtype), dtype, seed=100 + seed, mixtures=40)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_merged_products_without_the_question_change_bits(load: Load, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault that `_way` prevents; it is noticed. Should this pass one day, products need no care at all."""
    monkeypatch.setattr(probe, "_way", lambda *_: "merged")
    with pytest.raises(AssertionError):
        assert_exact(name, load(name, "float32"), "float32", seed=1, mixtures=6)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_samples_share_forwards(load: Load, name: str) -> None:
    """Two guided samples: two forwards, a branch each, or one of two pairs, or one of texts that are padded."""
    family, transformer = FAMILIES[name], load(name, "float32")
    generator = torch.Generator().manual_seed(0)
    batches: list[int] = []
    hook = transformer.register_forward_pre_hook(
        lambda _, __, kwargs: batches.append(len(kwargs.get("x", kwargs.get("hidden_states")))), with_kwargs=True
    )
    strategy = Merged(family, torch.float32)
    inputs = [make_input(family, generator, torch.float32, sigma=sigma) for sigma in (0.3, 0.8)]
    same = [make_input(family, generator, torch.float32, texts=(5, 5))] * 2
    is_one = family.conditioning.pair or family.conditioning.embeds.may_be_padded
    for some, expected in ((inputs, [4] if is_one else [2, 2]), (same, [4])):
        strategy.velocities(transformer, some)
        batches.clear()
        strategy.velocities(transformer, some)
        assert batches == expected
    hook.remove()


@torch.no_grad()
def test_captions_of_other_lengths_share_a_forward_if_they_are_padded_alike(load: Load) -> None:
    """Some need no padding, and are prepared by other functions than the rest."""
    family, transformer = FAMILIES["z_image"], load("z_image", "float32")
    generator, source = torch.Generator().manual_seed(0), random.Random(1)
    strategy = Merged(family, torch.float32)
    for _ in range(6):
        lengths = [(source.choice([3, 31, 32]), source.choice([5, 32])) for _ in range(3)]
        inputs = [make_input(family, generator, torch.float32, texts=texts) for texts in lengths]
        for _ in range(2):
            together = strategy.velocities(transformer, inputs)
            assert all(map(torch.equal, together, alone(family, transformer, inputs, torch.float32))), lengths
    (known,) = strategy._shared._known.values()
    ((analyses),) = known.notes.values()
    assert analyses is not None and len(analyses) > 1


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_samples_of_different_shapes_run_in_one_call_of_velocities(load: Load, name: str) -> None:
    family, transformer = FAMILIES[name], load(name, "float32")
    generator = torch.Generator().manual_seed(3)
    grids = [(4, 4), (4, 6), (4, 4), (2, 8)]
    inputs = [make_input(family, generator, torch.float32, grid=grid) for grid in grids]
    for strategy in (Merged(family, torch.float32), Alone(family, torch.float32)):
        together = strategy.velocities(transformer, inputs)
        assert all(map(torch.equal, together, alone(family, transformer, inputs, torch.float32)))
        keys = [strategy.batch_key(one) for one in inputs]
        assert keys[0] == keys[2] and len(set(keys)) == 3


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_one_sample_takes_the_path_of_velocity(load: Load, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It pays nothing for batching."""
    family, transformer = FAMILIES[name], load(name, "float32")
    inputs = [make_input(family, torch.Generator().manual_seed(0), torch.float32)]
    monkeypatch.setattr("flowroll.exact.sharing.Analysis", None)
    (one,) = Merged(family, torch.float32).velocities(transformer, inputs)
    assert torch.equal(one, alone(family, transformer, inputs, torch.float32)[0])


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_ranks_may_run_any_part_of_a_forward(load: Load, name: str) -> None:
    """As the groups of a cfg axis do: each has some of the inputs of every forward."""
    family, transformer = FAMILIES[name], load(name, "float32")
    generator = torch.Generator().manual_seed(0)
    inputs = [make_input(family, generator, torch.float32, sigma=sigma) for sigma in (0.3, 0.8, 0.4)]

    def run_in_parts(forwards: Sequence[Forward]) -> list[list[Output]]:
        return [[*one.part(0, 2)(), *one.part(2, len(one.inputs))()] for one in forwards]

    together = Merged(family, torch.float32, run_in_parts).velocities(transformer, inputs)
    assert all(map(torch.equal, together, alone(family, transformer, inputs, torch.float32)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_adapters_are_exact_too(checkpoints: dict[str, Path], name: str, dtype: str) -> None:
    transformer = load_transformer(examine_checkpoint(checkpoints[name], variant=None), DTYPES[dtype], None)
    for adapter in add_adapters(transformer):
        adapter.up.normal_(generator=torch.Generator().manual_seed(1))
    assert_exact(name, transformer, dtype, seed=5, mixtures=3)


@pytest.mark.parametrize("rows", [1, 3, 64])
def test_the_probe_sees_another_order_of_summation(rows: int) -> None:
    """In bfloat16 too, where a product of ordinary numbers would round it away."""
    for dtype in DTYPES.values():
        inputs, weight, _ = probe.cancelling_product(
            torch.Size((2, rows, 64)), torch.Size((48, 64)), dtype, torch.device("cpu")
        )
        order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
        one = torch.nn.functional.linear(inputs, weight)
        other = torch.nn.functional.linear(inputs[..., order].contiguous(), weight[:, order].contiguous())
        assert (one != other).float().mean() > 0.3, dtype
