"""Shards rows and branches inside a transformer, with hooks that are added from outside.

A region begins where hidden states are narrowed to this rank's rows and ends where its output is gathered. In between every
module computes fewer rows without any change; only attention is changed, since its queries need the keys of all ranks.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from flowroll.parallel.attention import attend_own_rows, gather_keys, has_last_queries, widen_mask, with_attention
from flowroll.parallel.mesh import Mesh
from flowroll.parallel.paths import find_modules
from flowroll.parallel.shards import Shard, shard_rows
from flowroll.types import Gather, ParallelPlan, Region, Split

# The gap between two rows, in elements: a cache line in bfloat16, so that rows keep their place within a cache line.
_GAP = 32


def shard_rows_of(transformer: nn.Module, plan: ParallelPlan, mesh: Mesh) -> None:
    """Makes a transformer compute this rank's rows and branches only, in every region of its plan."""
    for region in plan.regions:
        ShardedRegion(region, mesh).install(transformer)


class ShardedRegion:
    """One region of one transformer. It holds the shards of the forward that is running inside it.

    Args:
        region: The region that the family declares.
        mesh: The mesh of the ranks.
    """

    def __init__(self, region: Region, mesh: Mesh) -> None:
        self._region = region
        self._mesh = mesh
        self._rows: Shard | None = None
        self._has_branches = False
        self._is_whole = False

    def install(self, transformer: nn.Module) -> None:
        """Adds the hooks, and wraps the attention of the region."""
        if self._region.unless is not None:
            for _, module in find_modules(transformer, self._region.enter.module):
                module.register_forward_pre_hook(self._note_exception, with_kwargs=True)
        self._hook_split(transformer, self._region.enter, self._enter)
        for split in self._region.follow:
            self._hook_split(transformer, split, self._narrow)
        for _, module in find_modules(transformer, self._region.leave.module):
            module.register_forward_hook(lambda _, __, output: self._leave(self._region.leave, output))
        for path in self._region.sliced:
            for _, module in find_modules(transformer, path):
                module.register_forward_pre_hook(self._with_gaps)
        if self._mesh.degree("sp") > 1:
            for _, module in find_modules(transformer, self._region.attention):
                # An `Attention` of diffusers.
                attention: Any = module
                attention.set_processor(with_attention(attention.processor, self._gathering))

    def _hook_split(self, transformer: nn.Module, split: Split, narrow: Callable[[Split, Tensor], Tensor]) -> None:
        for _, module in find_modules(transformer, split.module):
            if split.argument is None:
                module.register_forward_hook(lambda _, __, output: _replace_item(output, split, narrow))
            else:
                parameters = list(inspect.signature(module.forward).parameters)
                place = parameters.index(split.argument)
                module.register_forward_pre_hook(_argument_hook(split, place, narrow), with_kwargs=True)

    def _note_exception(self, _: nn.Module, __: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._is_whole = kwargs.get(str(self._region.unless)) is not None

    def _enter(self, split: Split, hidden: Tensor) -> Tensor:
        if self._is_whole:
            return hidden
        self._rows = None if split.rows is None else self._row_shard(hidden.shape[split.rows])
        self._has_branches = split.branches is not None and self._mesh.shares_branches
        return self._narrow(split, hidden)

    def _narrow(self, split: Split, tensor: Tensor) -> Tensor:
        """Returns this rank's part, from the tensor's own size, since some tensors are narrowed before the region begins."""
        if split.is_behind_others:
            return self._narrow_behind(split, tensor)
        if split.rows is not None and (rows := self._row_shard(tensor.shape[split.rows])):
            tensor = tensor.narrow(split.rows, rows.start, rows.size)
        if split.branches is not None and self._mesh.shares_branches:
            # Takes this rank's branch of every sample: [samples * branches, ...] becomes [samples, ...].
            assert split.branches == 0
            degree = self._mesh.degree("cfg")
            tensor = tensor.view(-1, degree, *tensor.shape[1:])[:, self._mesh.coordinate("cfg")]
        # Contiguous as the whole tensor was, because products of strided inputs may use other kernels.
        return tensor.contiguous()

    def _narrow_behind(self, split: Split, tensor: Tensor) -> Tensor:
        """Narrows the last rows of a tensor, and keeps the rows before them."""
        assert split.rows is not None and split.branches is None
        if self._rows is None:
            return tensor
        others = tensor.shape[split.rows] - self._rows.total
        own = tensor.narrow(split.rows, others + self._rows.start, self._rows.size)
        return torch.cat((tensor.narrow(split.rows, 0, others), own), dim=split.rows)

    def _leave(self, gather: Gather, output: Tensor) -> Tensor:
        if self._rows is not None:
            output = self._mesh.gather(output, axis="sp", dim=gather.rows, sizes=self._rows.sizes)
        if self._has_branches:
            assert gather.branches == 0
            own = output.unsqueeze(1)
            output = self._mesh.gather(own, axis="cfg", dim=1, sizes=[1] * self._mesh.degree("cfg")).flatten(0, 1)
        self._rows, self._has_branches = None, False
        return output

    def _with_gaps(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Puts gaps between one branch's rows in memory, so that torch's linear computes them as it does those of the pair."""
        if not self._has_branches:
            return args
        inputs: Tensor = args[0]
        return nn.functional.pad(inputs, (0, _GAP))[..., : inputs.shape[-1]], *args[1:]

    def _row_shard(self, total: int) -> Shard | None:
        return shard_rows(total, self._mesh.coordinate("sp"), self._mesh.degree("sp"))

    def _gathering(self, dispatch: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def attend(query: Tensor, key: Tensor, value: Tensor, *, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
            if self._rows is None:
                return dispatch(query, key, value, attn_mask=attn_mask, **options)
            in_front = self._region.is_in_front
            has_end = has_last_queries(self._rows, key.shape[1], in_front=in_front)
            key, value = gather_keys(self._mesh, self._rows, key, value, in_front=in_front)
            if attn_mask is not None:
                assert not in_front, "no family has it"
                attn_mask = widen_mask(attn_mask, self._rows, key.shape[1])
            return attend_own_rows(dispatch, query, key, value, has_end=has_end, attn_mask=attn_mask, **options)

        return attend


def _argument_hook(
    split: Split, place: int, narrow: Callable[[Split, Tensor], Tensor]
) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]:
    assert split.argument is not None
    name = split.argument

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if kwargs.get(name) is not None:
            kwargs = {**kwargs, name: narrow(split, kwargs[name])}
        elif place < len(args) and args[place] is not None:
            args = (*args[:place], narrow(split, args[place]), *args[place + 1 :])
        return args, kwargs

    return hook


def _replace_item(output: Any, split: Split, narrow: Callable[[Split, Tensor], Tensor]) -> Any:
    if split.item is None:
        return narrow(split, output)
    return tuple(narrow(split, value) if index == split.item else value for index, value in enumerate(output))
