"""The one table of cases that the proofs run: family x dynamics x dtype x layout x batch mix.

Families and dynamics are read from the registries, so a new one joins every proof. The table covers every pair of options, not
every product of them: a fault that takes three particular options at once is not looked for here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from tests.guiding import in_words_of
from tests.pairs import pairs

from flowroll.families import FAMILIES as REGISTERED
from flowroll.types import ALIASES, ROLLOUT_FIELDS, SdeType

FAMILIES = tuple(REGISTERED)
DYNAMICS = tuple(get_args(SdeType))
DTYPES = ("float32", "bfloat16")
LAYOUTS = ("sp2", "cfg2", "tp2", "sp3", "sp4", "sp2xcfg2", "sp2xtp2")
# What runs beside the sample in question; see `company_of`.
COMPANY = ("alone", "group", "alike", "mixed")
Request = Mapping[str, Any]

_SHORT = "a cat"
# Longer than 32 tokens in every family, so that the two captions of a pair are padded to different lengths.
_LONG = "a red car beside a wooden table, " * 3 + "a red car beside"
# 1,056, 319 and 156 image tokens. Attention computes a last block of 1 to 3 queries otherwise than a larger one: 7 tokens of
# text make the small sequence end in such a block, and 33 of them would make the ranks' shares of the odd one end in one.
# The costly ones come first, so that they meet one sample alone in float32 in the rows of `make test`.
SHAPES: Mapping[str, Request] = {
    "large": {"height": 512, "width": 528, "prompt": _SHORT},
    "odd": {"height": 464, "width": 176, "prompt": _LONG},
    "small": {"height": 192, "width": 208, "prompt": _SHORT},
    "small, unguided": {"height": 192, "width": 208, "prompt": _SHORT, "guidance_scale": 0.0},
}
EVERYTHING: Request = {"debug_mode": True, "return_denoising_env": True, "return_dit_trajectory": True}
_BASE: Request = {"seed": 40, "num_inference_steps": 2, "guidance_scale": 4.0, "noise_level": 0.6, **EVERYTHING}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One row of the table: a request, the engine that answers it, and what runs beside it."""

    family: str
    dtype: str
    layout: str
    dynamics: str
    company: str
    shape: str

    def __str__(self) -> str:
        return f"{self.layout}-{self.family}-{self.dtype}-{self.dynamics}-{self.company}-{self.shape.replace(', ', '-')}"

    @property
    def request(self) -> Request:
        """The request in question."""
        group = {"num_outputs_per_prompt": 2} if self.company == "group" else {}
        return in_words_of(self.family, {**_BASE, **SHAPES[self.shape], "sde_type": self.dynamics, **group})

    @property
    def requests(self) -> list[Request]:
        """Everything that is in flight at once; the request in question comes first."""
        return [self.request, *(in_words_of(self.family, one) for one in company_of(self.company, self.request))]


def company_of(company: str, request: Request) -> list[Request]:
    """The other requests in flight.

    "alike" has requests of every dynamics that share every forward with the one in question. "mixed" has requests that share
    some forwards or none: other texts, sizes, guidance, step counts, schedules, windows, and evaluations.
    """
    if company == "alike":
        alike = [{**request, "seed": 50 + number, "sde_type": kind, "noise_level": 0.9} for number, kind in enumerate(DYNAMICS)]
        # The samples of a group start together, so that some forward is shared however the requests arrive.
        return [{**alike[0], "num_outputs_per_prompt": 2}, *alike[1:]]
    if company == "mixed":
        small = {**_BASE, "height": 64, "width": 64, "prompt": _SHORT}
        return [{**small, **fields} for fields in MIXTURE] + [evaluation({**small, "seed": 3})]
    return []


def evaluation(request: Request) -> Request:
    """The same request as plain generation, which takes no option of a rollout."""
    kept = {name: value for name, value in request.items() if ALIASES.get(name, name) not in ROLLOUT_FIELDS}
    return {**kept, "rollout": False}


MIXTURE: tuple[Request, ...] = (
    {"seed": 1},
    {"seed": 2, "num_inference_steps": 4, "sde_type": DYNAMICS[-1]},
    {"seed": 4, "num_inference_steps": 3, "num_outputs_per_prompt": 3, "sde_step_indices": (1,)},
    {"seed": 5, "num_inference_steps": None, "sigmas": (1.0, 0.8, 0.3, 0.0), "log_prob_no_const": True},
    {"seed": 6, "guidance_scale": 0.0, "prompt": "a photo of two wine glasses"},
    {"seed": 10, "init_seed": 3, "num_outputs_per_prompt": 2},
    {"seed": 7, "height": 48, "width": 80, "prompt": _LONG, "negative_prompt": "blurry", "num_outputs_per_prompt": 2},
    {"seed": 9, "num_inference_steps": 3, "rollout_steps": ({"dynamics": "ode"}, {"noise_level": 0.3}, {})},
    {"seed": None, "seeds": (8, 99, 1), "guidance_scale": 2.0, "debug_mode": False, "return_step_indices": (0, 2)},
)


def _dtype_on(layout: str, family: str) -> str:
    """Starting ranks takes long: a layout meets every family and every dtype with one engine for each family."""
    return DTYPES[(LAYOUTS.index(layout) + FAMILIES.index(family)) % len(DTYPES)]


def _table() -> tuple[Case, ...]:
    request = {"dynamics": DYNAMICS, "company": COMPANY, "shape": tuple(SHAPES)}
    one_rank = [Case(**row, layout="single") for row in pairs(family=FAMILIES, dtype=DTYPES, **request)]
    ranks = [
        Case(**row, dtype=_dtype_on(row["layout"], row["family"])) for row in pairs(layout=LAYOUTS, family=FAMILIES, **request)
    ]
    # One engine answers all of its cases in a row.
    return tuple(one_rank + sorted(ranks, key=lambda case: (LAYOUTS.index(case.layout), case.family)))


CASES = _table()


def cases(**wanted: str) -> list[Case]:
    """The rows of the table that have these values; "!x" stands for every value but x."""

    def fits(case: Case) -> bool:
        return all(
            (getattr(case, name) != value[1:]) if value[0] == "!" else (getattr(case, name) == value)
            for name, value in wanted.items()
        )

    return [case for case in CASES if fits(case)]
