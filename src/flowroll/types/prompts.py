"""The rules for a prompt that is given as token ids or as embeddings, as far as no model is needed for them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flowroll.types.rules import is_int, require

if TYPE_CHECKING:
    from flowroll.types.params import SamplingParams

# Far above what any tokenizer of a pipeline cuts at, and the number of tokenizers that one has.
MAX_TOKENS, MAX_TOKENIZERS = 100_000, 8
# The fields that hold a prompt as tensors, by the names of the pipelines' arguments. The first one is never missing.
EMBEDS, POOLED, MASK = "prompt_embeds", "pooled_prompt_embeds", "prompt_embeds_mask"
PROMPT_TENSORS = (EMBEDS, POOLED, MASK)
NEGATIVE = "negative_"
ALL_PROMPT_TENSORS = (*PROMPT_TENSORS, *(NEGATIVE + name for name in PROMPT_TENSORS))


def check_token_ids(field_name: str, lists: object) -> None:
    """Checks the form of token ids; None is none.

    Raises:
        InvalidRequestError: They are not a list of lists of numbers from 0 up.
    """
    if lists is None:
        return
    remedy = "send one list of ids for each of the model's tokenizers"
    ok = isinstance(lists, tuple) and 1 <= len(lists) <= MAX_TOKENIZERS
    require(ok, field_name, f"hold 1 to {MAX_TOKENIZERS} lists of token ids", lists, remedy)
    assert isinstance(lists, tuple)
    for ids in lists:
        ok = isinstance(ids, tuple) and 1 <= len(ids) <= MAX_TOKENS and all(is_int(one) and one >= 0 for one in ids)
        require(ok, field_name, f"hold lists of 1 to {MAX_TOKENS} integers >= 0", ids, remedy)


def check_embeds(params: SamplingParams) -> None:
    """Checks the form of the prompts that are given as tensors. Shapes and dtypes are checked where the model is known.

    Raises:
        InvalidRequestError: A value is no such tensor, one is missing, or the prompt is given in another form too.
    """
    for prefix in ("", NEGATIVE):
        given = {name: getattr(params, prefix + name) for name in PROMPT_TENSORS}
        for name, value in given.items():
            if value is None:
                continue
            alone = given[EMBEDS] is None
            require(not alone, prefix + name, f"be given beside {prefix}{EMBEDS}", None, "send both")
            kind, ok = _kind_of(name, value)
            require(
                ok, prefix + name, f"be a tensor of {kind}", _shown(value), "send what the pipeline's encode_prompt returns"
            )
        for other in (f"{prefix}prompt", f"{prefix}prompt_token_ids"):
            both = given[EMBEDS] is not None and getattr(params, other) is not None
            require(not both, prefix + EMBEDS, f"be given without {other}", "both", "send one of the two")


def _kind_of(name: str, value: object) -> tuple[str, bool]:
    """Returns what the tensor of a field must hold, and whether a value is such a tensor."""
    if name == MASK:
        whole = isinstance(value, Tensor) and not (value.is_floating_point() or value.is_complex())
        return "booleans or integers", whole
    return "floats", isinstance(value, Tensor) and value.is_floating_point()


def _shown(value: object) -> torch.dtype | str:
    return value.dtype if isinstance(value, Tensor) else type(value).__name__
