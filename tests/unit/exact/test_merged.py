"""Several samples in one forward: every sample has the bits that it has alone."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.parity.adapters import add_adapters
from torch import Tensor

from flowroll.engine.checkpoint import examine_checkpoint
from flowroll.engine.loading import load_transformer
from flowroll.exact import Alone, Merged, probe
from flowroll.families import FAMILIES, Family, StepInput
from flowroll.types import DenoisingEnv

NAMES = ["qwen_image", "z_image"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TEXT_DIM = 64

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
    rows, columns = grid
    guidance = family.guidance(scale)

    def branch(length: int) -> dict[str, Any]:
        text = torch.randn(length, TEXT_DIM, generator=generator).to(dtype)
        shapes = {"img_shapes": [[[1, rows, columns]]]} if family.name == "qwen_image" else {}
        return {family.embeds_key: text, **shapes}

    shape = (rows * columns, 64) if family.name == "qwen_image" else (16, 2 * rows, 2 * columns)
    return StepInput(
        latents=torch.randn(shape, generator=generator),
        timestep=torch.tensor([sigma], dtype=family.timestep_dtype(dtype)),
        env=DenoisingEnv(pos_cond_kwargs=branch(texts[0]), neg_cond_kwargs=branch(texts[1]) if guidance.is_active else None),
        guidance=guidance,
    )


def random_mixture(family: Family, dtype: torch.dtype, source: random.Random) -> list[StepInput]:
    """Samples of one size and one pair of text lengths, at a few noise levels, some or all or none of them guided."""
    generator = torch.Generator().manual_seed(source.getrandbits(32))
    grid = (source.randint(2, 9), source.randint(8, 14))
    texts = [source.randint(1, 40) for _ in range(2)]
    if source.random() < 0.3:
        # Both branches in one batch (Qwen-Image); a pair without a mask (Z-Image).
        texts[1] = texts[0]
    sigmas = [source.random() for _ in range(3)]
    scales = source.choice([(0.0,), (3.5, 7.0), (0.0, 3.5)])
    return [
        make_input(
            family,
            generator,
            dtype,
            grid=grid,
            texts=(texts[0], texts[1]),
            sigma=source.choice(sigmas),
            scale=source.choice(scales),
        )
        for _ in range(source.randint(1, 6))
    ]


def alone(family: Family, transformer: Any, inputs: list[StepInput], dtype: torch.dtype) -> list[Tensor]:
    return [family.velocity(transformer, one.latents, one.timestep, one.env, one.guidance, dtype) for one in inputs]


def assert_exact(name: str, transformer: Any, dtype: str, seed: int, mixtures: int) -> None:
    family, source = FAMILIES[name], random.Random(seed)
    for number in range(mixtures):
        inputs = random_mixture(family, DTYPES[dtype], source)
        expected = alone(family, transformer, inputs, DTYPES[dtype])
        together = family.velocities(transformer, inputs, DTYPES[dtype])
        assert len(together) == len(inputs)
        for index, (one, other) in enumerate(zip(together, expected, strict=True)):
            assert one.dtype == other.dtype and torch.equal(one, other), (seed, number, index)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
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
    """The fault that `_way` prevents; should this pass one day, batches need no care at all."""
    monkeypatch.setattr(products, "_way", lambda *_: products.merged)
    with pytest.raises(AssertionError):
        assert_exact(name, load(name, "float32"), "float32", seed=1, mixtures=6)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_samples_share_forwards(load: Load, name: str) -> None:
    """Two guided samples: two forwards (Qwen-Image, a branch each) or one (Z-Image, two pairs)."""
    family, transformer = FAMILIES[name], load(name, "float32")
    generator = torch.Generator().manual_seed(0)
    batches: list[int] = []
    hook = transformer.register_forward_pre_hook(
        lambda _, __, kwargs: batches.append(len(kwargs.get("x", kwargs.get("hidden_states")))), with_kwargs=True
    )
    inputs = [make_input(family, generator, torch.float32, sigma=sigma) for sigma in (0.3, 0.8)]
    family.velocities(transformer, inputs, torch.float32)
    assert batches == ([2, 2] if name == "qwen_image" else [4])
    batches.clear()
    family.velocities(transformer, [make_input(family, generator, torch.float32, texts=(5, 5))] * 2, torch.float32)
    assert batches == [4]
    hook.remove()


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_samples_of_different_shapes_run_in_one_call_of_velocities(load: Load, name: str) -> None:
    family, transformer = FAMILIES[name], load(name, "float32")
    generator = torch.Generator().manual_seed(3)
    grids = [(4, 4), (4, 6), (4, 4), (2, 8)]
    inputs = [make_input(family, generator, torch.float32, grid=grid) for grid in grids]
    together = family.velocities(transformer, inputs, torch.float32)
    assert all(map(torch.equal, together, alone(family, transformer, inputs, torch.float32)))
    keys = [family.batch_key(one) for one in inputs]
    assert keys[0] == keys[2] and len(set(keys)) == 3


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_one_sample_and_ranks_take_the_path_of_velocity(load: Load, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sample pays nothing for batching; forwards that ranks share are not merged."""
    family, transformer = FAMILIES[name], load(name, "float32")
    generator = torch.Generator().manual_seed(0)
    inputs = [make_input(family, generator, torch.float32) for _ in range(2)]
    monkeypatch.setattr("flowroll.families.base.PerSample", None)
    steps: list[int] = []

    def run(model: Any, calls: Any) -> Any:
        steps.append(len(calls))
        return run_in_turn(model, calls)

    (one,) = family.velocities(transformer, inputs[:1], torch.float32)
    shared = family.velocities(transformer, inputs, torch.float32, run=run)
    assert torch.equal(one, shared[0])
    assert steps == [2, 2] if name == "qwen_image" else [1, 1]


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_adapters_are_exact_too(checkpoints: dict[str, Path], name: str) -> None:
    transformer = load_transformer(examine_checkpoint(checkpoints[name], variant=None), torch.float32, None)
    for adapter in add_adapters(transformer):
        adapter.up.normal_(generator=torch.Generator().manual_seed(1))
    assert_exact(name, transformer, "float32", seed=5, mixtures=3)


@pytest.mark.parametrize("threads", [1, 2, 3], indirect=True)
@pytest.mark.parametrize("shape", [(7, 5), (16, 256), (110, 256)], ids=str)
def test_element_wise_functions_have_no_other_ends_in_a_batch(shape: tuple[int, int], threads: int) -> None:
    """Odd sizes, and sizes at which gelu divides a batch among threads but not a sample."""
    batch = torch.randn(5, *shape, generator=torch.Generator().manual_seed(0))
    complex_batch = torch.complex(batch, batch.flip(0))
    functions: list[Callable[[Tensor], Tensor]] = [
        torch.nn.functional.silu,
        lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
        torch.Tensor.tanh,
    ]
    for function in functions:
        with PerSample(range(5)):
            together = function(batch)
        assert torch.equal(together, torch.cat([function(part) for part in batch.split(1)]))
    table = complex_batch[0]
    with PerSample(range(5)):
        turned = complex_batch * table
    assert torch.equal(turned, torch.cat([part * table for part in complex_batch.split(1)]))


@pytest.mark.parametrize("rows", [1, 3, 64])
def test_the_probe_sees_another_order_of_summation(rows: int) -> None:
    """In bfloat16 too, where a product of ordinary numbers would round it away."""
    for dtype in DTYPES.values():
        inputs, weight, _ = products.cancelling_product(
            torch.Size((2, rows, 64)), torch.Size((48, 64)), dtype, torch.device("cpu")
        )
        order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
        one = torch.nn.functional.linear(inputs, weight)
        other = torch.nn.functional.linear(inputs[..., order].contiguous(), weight[:, order].contiguous())
        assert (one != other).float().mean() > 0.3, dtype
