"""One forward for several samples in which every sample keeps the bits that it has alone.

Owns what has to be done to a batched forward for that, from outside the model: `PerSample` is a function mode of torch that is
active during one forward, sees every function that the model calls, and computes those whose bits depend on the number of
rows for each sample by itself. It knows nothing of model families.

What depends on the number of rows, measured with torch 2.13 on a CPU:

- Products (`linear`): another number of rows is another kernel, or another division among threads.
- Element-wise functions that are no single IEEE operation (silu, gelu, tanh, ..., products of complex numbers): the last few
  elements of a tensor, and of each thread's part of it, are computed by scalar code with other bits.
- Attention in bfloat16: whether keys are packed depends on the size of the batch.

All else that the models call copies numbers, is a single rounded operation, or reduces one row at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from flowroll.exact.probe import attention_is_independent, parts_of, product

# Elements between which element-wise kernels may pass from one thread or kind of code to another: two vectors of 64 bytes, in
# the smallest dtype that we run.
_VECTORS = 64
# torch divides element-wise work among threads in parts of at least this many elements.
_GRAIN = 32768


class PerSample(TorchFunctionMode):
    """During a forward of several samples, computes for each by itself what would have other bits in a batch.

    Every batched tensor has the samples along its first dimension, each with the same number of entries or rows.

    Args:
        same_conditioning: For each sample the first one that has its conditioning (the timestep, in our families); products of
            one row per entry are computed once for these.
    """

    def __init__(self, same_conditioning: Sequence[int]) -> None:
        super().__init__()
        self._num_samples = len(same_conditioning)
        self._same = same_conditioning
        self._distinct = list(dict.fromkeys(same_conditioning))
        self._entries = 1

    def forward(self, transformer: Callable[..., Any], call: Mapping[str, Any], entries: int) -> Any:
        """The model's output of one batched forward, each sample's part with its own bits.

        Args:
            transformer: The model.
            call: The keyword arguments, batched.
            entries: Of the batch, per sample: 2 where a sample's own forward is a pair.
        """
        self._entries = entries
        with self:
            return transformer(**call, return_dict=False)[0]

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        handle = _HANDLERS.get(func)
        return func(*args, **kwargs) if handle is None else handle(self, func, *args, **kwargs)

    def linear(
        self, func: Callable[..., Tensor], inputs: Tensor, weight: Tensor, bias: Tensor | None = None, **_: Any
    ) -> Tensor:
        """Products of the rows that each sample has alone, once for samples of the same conditioning."""
        if inputs.ndim != 2 or len(inputs) != self._num_samples * self._entries or len(self._distinct) == self._num_samples:
            return product(inputs, self._num_samples, weight, bias)
        # One row per entry, without a sequence: a function of the conditioning.
        parts = parts_of(inputs, self._num_samples)
        distinct = product(torch.cat([parts[first] for first in self._distinct]), len(self._distinct), weight, bias)
        products = dict(zip(self._distinct, torch.split(distinct, self._entries), strict=True))
        return torch.cat([products[first] for first in self._same])

    def attention(
        self,
        func: Callable[..., Tensor],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """The whole batch at once where that is known to change nothing; else each sample's."""
        if attn_mask is None and attention_is_independent(query, key, self._num_samples):
            return func(query, key, value, **options)
        return self.each(func, query, key, value, attn_mask=attn_mask, **options)

    def pointwise(self, func: Callable[..., Tensor], *args: Any, **options: Any) -> Tensor:
        """The whole tensor at once, where no sample has elements at an end of a part; else each sample's."""
        inputs: Tensor = args[0]
        total = inputs.numel()
        own, rest = divmod(total, self._num_samples)
        if inputs.device.type != "cpu" or (not rest and _in_whole_vectors(own) and _in_whole_vectors(total)):
            return func(*args, **options)
        return self.each(func, *args, **options)

    def multiply(self, func: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """A product of real numbers is one rounded operation; of complex numbers it is several."""
        if any(isinstance(factor, Tensor) and factor.is_complex() for factor in args):
            return self.pointwise(func, *args, **options)
        return func(*args, **options)

    def each(self, func: Callable[..., Tensor], *args: Any, **options: Any) -> Tensor:
        """The function of each sample's part of every batched argument."""
        batched: Tensor = args[0]
        if batched.ndim == 1:
            # Of no sample: a table of frequencies.
            return func(*args, **options)

        def parts(value: Any) -> Sequence[Any]:
            # What is broadcast along the samples has fewer dimensions, whatever its length.
            is_batched = isinstance(value, Tensor) and value.ndim == batched.ndim and len(value) == len(batched)
            return parts_of(value, self._num_samples) if is_batched else [value] * self._num_samples

        columns = [parts(value) for value in args]
        named = {name: parts(value) for name, value in options.items()}
        return torch.cat(
            [
                func(*(column[i] for column in columns), **{name: column[i] for name, column in named.items()})
                for i in range(self._num_samples)
            ]
        )


def _in_whole_vectors(numel: int) -> bool:
    """Whether every thread's part of so many elements ends between vectors."""
    threads = torch.get_num_threads()
    # Most kernels give a thread no less than the grain; gelu uses all threads from half of it on.
    counts = {threads, max(1, min(threads, -(-numel // _GRAIN)))}
    return numel % _VECTORS == 0 and all(-(-numel // count) % _VECTORS == 0 for count in counts)


_HANDLERS: Mapping[Any, Callable[..., Any]] = {
    F.linear: PerSample.linear,
    F.scaled_dot_product_attention: PerSample.attention,
    Tensor.mul: PerSample.multiply,
    **dict.fromkeys(
        (F.silu, F.gelu, Tensor.tanh, torch.tanh, torch.sigmoid, Tensor.sigmoid, torch.exp, torch.sin, torch.cos),
        PerSample.pointwise,
    ),
}
