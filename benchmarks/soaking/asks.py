"""What is asked: random requests of either family, and requests that a server must refuse."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from flowroll.client import calls
from flowroll.client.exchange import Call
from flowroll.sampling.dynamics import DYNAMICS
from flowroll.wire.codec import WireFormat

# What the servers are started with, so that a body above it is small.
MAX_BODY_BYTES = 64 * 2**10
MAX_RUNNING_SAMPLES = 12
# What the servers may hold in answers that are not sent: a crowd of large ones is more.
MAX_UNSENT_BYTES = 48 * 2**20
_SHAPES = ("circle", "square", "triangle")
_COLOURS = ("red", "green", "blue", "yellow", "pink", "white")
_PLACES = ("", " at the top left", " in the center of a very large and otherwise quite empty sheet of grey paper")
_SIZES = (64, 96, 128)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One good request.

    Attributes:
        kind: The route.
        values: Fields of `SamplingParams`.
        wire_format: The format of the answer.
        dialect: The dialect of the answer.
    """

    kind: Literal["rollout", "generate"]
    values: Mapping[str, Any]
    wire_format: WireFormat
    dialect: Literal["native", "sglang"]

    def call(self, **more: Any) -> Call[list[Any]]:
        """As the client sends it, with further fields."""
        make = calls.rollout if self.kind == "rollout" else calls.generate
        return make(self.wire_format, **{**self.values, **more})

    def alone(self, seed: int) -> dict[str, Any]:
        """The fields of the request that has this one sample and no other."""
        grouped = ("seed", "seeds", "num_outputs_per_prompt")
        return {**{name: value for name, value in self.values.items() if name not in grouped}, "seeds": [seed]}


@dataclass(frozen=True, slots=True, kw_only=True)
class Bad:
    """One request that must be refused.

    Attributes:
        body: The body as it is sent.
        statuses: What may be answered.
        headers: The headers beside those of JSON.
    """

    body: bytes
    statuses: frozenset[int]
    headers: Mapping[str, str]


def draw_ask(source: random.Random, *, large: bool = False) -> Ask:
    """A request; a large one has an answer of MiB."""
    chance = source.random
    steps = source.randint(12, 20) if large else source.randint(1, 10)
    values: dict[str, Any] = {
        "prompt": f"a {source.choice(_COLOURS)} {source.choice(_SHAPES)}{source.choice(_PLACES)}",
        "width": 128 if large else source.choice(_SIZES),
        "height": 128 if large else source.choice(_SIZES),
        **_group(source, 4 if large else source.choice((1, 1, 2, 3, 5))),
    }
    if chance() < 0.2:
        values["sigmas"] = [1.0 - step / steps for step in range(steps)] + [0.0]
    else:
        values["num_inference_steps"] = steps
    if chance() < 0.7:
        values["guidance_scale"] = source.choice((0.0, 1.0, 3.5, 4))
    if chance() < 0.3:
        values["negative_prompt"] = source.choice(("", "blurred", "a photo of something else altogether"))
    if not large and chance() < 0.15:
        return Ask(kind="generate", values=values, wire_format=_wire_format(source), dialect="native")
    values |= _dynamics(source, steps) | _returns(source, steps, large)
    dialect: Literal["native", "sglang"] = "sglang" if chance() < 0.1 else "native"
    return Ask(kind="rollout", values=values, wire_format=_wire_format(source), dialect=dialect)


def asks_of_every_kind() -> Iterator[Ask]:
    """Short requests that together share forwards in more ways than a server remembers."""
    for place, guidance_scale, width, height in itertools.product(_PLACES[::2], (0.0, 4.0), _SIZES, _SIZES):
        for samples in range(2, MAX_RUNNING_SAMPLES + 1):
            values = {
                "prompt": f"a red circle{place}",
                "width": width,
                "height": height,
                "num_outputs_per_prompt": samples,
                "num_inference_steps": 1,
                "guidance_scale": guidance_scale,
                "debug_mode": False,
            }
            yield Ask(kind="rollout", values=values, wire_format="msgpack", dialect="native")


def draw_bad(source: random.Random) -> Bad:
    """A request that must be refused."""
    good = b'"prompt": "a red circle", "height": 64, "width": 64'
    bodies: tuple[tuple[bytes, set[int], dict[str, str]], ...] = (
        (b"{", {400}, {}),
        (b"[" * 5000, {400}, {}),
        (b"[]", {400, 422}, {}),
        (b"{}", {422}, {}),
        (b"{" + good + b', "steps": 4}', {422}, {}),
        (b"{" + good + b', "num_inference_steps": 1000000}', {422}, {}),
        (b"{" + good + b', "rollout_noise_level": NaN}', {400, 422}, {}),
        (b"{" + good + b', "seed": 4294967296}', {422}, {}),
        (b"{" + good + b', "guidance_scale": 1e400}', {400, 422}, {}),
        (b"{" + good + b', "rollout_sde_step_indices": [1, 1]}', {422}, {}),
        (b'{"prompt": "a", "height": 100, "width": 64}', {422}, {}),
        (b'{"prompt": "\xff"}', {400}, {}),
        (b'{"prompt": "' + b"a" * MAX_BODY_BYTES + b'"}', {413}, {}),
        (b"{" + good + b"}", {415}, {"content-type": "text/plain"}),
        (b"{" + good + b"}", {406}, {"accept": "text/csv"}),
        (b"{" + good + b"}", {422}, {"x-flowroll-deadline-s": "soon"}),
        (b"{" + good + b"}", {422}, {"x-flowroll-dialect": "none"}),
    )
    body, statuses, headers = source.choice(bodies)
    return Bad(body=body, statuses=frozenset(statuses), headers=headers)


def _wire_format(source: random.Random) -> WireFormat:
    return source.choice(("json", "msgpack"))


def _group(source: random.Random, samples: int) -> dict[str, Any]:
    """Seeds given one by one, counted up from one, or left to the server."""
    way = source.randrange(3)
    if way == 0:
        return {"seeds": [source.randrange(2**32) for _ in range(samples)]}
    group = {"num_outputs_per_prompt": samples}
    return group if way == 1 else {"seed": source.randrange(2**32 - samples), **group}


def _dynamics(source: random.Random, steps: int) -> dict[str, Any]:
    chosen = source.choice(tuple(DYNAMICS.values()))
    values: dict[str, Any] = {
        "sde_type": chosen.name,
        "noise_level": source.choice([level for level in (0, 0.3, 0.7, 1.0) if chosen.admits(level)]),
        "log_prob_no_const": source.random() < 0.3,
    }
    if not chosen.needs_history and source.random() < 0.5:
        first = source.randrange(steps)
        values["sde_step_indices"] = list(range(first, min(first + source.randint(1, 3), steps)))
    return values


def _returns(source: random.Random, steps: int, large: bool) -> dict[str, Any]:
    values: dict[str, Any] = {
        name: large or source.random() < 0.6 for name in ("debug_mode", "return_denoising_env", "return_dit_trajectory")
    }
    if not large and source.random() < 0.3:
        values["return_step_indices"] = source.sample(range(steps + 1), source.randint(1, steps + 1))
    return values
