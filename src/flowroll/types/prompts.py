"""The rules for a prompt that is given as token ids, as far as no model is needed for them."""

from __future__ import annotations

from flowroll.types.rules import is_int, require

# Far above what any tokenizer of a pipeline cuts at, and the number of tokenizers that one has.
MAX_TOKENS, MAX_TOKENIZERS = 100_000, 8


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
