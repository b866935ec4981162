"""Compiled blocks: the repeated blocks of a transformer, each run as kernels that torch's Inductor makes of it.

A compiled forward runs other kernels than an eager one and may have other last bits, so the two are two sets of kernels, each
with a name: the engine records the name, and replay refuses a transformer that runs another set. Within the compiled set bits
depend on nothing but the inputs: not on gradient mode, and not on the shapes that it was compiled for first.

No function mode of torch may be active in a compiled block. Samples of a compiled transformer run alone.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.fx.experimental._config
from torch import Tensor, nn

from flowroll.errors import InvalidRequestError
from flowroll.types.tensors import mesh_of

# Options of Inductor's, by name.
Settings: TypeAlias = Mapping[str, str | int | bool]
# What makes Inductor's kernels as independent as eager ones: roundings where eager kernels round, no choice by measured
# time or by the number of rows. On a CPU one thread, since the first shapes that are seen choose the division among threads.
EXACT_SETTINGS: Settings = {
    "emulate_precision_casts": True,
    "deterministic": True,
    "batch_invariant": True,
    "cpp.threads": 1,
}
# How often one kind of block may be compiled in a process: with gradients and without, for one entry and for several, for every
# width of model, dtype, number of CPU threads and kind of adapter. One more is an error of torch's, and nothing runs eagerly.
_MOST_COMPILATIONS = 64
# By default, sizes that are equal when a block is compiled are taken for one, and other shapes are compiled anew.
_EVERY_SIZE_FOR_ITSELF = torch.fx.experimental._config.patch(use_duck_shape=False)  # type: ignore[attr-defined]  # made at import
_CACHE = "TORCHINDUCTOR_CACHE_DIR"
# The transformers whose compiled blocks were shown to be exact among themselves, with gradients and without, whichever shape
# was compiled first, and the dtypes in which they were (tests/parity/test_compiled.py).
_PROVED = frozenset(
    {
        "Flux2Transformer2DModel",
        "FluxTransformer2DModel",
        "QwenImage21Transformer2DModel",
        "QwenImageTransformer2DModel",
        "SD3Transformer2DModel",
        "ZImageTransformer2DModel",
    }
)
_PROVED_DTYPES = frozenset({torch.bfloat16, torch.float32})

EAGER = "eager"


class CompiledBlock:
    """Stands for the `forward` of a block and runs it compiled. A copy of the block gets its own, which runs the copy."""

    def __init__(self, block: nn.Module, settings: Settings) -> None:
        self._block = block
        self.settings = settings

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the block: compiled, but for a call that is given numbers, each of which would be compiled anew."""
        forward = type(self._block).forward
        if _has_numbers((args, tuple(kwargs.values()))):
            return forward(self._block, *args, **kwargs)
        with _EVERY_SIZE_FOR_ITSELF:
            return _compiled(forward, tuple(self.settings.items()))(self._block, *map(_as_whole, args), **_as_whole(kwargs))


def compile_blocks(transformer: nn.Module, settings: Settings = EXACT_SETTINGS) -> nn.Module:
    """Makes the repeated blocks of a transformer run compiled, in place; the first call of each kind compiles it.

    The blocks are the members of the outermost lists of modules, as `transformer_blocks`. Every weight keeps its name. What
    was compiled is kept on disk for the next process, in the folder that TORCHINDUCTOR_CACHE_DIR names, by default
    flowroll/inductor in the user's cache folder.

    Args:
        transformer: A transformer of diffusers, not in a wrapper of peft's.
        settings: Options of Inductor's. With others than the exact ones, any transformer is compiled, and nothing is promised.

    Returns:
        The same transformer.

    Raises:
        InvalidRequestError: This torch has not all of the settings, there is no C++ compiler, the weights are sharded, or the
            transformer's class was not proved, or not in its dtype, or something else has replaced the `forward` of a block.
    """
    check_can_compile(_device_of(transformer), settings)
    if settings == EXACT_SETTINGS:
        _check_proved(transformer)
    if any(mesh_of(weight) is not None for weight in transformer.parameters()):
        raise _unfit("transformer", "have whole weights to be compiled", "sharded ones", "leave compile out")
    blocks = list(_repeated_blocks(transformer))
    if not blocks or _is_compiled_otherwise(transformer):
        raise _unfit(
            "transformer", "have repeated blocks that nothing else compiles", type(transformer).__name__, "load it anew"
        )
    for block in blocks:
        if (found := block.__dict__.get("forward")) is not None and not isinstance(found, CompiledBlock):
            other = f"{type(block).__name__} whose forward is {found}"
            raise _unfit("transformer", "have blocks with a forward of their class", other, "remove that wrapper first")
        block.forward = CompiledBlock(block, settings)
    return transformer


def rebind_compiled(copied: nn.Module) -> None:
    """Makes a shallow copy of a compiled block run itself, and not the block that it was copied from."""
    if isinstance(found := copied.__dict__.get("forward"), CompiledBlock):
        copied.forward = CompiledBlock(copied, found.settings)


def is_compiled(transformer: object) -> bool:
    """Tells whether any part of a transformer runs compiled, by `compile_blocks` or otherwise."""
    return isinstance(transformer, nn.Module) and (
        _is_compiled_otherwise(transformer) or any(settings is not None for settings in _own(transformer))
    )


def eager_modules(module: nn.Module) -> Iterator[nn.Module]:
    """Yields the modules of a transformer that are not in a compiled block."""
    if not isinstance(module.__dict__.get("forward"), CompiledBlock):
        yield module
        for child in module.children():
            yield from eager_modules(child)


def kernels_of(transformer: object) -> str | None:
    """Returns the name of the kernels that a transformer runs; None for compiled ones whose settings are not known.

    Of a callable that is no module nothing can be known; it counts as eager.
    """
    if not isinstance(transformer, nn.Module) or not is_compiled(transformer):
        return EAGER
    if _is_compiled_otherwise(transformer):
        return None
    first, *others = _own(transformer)
    if first is None or any(settings != first for settings in others):
        return None
    return compiled_kernels(_device_of(transformer), first)


def compiled_kernels(device: torch.device, settings: Settings = EXACT_SETTINGS) -> str:
    """Returns the name of the kernels that `compile_blocks` makes on a device: torch, settings and, on a CPU, the compiler."""
    words = [f"compiled by torch {torch.__version__}", *(f"{name}={value}" for name, value in settings.items())]
    return "; ".join([*words, _cpp_compiler()] if device.type == "cpu" else words)


def check_can_compile(device: torch.device, settings: Settings = EXACT_SETTINGS) -> None:
    """Refuses a machine that cannot compile blocks.

    Raises:
        InvalidRequestError: This torch has not all of the settings, or there is no C++ compiler for a CPU.
    """
    import torch._inductor

    if missing := sorted(set(settings) - set(torch._inductor.list_options())):
        raise _unfit("compile", f"have Inductor's {', '.join(missing)}", f"torch {torch.__version__}", "install torch 2.13")
    if device.type == "cpu":
        _cpp_compiler()


def _check_proved(transformer: nn.Module) -> None:
    kind = type(transformer).__name__
    dtypes = {weight.dtype for block in _repeated_blocks(transformer) for weight in block.parameters()}
    if kind not in _PROVED or len(dtypes) > 1 or not dtypes <= _PROVED_DTYPES:
        rule = f"be off but for what was proved ({', '.join(sorted(_PROVED))}, each in {_named(*_PROVED_DTYPES, of='or')})"
        raise _unfit("compile", rule, f"{kind} in {_named(*dtypes)}", "leave compile out")


def _named(*dtypes: torch.dtype, of: str = "and") -> str:
    return f" {of} ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))


def _device_of(transformer: nn.Module) -> torch.device:
    return next((weight.device for weight in transformer.parameters()), torch.device("cpu"))


def _own(transformer: nn.Module) -> list[Settings | None]:
    """Returns the settings of every repeated block; None for one that runs eagerly."""
    forwards = (block.__dict__.get("forward") for block in _repeated_blocks(transformer))
    return [forward.settings if isinstance(forward, CompiledBlock) else None for forward in forwards]


def _is_compiled_otherwise(transformer: nn.Module) -> bool:
    """Tells whether torch.compile was called on the transformer or on one of its modules."""
    return any(module._compiled_call_impl is not None or "_orig_mod" in module._modules for module in transformer.modules())


def _repeated_blocks(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        yield from child if isinstance(child, nn.ModuleList) else _repeated_blocks(child)


def _has_numbers(value: Any) -> bool:
    """Tells whether an argument holds whole numbers, as the bounds of a text among tokens."""
    return type(value) in (int, slice) or (type(value) in (tuple, list) and any(map(_has_numbers, value)))


def _as_whole(value: Any) -> Any:
    """Returns an argument whose tensors are not known as parts of others, which would be kinds of their own to compile.

    So would be a tensor that does not begin where its memory does, which is copied, and the strides that a part has in
    dimensions of size 1.
    """
    if isinstance(value, Tensor):
        if value.storage_offset():
            return value.clone(memory_format=torch.contiguous_format)
        if not value._is_view():
            return value
        return torch.ops.aten._unsafe_view.default(value.flatten() if value.is_contiguous() else value, value.shape)
    if type(value) in (tuple, list):
        return type(value)(map(_as_whole, value))
    return {name: _as_whole(part) for name, part in value.items()} if type(value) is dict else value


@lru_cache(maxsize=64)
def _compiled(forward: Callable[..., Any], settings: tuple[tuple[str, str | int | bool], ...]) -> Callable[..., Any]:
    """Returns a block's forward, compiled. Blocks of one class share what was compiled, whichever transformer they are of."""
    os.environ.setdefault(_CACHE, str(_cache_folder()))
    compiled: Callable[..., Any] = torch.compile(
        forward, fullgraph=True, dynamic=True, options=dict(settings), recompile_limit=_MOST_COMPILATIONS
    )  # type: ignore[call-overload]  # its stub lacks recompile_limit
    return compiled


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flowroll" / "inductor"


@cache
def _cpp_compiler() -> str:
    """Returns the name and version of the C++ compiler, on which the bits of CPU kernels may depend.

    Raises:
        InvalidRequestError: There is none.
    """
    from torch._inductor import cpp_builder, exc

    try:
        path = cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        raise _unfit("compile", "have a C++ compiler on a CPU", "none", "install g++, or leave compile out") from None
    version = re.search(r"(gcc|clang) version ([\d.]+)", cpp_builder.get_compiler_version_info(path))
    return " ".join(version.groups()) if version else Path(path).name


def _unfit(field: str, rule: str, value: object, remedy: str) -> InvalidRequestError:
    return InvalidRequestError(f"{field} must {rule}, got {value}; {remedy}.", field=field)
