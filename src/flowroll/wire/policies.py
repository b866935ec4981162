"""The requests and answers about policies: a copy, a moving average, an end."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

from msgspec import Meta

from flowroll.types import MAX_LORA_NAME_CHARS, Policy, PolicyChange
from flowroll.wire import fields
from flowroll.wire.fields import Request, about

_Source: TypeAlias = Annotated[
    Annotated[str, Meta(min_length=1, max_length=MAX_LORA_NAME_CHARS)] | None,
    about("default", "leave it out for the weights that the engine was last given"),
]


class CopyPolicyRequest(Request, kw_only=True, frozen=True):
    """Body of POST /policies/{name}/copy.

    Attributes:
        source: The policy or adapter that is copied. null: the default.
        mode: What becomes of the requests that run: they finish first, or are done again.
    """

    EXAMPLES = ({},)

    source: _Source = None
    mode: fields.Mode = "drain"


class AveragePolicyRequest(CopyPolicyRequest, kw_only=True, frozen=True):
    """Body of POST /policies/{name}/ema: its weights become decay x their own + (1 - decay) x those of the source.

    Attributes:
        decay: The policy's own share, from 0 to 1.
    """

    EXAMPLES = ({"decay": 0.95},)

    decay: Annotated[Annotated[float, Meta(ge=0, le=1)], about(0.95, "send a number from 0 to 1", "be a number from 0 to 1")]


class DropPolicyRequest(Request, kw_only=True, frozen=True):
    """Body of POST /policies/{name}/drop.

    Attributes:
        mode: What becomes of the requests that run: they finish first, or are done again.
    """

    EXAMPLES = ({},)

    mode: fields.Mode = "drain"


@dataclass(frozen=True, slots=True, kw_only=True)
class PoliciesObject:
    """The policies beside the default.

    Attributes:
        policies: The policies, in the order in which they were made.
    """

    policies: list[Policy]


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyChangeObject(PolicyChange):
    """A policy was copied, averaged or dropped.

    Attributes:
        success: Always.
        message: What this answer says, in words.
    """

    success: Literal[True] = True
    message: Annotated[str, Meta(examples=["old follows version 120"])]

    @classmethod
    def of(cls, change: PolicyChange) -> PolicyChangeObject:
        """Returns what is said of a change."""
        policy = change.policy
        message = f"{change.name} is gone" if policy is None else f"{change.name} follows version {policy.weight_version}"
        return cls(message=message, **{field.name: getattr(change, field.name) for field in dataclasses.fields(change)})
