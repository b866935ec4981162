"""Looks over the groups of a store for faults that no error shows, from the index alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from flowroll.store.selection import StoredSample

# What all samples of a group should have in common, by the words for it.
_COMMON: dict[str, Callable[[StoredSample], Any]] = {
    "models": lambda sample: f"{sample.family} {sample.variant}",
    "numbers of steps": lambda sample: sample.num_inference_steps,
    "dynamics": lambda sample: sample.sde_type,
    "noise levels": lambda sample: f"{sample.noise_level:g}",
    "guidance scales": lambda sample: f"{sample.guidance_scale:g}",
    "sizes": lambda sample: f"{sample.width} x {sample.height}",
    "adapters": lambda sample: sample.lora or "none",
    "policies": lambda sample: sample.policy or "default",
}


def group_findings(samples: Sequence[StoredSample]) -> list[str]:
    """Says what is odd about the samples of one group, in sentences; nothing where they are as a group should be.

    Looked for are weights of several versions, settings that differ, and rewards that are all the same, of which every
    advantage is 0.
    """
    return list(_found(samples))


def _found(samples: Sequence[StoredSample]) -> Iterator[str]:
    versions = list(dict.fromkeys(sample.weight_version for sample in samples))
    if len(versions) > 1:
        yield f"The samples were made with weights of {len(versions)} versions: {', '.join(versions)}."
    for words, value_of in _COMMON.items():
        values = list(dict.fromkeys(map(value_of, samples)))
        if len(values) > 1:
            yield f"The samples have different {words}: {', '.join(map(str, values))}."
    rewards = [sample.reward for sample in samples if sample.reward is not None]
    if len(rewards) > 1 and len(set(rewards)) == 1:
        yield f"All {len(rewards)} rewards are {rewards[0]:g}, so every advantage is 0."
