"""Prompts as token ids: for each tokenizer of a pipeline a stand-in that returns given ids instead of those of a text.

The pipeline's own code encodes them: it calls the stand-in as it calls the tokenizer, which pads the ids as that call asks. So
the embeddings have the bits of the text whose ids they are, and nothing of an encoder is written again here.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from flowroll.engine.facts import TokenizerFacts
from flowroll.families import Family
from flowroll.types import EnvValue

# What a call of a tokenizer may say about padding, which its method `pad` takes too.
_OF_PADDING = ("padding_side", "pad_to_multiple_of", "return_attention_mask", "return_tensors")


class _StandIn:
    """Takes the place of a tokenizer; everything that is not replaced here is the tokenizer's own.

    Args:
        tokenizer: A tokenizer of transformers, or a processor that has one.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Returns the tokens of a text."""
        raise NotImplementedError

    def apply_chat_template(self, *args: Any, tokenize: bool = True, **options: Any) -> Any:
        """Returns a conversation as text, or its tokens."""
        raise NotImplementedError


class _Given(_StandIn):
    """Returns given ids, whatever the text is."""

    def __init__(self, tokenizer: Any, ids: Sequence[int]) -> None:
        super().__init__(tokenizer)
        self._ids = list(ids)

    def __call__(self, *args: Any, padding: Any = False, images: Any = None, **options: Any) -> Any:
        owner = self._tokenizer if hasattr(self._tokenizer, "pad") else self._tokenizer.tokenizer
        wanted = (*_OF_PADDING, "max_length") if padding == "max_length" else _OF_PADDING
        chosen = {name: options[name] for name in wanted if name in options}
        made = owner.pad({"input_ids": [self._ids]}, padding=padding, **chosen)
        if images is not None:
            # A processor's part for images does with them what it does beside a text.
            made.update(self._tokenizer.image_processor(images=images, return_tensors=options.get("return_tensors")))
        return made

    def apply_chat_template(self, *args: Any, tokenize: bool = True, **options: Any) -> Any:
        return self(**options) if tokenize else ""


class _Heard(_StandIn):
    """Keeps how the pipeline calls the tokenizer for the first time, and the ids that it gets."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer)
        self.max_length: int | None = None
        self.ids: list[int] | None = None

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self._keep(self._tokenizer(*args, **options), options)

    def apply_chat_template(self, *args: Any, tokenize: bool = True, **options: Any) -> Any:
        made = self._tokenizer.apply_chat_template(*args, tokenize=tokenize, **options)
        return self._keep(made, options) if tokenize else made

    def _keep(self, made: Any, options: Mapping[str, Any]) -> Any:
        if self.ids is None:
            self.max_length = options.get("max_length")
            ids: Tensor = made["input_ids"][0]
            mask = made.get("attention_mask")
            self.ids = (ids if mask is None else ids[mask[0].bool()]).tolist()
        return made


def encode_ids(
    family: Family,
    pipeline: Any,
    variant: str,
    tokenizers: Sequence[TokenizerFacts],
    ids: Sequence[Sequence[int]],
    images: Sequence[Any] = (),
) -> Mapping[str, EnvValue]:
    """Encodes a prompt that is given as token ids, and returns its conditioning fields.

    Args:
        family: The family of the pipeline.
        pipeline: The loaded diffusers pipeline.
        variant: The variant that it is taken for.
        tokenizers: The tokenizers that the pipeline uses.
        ids: One list of ids for each of them, within its limits.
        images: The reference images beside the prompt, as RGB images of Pillow.
    """
    given = {one.name: _Given(getattr(pipeline, one.name), own) for one, own in zip(tokenizers, ids, strict=True)}
    return family.encode(_with_parts(pipeline, given), family.prompt("", variant, images))


def listen(
    family: Family, pipeline: Any, variant: str, text: str, images: Sequence[Any] = ()
) -> tuple[Mapping[str, EnvValue], tuple[TokenizerFacts, ...]]:
    """Encodes a text, and returns its conditioning fields and what the pipeline demands of token ids.

    Args:
        family: The family of the pipeline.
        pipeline: The loaded diffusers pipeline.
        variant: The variant that it is taken for.
        text: Any text of a few words.
        images: The reference images beside it, for a family that demands some.
    """
    parts = {name: tokenizer for name in family.tokenizers if (tokenizer := getattr(pipeline, name, None)) is not None}
    heard = {name: _Heard(tokenizer) for name, tokenizer in parts.items()}
    encoded = family.encode(_with_parts(pipeline, heard), family.prompt(text, variant, images))
    found = []
    for encoder, name in zip(family.text_encoders, family.tokenizers, strict=False):
        if name not in heard or (ids := heard[name].ids) is None:
            continue
        embeds = encoded[family.embeds_key]
        assert isinstance(embeds, Tensor)
        # A pipeline that returns fewer rows than there are tokens has left out those of its template in front.
        template = ids[: max(len(ids) - len(embeds), 0)]
        num_ids = getattr(pipeline, encoder).get_input_embeddings().weight.shape[0]
        # A pipeline that cuts nothing takes what the family's position table has room for.
        most = heard[name].max_length or len(template) + family.max_text_tokens
        found.append(TokenizerFacts(name=name, max_tokens=most, num_ids=num_ids, template=tuple(template)))
    return encoded, tuple(found)


def _with_parts(pipeline: Any, parts: Mapping[str, Any]) -> Any:
    """Returns a pipeline that has these parts and shares all others with the given one."""
    other = copy.copy(pipeline)
    # Not by assignment, which diffusers takes for a change of the pipeline's configuration.
    vars(other).update(parts)
    return other
