"""Which recorded steps have a forward in common: those before and at a fork, in the leaves of one tree."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace

import torch

from flowroll.replay.sources import Source
from flowroll.types import env_digests
from flowroll.types.forks import node_at


def shared_forwards(pairs: Sequence[tuple[Source, int]]) -> list[list[tuple[Source, int]]]:
    """Groups (sample, step) pairs whose forward is the same, in the order of their first pairs.

    The records say which these are. Two requests may have the same id, so the states and the environments are compared too.
    """
    digests: dict[int, Hashable] = {}
    groups: list[list[tuple[Source, int]]] = []
    known: dict[Hashable, list[list[tuple[Source, int]]]] = {}
    for source, step in pairs:
        record = source.rollout.sampling
        node = node_at(record.branches, step)
        if node is None:
            groups.append([(source, step)])
            continue
        if source.index not in digests:
            digests[source.index] = (source.rollout.request_id, replace(record, branches=None), env_digests(source.env))
        alike = known.setdefault((digests[source.index], node, step), [])
        group = next((group for group in alike if _has_states_of(source, group[0][0], step)), None)
        if group is None:
            group = []
            alike.append(group)
            groups.append(group)
        group.append((source, step))
    return groups


def _has_states_of(source: Source, other: Source, step: int) -> bool:
    """Returns whether two samples have the same states before a step, and before the one that it needs."""
    cpu = torch.device("cpu")
    return all(torch.equal(source.state(state, cpu), other.state(state, cpu)) for state in source.states_of(step)[:-1])
