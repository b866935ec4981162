"""The one place that decides with which kernels torch computes: by the engine, by every rank and by replay.

Bits are those of a kernel, and torch chooses kernels by settings of the process. `use_exact_kernels` puts them to what keeps a
sample's bits the same in any batch and on any rank, as far as a setting can; what no setting decides is asked of the kernels
(`probe`, `certificate`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

# The instruction sets with AMX, which oneDNN uses unless it is held to a lower one.
_AMX = frozenset({"", "ALL", "DEFAULT", "AVX512_CORE_AMX", "AVX512_CORE_AMX_FP16", "AVX10_2_512", "AVX10_2_512_AMX_2"})
# What of the environment makes the CPU libraries choose other kernels.
_CPU_VARIABLES = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR")
_CUDA_VARIABLES = ("CUBLAS_WORKSPACE_CONFIG", "CUBLASLT_WORKSPACE_SIZE", "NVIDIA_TF32_OVERRIDE")


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelSet:
    """What decides which kernels compute, beside shapes, dtypes and the number of CPU threads.

    Attributes:
        hardware: The name of the device; of a CPU with the instruction set that torch uses.
        versions: The versions of the libraries that hold kernels, by name.
        settings: The settings of the process, by name.
    """

    hardware: str
    versions: Mapping[str, str]
    settings: Mapping[str, str]

    @property
    def name(self) -> str:
        """A digest of all of it: two processes whose sets have one name compute with the same kernels."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]


def use_exact_kernels(device: torch.device) -> KernelSet:
    """Puts torch's settings to the kernels of the promises, in the whole process, and returns the set that they make.

    On a CPU: float32 products in float32. On CUDA also: no TF32, no split of the summed dimension of products (split-K),
    cuBLASLt where torch has it, cuDNN's deterministic and not its fastest convolutions, and no cuDNN attention, whose plans
    depend on the batch and on gradients; so that attention without a mask is FlashAttention's, and with one the
    memory-efficient kernel. torch's `use_deterministic_algorithms` is left alone: no forward here has a kernel that it would
    change, and it would slow down and refuse what else the process does.

    Args:
        device: The device of the transformer.
    """
    torch.set_float32_matmul_precision("highest")
    settings = {"float32_matmul": "highest"}
    if device.type != "cuda":
        return KernelSet(
            hardware=f"{_cpu()}, {torch.backends.cpu.get_cpu_capability()}{', AMX' if has_amx() else ''}",
            versions={"torch": str(torch.__version__), **_cpu_libraries()},
            settings=settings | _environment(_CPU_VARIABLES),
        )
    matmul, attention = torch.backends.cuda.matmul, torch.backends.cuda
    can_forbid = hasattr(matmul, "allow_bf16_reduced_precision_reduction_split_k")
    matmul.allow_bf16_reduced_precision_reduction = (False, False) if can_forbid else False
    # A build of torch without CUDA, on which the GPU's path is rehearsed, refuses it.
    with contextlib.suppress(RuntimeError):
        torch.backends.cuda.preferred_blas_library("cublaslt")
        settings["blas"] = "cublaslt"
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    attention.enable_cudnn_sdp(False)
    attention.enable_flash_sdp(True)
    attention.enable_mem_efficient_sdp(True)
    # Chosen only where neither of the two can run.
    attention.enable_math_sdp(True)
    settings |= {
        "bfloat16_reductions": "float32",
        "split_k": "off" if can_forbid else "unknown to this torch",
        "convolutions": "deterministic, no TF32",
        "attention": "flash, with a mask memory-efficient",
    }
    return KernelSet(
        hardware=torch.cuda.get_device_name(device) if torch.cuda.is_available() else "CUDA without a device",
        versions={"torch": str(torch.__version__), **_cuda_libraries()},
        settings=settings | _environment(_CUDA_VARIABLES),
    )


def has_amx() -> bool:
    """Tells whether oneDNN may use AMX, whose bfloat16 products have bits that depend on the number of rows and columns."""
    held_to = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", ""))
    return torch.cpu._is_amx_tile_supported() and held_to.upper() in _AMX


def _environment(names: tuple[str, ...]) -> dict[str, str]:
    return {name: os.environ[name] for name in names if name in os.environ}


@lru_cache(maxsize=1)
def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


@lru_cache(maxsize=1)
def _cpu_libraries() -> dict[str, str]:
    """Returns the versions of MKL and oneDNN that torch was built with."""
    patterns = {"mkl": r"Math Kernel Library Version (\S+)", "onednn": r"MKL-DNN v(\S+)"}
    found = {name: re.search(pattern, torch.__config__.show()) for name, pattern in patterns.items()}
    return {name: match[1] for name, match in found.items() if match}


def _cuda_libraries() -> dict[str, str]:
    found = {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}  # type: ignore[no-untyped-call]
    # It comes in a package of its own, which may be newer than the one that torch was built with.
    for package in ("nvidia-cublas", "nvidia-cublas-cu12", "nvidia-cublas-cu13"):
        with contextlib.suppress(PackageNotFoundError):
            found["cublas"] = version(package)
    return found
