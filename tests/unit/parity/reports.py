"""Small reports made by hand."""

from typing import Any

from flowroll.parity.results import LayoutParity, Measure, ModeParity, ParityReport, TensorParity

EQUAL = Measure(equal=True)
OFF = Measure(equal=False, max_abs=3e-7, mean_abs=1.25e-8, min_cosine=1 - 4e-13, first_step=2)


def make_mode(mode: str = "sde", **tensors: Measure) -> ModeParity:
    return ModeParity(
        mode=mode,
        tensors=tuple(TensorParity(name=name, first=EQUAL, whole=whole) for name, whole in tensors.items()),
        received_bytes_per_step={"sp": 1536.0, "cfg": 0.0, "tp": 0.0},
    )


def make_layout(name: str = "sp2", *modes: ModeParity, **fields: Any) -> LayoutParity:
    return LayoutParity(**{"layout": name, "num_ranks": 2, "transformer_bytes": 2**20, "modes": modes, **fields})


def make_report(*layouts: LayoutParity, **fields: Any) -> ParityReport:
    return ParityReport(
        **{
            "model": "tiny",
            "date": "2030-01-02",
            "command": "flowroll parity tiny",
            "configuration": {"prompt": "a | b", "dtype": "float32"},
            "versions": {"torch": "2.13.0"},
            "machine": {"CPU": "a fast one"},
            "transformer_bytes": 2**21,
            "layouts": layouts,
            **fields,
        }
    )
