"""The prompts of a request's two branches, in whichever form it gives them, checked against the model.

A prompt is a text, the token ids of one, or the embeddings that the text encoders make of one.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from flowroll.engine.facts import ModelFacts
from flowroll.families.conditioning import TOKENS, ConditioningField
from flowroll.types import ReferenceImage, SamplingParams, all_finite, branch_digest
from flowroll.types.prompts import EMBEDS, MASK, NEGATIVE, PROMPT_TENSORS
from flowroll.types.rules import refuse
from flowroll.types.tensors import plain_tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class BranchText:
    """The text of one branch, in one of the forms in which a request may give it.

    Attributes:
        text: The prompt.
        token_ids: Its token ids, one list for each of the pipeline's tokenizers; they go before the text.
        embeds: Its embeddings, by the names that the transformer has for them, on the CPU; they go before both.
        embeds_sha256: The digest of the embeddings.
    """

    text: str | None
    token_ids: tuple[tuple[int, ...], ...] | None = None
    embeds: Mapping[str, Tensor] | None = field(default=None, compare=False)
    embeds_sha256: str | None = None

    @classmethod
    def of(cls, params: SamplingParams, model: ModelFacts, prefix: str = "") -> BranchText:
        """Returns the text of the conditional branch, or with the prefix `NEGATIVE` that of the unconditional one.

        Args:
            params: The request, from `with_checked_embeds`.
            model: The facts about the model.
            prefix: What the names of the branch's fields begin with.
        """
        text, ids = getattr(params, f"{prefix}prompt"), getattr(params, f"{prefix}prompt_token_ids")
        declared = model.family.conditioning.prompt_fields
        tensors = {name: getattr(params, prefix + name) for name in PROMPT_TENSORS}
        embeds = {declared[name].name: tensor for name, tensor in tensors.items() if tensor is not None}
        return cls(
            text=text,
            token_ids=ids,
            embeds=embeds or None,
            embeds_sha256=branch_digest(embeds) if embeds else None,
        )

    @property
    def is_given(self) -> bool:
        """Whether the request has the prompt in any form."""
        return (self.text, self.token_ids, self.embeds) != (None, None, None)


def negative_text(params: SamplingParams, model: ModelFacts) -> BranchText | None:
    """Returns the text of an unconditional branch, if one runs; None: there is none to run."""
    given = BranchText.of(params, model, NEGATIVE)
    default = model.defaults.negative_prompt
    if given.is_given or default is None:
        return given if given.is_given else None
    return BranchText(text=default)


def check_token_ids(params: SamplingParams, model: ModelFacts, images: tuple[ReferenceImage, ...]) -> None:
    """Checks prompts that are given as token ids, beside the request's images.

    Raises:
        InvalidRequestError: The pipeline's tokenizers make no such ids.
    """
    known = model.tokenizers
    for name in ("prompt_token_ids", "negative_prompt_token_ids"):
        lists = getattr(params, name)
        if lists is None:
            continue
        if not known:
            refuse(name, f"be left out for {model.family.name}", f"{len(lists)} lists", "send the prompt as text")
        if len(lists) != len(known):
            names = ", ".join(one.name for one in known)
            refuse(name, f"hold one list for each of {names}", f"{len(lists)} lists", "tokenize with each of these")
        for one, ids in zip(known, lists, strict=True):
            least, start = len(one.template) + 1, ids[: len(one.template)]
            if start != one.template:
                rule = f"begin with the {len(one.template)} ids of the pipeline's template for {one.name}"
                refuse(name, rule, str(list(start))[:80], "tokenize the text that the pipeline makes of a prompt")
            if not least <= len(ids) <= one.max_tokens:
                rule = f"hold {least} to {one.max_tokens} ids for {one.name}"
                remedy = f"tokenize with truncation=True and max_length={one.max_tokens}, without padding"
                refuse(name, rule, len(ids), remedy)
            if images:
                _check_image_tokens(name, ids, model, images)
            if max(ids) >= one.num_ids:
                rule = f"hold ids below {one.num_ids} for {one.name}"
                refuse(name, rule, max(ids), "use the tokenizer of this checkpoint")


def _check_image_tokens(field: str, ids: tuple[int, ...], model: ModelFacts, images: tuple[ReferenceImage, ...]) -> None:
    assert model.spec.vision is not None
    token_id, counts = model.spec.vision.token_id, model.family.image_tokens(model.spec, images)
    runs = tuple(len(list(run)) for is_image, run in itertools.groupby(ids, lambda one: one == token_id) if is_image)
    if runs != counts:
        rule = f"hold the id {token_id} {' and '.join(map(str, counts))} times in a row, for the request's images"
        remedy = "send what the pipeline's processor makes of the text and the images as the pipeline resizes them"
        refuse(field, rule, f"it {list(runs)[:8]} times", remedy)


def with_checked_embeds(params: SamplingParams, model: ModelFacts) -> SamplingParams:
    """Returns the request with copies of its embeddings on the CPU, which nobody else can change.

    They lose a first dimension of one, with which the pipelines have them. A mask becomes one of booleans; a mask of text alone
    says nothing, and is left out, as the pipelines do.

    Raises:
        InvalidRequestError: They do not fit the family's declaration, or are not finite, or some are missing.
    """
    checked: dict[str, Any] = {}
    for prefix in ("", NEGATIVE):
        if getattr(params, prefix + EMBEDS) is None:
            continue
        for name in PROMPT_TENSORS:
            field_name, given = prefix + name, getattr(params, prefix + name)
            own = model.family.conditioning.prompt_fields.get(name)
            if given is None:
                if own is not None and own.is_required:
                    rule = f"be given beside {prefix}{EMBEDS} for {model.family.name}"
                    refuse(field_name, rule, "nothing", "send what the pipeline's encode_prompt returns with it")
            elif name == MASK:
                checked[field_name] = _mask(field_name, given, own, len(checked[prefix + EMBEDS]), model)
            elif own is None:
                refuse(field_name, f"be left out for {model.family.name}", "a tensor", "remove it")
            else:
                checked[field_name] = _floats(field_name, given, own, model)
    return replace(params, **checked) if checked else params


def _floats(name: str, given: Tensor, own: ConditioningField, model: ModelFacts) -> Tensor:
    """Returns a copy of an embedding, whose first dimension is that of its tokens if it has any."""
    assert own.shape is not None
    is_text = own is model.family.conditioning.embeds
    shape = own.sizes({**model.spec.widths, TOKENS: 0})
    found = _without_batch(given, len(shape))
    most = model.family.max_text_tokens
    shown = ["tokens" if size == TOKENS else length for size, length in zip(own.shape, shape, strict=True)]
    fits = found.ndim == len(shape) and all(
        size == TOKENS or length == wanted for size, length, wanted in zip(own.shape, found.shape, shape, strict=True)
    )
    if not fits or given.dtype != model.dtype:
        rule = f"be a tensor [{', '.join(map(str, shown))}] of {model.dtype} for {model.family.name}"
        got = f"{list(given.shape)[:8]} of {given.dtype}"
        refuse(name, rule, got, "send what the pipeline's encode_prompt returns for one prompt; nothing is cast")
    if is_text and not 1 <= len(found) <= most:
        refuse(name, f"hold 1 to {most} tokens for {model.family.name}", len(found), "cut the prompt as the pipeline does")
    copied = plain_tensor(found, name).clone()
    if not all_finite(copied):
        refuse(name, "be finite", "NaN or infinity", "look at the text encoder that made it")
    return copied


def _mask(name: str, given: Tensor, own: ConditioningField | None, tokens: int, model: ModelFacts) -> Tensor | None:
    """Returns a mask as booleans; None where it marks every token."""
    found = _without_batch(given, 1)
    if tuple(found.shape) != (tokens,):
        refuse(name, f"be of the shape [{tokens}], an entry for each token", list(given.shape)[:8], "send one value a token")
    copied = plain_tensor(found, name).clone()
    if not ((copied == 0) | (copied == 1)).all():
        refuse(name, "hold 0 and 1 alone", "other numbers", "send 1 for a token of the text, and 0 for padding")
    copied = copied.to(torch.bool)
    if copied.all():
        return None
    if own is None:
        rule = f"mark every token for {model.family.name}, whose model takes no mask"
        refuse(name, rule, f"{int(copied.sum())} of {tokens}", "send the embedding without padding, embeds[mask.bool()]")
    if not copied.any():
        refuse(name, "mark a token", "none", "send 1 for a token of the text, and 0 for padding")
    return copied


def _without_batch(given: Tensor, ndim: int) -> Tensor:
    """Returns the tensor without a first dimension of one that it has beyond so many dimensions."""
    return given[0] if given.ndim == ndim + 1 and given.shape[0] == 1 else given
