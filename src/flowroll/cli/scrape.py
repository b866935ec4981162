"""The numbers of GET /metrics, and what changed between two looks at them. Knows nothing of how they are shown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One value of a series.

    Attributes:
        labels: That tell it from others of its name.
        value: At the time.
    """

    labels: Mapping[str, str]
    value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Scrape:
    """One look.

    Attributes:
        at_s: Monotonic clock.
        series: Samples by name.
    """

    at_s: float
    series: Mapping[str, tuple[Sample, ...]] = field(repr=False)

    @classmethod
    def read(cls, text: str, at_s: float) -> Scrape:
        """From the text of /metrics.

        Raises:
            ValueError: It is none.
        """
        series: dict[str, list[Sample]] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                series.setdefault(sample.name, []).append(Sample(labels=sample.labels, value=float(sample.value)))
        return cls(at_s=at_s, series={name: tuple(samples) for name, samples in series.items()})

    def total(self, name: str, **labels: str) -> float:
        """The sum of the samples with these labels; 0 where there are none."""
        samples = self.series.get(name, ())
        return sum((sample.value for sample in samples if labels.items() <= sample.labels.items()), start=0.0)

    def by(self, name: str, label: str) -> dict[str, float]:
        """Sums by one label."""
        totals: dict[str, float] = {}
        for sample in self.series.get(name, ()):
            key = sample.labels.get(label, "")
            totals[key] = totals.get(key, 0.0) + sample.value
        return totals


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What happened between two looks.

    Attributes:
        before: The earlier one.
        after: The later one.
    """

    before: Scrape
    after: Scrape

    @property
    def seconds(self) -> float:
        """Between them."""
        return self.after.at_s - self.before.at_s

    def of(self, name: str, **labels: str) -> float:
        """By how much a counter grew. One that is lower than before was begun anew, by a server that was."""
        before, after = self.before.total(name, **labels), self.after.total(name, **labels)
        return after - before if after >= before else after

    def per_s(self, name: str, **labels: str) -> float:
        """By how much it grew in a second; 0 without two looks."""
        return self.of(name, **labels) / self.seconds if self.seconds > 0 else 0.0

    def mean(self, total: str, count: str, **labels: str) -> float | None:
        """By how much one counter grew for each of another; None: the other did not."""
        grown = self.of(count)
        return self.of(total, **labels) / grown if grown else None
