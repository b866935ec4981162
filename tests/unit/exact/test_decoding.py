"""Several samples in one call of a VAE: every picture has the bits that it has alone."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flowroll.checkpoints import SHAPES_FAMILIES, shapes_checkpoint
from flowroll.engine.checkpoint import examine_checkpoint
from flowroll.engine.loading import load_model
from flowroll.exact import SharedDecoding
from flowroll.exact.probe import convolution_is_independent, norm_is_independent


@pytest.fixture(autouse=True, params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    with torch.no_grad():
        yield request.param
    torch.set_num_threads(before)


class Counted:
    """A VAE's `decode` that counts the samples of each call."""

    def __init__(self, vae: Any) -> None:
        self._vae, self.calls = vae, []

    def __call__(self, z: Tensor, *, return_dict: bool) -> Any:
        self.calls.append(len(z))
        return self._vae.decode(z, return_dict=return_dict)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", SHAPES_FAMILIES)
def test_pictures_have_the_bits_that_they_have_alone(family: str, dtype: torch.dtype) -> None:
    checkpoint = examine_checkpoint(shapes_checkpoint(family), variant=None)
    model, pipeline = load_model(checkpoint, device=torch.device("cpu"), dtype=dtype, mesh=None)
    geometry = model.family.geometry(model.spec, height=32, width=16)
    noise = torch.randn(7, *geometry.latent_shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    cells = [model.family.vae_input(pipeline, one.clone(), geometry) for one in noise]
    counted = Counted(pipeline.vae)
    shared = SharedDecoding(counted, pipeline.vae.parameters)
    first, again = shared.decode(cells[:4]), shared.decode(cells[3:])
    assert counted.calls == [1, 1, 1, 1, 4, 4], "the first call is compared with every sample alone, the second repeats it"
    alone = [pipeline.vae.decode(one, return_dict=False)[0] for one in cells]
    assert all(torch.equal(one, other) for one, other in zip(first, alone[:4], strict=True))
    assert all(torch.equal(one, other) for one, other in zip(again, alone[3:], strict=True))
    assert [one.stride() for one in first] == [(first[0].stride(0), *one.stride()[1:]) for one in alone[:4]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("channels", "outputs", "taps"), [(4, 4, 1), (4, 32, 3), (32, 32, 3), (16, 8, 1), (8, 3, 3)])
def test_convolutions_that_the_probe_merges_have_the_bits_of_each(
    channels: int, outputs: int, taps: int, memory_format: torch.memory_format, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(outputs, channels, taps, taps, generator=generator).to(dtype)
    bias = torch.randn(outputs, generator=generator).to(dtype)
    options = ((1, 1), (taps // 2,) * 2, (1, 1))
    for size in (4, 8, 17):
        batch = torch.randn(6, channels, size, size, generator=generator).to(dtype).contiguous(memory_format=memory_format)
        merged = F.conv2d(batch, weight, bias, *options)
        alone = torch.cat([F.conv2d(one.clone(), weight, bias, *options) for one in batch.split(1)])
        assert torch.equal(merged, alone) or not convolution_is_independent("conv2d", batch, weight, True, options, 6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_norms_that_the_probe_merges_have_the_bits_of_each(memory_format: torch.memory_format, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    norms = {"group_norm": (4, lambda some: F.group_norm(some, 4)), "normalize": (1, lambda some: F.normalize(some, dim=1))}
    found = []
    for channels, size in ((8, 64), (32, 8), (32, 9), (16, 33)):
        batch = torch.randn(6, channels, size, size, generator=generator).to(dtype).contiguous(memory_format=memory_format)
        for name, (option, norm) in norms.items():
            merged, alone = norm(batch), torch.cat([norm(one.clone()) for one in batch.split(1)])
            found.append(norm_is_independent(name, batch, option, 6))  # type: ignore[arg-type]
            assert torch.equal(merged, alone) or not found[-1]
    assert any(found)


def test_samples_of_which_one_changes_another_are_decoded_alone() -> None:
    def mixing(z: Tensor, *, return_dict: bool) -> tuple[Tensor]:
        return (z - z.mean(dim=0, keepdim=True) if len(z) > 1 else z,)

    cells = list(torch.randn(4, 1, 8, 4, 4, generator=torch.Generator().manual_seed(0)))
    assert all(torch.equal(one, own) for one, own in zip(SharedDecoding(mixing, tuple).decode(cells), cells, strict=True))


def test_weights_at_another_address_are_looked_at_again() -> None:
    memory, calls = torch.randn(8 * 8 + 1, generator=torch.Generator().manual_seed(0)), []
    weights = [memory[:64].view(8, 8, 1, 1)]

    def decode(z: Tensor, *, return_dict: bool) -> tuple[Tensor]:
        calls.append(len(z))
        return (F.conv2d(z, weights[0]),)

    cells = list(torch.randn(2, 1, 8, 4, 4, generator=torch.Generator().manual_seed(0)))
    shared = SharedDecoding(decode, lambda: weights)
    for expected in ([1, 1, 2], [2]):
        calls.clear()
        shared.decode(cells)
        assert calls == expected
    weights[0] = memory[1:].view(8, 8, 1, 1)
    calls.clear()
    shared.decode(cells)
    assert calls[0] == 1, "the last sample is compared with itself alone again"
