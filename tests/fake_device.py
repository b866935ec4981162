"""A CUDA device without a GPU: tensors have a device, a shape and a dtype, and no numbers.

torch's `FakeTensorMode` raises where most operations mix devices, and where somebody reads a number of a tensor. `Watch` raises
at what it lets pass.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CUDA = torch.device("cuda", 0)
# `c10::DeviceType::CUDA`, and how many types there are at least.
_CUDA_TYPE, _NUM_TYPES = 1, 16
# More than the interface has functions.
_NUM_FUNCTIONS = 64
_REGISTRY = "_ZN3c104impl26device_guard_impl_registryE"
_REGISTER = "_ZN3c104impl19registerDeviceGuardENS_10DeviceTypeEPKNS0_24DeviceGuardImplInterfaceE"


class DeviceFaultError(Exception):
    """An operation has operands on two devices, or makes the host wait for the device."""


class Watch(TorchDispatchMode):
    """Raises at operands on two devices and at copies to the CPU that the host waits for.

    A fake device lets pass: scalars, indices and the input of a convolution on the CPU beside operands on a GPU; every copy.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = _devices((args, kwargs))
        is_copy_here = func is torch.ops.aten.copy_.default
        if len(given) > 1 and not is_copy_here:
            raise DeviceFaultError(f"{func} has operands on {' and '.join(sorted(given))}")
        result = func(*args, **kwargs)
        if is_copy_here or func is torch.ops.aten._to_copy.default:
            is_queued = kwargs.get("non_blocking") or args[2:] == (True,)
            if "cuda" in given and _devices(result) == {"cpu"} and not is_queued:
                raise DeviceFaultError(f"{func} to the CPU waits for the device")
        return result


def _devices(values: Any) -> set[str]:
    return {value.device.type for value in tree_leaves(values) if isinstance(value, Tensor)}


@contextlib.contextmanager
def fake_cuda() -> Iterator[FakeTensorMode]:
    """The mode in which device "cuda" is a fake one, not yet entered. Skips the test where this torch cannot have one.

    Tensors of the CPU that were made before, such as a model's tables, become fake ones on the CPU when they are used.
    """
    with _cuda_guard() if torch.version.cuda is None else contextlib.nullcontext():
        yield FakeTensorMode(allow_non_fake_inputs=True)


@contextlib.contextmanager
def _cuda_guard() -> Iterator[None]:
    """Gives a CPU build of torch the device guard that a CUDA build has where there is no GPU: one that does nothing.

    torch puts that one in place of a guard that counts no devices. So it is handed such a guard first: an object whose virtual
    functions are all one that returns 0.
    """
    try:
        library = ctypes.CDLL(str(next((Path(torch.__file__).parent / "lib").glob("libc10.*"))))
        registry = (ctypes.c_void_p * _NUM_TYPES).in_dll(library, _REGISTRY)
        register = getattr(library, _REGISTER)
        replace = torch._C._ensureCUDADeviceGuardSet
    except (StopIteration, OSError, ValueError, AttributeError) as error:
        pytest.skip(f"this build of torch cannot be given a fake device: {error}")
    register.argtypes, register.restype = (ctypes.c_int8, ctypes.c_void_p), None
    returns_zero = ctypes.CFUNCTYPE(ctypes.c_int64)(lambda: 0)
    functions = (ctypes.c_void_p * _NUM_FUNCTIONS)(*[ctypes.cast(returns_zero, ctypes.c_void_p).value] * _NUM_FUNCTIONS)
    empty = ctypes.c_void_p(ctypes.addressof(functions))
    before = registry[_CUDA_TYPE]
    try:
        register(_CUDA_TYPE, ctypes.addressof(empty))
        replace()
        if registry[_CUDA_TYPE] == ctypes.addressof(empty):
            pytest.skip("this build of torch cannot be given a fake device: it keeps a guard that counts no devices")
        yield
    finally:
        register(_CUDA_TYPE, before)


class Event:
    """Stands in for `torch.cuda.Event`, which a CPU build lacks."""

    def __init__(self) -> None:
        self.streams: list[object] = []

    def record(self, stream: object) -> None:
        """Notes the stream."""
        self.streams.append(stream)

    def synchronize(self) -> None:
        """Returns at once; fails if there is nothing to wait for."""
        assert self.streams


def stand_in_for_cuda_functions(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """Replaces the functions of `torch.cuda` that need a driver; returns a list to which `set_device` appends."""
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: ("stream of", device))
    return chosen


def stand_in_for_generators(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces the generators that noise is drawn from; a fake device has none."""
    from flowroll.sampling import noise

    def initial_noise(seed: int, shape: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.randn(tuple(shape), dtype=dtype, device=device)

    def step_noise(seed: int, step: int, shape: Any, *, device: torch.device) -> Tensor:
        return torch.randn(tuple(shape), dtype=torch.float32, device=device)

    monkeypatch.setattr(noise, "initial_noise", initial_noise)
    monkeypatch.setattr(noise, "step_noise", step_noise)


def stand_in_for_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces what `Merged` reads of numbers, which a fake device has not: every comparison of two tensors on one device finds
    them equal, and no kernel computes a product of several samples with the bits of each.
    """
    from flowroll.exact import mode, probe, sharing

    equal = torch.equal

    def same_outline(one: Tensor, other: Tensor) -> bool:
        return (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)

    def equal_on_host(one: Tensor, other: Tensor) -> bool:
        """The state of the CPU's generator has numbers."""
        with unset_fake_temporarily():
            return equal(one, other)

    monkeypatch.setattr(torch, "equal", equal_on_host)
    monkeypatch.setattr(mode, "same_bits", same_outline)
    monkeypatch.setattr(sharing, "same_bits", same_outline)
    monkeypatch.setattr(probe, "_way", lambda *_: probe.each)
    monkeypatch.setattr(probe, "_attends_alike", lambda *_: True)
    monkeypatch.setattr(probe, "_reduces_alike", lambda *_: True)
