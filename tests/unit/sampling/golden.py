"""Reads the golden vectors in tests/data: single steps computed by public implementations (see tests/data/README.md)."""

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

DATA = Path(__file__).parents[2] / "data"
VECTOR_FILES = sorted(path.name for path in DATA.glob("*_T*_seed*.safetensors"))


@dataclass(frozen=True)
class Golden:
    tensors: dict[str, Tensor]
    noise_levels: dict[str, float]

    @classmethod
    def load(cls, name: str) -> "Golden":
        with safe_open(DATA / name, "pt") as file:
            case = json.loads(file.metadata()["case"])
        return cls(tensors=load_file(DATA / name), noise_levels=case["eta"])

    def __getitem__(self, key: str) -> Tensor:
        return self.tensors[key]

    @classmethod
    def above_one(cls, name: str) -> "Golden":
        """The inputs of a vector file, and CPS at a noise level above 1."""
        golden, prefix = cls.load(name), name.removesuffix(".safetensors") + "/"
        outputs = load_file(DATA / "cps_above_one.safetensors")
        found = {key.removeprefix(prefix): value for key, value in outputs.items() if key.startswith(prefix)}
        return cls(tensors=golden.tensors | found, noise_levels={"cps_eta1.3": 1.3})

    @property
    def num_steps(self) -> int:
        return self["sigmas"].shape[0] - 1
