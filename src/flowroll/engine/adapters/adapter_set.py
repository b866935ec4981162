"""The transformer with LoRA adapters: each adapter has its own tree of modules over the same weights.

    base:     transformer -> blocks -> attention -> to_q
    adapter:  transformer' -> blocks' -> attention' -> peft's layer(to_q), or to_q' with merged weights

Only the modules on the path to an adapted linear are copied, as Python objects. All other modules, and every weight that the
adapter does not change, are the base's own. So the base is the same as without adapters: it has no wrapper, no flag and no
other names. A forward uses the adapter whose tree it calls, without any state that must be set before. An update of the base's
weights takes effect in every tree.

peft itself finds the adapted linears and makes their layers, on a copy of the base without weights, so it may run while
requests run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from flowroll.engine.adapters.config import load_peft, lora_config, shape_key
from flowroll.engine.adapters.files import AdapterData, refused, unreadable
from flowroll.engine.adapters.pushed import PUSHED_ADAPTER, LoraFactors
from flowroll.engine.weights.staged import listed
from flowroll.errors import InvalidRequestError
from flowroll.exact import rebind_compiled, without_stand_in
from flowroll.families.checksums import layers_checksum
from flowroll.parallel.linears import ColumnParallelLinear
from flowroll.types import DEFAULT_POLICY, AdapterRecord, LoraAdapter, Number, all_finite

# The name that peft gives the adapter; each tree has one adapter.
_OWN = "default"
_MOST_TEMPLATES = 4
# The attributes of a module that hold the hooks around its forward.
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
        about: The description of the adapter: its name, version, checksum and sizes.
        layers: peft's layers, by the paths of the linears that they wrap.
        transformer: The transformer's tree with this adapter.
        base_changes: The number of changes of the base's weights before the adapter was made; it matters for a merged one.
    """

    about: LoraAdapter
    layers: Mapping[str, Any]
    transformer: nn.Module
    base_changes: int


class AdapterSet:
    """The adapters of one transformer. Only one thread may change it; any thread may read it.

    Args:
        transformer: The transformer in memory, or this rank's part of it.
    """

    def __init__(self, transformer: nn.Module) -> None:
        self._base = transformer
        self._loaded: Mapping[str, Adapter] = {}
        self._base_changes = 0
        # peft's layers without tensors, by their shape key, so that peft searches the layers of similar adapters only once.
        self._templates: Mapping[str, Mapping[str, Any]] = {}

    @property
    def loaded(self) -> tuple[LoraAdapter, ...]:
        """The loaded adapters, in the order of loading."""
        return tuple(adapter.about for adapter in self._loaded.values())

    @property
    def module_names(self) -> frozenset[str]:
        """The names of all modules of the transformer."""
        return frozenset(name for name, _ in self._base.named_modules())

    def parameters(self) -> Iterator[Tensor]:
        """Yields the parameters of all trees and layers, including shared ones of the base; some occur several times."""
        for adapter in self._loaded.values():
            for module in (adapter.transformer, *adapter.layers.values()):
                yield from module.parameters()

    def averaged(self, name: str, source: str, decay: Number | None) -> Adapter:
        """Makes decay x one adapter + (1 - decay) x another one, factor by factor, in float32; for None, a copy of the other.

        Args:
            name: The adapter that is averaged, and whose name the result has.
            source: The other adapter.
            decay: The share of the first one.

        Raises:
            InvalidRequestError: The two have other layers or ranks.
        """
        other = self._get(source)
        layers = {path: _empty_copy(layer) for path, layer in other.layers.items()}
        own = None if decay is None else self._get(name).layers
        if own is not None and _shapes(own) != _shapes(layers):
            raise InvalidRequestError(
                f"source must have the layers and ranks of the policy {name}, got others in {source}; drop the policy first.",
                field="source",
            )
        for path, layer in layers.items():
            for kind in ("lora_A", "lora_B"):
                factor = getattr(other.layers[path], kind)[_OWN].weight.detach()
                if own is None or decay is None:
                    mixed = factor.clone()
                else:
                    kept = getattr(own[path], kind)[_OWN].weight.detach().to(torch.float32)
                    mixed = (kept * decay).add_(factor.to(torch.float32), alpha=1 - decay)
                getattr(layer, kind)[_OWN].weight = nn.Parameter(mixed)
        num_bytes = sum(factor.nbytes for layer in layers.values() for factor in _factors(layer).values())
        sha256 = layers_checksum(layers.items(), _OWN)
        with torch.no_grad():
            return self._build(replace(other.about, name=name, sha256=sha256, num_bytes=num_bytes), layers)

    def transformer(self, name: str | None, policy: str | None = None) -> Any:
        """Returns the transformer with this adapter; for None, with the pushed adapter if there is one, otherwise the base.

        A policy beside the default decides instead of the name: it is an adapter, or the base.

        Raises:
            InvalidRequestError: The adapter is not loaded.
        """
        adapter = self._find(name, policy)
        return self._base if adapter is None else adapter.transformer

    def record(self, name: str | None, policy: str | None = None) -> AdapterRecord | None:
        """Returns what a sample's record says about the adapter that `transformer` has; None if there is none.

        Raises:
            InvalidRequestError: The adapter is not loaded.
        """
        adapter = self._find(name, policy)
        return None if adapter is None else adapter.about.record

    def factors(self, name: str) -> dict[str, LoraFactors]:
        """Returns the factors of an adapter by layer; an empty mapping if it is not loaded."""
        adapter = self._loaded.get(name)
        if adapter is None:
            return {}
        return {
            path: LoraFactors(down=layer.lora_A[_OWN].weight, up=layer.lora_B[_OWN].weight, alpha=layer.lora_alpha[_OWN])
            for path, layer in adapter.layers.items()
        }

    def check(self, config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> None:
        """Checks an adapter by its configuration and the shapes of its tensors, before their data is read.

        Raises:
            WeightsRejectedError: The adapter does not fit this transformer.
        """
        try:
            _check_fit(self._empty_layers(config), shapes)
        except (RuntimeError, MemoryError, OverflowError) as error:
            raise unreadable(error) from error

    def stage(self, data: AdapterData, *, name: str, merged: bool) -> Adapter:
        """Makes an adapter from data that was read, beside the loaded ones. It may run while the transformer runs.

        Raises:
            WeightsRejectedError: The adapter does not fit this transformer.
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
        """Returns a staged adapter, ready for `put`: with this version, and merged again if the base's weights have changed."""
        if staged.about.merged and staged.base_changes != self._base_changes:
            staged = self._again(staged)
        return replace(staged, about=replace(staged.about, version=version))

    def put(self, adapter: Adapter) -> None:
        """Adds an adapter, or replaces the one with the same name."""
        self._loaded = {**self._loaded, adapter.about.name: adapter}

    def drop(self, name: str) -> None:
        """Removes an adapter.

        Raises:
            InvalidRequestError: The adapter is not loaded.
        """
        self._get(name)
        self._loaded = {other: adapter for other, adapter in self._loaded.items() if other != name}

    def over_new_base(self) -> Mapping[str, Adapter]:
        """Returns all adapters over the base's current weights, with merged ones merged again, for `adopt`."""
        return {name: self._again(adapter) if adapter.about.merged else adapter for name, adapter in self._loaded.items()}

    def adopt(self, adapters: Mapping[str, Adapter]) -> None:
        """Puts the result of `over_new_base` into effect, and counts the change of the base's weights."""
        self._loaded = adapters
        self._base_changes += 1

    def _find(self, name: str | None, policy: str | None) -> Adapter | None:
        if policy not in (None, DEFAULT_POLICY):
            # A policy that is no adapter consists of weights, and of nothing beside them.
            return self._loaded.get(policy)
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
        # Read before the weights are, so that a change between the two counts as not yet seen, and the adapter is merged again.
        base_changes = self._base_changes
        if about.merged:
            placed = {path: _merged(layer, self._base.get_submodule(path)) for path, layer in layers.items()}
            about = replace(about, num_bytes=about.num_bytes + sum(_weight(linear).nbytes for linear in placed.values()))
        tree = _with_modules(self._base, placed)
        return Adapter(about=about, layers=layers, transformer=tree, base_changes=base_changes)


def _inject(base: nn.Module, config: Any) -> nn.Module:
    """Returns a copy of the base without weights, into which peft has put its layers as the configuration says."""
    peft = load_peft()
    try:
        # On the meta device, which is set for this thread only, peft's tensors take no memory and draw no random numbers.
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
    # Without parameters, because peft would change their flags.
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
    """Returns a copy of one of peft's layers, with its own modules for the factors."""
    copied = _with_own_modules(layer)
    for factor in ("lora_A", "lora_B"):
        own = _with_own_modules(getattr(layer, factor))
        own._modules[_OWN] = _with_own_parameters(getattr(layer, factor)[_OWN])
        copied._modules[factor] = own
    return copied


def _shapes(layers: Mapping[str, Any]) -> dict[str, Any]:
    return {
        path: (layer.scaling[_OWN], *(factor.shape for factor in _factors(layer).values())) for path, layer in layers.items()
    }


def _factors(layer: Any) -> dict[str, Tensor]:
    return {"lora_A.weight": layer.lora_A[_OWN].weight, "lora_B.weight": layer.lora_B[_OWN].weight}


def _check_fit(layers: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> None:
    """Checks that there is one tensor of the right shape for each factor of each layer, and no other."""
    expected = {f"{path}.{name}": factor for path, layer in layers.items() for name, factor in _factors(layer).items()}
    for rule, names in (
        ("hold tensors of the layers that its configuration names alone, got others:", set(shapes) - set(expected)),
        ("hold both factors of every layer that its configuration names, got none for", set(expected) - set(shapes)),
    ):
        if names:
            raise refused(f"the adapter must {rule} {listed(names)}; save it again, for the model that is served.")
    for name, factor in expected.items():
        if tuple(shapes[name]) != tuple(factor.shape):
            got = list(shapes[name])[:8]
            raise refused(f"the adapter must hold {name} as {list(factor.shape)}, got {got}; save it for this model.")


def _fill(layers: Mapping[str, Any], tensors: Mapping[str, Tensor], linears: Mapping[str, nn.Module]) -> None:
    """Puts the tensors into the layers, after checking all of them."""
    _check_fit(layers, {name: tensor.shape for name, tensor in tensors.items()})
    for name, tensor in tensors.items():
        if not all_finite(tensor):
            raise refused(f"the adapter must hold finite numbers, got NaN or infinity in {name}; look after the training.")
    for path, layer in layers.items():
        device = _weight(linears[path]).device
        for kind in ("lora_A", "lora_B"):
            # Not frozen, as a trainer has them, and because torch may choose other kernels for frozen weights.
            getattr(layer, kind)[_OWN].weight = nn.Parameter(tensors[f"{path}.{kind}.weight"].to(device))


def _put_over(layer: Any, linear: nn.Module) -> None:
    """Makes peft's layer wrap a linear of the base. The layer gets the linear's hooks, because they shard rows."""
    if any(getattr(linear, hooks) for hooks in _HOOKS):
        bare = _twin(linear)
        for hooks in _HOOKS:
            setattr(layer, hooks, getattr(linear, hooks))
            setattr(bare, hooks, type(getattr(linear, hooks))())
        linear = bare
    layer.base_layer = linear


def _merged(layer: Any, linear: nn.Module) -> nn.Module:
    """Returns a copy of the linear with the adapter added to a copy of its weight, by peft's own product."""
    weight, delta = _weight(linear).data.clone(), layer.get_delta_weight(_OWN)
    # In place, as peft merges: if the adapter has a wider dtype, only the sum is rounded.
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
    """Returns a shallow copy of a module. An adapter needs thousands, and this is eight times as fast as `copy.copy`."""
    twin = type(module).__new__(type(module))
    twin.__dict__.update(module.__dict__)
    rebind_compiled(twin)
    without_stand_in(twin)
    return twin


def _weight(linear: nn.Module) -> Tensor:
    weight = linear.weight
    assert isinstance(weight, Tensor)
    return weight


def _with_modules(module: nn.Module, placed: Mapping[str, nn.Module]) -> nn.Module:
    """Returns the tree with other modules at these paths; modules on the way to them are copied, all others are shared."""
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
