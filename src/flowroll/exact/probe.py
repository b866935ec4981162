"""Finds out how products and attention of several samples may be computed together without a changed bit.

Whether a product of more rows, or attention over a larger batch, has the same bits depends on shapes, dtype, thread count,
library and device. It is not assumed but asked: the very function is run on made-up inputs of that shape both ways, and the
answer is kept (`findings`). An engine asks about its model's own shapes when it is started (`certificate`); whatever else it
meets is asked the first time.

The inputs are made so that a wrong answer shows. Every sum is of pairs that cancel exactly, in a shuffled order, so that what
a kernel returns is its rounding error and nothing else. Another order of summation is another rounding error, in nearly every
element and in bfloat16 too, where ordinary numbers would hide it behind the rounding of the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from flowroll.exact.findings import asked
from flowroll.exact.layout import ALLOCATED, is_outermost, parts_of

# Computes a product of several samples from the inputs (samples first), the number of samples, the weight and the bias.
Product: TypeAlias = Callable[[Tensor, int, Tensor, "Tensor | None"], Tensor]

# What a function is run in: dtype, device, number of CPU threads.
Setting: TypeAlias = "tuple[torch.dtype, torch.device, int]"

# Random inputs repeat this many rows. It is prime, so the repetition does not line up with the samples.
_POOL = 61
# Products of so many rows are what those of other numbers of rows are compared with: more than the pool, so that rows repeat.
_REFERENCE = 64
# The share of elements that must have a rounding error for an answer to count.
_TELLING = 0.5


def each(inputs: Tensor, num_samples: int, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Computes one product per sample, which is exact on every machine."""
    return torch.cat([F.linear(part, weight, bias) for part in parts_of(inputs, num_samples)])


def merged(inputs: Tensor, num_samples: int, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Computes one product of the rows of all samples."""
    return F.linear(inputs, weight, bias)


def stacked(inputs: Tensor, num_samples: int, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Computes one batched product, in which each sample has an entry of its own."""
    rows = inputs.reshape(num_samples, -1, inputs.shape[-1])
    columns = weight.t().expand(num_samples, *weight.t().shape)
    products = torch.bmm(rows, columns) if bias is None else torch.baddbmm(bias, rows, columns)
    return products.view(*inputs.shape[:-1], -1)


def product(inputs: Tensor, num_samples: int, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Computes the product of every sample's rows in the fastest way that keeps the bits each sample has alone."""
    ordinary = type(weight) in (Tensor, nn.Parameter) and weight.is_contiguous() and inputs.is_contiguous()
    if num_samples == 1 or not ordinary or weight.data_ptr() % ALLOCATED:
        return each(inputs, num_samples, weight, bias)
    setting = (inputs.dtype, inputs.device, torch.get_num_threads())
    way = _way(inputs.shape, num_samples, weight.shape, bias is not None, weight.requires_grad, setting)
    return _WAYS[way](inputs, num_samples, weight, bias)


_WAYS = {way.__name__: way for way in (each, merged, stacked)}


@asked("product")
def _way(
    shape: torch.Size, num_samples: int, weight_shape: torch.Size, has_bias: bool, requires_grad: bool, setting: Setting
) -> str:
    """Returns the first way whose rounding errors on a product of these shapes equal those of each sample alone."""
    dtype, device, _ = setting
    inputs, weight, bias = cancelling_product(shape, weight_shape, dtype, device)
    operands = (inputs, num_samples, weight.requires_grad_(requires_grad), bias if has_bias else None)
    # For bfloat16 on the CPU torch has no fast kernel of that kind; on a GPU nobody has measured whether it pays.
    ways = (merged, stacked) if dtype == torch.float32 and device.type == "cpu" else (merged,)
    # Gradient checkpointing counts what is saved around it, and is not to count this.
    with saved_tensors_hooks(_itself, _itself):
        expected = each(*operands)
        exact = (way for way in ways if tells(expected) and torch.equal(way(*operands), expected))
        return next(exact, each).__name__


@asked("rows")
def rows_are_usual(
    num_samples: int,
    rows: int,
    columns: int,
    weight_shape: torch.Size,
    has_bias: bool,
    requires_grad: bool,
    setting: Setting,
) -> bool:
    """Tells whether each row of a product has the bits that it has among `_REFERENCE` rows, wherever it stands.

    Args:
        num_samples: The number of samples.
        rows: The number of rows of each.
        columns: The number of columns of a row.
        weight_shape: The shape of the weight.
        has_bias: Whether there is a bias.
        requires_grad: Whether the weight needs a gradient.
        setting: What the product is run in.
    """
    dtype, device, _ = setting
    total = num_samples * rows
    inputs, weight, bias = cancelling_product(torch.Size((max(total, _REFERENCE), columns)), weight_shape, dtype, device)
    weight.requires_grad_(requires_grad)

    def compute(first: int, *shape: int) -> Tensor:
        found = F.linear(inputs[:first].clone().view(*shape, columns), weight, bias if has_bias else None)
        return found.detach().view(first, -1)

    # Gradient checkpointing counts what is saved around it, and is not to count this.
    with saved_tensors_hooks(_itself, _itself):
        expected, found = compute(_REFERENCE, 1, _REFERENCE), compute(total, num_samples, rows)
    repeats = torch.equal(expected[_POOL:], expected[: _REFERENCE - _POOL])
    return tells(expected) and repeats and torch.equal(found, expected[torch.arange(total, device=device) % _POOL])


def attention_is_independent(query: Tensor, key: Tensor, value: Tensor, num_samples: int) -> bool:
    """Tells whether plain attention over a batch (no mask, no options) gives every sample the bits that it has alone."""
    layouts = tuple(_heads_are_inside(one) for one in (query, key, value))
    shapes_fit = key.shape == value.shape and query.shape[3] == key.shape[3] and query.shape[:2] == key.shape[:2]
    if None in layouts or not shapes_fit:
        return False
    setting = (query.dtype, query.device, torch.get_num_threads())
    return _attends_alike(query.shape, key.shape, layouts, num_samples, setting)


def rows_are_independent(rows: Tensor, num_samples: int) -> bool:
    """Tells whether sums and means along the last dimension of a batch have the bits that every sample's have alone."""
    return _reduces_alike(rows.shape, num_samples, (rows.dtype, rows.device, torch.get_num_threads()))


@asked("mean")
def _reduces_alike(shape: torch.Size, num_samples: int, setting: Setting) -> bool:
    rows = cancelling_rows(shape, *setting[:2])
    expected = torch.cat([part.mean(-1) for part in parts_of(rows, num_samples)])
    return tells(expected) and torch.equal(rows.mean(-1), expected)


def convolution_is_independent(
    name: str, inputs: Tensor, weight: Tensor, has_bias: bool, options: Sequence[tuple[int, ...]], num_samples: int
) -> bool:
    """Tells whether a convolution of a batch gives every sample the bits that it has alone.

    Args:
        name: The name of the function in torch.
        inputs: The batch.
        weight: The weight, contiguous; the channels are in one group.
        has_bias: Whether there is a bias.
        options: Stride, padding and dilation.
        num_samples: The number of samples.
    """
    if not _is_dense(inputs):
        return False
    setting = (inputs.dtype, inputs.device, torch.get_num_threads())
    laid_out = (inputs.shape, inputs.stride(), weight.shape, weight.stride())
    about = (*laid_out, has_bias, weight.requires_grad, tuple(options), num_samples)
    return _convolves_alike(name, *about, setting)


@asked("convolution")
def _convolves_alike(
    name: str,
    shape: torch.Size,
    strides: tuple[int, ...],
    weight_shape: torch.Size,
    weight_strides: tuple[int, ...],
    has_bias: bool,
    requires_grad: bool,
    options: tuple[tuple[int, ...], ...],
    num_samples: int,
    setting: Setting,
) -> bool:
    dtype, device, _ = setting
    batch, channels, *sizes = shape
    outputs, _, *taps = weight_shape
    # Channels cancel, each with another at the same place, so that borders do not matter.
    rows, columns, bias = cancelling_product(
        torch.Size((math.prod((batch, *sizes)), channels)), torch.Size((math.prod((outputs, *taps)), channels)), dtype, device
    )
    # Strides of dimensions of one element count too: torch takes the memory format from them.
    inputs = torch.empty_strided(shape, strides, dtype=dtype, device=device)
    inputs.copy_(rows.view(batch, *sizes, channels).movedim(-1, 1))
    weight = torch.empty_strided(weight_shape, weight_strides, dtype=dtype, device=device)
    weight.copy_(columns.view(outputs, *taps, channels).movedim(-1, 1)).requires_grad_(requires_grad)
    convolve = getattr(F, name)
    with saved_tensors_hooks(_itself, _itself):
        parts = parts_of(inputs, num_samples)
        shows = tells(convolve(parts[0], weight, None, *options))
        given = (weight, bias[:outputs] if has_bias else None, *options)
        return shows and torch.equal(convolve(inputs, *given), torch.cat([convolve(part, *given) for part in parts]))


def norm_is_independent(name: Literal["group_norm", "normalize"], rows: Tensor, option: int, num_samples: int) -> bool:
    """Tells whether a norm of a batch gives every sample the bits that it has alone.

    Args:
        name: The name of the function in torch.
        rows: The batch.
        option: The number of groups, or the dimension.
        num_samples: The number of samples.
    """
    if not _is_dense(rows):
        return False
    setting = (rows.dtype, rows.device, torch.get_num_threads())
    return _normalizes_alike(name, rows.shape, rows.stride(), option, num_samples, setting)


@asked("norm")
def _normalizes_alike(
    name: str, shape: torch.Size, strides: tuple[int, ...], option: int, num_samples: int, setting: Setting
) -> bool:
    dtype, device, _ = setting
    rows = torch.empty_strided(shape, strides, dtype=dtype, device=device)
    if name == "group_norm":
        # Groups whose means are rounding errors, which is all that the zeros among them become.
        num, size = shape[0] * option, math.prod(shape[1:]) // option
        groups = torch.cat(
            (cancelling_rows(torch.Size((num, size - size // 2)), dtype, device), rows.new_zeros(num, size // 2)), 1
        )
        order = torch.randperm(size, generator=torch.Generator(device).manual_seed(1), device=device)
        rows.copy_(groups[:, order].view(shape))
    else:
        rows.copy_(_random(math.prod(shape[:-1]), shape[-1], torch.Generator(device).manual_seed(0), dtype).view(shape))

    def compute(some: Tensor) -> Tensor:
        return F.group_norm(some, option) if name == "group_norm" else F.normalize(some, dim=option)

    expected = torch.cat([compute(part) for part in parts_of(rows, num_samples)])
    # In another order the sums must be others, or equal bits would say nothing.
    dims = tuple(range(1, rows.ndim)) if name == "group_norm" else (option,)
    shows = not torch.equal(compute(rows.flip(dims)).flip(dims), expected)
    return shows and torch.equal(compute(rows), expected)


def _is_dense(batch: Tensor) -> bool:
    """Tells whether a batch has no gaps in memory, and the first dimension outermost."""
    return batch.data_ptr() % ALLOCATED == 0 and is_outermost(batch) and batch.numel() == _extent(batch)


def _extent(tensor: Tensor) -> int:
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _heads_are_inside(operand: Tensor) -> bool | None:
    """Returns True if the heads lie inside every row, False if the operand is contiguous, None for other layouts."""
    if operand.ndim != 4 or operand.data_ptr() % ALLOCATED:
        return None
    if operand.is_contiguous():
        return False
    return True if operand.transpose(1, 2).is_contiguous() else None


@asked("attention")
def _attends_alike(
    shape: torch.Size, key_shape: torch.Size, layouts: tuple[bool | None, ...], num_samples: int, setting: Setting
) -> bool:
    for attended in telling_attention(shape, key_shape, layouts, *setting[:2]):
        alone = [
            F.scaled_dot_product_attention(*own) for own in zip(*(parts_of(x, num_samples) for x in attended), strict=True)
        ]
        expected = torch.cat(alone)
        if not tells(expected) or not torch.equal(F.scaled_dot_product_attention(*attended), expected):
            return False
    return True


def telling_attention(
    shape: torch.Size, key_shape: torch.Size, layouts: tuple[bool | None, ...], dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Makes queries, keys and values whose attention shows the order of its sums over channels, then over keys.

    Args:
        shape: The shape of the queries [batch, heads, queries, channels].
        key_shape: The shape of the keys and of the values.
        layouts: For each of the three whether the heads lie inside every row.
        dtype: The dtype of all three.
        device: Where to make them.
    """
    generator = torch.Generator(device).manual_seed(0)
    batch, heads, queries, channels = shape
    keys = key_shape[2]

    def laid_out(rows: Tensor, length: int, heads_are_inside: bool | None) -> Tensor:
        if heads_are_inside:
            return rows.view(batch, length, heads, channels).transpose(1, 2)
        return rows.view(batch, heads, length, channels)

    # Logits that are enlarged rounding errors show the order of the sums over channels.
    first, second, _ = cancelling_product(
        torch.Size((batch * heads * queries, channels)), torch.Size((batch * heads * keys, channels)), dtype, device
    )
    noisy = (laid_out(first * 2.0**11, queries, layouts[0]), laid_out(second * 2.0**11, keys, layouts[1]))
    values = laid_out(_random(batch * heads * keys, channels, generator, dtype), keys, layouts[2])
    # Equal weights and values that cancel show the order of the sums over keys. These are sums of plain bfloat16 numbers, not
    # of products, and are rounded only if the numbers are of very different magnitudes.
    zeros = (torch.zeros_like(noisy[0]), torch.zeros_like(noisy[1]))
    pairs = _random(keys // 2 * batch, heads * channels, generator, dtype, octaves=14)
    cancelling = torch.cat((pairs, -pairs, pairs.new_zeros(keys % 2 * batch, heads * channels)))
    order = torch.randperm(keys, generator=generator, device=device)
    shuffled = cancelling.view(keys, batch, heads, channels)[order].transpose(0, 1)
    yield *noisy, values
    yield *zeros, laid_out(_in_order(shuffled, layouts[2]), keys, layouts[2])


def _in_order(values: Tensor, heads_are_inside: bool | None) -> Tensor:
    """Reshapes [batch, keys, heads, channels] to rows of channels, in their order in memory."""
    ordered = values if heads_are_inside else values.transpose(1, 2)
    return ordered.reshape(-1, values.shape[-1])


def cancelling_product(
    shape: torch.Size, weight_shape: torch.Size, dtype: torch.dtype, device: torch.device
) -> tuple[Float[Tensor, "... inputs"], Float[Tensor, "outputs inputs"], Float[Tensor, " outputs"]]:
    """Makes inputs, weight and bias whose exact product is the bias, which is as small as the rounding errors."""
    generator = torch.Generator(device).manual_seed(0)
    columns = shape[-1]
    half, rows = columns // 2, shape[:-1].numel()
    left = _random(rows, half, generator, dtype)
    right = _random(weight_shape[0], half, generator, dtype)
    odd = columns - 2 * half
    order = torch.randperm(columns, generator=generator, device=device)
    inputs = torch.cat((left, left, left.new_ones(rows, odd)), dim=1)[:, order]
    weight = torch.cat((right, -right, right.new_zeros(weight_shape[0], odd)), dim=1)[:, order]
    bias = torch.randn(weight_shape[0], generator=generator, device=device) * 2.0**-18
    return inputs.contiguous().view(shape), weight.contiguous(), bias.to(dtype)


def cancelling_rows(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Float[Tensor, "... columns"]:
    """Makes rows whose exact sums are zero, so that what a reduction returns is its rounding error."""
    generator = torch.Generator(device).manual_seed(0)
    half, rows = shape[-1] // 2, shape[:-1].numel()
    # These are sums of plain numbers, which in bfloat16 are rounded only if their magnitudes differ very much.
    left = _random(rows, half, generator, dtype, octaves=14)
    order = torch.randperm(shape[-1], generator=generator, device=device)
    return torch.cat((left, -left, left.new_zeros(rows, shape[-1] - 2 * half)), dim=1)[:, order].contiguous().view(shape)


def _random(
    rows: int, columns: int, generator: torch.Generator, dtype: torch.dtype, octaves: int = 5
) -> Float[Tensor, "rows columns"]:
    """Draws numbers of many magnitudes, so that sums are rounded in bfloat16 too; a few rows are repeated."""
    pool = torch.randn(_POOL, columns, generator=generator, device=generator.device)
    magnitudes = torch.randint(-octaves, octaves + 1, pool.shape, generator=generator, device=generator.device)
    pool = torch.ldexp(pool, magnitudes).to(dtype)
    return pool[torch.arange(rows, device=pool.device) % _POOL]


def tells(errors: Tensor) -> bool:
    """Returns whether there are enough rounding errors to compare."""
    return bool(torch.isfinite(errors).all()) and bool((errors != 0).float().mean() >= _TELLING)


def _itself(tensor: Tensor) -> Tensor:
    return tensor
