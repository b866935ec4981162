"""The functions of torch that have a rule in a shared forward, by what is known about them.

Each claim is tested: `tests/unit/exact/test_functions.py` computes every element-wise function, and every reduction of rows, in
batches of many shapes and compares the bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_OWNERS = (torch, Tensor, F, torch._C._nn, torch.special)


def functions(*names: str) -> frozenset[Callable[..., Any]]:
    """Returns torch's functions of these names: in `torch`, in `torch.nn.functional`, and as methods of tensors."""
    found = set()
    for name in names:
        owners = (Tensor,) if name.startswith("__") else _OWNERS
        these = {getattr(owner, name) for owner in owners if callable(getattr(owner, name, None))}
        assert these, name
        found |= these
    return frozenset(found)


def named(func: Any) -> str:
    """Returns the name of a function for a message."""
    return str(getattr(func, "__name__", None) or repr(func))


# Functions that return a property of a tensor other than its numbers.
METADATA = functions(
    *("size", "dim", "ndimension", "numel", "nelement", "__len__", "stride", "storage_offset", "is_contiguous", "get_device"),
    *("is_floating_point", "is_complex", "is_signed", "element_size", "data_ptr", "is_same_size", "__hash__", "result_type"),
    "requires_grad_",
)

# Functions of one correctly rounded operation, or a choice, per element (for real numbers).
ELEMENTWISE = functions(
    *("add", "__add__", "__radd__", "sub", "__sub__", "__rsub__", "rsub", "mul", "__mul__", "__rmul__", "div", "true_divide"),
    *("__truediv__", "__rtruediv__", "__rdiv__", "neg", "negative", "__neg__", "abs", "absolute", "__abs__", "square"),
    *("maximum", "minimum", "clamp", "clip", "relu", "sqrt", "reciprocal", "floor", "ceil", "round", "trunc", "sign"),
    *("eq", "ne", "lt", "le", "gt", "ge", "__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "isnan", "isinf"),
    *("logical_not", "logical_and", "logical_or", "logical_xor", "__invert__", "__and__", "__or__", "isfinite"),
)

# Functions that move or convert numbers, element by element. Dropout that is off does so; dropout that is on draws numbers,
# which ends the shared forward.
COPIES = functions(
    *("to", "type_as", "float", "half", "bfloat16", "double", "int", "long", "bool", "clone", "contiguous", "detach"),
    *("where", "masked_fill", "dropout", "view_as_real", "view_as_complex", "complex", "zeros_like", "ones_like", "full_like"),
)

# Functions that use the numbers of the first argument alone; of another one they use the dtype and the device.
CASTS = functions("to", "type_as")

# Functions of several operations per element, whose code differs for the last elements of a tensor.
POINTWISE = functions(
    *("silu", "gelu", "tanh", "sigmoid", "exp", "expm1", "log", "log1p", "sin", "cos", "erf", "softplus", "mish", "elu"),
    *("logsigmoid", "addcmul", "addcdiv", "lerp", "polar", "atan2", "__pow__", "__rpow__", "hardtanh", "leaky_relu"),
)

# Reductions, and norms, that go row by row along the last dimension.
SUMS = functions("mean", "sum")
ROW_REDUCTIONS = SUMS | functions("softmax", "log_softmax", "amax", "amin")
ROW_NORMS = functions("layer_norm", "rms_norm")

# Convolutions, and what else a VAE computes along other dimensions than the last.
CONVOLUTIONS = functions("conv2d", "conv3d")
GROUP_NORM, NORMALIZE, INTERPOLATE = (functions(name) for name in ("group_norm", "normalize", "interpolate"))

# Views that keep or move dimensions; the first sample's own view tells whether the samples still come first.
VIEWS = functions("transpose", "swapaxes", "permute", "movedim", "unsqueeze", "squeeze", "narrow", "select", "diagonal")
VIEW = functions("view", "view_as")
EXPAND = functions("expand", "expand_as", "broadcast_to")
RESHAPES = VIEW | EXPAND | functions("reshape", "reshape_as", "flatten", "unflatten", "ravel")
UNBINDS = functions("unbind", "__iter__")
SECTIONS = UNBINDS | functions("chunk", "split", "tensor_split", "split_with_sizes")
INDEXING = functions("__getitem__")

JOINS = functions("cat", "concat", "concatenate", "stack")
# Functions that make a batch from a list of entries.
GATHERS = JOINS | {torch._C._nn.pad_sequence}

# Functions that make a tensor whose numbers do not depend on its size.
FACTORIES = functions(
    *("zeros", "ones", "full", "empty", "arange", "tensor", "eye", "meshgrid", "zeros_like", "ones_like", "full_like"),
    *(
        "cat",
        "stack",
        "clone",
        "repeat",
        "repeat_interleave",
        "tile",
        "pad",
        "where",
        "embedding",
        "index_select",
        "roll",
        "flip",
    ),
) | {torch._C._nn.pad_sequence}
NEW = functions("new_zeros", "new_ones", "new_full", "new_empty", "new_tensor", "empty_like")

# Functions that write numbers unchanged.
WRITES = functions("__setitem__", "fill_", "zero_", "copy_", "masked_fill_", "index_fill_")

# Functions that are always computed for each sample, so that no number among their arguments is taken for a batch length.
PER_SAMPLE = functions(
    *("matmul", "__matmul__", "mm", "bmm", "addmm", "baddbmm", "einsum", "conv1d", "conv2d", "conv3d", "group_norm", "cumsum"),
    *(
        "sort",
        "var",
        "std",
        "var_mean",
        "norm",
        "prod",
        "max",
        "min",
        "argmax",
        "embedding",
        "repeat_interleave",
        "flip",
        "roll",
    ),
    *("interpolate", "avg_pool2d", "pixel_shuffle", "pixel_unshuffle", "outer", "gather", "topk", "index_select", "cumprod"),
)
