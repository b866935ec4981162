"""A CUDA device without a GPU: tensors have a device, a shape and a dtype, and no numbers.

torch's `FakeTensorMode` makes such tensors on any build, once the build has a device guard for CUDA. What a fake device cannot
do has a stand-in here: the functions of `torch.cuda` that need a driver, generators on the device, and the choice of a kernel
for attention.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from benchmarks.rehearsal.queues import Queues

CUDA = torch.device("cuda", 0)
# `c10::DeviceType::CUDA`, and how many types there are at least.
_CUDA_TYPE, _NUM_TYPES = 1, 16
# More than the interface has functions.
_NUM_FUNCTIONS = 64
_REGISTRY = "_ZN3c104impl26device_guard_impl_registryE"
_REGISTER = "_ZN3c104impl19registerDeviceGuardENS_10DeviceTypeEPKNS0_24DeviceGuardImplInterfaceE"


class NoFakeDeviceError(Exception):
    """This build of torch cannot be given a fake device."""


@contextlib.contextmanager
def fake_cuda() -> Iterator[FakeTensorMode]:
    """The mode in which device "cuda" is a fake one, not yet entered.

    Raises:
        NoFakeDeviceError: This torch cannot have one.
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
        raise NoFakeDeviceError(f"this build of torch cannot be given a fake device: {error}") from error
    register.argtypes, register.restype = (ctypes.c_int8, ctypes.c_void_p), None
    returns_zero = ctypes.CFUNCTYPE(ctypes.c_int64)(lambda: 0)
    functions = (ctypes.c_void_p * _NUM_FUNCTIONS)(*[ctypes.cast(returns_zero, ctypes.c_void_p).value] * _NUM_FUNCTIONS)
    empty = ctypes.c_void_p(ctypes.addressof(functions))
    before = registry[_CUDA_TYPE]
    try:
        register(_CUDA_TYPE, ctypes.addressof(empty))
        replace()
        if registry[_CUDA_TYPE] == ctypes.addressof(empty):
            raise NoFakeDeviceError("this build of torch keeps a guard that counts no devices")
        yield
    finally:
        register(_CUDA_TYPE, before)


@contextlib.contextmanager
def stand_ins(peak_bytes: Callable[[], int] = lambda: 0, queues: Queues | None = None) -> Iterator[list[torch.device]]:
    """Replaces the functions of `torch.cuda` that need a driver, and the generators that noise is drawn from.

    Args:
        peak_bytes: Returns the most bytes that were allocated.
        queues: Stand in for streams and events.

    Yields:
        A list to which `set_device` appends.
    """
    from flowroll.engine.weights import host
    from flowroll.sampling import noise
    from flowroll.types import tensors

    def initial_noise(seed: int, shape: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.randn(tuple(shape), dtype=dtype, device=device)

    def step_noise(seed: int, step: int, shape: Any, *, device: torch.device) -> Tensor:
        return torch.randn(tuple(shape), dtype=torch.float32, device=device)

    def has_memory(tensor: Tensor, real: Callable[[Tensor], bool] = tensors._has_memory) -> bool:
        return isinstance(tensor, FakeTensor) or real(tensor)

    def ordinary(tensor: Tensor, real: Callable[[Tensor], Tensor] = tensors._ordinary) -> Tensor:
        return tensor if isinstance(tensor, FakeTensor) else real(tensor)

    queues = queues or Queues()
    chosen: list[torch.device] = []
    driver: Mapping[str, Any] = {
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": chosen.append,
        **queues.driver,
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda _: None,
        "max_memory_allocated": lambda _: peak_bytes(),
    }
    with contextlib.ExitStack() as stack:
        for name, function in driver.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, function))
        stack.enter_context(mock.patch.object(Tensor, "record_stream", lambda *given: queues.keep_for(*given)))
        # A tensor on the device counts as one with memory.
        stack.enter_context(mock.patch.object(tensors, "_has_memory", has_memory))
        stack.enter_context(mock.patch.object(tensors, "_ordinary", ordinary))
        stack.enter_context(mock.patch.object(host, "can_pin", lambda: True))
        stack.enter_context(mock.patch.object(noise, "initial_noise", initial_noise))
        stack.enter_context(mock.patch.object(noise, "step_noise", step_noise))
        yield chosen


@contextlib.contextmanager
def fused_attention() -> Iterator[None]:
    """Calls the kernels that a CUDA build chooses for attention: FlashAttention, or the memory-efficient one beside a mask.

    A CPU build has no table of kernels for CUDA, and would write out the scores.
    """
    real = F.scaled_dot_product_attention

    def attend(query: Tensor, *args: Any, **options: Any) -> Tensor:
        return (_attend if query.device.type == "cuda" else real)(query, *args, **options)

    with mock.patch.object(F, "scaled_dot_product_attention", attend):
        yield


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if enable_gqa:
        repeats = query.shape[1] // key.shape[1]
        key, value = (one.repeat_interleave(repeats, 1) for one in (key, value))
    if attn_mask is None:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(query, key, value, dropout_p, is_causal, scale=scale)[0]  # type: ignore[no-any-return]
    if attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, float("-inf"))
    bias = attn_mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    return efficient(query, key, value, bias, False, dropout_p, is_causal, scale=scale)[0]  # type: ignore[no-any-return]


@contextlib.contextmanager
def stand_in_for_bits() -> Iterator[None]:
    """Replaces what `Merged` reads of numbers: tensors of one shape are equal, and products are computed sample by sample."""
    from flowroll.exact import layout, mode, probe

    def same_outline(one: Tensor, other: Tensor) -> bool:
        return (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)

    with (
        mock.patch.object(layout, "same_bits", same_outline),
        mock.patch.object(mode, "same_bits", same_outline),
        mock.patch.object(probe, "_way", lambda *_: probe.each),
        mock.patch.object(probe, "_attends_alike", lambda *_: True),
        mock.patch.object(probe, "_reduces_alike", lambda *_: True),
    ):
        yield
