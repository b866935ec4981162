"""Small reports made by hand."""

from typing import Any

from flowroll.parity.compare import Measure, TensorParity
from flowroll.parity.run import LayoutParity, ParityReport

EQUAL = Measure(equal=True)
OFF = Measure(equal=False, max_abs=3e-7, mean_abs=1.25e-8, min_cosine=1 - 4e-13, first_step=2)


def make_mode(mode: str = "sde", **tensors: Measure) -> tuple[TensorParity, ...]:
    return tuple(TensorParity(mode=mode, name=name, first=EQUAL, whole=whole) for name, whole in tensors.items())


def make_layout(name: str = "sp2", *modes: tuple[TensorParity, ...], **fields: Any) -> LayoutParity:
    made = {"layout": name, "num_ranks": 2, "transformer_bytes": 2**20, "tensors": sum(modes, ())}
    return LayoutParity(**{**made, "received_bytes": {"sp": 1536.0, "cfg": 0.0, "tp": 10.0}, **fields})


def make_report(*layouts: LayoutParity, **fields: Any) -> ParityReport:
    return ParityReport(
        **{
            "setting": {"model": "tiny", "prompt": "a | b", "dtype": "float32", "versions": "torch 2.13.0"},
            "modes": ("sde", "ode"),
            "commands": {"this run": "flowroll parity tiny"},
            "one_rank": make_layout("single", num_ranks=1, transformer_bytes=2**21, received_bytes={}),
            "layouts": layouts,
            **fields,
        }
    )
