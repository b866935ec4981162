"""The methods of both clients about policies."""

from __future__ import annotations

from urllib.parse import quote

import msgspec

from flowroll.client.calls import UpdateMode
from flowroll.client.exchange import Call, post, reader
from flowroll.types import Number, Policy, PolicyChange, check_lora_name
from flowroll.wire.codec import WireFormat
from flowroll.wire.names import COPY_POLICY_ROUTE, DROP_POLICY_ROUTE, EMA_POLICY_ROUTE, POLICIES_ROUTE
from flowroll.wire.policies import AveragePolicyRequest, CopyPolicyRequest, DropPolicyRequest, PoliciesObject

_POLICIES = reader(msgspec.json.Decoder(PoliciesObject))
_CHANGE = reader(msgspec.json.Decoder(PolicyChange))


def policies(_: WireFormat, /) -> Call[list[Policy]]:
    """Returns the policies beside the default, in the order in which they were made."""
    return Call(method="GET", path=POLICIES_ROUTE, read=lambda *answer: _POLICIES(*answer).policies)


def copy_policy(_: WireFormat, /, name: str, *, source: str | None = None, mode: UpdateMode = "drain") -> Call[PolicyChange]:
    """Has the server make a policy as a copy of another one, without weights being sent; requests choose it by `policy`.

    Args:
        name: The name of the policy; one that has it is replaced.
        source: The policy or adapter that is copied; None: the weights that the server was last given.
        mode: What happens to the requests that run; see `update_weights`.

    Raises:
        FlowrollError: The call fails for a reason that `rollout` lists.
    """
    sent = CopyPolicyRequest(source=source, mode=mode)
    return post(_path(COPY_POLICY_ROUTE, name), sent, _CHANGE)


def average_policy(
    _: WireFormat, /, name: str, *, decay: Number, source: str | None = None, mode: UpdateMode = "drain"
) -> Call[PolicyChange]:
    """Has the server move a policy towards another one: decay x its weights + (1 - decay) x those of the source.

    Args:
        name: The name of the policy; one that there is not yet begins as a copy.
        decay: Its own share, from 0 to 1.
        source: The policy or adapter that it moves towards; None: the weights that the server was last given.
        mode: What happens to the requests that run; see `update_weights`.

    Raises:
        FlowrollError: The call fails for a reason that `rollout` lists.
    """
    sent = AveragePolicyRequest(decay=decay, source=source, mode=mode)
    return post(_path(EMA_POLICY_ROUTE, name), sent, _CHANGE)


def drop_policy(_: WireFormat, /, name: str, *, mode: UpdateMode = "drain") -> Call[PolicyChange]:
    """Has the server forget a policy.

    Args:
        name: The name of the policy.
        mode: What happens to the requests that run; see `update_weights`.
    """
    sent = DropPolicyRequest(mode=mode)
    return post(_path(DROP_POLICY_ROUTE, name), sent, _CHANGE)


def _path(route: str, name: str) -> str:
    check_lora_name(name, "name")
    return route.format(name=quote(name, safe=""))
