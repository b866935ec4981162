"""What each page says. A page is made of its template in `templates/` and what is told to it here, with every text escaped."""

from __future__ import annotations

import base64
import itertools
import math
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from statistics import fmean, pstdev
from typing import Any

import jinja2
from markupsafe import Markup

from flowroll.errors import InvalidRequestError
from flowroll.store import StoredSample
from flowroll.store.findings import group_findings
from flowroll.store.selection import id_of, key_of
from flowroll.types import Rollout
from flowroll.types.pictures import encode_png
from flowroll.types.shown import rollout_rows
from flowroll.viewer.charts import step_charts
from flowroll.viewer.source import Model, Source
from flowroll.viewer.steps import Replayed, Step, picture_of_step, replay, steps_of

# Samples on one page of the gallery. Their pictures are loaded as they come into view.
PAGE_SAMPLES = 1000
MOST_COMPARED = 4
# The steps of one sample are asked for one after the other, and a rollout may have hundreds of megabytes.
_MOST_LOADED = 2
_TEMPLATES = files("flowroll.viewer").joinpath("templates")
ASSETS: Mapping[str, str] = {"viewer.css": "text/css", "viewer.js": "text/javascript"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """Which samples a gallery shows.

    Attributes:
        prompt: A part of the prompt's text.
        version: The version of the weights.
        min_reward: The least reward.
        oldest_first: Whether the oldest group comes first.
        page: The page, counted from 1.
    """

    prompt: str = ""
    version: str = ""
    min_reward: float | None = None
    oldest_first: bool = False
    page: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The samples of one request on a page.

    Attributes:
        samples: What the index says of each.
        findings: What is odd about them.
    """

    samples: Sequence[StoredSample]
    findings: Sequence[str]

    @property
    def rewards(self) -> str:
        """The mean of the rewards and their std, where there are any."""
        values = [sample.reward for sample in self.samples if sample.reward is not None]
        return f"reward {fmean(values):.3g} ± {pstdev(values):.2g}" if values else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownSample:
    """One sample with all that its page shows.

    Attributes:
        id: Its id in the source.
        stored: What the index says of it.
        rollout: The rollout.
        steps: Its steps.
        replayed: Its ratios; None: it was not replayed.
    """

    id: str
    stored: StoredSample
    rollout: Rollout
    steps: Sequence[Step]
    replayed: Replayed | None

    @property
    def label(self) -> str:
        """What it is called in a chart."""
        return f"seed {self.stored.seed}, weights {self.stored.weight_version}"

    @property
    def facts(self) -> dict[str, str]:
        """What there is to say of it, by name."""
        stored = self.stored
        rewards = {f"reward {name}" if name != "reward" else name: f"{value:.6g}" for name, value in stored.rewards.items()}
        said = {
            "prompt": "token ids" if stored.prompt is None else stored.prompt,
            "seed": str(stored.seed),
            **rewards,
            "weights": stored.weight_version,
            "adapter": stored.lora or "none",
            "policy": stored.policy or "default",
            "request": stored.request_id,
            **dict(rollout_rows(self.rollout)),
            **self._proof,
        }
        return said | ({"notes": " / ".join(stored.notes)} if stored.notes else {})

    @property
    def _proof(self) -> dict[str, str]:
        proof, stored = self.rollout.provenance, self.stored
        if proof is None:
            return {}
        versions = ", ".join(f"{name} {version}" for name, version in proof.versions.items())
        digests = {"start": stored.start or "none", "noise": stored.noise or "none", "grid": stored.sigmas or "none"}
        fast = f"fast: {', '.join(proof.fast_parts)}; " if proof.exactness == "fast" else ""
        return {"engine": f"{fast}{proof.layout}, {proof.strategy}; {versions}", **digests}


class Pages:
    """Makes the pages about the rollouts of one source.

    Args:
        source: What is looked at.
        model: Decodes steps of which there is no picture, and replays; None: neither is offered.
        title: What is looked at, for people.
        prefix: What stands in front of the path of every page.
        is_single_file: Whether a page carries its pictures, style and script in itself, and links to no other.
    """

    def __init__(
        self,
        source: Source,
        *,
        model: Model | None = None,
        title: str = "rollouts",
        prefix: str = "",
        is_single_file: bool = False,
    ) -> None:
        self._source, self.model, self._is_single_file = source, model, is_single_file
        self._prefix = prefix
        self._loaded: OrderedDict[str, Rollout] = OrderedDict()
        self._loading = threading.Lock()
        self._environment = jinja2.Environment(
            loader=jinja2.FunctionLoader(lambda name: _TEMPLATES.joinpath(name).read_text(encoding="utf-8")),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._environment.globals.update(
            title=title,
            prefix=prefix,
            is_single_file=is_single_file,
            can_replay=model is not None,
            most_compared=MOST_COMPARED,
            picture=self._picture_url,
            asset=lambda name: Markup(asset(name)),
        )

    def gallery(self, query: Query) -> str:
        """Makes the page of all groups that match.

        Raises:
            InvalidRequestError: A value of the query is not of its kind.
        """
        found = self._source.select(
            prompt_contains=query.prompt or None, weight_version=query.version or None, min_reward=query.min_reward
        )
        num_pages = max(math.ceil(len(found) / PAGE_SAMPLES), 1)
        first = (min(max(query.page, 1), num_pages) - 1) * PAGE_SAMPLES
        ordered = found if query.oldest_first else found[::-1]
        samples = ordered[first : first + PAGE_SAMPLES].samples()
        groups = []
        for _, members in itertools.groupby(samples, key=lambda sample: sample.request_id):
            # Within a group the order is that in which they were written.
            listed = list(members)
            if not query.oldest_first:
                listed.reverse()
            groups.append(Group(samples=listed, findings=group_findings(listed)))
        return self._page(
            "gallery.html",
            groups=groups,
            query=query,
            total=len(found),
            page=first // PAGE_SAMPLES + 1,
            num_pages=num_pages,
        )

    def sample(self, sample: str, *, is_replayed: bool = False) -> str:
        """Makes the page of one sample.

        Args:
            sample: Its id.
            is_replayed: Whether to replay it first.

        Raises:
            InvalidRequestError: There is no such sample, or it cannot be replayed.
        """
        shown, group = self._shown(sample, is_replayed=is_replayed)
        place = next(index for index, member in enumerate(group) if member.id == shown.id)
        return self._page(
            "sample.html",
            sample=shown,
            group=group,
            previous=group[place - 1] if place else None,
            following=group[place + 1] if place + 1 < len(group) else None,
            findings=group_findings(group),
            charts=self._charts([shown]),
        )

    def compare(self, samples: Sequence[str]) -> str:
        """Makes the page on which some samples stand side by side.

        Raises:
            InvalidRequestError: There are not two to four, or one is not there.
        """
        chosen = list(dict.fromkeys(samples))
        if not 2 <= len(chosen) <= MOST_COMPARED:
            raise InvalidRequestError(
                f"sample must be given for 2 to {MOST_COMPARED} samples, got {len(chosen)}; tick as many in the gallery.",
                field="sample",
            )
        shown = [self._shown(sample)[0] for sample in chosen]
        facts = [sample.facts for sample in shown]
        rows = [(name, [said.get(name, "-") for said in facts]) for name in dict.fromkeys(itertools.chain(*facts))]
        return self._page("compare.html", samples=shown, rows=rows, charts=self._charts(shown))

    def error(self, message: str) -> str:
        """Makes the page that says why there is no other."""
        return self._page("error.html", message=message)

    def picture(self, sample: str) -> bytes | None:
        """Returns a sample's picture as PNG; None: nothing was decoded."""
        found = self._source.picture(sample)
        return None if found is None else encode_png(found)

    def picture_of_step(self, sample: str, step: int) -> bytes | None:
        """Returns the picture of what a step predicted, as PNG; None: there is none, and it cannot be decoded."""
        return picture_of_step(self._load(sample), step, self.model)

    def _shown(self, sample: str, *, is_replayed: bool = False) -> tuple[ShownSample, list[StoredSample]]:
        """Returns a sample, and the samples of its group."""
        sample = id_of(key_of(sample))
        rollout = self._load(sample)
        group = list(self._source.select(request_id=rollout.request_id).samples())
        stored = next(member for member in group if member.id == sample)
        replayed = replay(rollout, self.model) if is_replayed and self.model is not None else None
        steps = steps_of(rollout, model=self.model, replayed=replayed)
        return ShownSample(id=sample, stored=stored, rollout=rollout, steps=steps, replayed=replayed), group

    def _load(self, sample: str) -> Rollout:
        with self._loading:
            if (rollout := self._loaded.pop(sample, None)) is None:
                rollout = self._source.load(sample)
            self._loaded[sample] = rollout
            while len(self._loaded) > _MOST_LOADED:
                self._loaded.popitem(last=False)
            return rollout

    def _charts(self, samples: Sequence[ShownSample]) -> list[Markup]:
        # matplotlib escapes the labels in them.
        return [Markup(chart) for chart in step_charts([(sample.label, sample.steps) for sample in samples])]

    def _picture_url(self, sample: str, step: int | None = None) -> str:
        if not self._is_single_file:
            return f"{self._prefix}/picture/{sample}" + (".png" if step is None else f"/{step}.png")
        png = self.picture(sample) if step is None else self.picture_of_step(sample, step)
        return "data:," if png is None else f"data:image/png;base64,{base64.b64encode(png).decode()}"

    def _page(self, template: str, **values: Any) -> str:
        return self._environment.get_template(template).render(**values)


def asset(name: str) -> str:
    """Returns the text of a page's style or script."""
    return _TEMPLATES.joinpath(name).read_text(encoding="utf-8")
