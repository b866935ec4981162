"""How several samples share a forward without a changed bit.

`strategy` is what the runner uses; `mode` watches a merged forward, `rules` says what each operation may do in it, and `probe`
asks the kernels, whose answers `findings` keeps. `graphs` replays recorded forwards. `kernels` sets what torch computes with;
`certificate` asks about a model's shapes at the start. Families declare how their forward inputs are collated and know nothing
of this package.
"""

from __future__ import annotations

from flowroll.exact.certificate import Certificate, certify, check_shards
from flowroll.exact.compiled import (
    EAGER,
    check_can_compile,
    compile_blocks,
    eager_modules,
    is_compiled,
    kernels_of,
    rebind_compiled,
)
from flowroll.exact.cuda_graphs import recorder_for
from flowroll.exact.decoding import SharedDecoding
from flowroll.exact.findings import FINDINGS, cache_folder
from flowroll.exact.graphs import GraphCounts, GraphedForwards
from flowroll.exact.kernels import KernelSet, has_amx, use_exact_kernels
from flowroll.exact.modulation import Modulations, without_stand_in
from flowroll.exact.ranks import all_ranks_agree, run_on_groups
from flowroll.exact.strategy import Alone, Forward, Merged, PlainBatch, RunForwards, Strategy, choose_strategy, run_here

__all__ = [
    "EAGER",
    "FINDINGS",
    "Alone",
    "Certificate",
    "Forward",
    "GraphCounts",
    "GraphedForwards",
    "KernelSet",
    "Merged",
    "Modulations",
    "PlainBatch",
    "RunForwards",
    "SharedDecoding",
    "Strategy",
    "all_ranks_agree",
    "cache_folder",
    "certify",
    "check_can_compile",
    "check_shards",
    "choose_strategy",
    "compile_blocks",
    "eager_modules",
    "has_amx",
    "is_compiled",
    "kernels_of",
    "rebind_compiled",
    "recorder_for",
    "run_here",
    "run_on_groups",
    "use_exact_kernels",
    "without_stand_in",
]
