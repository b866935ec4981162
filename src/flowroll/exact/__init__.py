"""How several samples share a forward without a changed bit.

`strategy` is what the runner uses; `mode` watches a merged forward, `rules` says what each operation may do in it, and `probe`
asks the kernels. Families declare how their forward inputs are collated and know nothing of this package.
"""

from __future__ import annotations

from flowroll.exact.compiled import (
    EAGER,
    check_can_compile,
    compile_blocks,
    eager_modules,
    is_compiled,
    kernels_of,
    rebind_compiled,
)
from flowroll.exact.ranks import all_ranks_agree, run_on_groups
from flowroll.exact.strategy import Alone, Forward, Merged, PlainBatch, RunForwards, Strategy, choose_strategy, run_here

__all__ = [
    "EAGER",
    "Alone",
    "Forward",
    "Merged",
    "PlainBatch",
    "RunForwards",
    "Strategy",
    "all_ranks_agree",
    "check_can_compile",
    "choose_strategy",
    "compile_blocks",
    "eager_modules",
    "is_compiled",
    "kernels_of",
    "rebind_compiled",
    "run_here",
    "run_on_groups",
]
