"""The only access to the raw memory of a tensor, and a test of its numbers.

An object that is a `Tensor` need not have memory of its own: a DTensor holds a shard, a meta or fake tensor holds nothing, a
quantized or sparse one holds something else than its elements, and FSDP frees storages under tensors that still exist. Reading
at `data_ptr()` of such an object gives other values or ends the process. Everything that reads or writes bytes of a tensor
therefore takes them from `tensor_bytes`, and a tensor that a caller gave goes through `plain_tensor` first.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from flowroll.errors import InvalidRequestError

_NO_DISPATCH = torch._C._disabled_torch_dispatch_impl
_MOST_SHOWN = 200


def plain_tensor(tensor: object, subject: str = "the tensor", *, device: torch.device | str | None = "cpu") -> Tensor:
    """Returns an ordinary contiguous tensor with the same values, in the same memory if the tensor is already such a tensor.

    A DTensor is gathered, which is a collective operation: every rank of its mesh has to call this for the same tensors in the
    same order.

    Args:
        tensor: Any tensor; other objects are refused.
        subject: The tensor's name in an error message, e.g. its name in a state_dict.
        device: The device of the result; None: the tensor's device.

    Raises:
        InvalidRequestError: The tensor has no data, or its elements cannot be read directly; the message says what to do.
    """
    readable_bytes(tensor, subject)
    assert isinstance(tensor, Tensor)
    with _errors_named(tensor, subject), torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
        found = _ordinary(_gathered(tensor.detach()))
        if _has_memory(found):
            found = found.contiguous() if device is None else found.to(device).contiguous()
    if type(found) is not Tensor or not _has_memory(found):
        raise _without_memory(tensor, subject)
    return found


def readable_bytes(tensor: object, subject: str = "the tensor") -> int:
    """Returns the size of a tensor in bytes (of a DTensor, its whole size) without reading or gathering it.

    Raises:
        InvalidRequestError: The object evidently has no readable elements: it is not a tensor, has no data, or is quantized,
            sparse or nested.
    """
    if not isinstance(tensor, Tensor):
        raise InvalidRequestError(
            f"{subject} must be a torch tensor, got {type(tensor).__name__}; convert it with torch.as_tensor."
        )
    if is_lazy(tensor):
        raise _refused(subject, "an uninitialized parameter", "run a forward first")
    # A class may answer even for its attributes.
    with _errors_named(tensor, subject), torch._C.DisableTorchFunctionSubclass():
        if tensor.device.type == "meta":
            raise _refused(subject, "a meta tensor", "load the weights first")
        if tensor.is_quantized:
            raise _refused(subject, f"a quantized tensor of {tensor.dtype}", "call its dequantize() first")
        if tensor.is_nested:
            raise _refused(subject, "a nested tensor", "call its to_padded_tensor() or unbind() first")
        if tensor.layout is not torch.strided:
            raise _refused(subject, f"a tensor of layout {tensor.layout}", "call its to_dense() first")
        if type(tensor).__torch_dispatch__ is _NO_DISPATCH and not _has_memory(tensor):
            raise _without_memory(tensor, subject)
        return tensor.numel() * tensor.itemsize


def all_finite(tensor: Tensor) -> bool:
    """Tells whether no entry is NaN or infinite, in one pass over the tensor that allocates no second tensor."""
    if not tensor.is_floating_point():
        return True
    # A sum with NaN or infinity in it is not finite. A sum of finite numbers may overflow too, so then each number is checked.
    return math.isfinite(tensor.sum().item()) or bool(tensor.isfinite().all())


def mesh_of(tensor: object) -> Any:
    """Returns the device mesh over which a DTensor is sharded; None for every other object."""
    # A DTensor exists only where its module was imported, which takes long and which most processes never do.
    module = sys.modules.get("torch.distributed.tensor")
    return tensor.device_mesh if module is not None and isinstance(tensor, module.DTensor) else None


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Returns a writable view of the memory of a contiguous CPU tensor; the view keeps the tensor alive.

    Args:
        tensor: A result of `plain_tensor`, or a tensor that torch's own allocator made.

    Raises:
        InvalidRequestError: The tensor has no contiguous memory on the CPU.
    """
    is_ordinary = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout is torch.strided
    is_read_as_it_lies = is_ordinary and not (tensor.is_quantized or tensor.is_neg() or tensor.is_conj())
    if not (is_read_as_it_lies and tensor.device.type == "cpu" and tensor.is_contiguous() and _has_memory(tensor)):
        raise _refused("the tensor", f"a {type(tensor).__name__} without contiguous memory on the CPU")
    if tensor.nbytes == 0:
        return memoryview(b"")
    memory: Any = (ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())
    memory.owner = tensor
    return memoryview(memory).cast("B")


def _gathered(tensor: Tensor) -> Tensor:
    """Gathers a DTensor from all ranks of its mesh; returns every other tensor unchanged."""
    mesh = mesh_of(tensor)
    if mesh is None:
        return tensor
    sharded: Any = tensor
    # Parameters that FSDP offloads lie on the CPU, where the mesh has no means of communication.
    return sharded.to(mesh.device_type).full_tensor()  # type: ignore[no-any-return]


def _ordinary(tensor: Tensor) -> Tensor:
    """Returns the tensor as a plain `Tensor`, with any pending conjugation or negation carried out."""
    if type(tensor) is not Tensor:
        tensor = tensor.as_subclass(Tensor) if type(tensor).__torch_dispatch__ is _NO_DISPATCH else _copied(tensor)
    return tensor.resolve_conj().resolve_neg()


def _copied(tensor: Tensor) -> Tensor:
    """Copies a tensor whose class implements torch's operations itself, because only the class knows its memory.

    Raises:
        RuntimeError: The class does not copy every element.
    """
    copies = []
    for filling in (0, 255):
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        copies.append(copy.reshape(-1).view(torch.uint8).fill_(filling))
        copy.copy_(tensor)
    # An element that was not written differs between the two copies.
    if not torch.equal(*copies):
        raise RuntimeError("its class does not copy it")
    return copy


def _has_memory(tensor: Tensor) -> bool:
    """Tells whether all elements of a strided tensor lie in its storage."""
    if tensor.numel() == 0:
        return True
    last = tensor.storage_offset() + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    storage = tensor.untyped_storage()
    return storage.data_ptr() != 0 and (last + 1) * tensor.itemsize <= storage.nbytes()


@contextlib.contextmanager
def _errors_named(tensor: Tensor, subject: str) -> Iterator[None]:
    """Turns every error that torch or a tensor's class raises about missing memory into one error that names the tensor."""
    try:
        yield
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AssertionError, AttributeError) as error:
        reason = (str(error).strip().splitlines() or [""])[0][:_MOST_SHOWN]
        raise _refused(subject, f"a {type(tensor).__name__} ({type(error).__name__}: {reason})") from error


def _without_memory(tensor: Tensor, subject: str) -> InvalidRequestError:
    return _refused(subject, f"a {type(tensor).__name__} whose memory is freed or elsewhere")


def _refused(
    subject: str, got: str, remedy: str = "gather, dequantize or copy it into an ordinary tensor first"
) -> InvalidRequestError:
    return InvalidRequestError(f"{subject} must have its elements in memory, got {got}; {remedy}.")
