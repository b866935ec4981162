"""Keeps what the text encoders made of the last prompts: their weights never change, and most requests share a negative one."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

import torch
from torch import Tensor

from flowroll.engine.prompts import BranchText
from flowroll.types import EnvValue

# The most bytes that are kept: a few prompts of the greatest length, or some hundred short ones.
_MOST_BYTES = 16 * 2**20


class EncodedTexts:
    """The conditioning fields of the texts that were encoded last, each as it was made with one number of CPU threads.

    The same tensors go to several requests, as they go to the samples of one; what a caller gets is a copy.
    """

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[BranchText, int], Mapping[str, EnvValue]] = OrderedDict()
        self._num_bytes = 0

    def get(self, text: BranchText) -> Mapping[str, EnvValue] | None:
        """Returns the fields of a text; None if they are not kept."""
        key = text, torch.get_num_threads()
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    def keep(self, text: BranchText, fields: Mapping[str, EnvValue]) -> None:
        """Keeps the finite fields of a text. What is given as embeddings is not kept."""
        key = text, torch.get_num_threads()
        if text.embeds is not None or key in self._kept:
            return
        self._kept[key] = fields
        self._num_bytes += _bytes(fields)
        while self._num_bytes > _MOST_BYTES:
            self._num_bytes -= _bytes(self._kept.popitem(last=False)[1])


def _bytes(fields: Mapping[str, EnvValue]) -> int:
    return sum(one.untyped_storage().nbytes() for one in fields.values() if isinstance(one, Tensor))
