"""Model adapters of Flow-Factory whose `inference` runs on flowroll, in this process or over HTTP.

Flow-Factory takes any dotted path as the type of its model: `flowroll.integrations.flow_factory.QwenImageAdapter` as
`model_type` is all that a configuration needs. The adapter's own `inference` makes its samples: it encodes the prompts, draws
x_T and keeps what it is asked to keep. Only its transformer does not run: at the first step the whole trajectory is rolled out
on flowroll, and each step is answered from it.

Reference: src/flow_factory/models/abc.py, models/*/*.py, scheduler/flow_match_euler_discrete.py and trainers/ of
X-GenGroup/Flow-Factory at a0b2bc5a.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any

from flowroll.errors import MissingExtraError
from flowroll.integrations.flow_factory.backends import Backend, ClientBackend, EngineBackend, make_backend
from flowroll.integrations.flow_factory.mixin import FlowrollMixin

__all__ = ["ADAPTERS", "Backend", "ClientBackend", "EngineBackend", "FlowrollMixin", "make_backend", "on_flowroll"]

# The adapters of Flow-Factory whose models flowroll has, and the modules that they are in.
ADAPTERS: Mapping[str, str] = {
    "QwenImageAdapter": "flow_factory.models.qwen_image.qwen_image",
    "SD3_5Adapter": "flow_factory.models.stable_diffusion.sd3_5",
    "ZImageAdapter": "flow_factory.models.z_image.z_image",
    "Flux1Adapter": "flow_factory.models.flux.flux1",
}


def on_flowroll(base: type, backend: Callable[[Any], Backend] | None = None) -> type:
    """Makes a model adapter that rolls out on flowroll of one of Flow-Factory's.

    Args:
        base: The class of the adapter, whose model flowroll must have.
        backend: Makes the backend of an adapter; None: `make_backend`.

    Returns:
        A subclass of the same name.
    """
    # Flow-Factory passes the arguments that the signatures name.
    own: dict[str, Any] = {"__module__": __name__, "__doc__": base.__doc__, "flowroll_make_backend": backend}
    for name in ("inference", "forward", "decode_latents"):
        own[name] = _with_signature_of(getattr(base, name), getattr(FlowrollMixin, name))
    if backend is not None:
        own["flowroll_make_backend"] = staticmethod(backend)
    made = type(base.__name__, (FlowrollMixin, base), {})
    for name, value in own.items():
        setattr(made, name, value)
    return made


def __getattr__(name: str) -> Any:
    """Makes the adapter of a name in `ADAPTERS` when it is first asked for, which imports Flow-Factory."""
    if name not in ADAPTERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(ADAPTERS[name])
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "flow_factory":
            raise
        raise MissingExtraError(
            f"flowroll.integrations.flow_factory must have Flow-Factory, got none ({ADAPTERS[name]}); install "
            "github.com/X-GenGroup/Flow-Factory and run: pip install 'flowroll[flow-factory]'."
        ) from error
    made = on_flowroll(getattr(module, name))
    globals()[name] = made
    return made


def _with_signature_of(own: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(own)
    def method(self: Any, *args: Any, **values: Any) -> Any:
        return ours(self, *args, **values)

    return method
