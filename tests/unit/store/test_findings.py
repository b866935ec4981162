"""What is said about the groups of a store, and about samples of different requests."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.factories import make_rollout

from flowroll import Rollout, save_rollouts
from flowroll.store import open_rollouts
from flowroll.store.findings import group_findings, store_findings
from flowroll.store.selection import StoredSample
from flowroll.types import Provenance

MAKER = Provenance(layout="single", strategy="merged", versions={"torch": "2.13.0"})


def sample(seed: int, *, noise: tuple[str | None, ...] | None = None, start: str | None = None, **values: Any) -> Rollout:
    """A small rollout whose digests are these letters, by default its own."""
    made = make_rollout(family="z_image", height=16, width=16, steps=3, text_tokens=2, guided=False, seed=seed, **values)
    noises = tuple(f"noise {seed} {step}" for step in range(3)) if noise is None else noise
    return replace(made, provenance=replace(MAKER, start_sha256=start or f"start {seed}", noise_sha256=noises))


def stored(folder: Path, *rollouts: Rollout) -> list[StoredSample]:
    save_rollouts(folder / "runs", rollouts)
    return list(open_rollouts(folder / "runs").select().samples())


def test_samples_with_noise_of_their_own_are_no_finding(tmp_path: Path) -> None:
    samples = stored(tmp_path, sample(0), sample(1), sample(2))
    assert group_findings(samples) == store_findings(samples) == []


@pytest.mark.parametrize(
    ("others", "finding"),
    [
        (lambda: sample(0), "Samples 0, 1 have the same noise at every step: give each its own seed."),
        (lambda: sample(1, noise=("noise 0 0", "noise 0 1", "noise 0 2")), "Samples 0, 1 have the same noise at every step"),
        # One x_T for a group is what some algorithms ask for, and a tree shares its first steps.
        (lambda: sample(1, start="start 0"), None),
        (lambda: sample(1, start="start 0", noise=("noise 0 0", "noise 1 1", "noise 1 2")), None),
    ],
    ids=["copy", "noise", "start", "fork"],
)
def test_samples_of_a_group_with_one_noise_are_told_of(
    others: Callable[[], Rollout], finding: str | None, tmp_path: Path
) -> None:
    found = group_findings(stored(tmp_path, sample(0), others()))
    assert len(found) == (finding is not None)
    assert finding is None or found[0].startswith(finding)


def test_without_noise_the_start_decides(tmp_path: Path) -> None:
    none = (None, None, None)
    samples = stored(tmp_path, sample(0, noise=none), sample(1, noise=none), sample(2, noise=none, start="start 0"))
    assert group_findings(samples) == ["Samples 0, 2 start from the same state and draw no noise: give each its own seed."]


def test_grids_that_differ_in_a_group_are_told_of(tmp_path: Path) -> None:
    one, other = sample(0), sample(1)
    sigmas = (1.0, *(0.9 * sigma for sigma in other.sampling.sigmas[1:]))
    other = replace(other, sampling=replace(other.sampling, sigmas=sigmas))
    assert group_findings(stored(tmp_path, one, other)) == ["The samples have 2 different grids of noise levels."]


def test_requests_that_share_their_noise_are_told_of(tmp_path: Path) -> None:
    def of(request: str, seed: int, version: str = "0") -> Rollout:
        return sample(seed, request_id=request, prompt=request, weight_version=version)

    samples = stored(tmp_path, of("a", 0), of("a", 1), of("b", 1), of("b", 2), of("c", 0, version="1"))
    assert store_findings(samples) == [
        "2 samples share start and noise with a sample of another request: give each request its own seeds."
    ]


def test_rollouts_without_provenance_are_no_finding(tmp_path: Path) -> None:
    samples = stored(tmp_path, *(replace(sample(0), provenance=None) for _ in range(2)))
    assert group_findings(samples) == store_findings(samples) == []
    assert {(one.start, one.noise) for one in samples} == {(None, None)}
