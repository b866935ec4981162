"""How one function of a forward is computed when the texts of the samples that share it differ in length.

Most functions take the padded batch as it is: `None`, the plain call. These are the ways of those that must not: products,
whose bits may depend on the number of rows; attention, which would see the padding; what no rule is known for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flowroll.exact.layout import ALLOCATED, CannotMergeError, parts_of
from flowroll.exact.padding import Lengths, Padding, cut, fill, row_indices
from flowroll.exact.probe import attention_is_independent, product, rows_are_usual
from flowroll.exact.ways import Path, Samples, put_at, value_at

# The most shapes that are remembered.
_SHAPES = 65536


@dataclass(frozen=True, slots=True)
class RaggedEach:
    """Calls the function with each sample's own rows of every argument, and pads and joins the results.

    Attributes:
        splits: The places of arguments of which a sample has a part; the address that the part has alone; where it is padded;
            whether the argument is batched, or of no sample with a row for each of the padded text's.
        padding: Where the result is padded; None if it has no rows of text.
    """

    splits: tuple[tuple[Path, int, Padding | None, bool], ...]
    padding: Padding | None = None

    def __call__(self, samples: Samples, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Computes the joined results."""
        return self.joined(samples, self.results(samples, func, args, kwargs))

    def results(
        self, samples: Samples, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> list[Tensor]:
        """Computes each sample's own result.

        Raises:
            CannotMergeError: The function returns something else than a contiguous tensor.
        """
        assert samples.lengths is not None
        results = []
        for index, length in enumerate(samples.lengths.own):
            own_args, own_kwargs = list(args), dict(kwargs)
            for path, at, padding, is_batched in self.splits:
                one = value_at(args, kwargs, path)
                part = one.split(len(one) // samples.count)[index] if is_batched else one
                own = part if padding is None else cut(part, padding, length, samples.lengths.padded)
                put_at(own_args, own_kwargs, path, parts_of(own, 1, at)[0])
            results.append(func(*own_args, **own_kwargs))
            if not isinstance(results[-1], Tensor) or not results[-1].is_contiguous():
                raise CannotMergeError("a function of texts of several lengths returns no contiguous tensor")
        return results

    def joined(self, samples: Samples, results: Sequence[Tensor]) -> Tensor:
        """Pads the samples' results where they have rows of text, and joins them."""
        lengths, padding = samples.lengths, self.padding
        assert lengths is not None
        if padding is not None:
            results = [fill(one, padding, own, lengths.padded) for one, own in zip(results, lengths.own, strict=True)]
        return torch.cat(list(results))


@dataclass(frozen=True, slots=True)
class RaggedProduct:
    """Computes a linear layer of the padded rows of all samples, and of a sample's own rows where their number changes bits."""

    def __call__(self, samples: Samples, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Computes the product."""
        assert samples.lengths is not None
        return self.compute(samples.lengths, *args, **kwargs)

    def compute(self, lengths: Lengths, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Computes the product of rows [samples, rows, inputs]; the names are those of `torch.nn.functional.linear`."""
        runs = lengths.runs
        ordinary = (
            type(weight) in (Tensor, torch.nn.Parameter) and weight.is_contiguous() and weight.data_ptr() % ALLOCATED == 0
        )
        setting = (input.dtype, input.device, torch.get_num_threads())
        options = (weight.shape, bias is not None, weight.requires_grad, setting)
        together = _runs_together(lengths, input.shape[-1], *options) if ordinary else (False,) * len(runs)
        found = F.linear(input, weight, bias) if any(together) else None
        if found is not None and all(together):
            return found
        parts = []
        for (start, stop, length), is_alike in zip(runs, together, strict=True):
            if found is not None and is_alike:
                parts.append(found[start:stop])
                continue
            own = cut(input[start:stop], Padding(1, 0), length, lengths.padded)
            (own,) = parts_of(own, 1)
            parts.append(fill(product(own, stop - start, weight, bias), Padding(1, 0), length, lengths.padded))
        return torch.cat(parts)


@lru_cache(maxsize=_SHAPES)
def _runs_together(
    lengths: Lengths,
    columns: int,
    weight_shape: torch.Size,
    has_bias: bool,
    requires_grad: bool,
    setting: tuple[torch.dtype, torch.device, int],
) -> tuple[bool, ...]:
    """Tells for each run whether its rows may be multiplied together with all others, padding included."""

    def is_usual(samples: int, rows: int) -> bool:
        return rows_are_usual(samples, rows, columns, weight_shape, has_bias, requires_grad, setting)

    merged = is_usual(len(lengths.own), lengths.padded)
    return tuple(merged and is_usual(1, length) for _, _, length in lengths.runs)


@dataclass(frozen=True, slots=True)
class RaggedAttention:
    """Computes plain attention of each sample's own queries, keys and values.

    Samples of one length are computed together where that is exact.

    Attributes:
        start: The number of rows in front of the text.
    """

    start: int

    def __call__(self, samples: Samples, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Computes the attention."""
        assert samples.lengths is not None
        return self.compute(samples.lengths, func, *args, **kwargs)

    def compute(
        self, lengths: Lengths, func: Callable[..., Any], query: Tensor, key: Tensor, value: Tensor, *_: object, **__: object
    ) -> Tensor:
        """Computes the attention of operands [samples, heads, rows, channels] whose heads lie inside the rows."""
        count, heads, size, channels = query.shape
        own_rows, places, sizes = row_indices(lengths, self.start, size, query.device)
        operands = [
            torch.split(one.transpose(1, 2).reshape(count * size, -1).index_select(0, own_rows), list(sizes))
            for one in (query, key, value)
        ]
        found = []
        for (start, stop, length), rows in zip(lengths.runs, zip(*operands, strict=True), strict=True):
            num = stop - start
            own = [
                (one if one.data_ptr() % ALLOCATED == 0 else one.clone())
                .view(num, size - lengths.padded + length, heads, channels)
                .transpose(1, 2)
                for one in rows
            ]
            if num == 1 or attention_is_independent(own[0], own[1], own[2], num):
                attended = func(*own)
            else:
                attended = torch.cat([func(*part) for part in zip(*(parts_of(one, num) for one in own), strict=True)])
            found.append(attended.transpose(1, 2).reshape(-1, heads * channels))
        return torch.cat(found).index_select(0, places).view(count, size, heads, channels).transpose(1, 2)
