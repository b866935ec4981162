"""Keeps what the text encoders made of the last prompts: their weights never change, and most requests share a negative one."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from flowroll.engine.prompts import BranchText
from flowroll.types import EnvValue, all_finite

# The most bytes that are kept: a few prompts of the greatest length, or some hundred short ones.
_MOST_BYTES = 16 * 2**20


class EncodedTexts:
    """The conditioning fields of the texts that were encoded last, each as it was made with one number of CPU threads.

    The same tensors go to several requests, as they go to the samples of one; what a caller gets is a copy.
    """

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[BranchText, int], Mapping[str, EnvValue]] = OrderedDict()
        self._num_bytes = 0

    def get(self, text: BranchText, encode: Callable[[], Mapping[str, EnvValue]]) -> Mapping[str, EnvValue]:
        """Returns the fields of a text, which `encode` makes if they are not kept.

        Args:
            text: A text, or token ids; what is given as embeddings is not kept.
            encode: Makes the fields.
        """
        key = text, torch.get_num_threads()
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        fields = encode()
        # NaN or infinity, with which the request fails, may not come again.
        if text.embeds is None and all(all_finite(one) for one in fields.values() if isinstance(one, Tensor)):
            self._kept[key] = fields
            self._num_bytes += _bytes(fields)
            while self._num_bytes > _MOST_BYTES:
                self._num_bytes -= _bytes(self._kept.popitem(last=False)[1])
        return fields


def _bytes(fields: Mapping[str, EnvValue]) -> int:
    return sum(one.untyped_storage().nbytes() for one in fields.values() if isinstance(one, Tensor))
