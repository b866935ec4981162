"""Which policies an engine has."""

from __future__ import annotations

from flowroll.engine.adapters.adapter_set import AdapterSet
from flowroll.engine.weights.staged import listed
from flowroll.errors import InvalidRequestError
from flowroll.types import DEFAULT_POLICY, Policy, PolicyRecord


class PolicyTable:
    """The policies of an engine by name. Only one thread may change it; any thread may read it.

    Args:
        adapters: The adapters of this rank; a policy that is an adapter is one of them, and gone when that is unloaded.
    """

    def __init__(self, adapters: AdapterSet) -> None:
        self._adapters = adapters
        self._policies: dict[str, Policy] = {}

    @property
    def held(self) -> dict[str, Policy]:
        """The policies beside the default, in the order in which they were made."""
        loaded = self.adapter_names
        return {name: one for name, one in self._policies.items() if one.kind == "weights" or name in loaded}

    @property
    def adapter_names(self) -> frozenset[str]:
        """The names of all loaded adapters."""
        return frozenset(adapter.name for adapter in self._adapters.loaded)

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

    def put(self, policy: Policy) -> None:
        """Adds a policy, or replaces the one with the same name."""
        self._policies = {**self._policies, policy.name: policy}

    def remove(self, name: str) -> None:
        """Removes a policy."""
        self._policies = {other: policy for other, policy in self._policies.items() if other != name}

    def unknown(self, field: str, name: str) -> InvalidRequestError:
        """Makes the error for a name that no policy has."""
        names = listed({DEFAULT_POLICY, *self.held, *self.adapter_names})
        return InvalidRequestError(f"{field} must be one of {names}, got {name}; make it first, or leave it out.", field=field)

    def _find(self, name: str | None) -> Policy | None:
        if name is None or name == DEFAULT_POLICY:
            return None
        policy = self.held.get(name)
        if policy is None and name not in self.adapter_names:
            raise self.unknown("policy", name)
        return policy
