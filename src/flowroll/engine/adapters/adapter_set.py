"""The transformer with LoRA adapters: one more tree of modules for each, over the same weights.

    base:     transformer -> blocks -> attention -> to_q
    adapter:  transformer' -> blocks' -> attention' -> peft's layer(to_q), or to_q with merged weights

Only the modules on the way to an adapted linear are copied, as Python objects; all others, and every weight that the adapter
does not change, are the base's own. So the base has no wrapper, no flag and no other name than without adapters; a forward uses
the adapter whose tree it calls, and no state has to be set before it; an update of the base's weights is seen by every tree.

peft itself finds the adapted linears and makes their layers, on a copy of the base that has no weights: it may run while
requests do.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from flowroll.engine.adapters.config import load_peft, lora_config, shape_key
from flowroll.engine.adapters.files import AdapterData, refused, unreadable
from flowroll.engine.adapters.pushed import PUSHED_ADAPTER, LoraFactors
from flowroll.engine.weights.staged import listed
from flowroll.errors import InvalidRequestError
from flowroll.families.checksums import layers_checksum
from flowroll.parallel.linears import ColumnParallelLinear
from flowroll.types import AdapterRecord, LoraAdapter

# peft's name of the adapter, in trees that have one each.
_OWN = "default"
_MOST_TEMPLATES = 4
# What a module calls around its forward.
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Adapter:
    """An adapter in memory.

    Attributes:
        about: What is said of it.
        layers: peft's layers by the paths of the linears below them.
        transformer: The tree that runs with it.
        base_changes: Changes of the base's weights that a merged one has seen.
    """

    about: LoraAdapter
    layers: Mapping[str, Any]
    transformer: nn.Module
    base_changes: int


class AdapterSet:
    """The adapters of one transformer. One thread changes it, any may read.

    Args:
        transformer: In memory, or this rank's part of it.
    """

    def __init__(self, transformer: nn.Module) -> None:
        self._base = transformer
        self._loaded: Mapping[str, Adapter] = {}
        self._base_changes = 0
        # peft's layers without tensors, by what shapes them: an adapter that is loaded again and again is found once.
        self._templates: Mapping[str, Mapping[str, Any]] = {}

    @property
    def loaded(self) -> tuple[LoraAdapter, ...]:
        """What there is, in the order of loading."""
        return tuple(adapter.about for adapter in self._loaded.values())

    @property
    def module_names(self) -> frozenset[str]:
        """Names of the modules of the transformer."""
        return frozenset(name for name, _ in self._base.named_modules())

    def parameters(self) -> Iterator[Tensor]:
        """Of all trees and layers; those of the base are among them, and some come several times."""
        for adapter in self._loaded.values():
            for module in (adapter.transformer, *adapter.layers.values()):
                yield from module.parameters()

    def transformer(self, name: str | None) -> Any:
        """What runs with this adapter; None: with the one that a trainer has pushed, or the base.

        Raises:
            InvalidRequestError: It is not loaded.
        """
        adapter = self._find(name)
        return self._base if adapter is None else adapter.transformer

    def record(self, name: str | None) -> AdapterRecord | None:
        """What a sample's record says of it.

        Raises:
            InvalidRequestError: It is not loaded.
        """
        adapter = self._find(name)
        return None if adapter is None else adapter.about.record

    def factors(self, name: str) -> dict[str, LoraFactors]:
        """The factors of an adapter by layer; none if it is not loaded."""
        adapter = self._loaded.get(name)
        if adapter is None:
            return {}
        return {
            path: LoraFactors(down=layer.lora_A[_OWN].weight, up=layer.lora_B[_OWN].weight, alpha=layer.lora_alpha[_OWN])
            for path, layer in adapter.layers.items()
        }

    def stage(self, data: AdapterData, *, name: str, merged: bool) -> Adapter:
        """Makes an adapter of what was read, beside those that are loaded; may run while the transformer does.

        Raises:
            WeightsRejectedError: It is none of this transformer's.
        """
        try:
            with torch.no_grad():
                layers = self._empty_layers(data.config)
                linears = {path: self._base.get_submodule(path) for path in layers}
                _fill(layers, data.tensors, linears)
                about = LoraAdapter(
                    name=name,
                    version="",
                    sha256=layers_checksum(layers.items(), _OWN),
                    merged=merged,
                    num_layers=len(layers),
                    num_bytes=sum(tensor.nbytes for tensor in data.tensors.values()),
                )
                for path, layer in layers.items():
                    _put_over(layer, linears[path])
                return self._build(about, layers)
        except (RuntimeError, MemoryError, OverflowError) as error:
            raise unreadable(error) from error

    def finished(self, staged: Adapter, version: str) -> Adapter:
        """A staged adapter as it is to be put: of this version, and over the base's weights of now."""
        if staged.about.merged and staged.base_changes != self._base_changes:
            staged = self._again(staged)
        return replace(staged, about=replace(staged.about, version=version))

    def put(self, adapter: Adapter) -> None:
        """Adds it, or replaces the one of its name."""
        self._loaded = {**self._loaded, adapter.about.name: adapter}

    def drop(self, name: str) -> None:
        """Forgets it.

        Raises:
            InvalidRequestError: It is not loaded.
        """
        self._get(name)
        self._loaded = {other: adapter for other, adapter in self._loaded.items() if other != name}

    def over_new_base(self) -> Mapping[str, Adapter]:
        """All adapters over the base's weights of now: merged ones merged again. For `adopt`, once the change is certain."""
        return {name: self._again(adapter) if adapter.about.merged else adapter for name, adapter in self._loaded.items()}

    def adopt(self, adapters: Mapping[str, Adapter]) -> None:
        """Takes the result of `over_new_base`."""
        self._loaded = adapters
        self._base_changes += 1

    def _find(self, name: str | None) -> Adapter | None:
        return self._loaded.get(PUSHED_ADAPTER) if name is None else self._get(name)

    def _get(self, name: str) -> Adapter:
        adapter = self._loaded.get(name)
        if adapter is None:
            known = f"one of {listed(self._loaded)}" if self._loaded else "a loaded adapter, of which there is none"
            raise InvalidRequestError(
                f"lora_name must be {known}, got {name}; load it first, or leave it out for the model as it is.",
                field="lora_name",
            )
        return adapter

    def _empty_layers(self, config: Mapping[str, Any]) -> dict[str, Any]:
        chosen, key = lora_config(config), shape_key(config)
        found = self._templates.get(key)
        if found is None:
            found = _layers(_inject(self._base, chosen))
            recent = list(self._templates.items())[1 - _MOST_TEMPLATES :]
            self._templates = {**dict(recent), key: found}
        return {path: _empty_copy(layer) for path, layer in found.items()}

    def _again(self, adapter: Adapter) -> Adapter:
        bare = sum(factor.nbytes for layer in adapter.layers.values() for factor in _factors(layer).values())
        with torch.no_grad():
            return self._build(replace(adapter.about, num_bytes=bare), adapter.layers)

    def _build(self, about: LoraAdapter, layers: Mapping[str, Any]) -> Adapter:
        placed: Mapping[str, nn.Module] = layers
        # Read before the weights: a change that comes between is seen as one that has not been.
        base_changes = self._base_changes
        if about.merged:
            placed = {path: _merged(layer, self._base.get_submodule(path)) for path, layer in layers.items()}
            about = replace(about, num_bytes=about.num_bytes + sum(_weight(linear).nbytes for linear in placed.values()))
        tree = _with_modules(self._base, placed)
        return Adapter(about=about, layers=layers, transformer=tree, base_changes=base_changes)


def _inject(base: nn.Module, config: Any) -> nn.Module:
    """A copy of the base without weights, in which peft has put its layers where the configuration says."""
    peft = load_peft()
    try:
        # The device is this thread's own: what peft makes takes no memory, and no random numbers.
        with torch.device("meta"):
            skeleton = peft.inject_adapter_in_model(config, _skeleton(base), adapter_name=_OWN)
    except (ValueError, TypeError, KeyError, NotImplementedError, AttributeError, OverflowError, re.error) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise refused(f"adapter_config.json must fit {type(base).__name__}, got {reason}; save the adapter again.") from error
    return skeleton.eval()  # type: ignore[no-any-return]


def _skeleton(module: nn.Module) -> nn.Module:
    if isinstance(module, nn.Linear | ColumnParallelLinear):
        return nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
    copied = _twin(module)
    # peft changes flags of parameters; these are not to be found.
    copied._parameters = {}
    copied._modules = {name: None if child is None else _skeleton(child) for name, child in module._modules.items()}
    return copied


def _layers(skeleton: nn.Module) -> dict[str, Any]:
    from peft.tuners.lora import Linear, LoraLayer

    layers = {path: module for path, module in skeleton.named_modules() if isinstance(module, LoraLayer)}
    if odd := [path for path, layer in layers.items() if type(layer) is not Linear]:
        raise refused(f"target_modules must name linears alone, got {listed(odd)}; leave the others out.")
    return layers


def _empty_copy(layer: Any) -> Any:
    """Another of peft's layers, with modules for its factors that nobody else has."""
    copied = _with_own_modules(layer)
    for factor in ("lora_A", "lora_B"):
        own = _with_own_modules(getattr(layer, factor))
        own._modules[_OWN] = _with_own_parameters(getattr(layer, factor)[_OWN])
        copied._modules[factor] = own
    return copied


def _factors(layer: Any) -> dict[str, Tensor]:
    return {"lora_A.weight": layer.lora_A[_OWN].weight, "lora_B.weight": layer.lora_B[_OWN].weight}


def _fill(layers: Mapping[str, Any], tensors: Mapping[str, Tensor], linears: Mapping[str, nn.Module]) -> None:
    """Gives the layers their tensors, all of which are checked first."""
    expected = {f"{path}.{name}": factor for path, layer in layers.items() for name, factor in _factors(layer).items()}
    for rule, names in (
        ("hold tensors of the layers that its configuration names alone, got others:", set(tensors) - set(expected)),
        ("hold both factors of every layer that its configuration names, got none for", set(expected) - set(tensors)),
    ):
        if names:
            raise refused(f"the adapter must {rule} {listed(names)}; save it again, for the model that is served.")
    for name, factor in expected.items():
        if tensors[name].shape != factor.shape:
            got = list(tensors[name].shape)[:8]
            raise refused(f"the adapter must hold {name} as {list(factor.shape)}, got {got}; save it for this model.")
        if not tensors[name].isfinite().all():
            raise refused(f"the adapter must hold finite numbers, got NaN or infinity in {name}; look after the training.")
    for path, layer in layers.items():
        device = _weight(linears[path]).device
        for kind in ("lora_A", "lora_B"):
            # Not frozen, for the same reason as the weights below, and as a trainer has them.
            getattr(layer, kind)[_OWN].weight = nn.Parameter(tensors[f"{path}.{kind}.weight"].to(device))


def _put_over(layer: Any, linear: nn.Module) -> None:
    """Puts peft's layer over a linear of the base. What is hooked to the linear is hooked to the layer: it is about rows."""
    if any(getattr(linear, hooks) for hooks in _HOOKS):
        bare = _twin(linear)
        for hooks in _HOOKS:
            setattr(layer, hooks, getattr(linear, hooks))
            setattr(bare, hooks, type(getattr(linear, hooks))())
        linear = bare
    layer.base_layer = linear


def _merged(layer: Any, linear: nn.Module) -> nn.Module:
    """The linear with the adapter added to a copy of its weight, by peft's own product."""
    weight, delta = _weight(linear).data.clone(), layer.get_delta_weight(_OWN)
    # In place, as peft merges: of a wider adapter only the sum is rounded.
    weight += delta[linear.own_columns] if isinstance(linear, ColumnParallelLinear) else delta
    copied = _with_own_parameters(linear)
    copied.weight = nn.Parameter(weight, requires_grad=_weight(linear).requires_grad)
    return copied


def _with_own_parameters(module: nn.Module) -> nn.Module:
    copied = _twin(module)
    copied.__dict__["_parameters"] = dict(module._parameters)
    return copied


def _with_own_modules(module: nn.Module) -> nn.Module:
    copied = _twin(module)
    copied.__dict__["_modules"] = dict(module._modules)
    return copied


def _twin(module: nn.Module) -> nn.Module:
    """Another module with the same attributes. `copy.copy`, eight times as fast, of which an adapter needs thousands."""
    twin = type(module).__new__(type(module))
    twin.__dict__.update(module.__dict__)
    return twin


def _weight(linear: nn.Module) -> Tensor:
    weight = linear.weight
    assert isinstance(weight, Tensor)
    return weight


def _with_modules(module: nn.Module, placed: Mapping[str, nn.Module]) -> nn.Module:
    """The same tree with others at these paths; what lies on the way to them is copied, everything else shared."""
    if "" in placed:
        return placed[""]
    below: dict[str, dict[str, nn.Module]] = {}
    for path, other in placed.items():
        child, _, rest = path.partition(".")
        below.setdefault(child, {})[rest] = other
    copied = _with_own_modules(module)
    for name, own in below.items():
        child_module = module._modules[name]
        assert child_module is not None
        copied._modules[name] = _with_modules(child_module, own)
    return copied
