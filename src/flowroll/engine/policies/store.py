"""The policies of one engine, which it copies, averages and drops on all of its ranks.

It does not schedule anything: whoever changes them ensures that no request runs meanwhile.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, TypeAlias

from flowroll.engine.adapters.adapter_set import AdapterSet
from flowroll.engine.adapters.pushed import PUSHED_ADAPTER
from flowroll.engine.runner.changes import AnyChange, DropAdapter, DropPolicy, UpdatePolicy
from flowroll.engine.weights.offload import WeightOffload
from flowroll.engine.weights.staged import listed
from flowroll.engine.weights.versions import WeightVersions
from flowroll.errors import InvalidRequestError
from flowroll.types import DEFAULT_POLICY, Number, Policy, PolicyChange, PolicyKind, PolicyRecord, check_lora_name

# Makes a change on every rank, as `Executor.change` does.
MakeChange: TypeAlias = Callable[[AnyChange], Any]


class PolicyStore:
    """The policies of an engine by name. Only one thread may change them; any thread may read them.

    A policy that is made from the weights is a set of weights; one that is made from an adapter, or from the default while a
    pushed adapter is part of that, is an adapter, and gone when that is unloaded. A policy stays what it is when the engine
    gets other weights.

    Args:
        adapters: The adapters of this rank.
        offload: Tells whether the weights are in memory.
        versions: The versions of the weights.
        max_policies: The largest number of policies beside the default.
    """

    def __init__(self, adapters: AdapterSet, offload: WeightOffload, versions: WeightVersions, max_policies: int) -> None:
        self._adapters, self._offload, self._versions = adapters, offload, versions
        self._max_policies = max_policies
        self._policies: dict[str, Policy] = {}

    @property
    def held(self) -> dict[str, Policy]:
        """The policies beside the default, in the order in which they were made."""
        loaded = self._adapter_names
        return {name: one for name, one in self._policies.items() if one.kind == "weights" or name in loaded}

    def record(self, name: str | None) -> PolicyRecord | None:
        """Returns what a sample's record says about a policy; None for the default and for an adapter that is no policy.

        Raises:
            InvalidRequestError: There is no such policy, and no such adapter.
        """
        policy = self._find(name)
        return None if policy is None else policy.record

    def weights_of(self, name: str | None) -> str | None:
        """Returns the policy whose held weights a request of this policy runs on; None: those in place. Errors as `record`."""
        policy = self._find(name)
        return None if policy is None or policy.kind != "weights" else policy.name

    def copy(self, name: str, source: str | None, change: MakeChange) -> PolicyChange:
        """Makes a policy, or replaces it, as a copy of another one; None: of the default.

        Raises:
            InvalidRequestError: The name cannot be that of a policy, there is no such source, or no more policies may be held.
            EngineError: There is no room for it on some rank. Nothing has changed.
        """
        return self._update(name, source, None, change)

    def average(self, name: str, source: str | None, decay: Number, change: MakeChange) -> PolicyChange:
        """Moves a policy towards another one: decay x its weights + (1 - decay) x those of the source, in float32.

        A policy that there is not yet begins as a copy. The errors are those of `copy`.

        Raises:
            InvalidRequestError: The decay is not a number from 0 to 1, or one of the two is an adapter and the other is not.
        """
        if not (math.isfinite(decay) and 0 <= decay <= 1):
            raise InvalidRequestError(f"decay must be a number from 0 to 1, got {decay}; use 0.9, say.", field="decay")
        return self._update(name, source, decay, change)

    def drop(self, name: str, change: MakeChange) -> PolicyChange:
        """Forgets a policy. Waiting requests that name it end in an error.

        Raises:
            InvalidRequestError: There is no such policy.
        """
        started_s = time.perf_counter()
        policy = self.held.get(name)
        if policy is None:
            raise self._unknown("policy", name)
        change(DropPolicy(name=name) if policy.kind == "weights" else DropAdapter(name=name))
        self._policies = {other: one for other, one in self._policies.items() if other != name}
        return PolicyChange(name=name, policy=None, paused_s=time.perf_counter() - started_s)

    def _update(self, name: str, source: str | None, decay: Number | None, change: MakeChange) -> PolicyChange:
        self._offload.check_awake()
        started_s = time.perf_counter()
        check_lora_name(name, "policy")
        held = self.held
        own, (given, kind) = held.get(name), self._resolved(source)
        self._check_name(name)
        if own is None:
            # There is nothing to average with.
            decay = None
        elif own.kind != kind:
            raise InvalidRequestError(
                f"source must be of the kind of the policy {name}, {own.kind}, got one of {kind}; drop the policy, or name "
                "another source.",
                field="source",
            )
        num_bytes = change(
            UpdatePolicy(name=name, source=given, decay=decay, is_adapter=kind == "adapter", version=self._versions.current)
        )
        followed = held.get(given or "")
        policy = Policy(
            name=name,
            kind=kind,
            weight_version=self._versions.current if followed is None else followed.weight_version,
            decay=decay,
            num_updates=1 if own is None else own.num_updates + 1,
            num_bytes=num_bytes,
        )
        self._policies = {**self._policies, name: policy}
        return PolicyChange(name=name, policy=policy, paused_s=time.perf_counter() - started_s)

    def _resolved(self, source: str | None) -> tuple[str | None, PolicyKind]:
        """Returns the source's own name and its kind; the default is the pushed adapter where there is one."""
        adapters = self._adapter_names
        if source is None or source == DEFAULT_POLICY:
            return (PUSHED_ADAPTER, "adapter") if PUSHED_ADAPTER in adapters else (None, "weights")
        if source in adapters:
            return source, "adapter"
        if source not in self.held:
            raise self._unknown("source", source)
        return source, "weights"

    def _check_name(self, name: str) -> None:
        held = self.held
        if name in (DEFAULT_POLICY, PUSHED_ADAPTER) or (name in self._adapter_names and name not in held):
            raise InvalidRequestError(
                f"policy must have a name that nothing else has, got {name}; use another one.", field="policy"
            )
        if name not in held and len(held) >= self._max_policies:
            raise InvalidRequestError(
                f"policy must be one of at most {self._max_policies} ({listed(held)}), got another one, {name}; drop one, or "
                "start the engine with a higher limit.",
                field="policy",
            )

    @property
    def _adapter_names(self) -> frozenset[str]:
        """The names of all loaded adapters."""
        return frozenset(adapter.name for adapter in self._adapters.loaded)

    def _unknown(self, field: str, name: str) -> InvalidRequestError:
        """Makes the error for a name that no policy has."""
        names = listed({DEFAULT_POLICY, *self.held, *self._adapter_names})
        return InvalidRequestError(f"{field} must be one of {names}, got {name}; make it first, or leave it out.", field=field)

    def _find(self, name: str | None) -> Policy | None:
        if name is None or name == DEFAULT_POLICY:
            return None
        policy = self.held.get(name)
        if policy is None and name not in self._adapter_names:
            raise self._unknown("policy", name)
        return policy
