"""Looks over the groups of a store for faults that no error shows, from the index alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
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

    Looked for are weights of several versions, settings and grids that differ, samples with one noise, and rewards that are
    all the same, of which every advantage is 0.
    """
    return list(_found(samples))


def store_findings(samples: Iterable[StoredSample]) -> list[str]:
    """Says what is odd about the samples of different requests, in sentences: those that were drawn from the same noise.

    Samples of different prompts that share their noise are no independent draws; of different weights they are a comparison.
    Only digests are kept of each sample.
    """
    requests: dict[tuple[str | None, ...], set[str]] = {}
    counts: Counter[tuple[str | None, ...]] = Counter()
    for sample in samples:
        if sample.start is not None:
            drawn = sample.start, sample.noise, sample.weight_version, sample.policy
            requests.setdefault(drawn, set()).add(sample.request_id)
            counts[drawn] += 1
    shared = [key for key, ids in requests.items() if len(ids) > 1]
    if not shared:
        return []
    number = sum(counts[key] for key in shared)
    return [f"{number} samples share start and noise with a sample of another request: give each request its own seeds."]


def _found(samples: Sequence[StoredSample]) -> Iterator[str]:
    versions = list(dict.fromkeys(sample.weight_version for sample in samples))
    if len(versions) > 1:
        yield f"The samples were made with weights of {len(versions)} versions: {', '.join(versions)}."
    for words, value_of in _COMMON.items():
        values = list(dict.fromkeys(map(value_of, samples)))
        if len(values) > 1:
            yield f"The samples have different {words}: {', '.join(map(str, values))}."
    # A grid of another length is told of above.
    grids = {sample.sigmas for sample in samples if sample.sigmas is not None}
    if len(grids) > 1 and len({sample.num_inference_steps for sample in samples}) == 1:
        yield f"The samples have {len(grids)} different grids of noise levels."
    yield from _collisions(samples)
    rewards = [sample.reward for sample in samples if sample.reward is not None]
    if len(rewards) > 1 and len(set(rewards)) == 1:
        yield f"All {len(rewards)} rewards are {rewards[0]:g}, so every advantage is 0."


def _collisions(samples: Sequence[StoredSample]) -> Iterator[str]:
    """Finds samples that were drawn from one noise. One start for all is what some algorithms ask for, and no finding."""
    keys: dict[str, Callable[[StoredSample], str | None]] = {
        "have the same noise at every step": lambda sample: sample.noise,
        # Without noise on the way the start decides alone.
        "start from the same state and draw no noise": lambda sample: None if sample.noise else sample.start,
    }
    for words, key_of in keys.items():
        places: dict[str, list[int]] = {}
        for place, sample in enumerate(samples):
            if (key := key_of(sample)) is not None:
                places.setdefault(key, []).append(place)
        for alike in places.values():
            if len(alike) > 1:
                yield f"Samples {', '.join(map(str, alike))} {words}: give each its own seed."
