"""What every request has in common: its base class, and the fields that several messages share.

The annotation of a field is its only definition: its type and limits, an example, and the remedy for a value that breaks the
rule. `validation` parses by it and words its errors from it, and `describe` makes the OpenAPI document from it; the docstrings'
`Attributes` describe the fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from msgspec import Meta, Struct

from flowroll.types import MAX_GUIDANCE_SCALE, MAX_PROMPT_CHARS, MAX_REQUEST_ID_CHARS, MAX_SEED, MAX_VERSION_CHARS, ModuleName


class Request(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The base class of requests: a client makes and encodes one, and a server makes one with `validation.parse`.

    Attributes:
        EXAMPLES: Complete requests for the OpenAPI document.
    """

    EXAMPLES: ClassVar[tuple[Mapping[str, Any], ...]] = ()

    def check(self, sent: Mapping[str, Any]) -> None:
        """Checks the rules between fields.

        Args:
            sent: The request as it was received, which says which fields were sent.

        Raises:
            InvalidRequestError: Values contradict each other.
        """


def about(example: object, remedy: str, rule: str | None = None, description: str | None = None) -> Meta:
    """Describes a field beyond its type; an error is `<field> must <rule>, got <value>; <remedy>`.

    Args:
        example: A valid value.
        remedy: What to do if a value breaks the rule.
        rule: The rule in words, with its verb; None: the rule of the type.
        description: What the field is; None: the docstring's description.
    """
    return Meta(examples=[example], description=description, extra={"remedy": remedy, "rule": rule})


Count: TypeAlias = Annotated[int, Meta(ge=1)]
Scale: TypeAlias = Annotated[float, Meta(ge=0, le=MAX_GUIDANCE_SCALE)]
Text: TypeAlias = Annotated[str, Meta(max_length=MAX_PROMPT_CHARS)]
SeedNumber: TypeAlias = Annotated[int, Meta(ge=0, le=MAX_SEED)]
VersionText: TypeAlias = Annotated[str, Meta(min_length=1, max_length=MAX_VERSION_CHARS)]
PathText: TypeAlias = Annotated[str, Meta(min_length=1, max_length=4096)]

Prompt: TypeAlias = Annotated[Text, about("a red fox in snow", "send one prompt as text")]
PromptOrNull: TypeAlias = Annotated[Text | None, about("a red fox in snow", "send one prompt as text")]
NegativePrompt: TypeAlias = Annotated[Text | None, about("blurry, low quality", "leave it out for the family's own")]
Seed: TypeAlias = Annotated[SeedNumber | None, about(42, "leave it out for a drawn seed")]
Steps: TypeAlias = Annotated[Count | None, about(20, "leave it out for the family's number")]
GuidanceScale: TypeAlias = Annotated[Scale | None, about(4.0, "use 0 for no guidance")]
Flag: TypeAlias = Annotated[bool, about(True, "leave it out for false")]
RequestId: TypeAlias = Annotated[
    Annotated[str, Meta(min_length=1, max_length=MAX_REQUEST_ID_CHARS)] | None,
    about("step-120-prompt-7", "leave it out for a generated one"),
]

Module: TypeAlias = Annotated[ModuleName, about("transformer", "choose one of these")]
Version: TypeAlias = Annotated[VersionText | None, about("120", "leave it out for a counted one")]
Mode: TypeAlias = Annotated[Literal["drain", "abort"], about("drain", 'leave it out for "drain"')]
DiskPath: TypeAlias = Annotated[
    PathText, about("/runs/7/step-120", "send an absolute path on the server's disk", "be a path of 1 to 4096 characters")
]
