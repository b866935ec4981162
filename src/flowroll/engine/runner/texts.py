"""Keeps what the text encoders made of the last prompts: their weights never change, and most requests share a negative one."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from flowroll.engine.prompts import BranchText
from flowroll.types import EnvValue

# The most bytes that are kept: a few prompts of the greatest length, or some hundred short ones.
_MOST_BYTES = 16 * 2**20
# Where torch's allocator puts a tensor, in bytes; bits can depend on the address.
_ALLOCATED = 64


class EncodedTexts:
    """The conditioning fields of the texts that were encoded last, each as it was made with one number of CPU threads."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[BranchText, int], Mapping[str, EnvValue]] = OrderedDict()
        self._num_bytes = 0

    def get(self, text: BranchText, encode: Callable[[], Mapping[str, EnvValue]]) -> Mapping[str, EnvValue]:
        """Returns the fields of a text, which `encode` makes if they are not kept; nobody else holds these tensors.

        Args:
            text: A text, or token ids; what is given as embeddings is not kept.
            encode: Makes the fields.
        """
        key = text, torch.get_num_threads()
        if key in self._kept:
            self._kept.move_to_end(key)
            return _copied(self._kept[key])
        fields = encode()
        # A copy lies elsewhere than what it is made of, unless that lies as an allocation does.
        lie_as_copies = all(
            isinstance(one, Tensor) and one.is_contiguous() and not one.data_ptr() % _ALLOCATED for one in fields.values()
        )
        if text.embeds is None and lie_as_copies:
            self._kept[key] = _copied(fields)
            self._num_bytes += _bytes(fields)
            while self._num_bytes > _MOST_BYTES:
                self._num_bytes -= _bytes(self._kept.popitem(last=False)[1])
        return fields


def _copied(fields: Mapping[str, EnvValue]) -> dict[str, EnvValue]:
    return {name: one.clone() if isinstance(one, Tensor) else one for name, one in fields.items()}


def _bytes(fields: Mapping[str, EnvValue]) -> int:
    return sum(one.nbytes for one in fields.values() if isinstance(one, Tensor))
