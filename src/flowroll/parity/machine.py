"""The hardware, in words that say nothing about whose machine it is."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

_CPU_INFO = Path("/proc/cpuinfo")


def describe_machine(device: torch.device) -> dict[str, str]:
    """Processor, cores and system, and on a GPU what it is and what drives it."""
    facts = {
        "CPU": f"{_cpu_model()}, {os.cpu_count()} cores, torch kernels for {torch.backends.cpu.get_cpu_capability()}",
        "system": f"{platform.system()} {platform.machine()}",
    }
    if device.type == "cuda":
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        facts["GPU"] = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
        nccl: Any = torch.cuda.nccl
        cudnn: Any = torch.backends.cudnn
        facts["CUDA"] = f"{torch.version.cuda}, cuDNN {cudnn.version()}, NCCL {'.'.join(map(str, nccl.version()))}"
    return facts


def describe_versions(engine_versions: Mapping[str, str]) -> dict[str, str]:
    """The engine's libraries, and Python."""
    return {**engine_versions, "Python": platform.python_version()}


def _cpu_model() -> str:
    if _CPU_INFO.is_file():
        for line in _CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
