"""What a replica's server needs of verl's configuration, checked before a model is loaded."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flowroll.errors import InvalidRequestError
from flowroll.types import Layout
from flowroll.types.rules import is_finite, require

# What `engine_kwargs.flowroll` may hold.
_KNOWN = ("variant", "device", "layout", "gather_ms", "abort_drain_s", "max_group")
# How long an abort waits for running samples, in seconds, as in verl-omni, whose variable is read too.
_DRAIN_S, _DRAIN_VARIABLE = 120.0, "VERL_OMNI_ABORT_DRAIN_TIMEOUT_S"
_MAX_GATHER_MS = 10_000.0
_ADAPTERS = ("default", "old")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """How a replica's server runs.

    Attributes:
        model: The checkpoint folder, or the name of a checkpoint that flowroll ships.
        algorithm: The algorithm of the model's configuration, e.g. "flow_grpo".
        adapter: Which of the trainer's adapters samples are made with, "default" or "old".
        dtype: The dtype of the weights.
        layout: How the transformer is distributed over the replica's devices.
        variant: The variant of the model family; None: the checkpoint's own.
        device: The device, or "auto".
        gather_s: How long a sample waits for others of its prompt, in seconds.
        max_group: The most samples of one request to the engine.
        abort_drain_s: How long `abort_all_requests` waits for running samples, in seconds.
        frees_memory: Whether the memory of the weights is released while the trainer trains.
        mode: The mode of the replica: "hybrid", "colocated" or "standalone".
        replica_rank: The number of the replica.
    """

    model: str
    algorithm: str = "flow_grpo"
    adapter: str = "default"
    dtype: str = "auto"
    layout: Layout = field(default_factory=Layout)
    variant: str | None = None
    device: str = "auto"
    gather_s: float = 0.005
    max_group: int = 64
    abort_drain_s: float = _DRAIN_S
    frees_memory: bool = True
    mode: str = "hybrid"
    replica_rank: int = 0

    @property
    def sleeps(self) -> bool:
        """Whether `sleep` and `wake_up` do anything: a standalone replica has its devices to itself."""
        return self.frees_memory and self.mode != "standalone"


def server_options(config: Any, model_config: Any, *, mode: str, replica_rank: int = 0) -> ServerOptions:
    """Reads verl's configuration.

    Args:
        config: The configuration of the rollout: a mapping, or a dataclass of verl's.
        model_config: The configuration of the model, likewise.
        mode: The mode of the replica.
        replica_rank: The number of the replica.

    Raises:
        InvalidRequestError: A value is wrong, or asks for what flowroll does not do.
    """
    own = read(read(config, "engine_kwargs") or {}, "flowroll") or {}
    for name in own:
        known = ", ".join(_KNOWN)
        require(name in _KNOWN, "engine_kwargs.flowroll", f"hold some of {known}", name, "remove that name")
    for name in ("data_parallel_size", "pipeline_model_parallel_size", "expert_parallel_size"):
        size = read(config, name)
        require(size in (None, 1), f"rollout.{name}", "be 1 for flowroll", size, "make more replicas, or shard with tp and sp")
    quantization = read(config, "quantization")
    require(quantization is None, "rollout.quantization", "be left out for flowroll", quantization, "remove it")
    ranks = read(config, "tensor_model_parallel_size") or 1
    layout = Layout.parse(own["layout"]) if own.get("layout") else Layout(tp=ranks)
    rule = f"be a product of {ranks} ranks, as rollout.tensor_model_parallel_size says"
    require(layout.num_ranks == ranks, "engine_kwargs.flowroll.layout", rule, layout.name, "change one of the two")
    gather_ms = _number(own, "gather_ms", 5.0, most=_MAX_GATHER_MS)
    drain_s = _number(own, "abort_drain_s", _drain_s(), most=86_400.0)
    max_group = own.get("max_group", 64)
    ok = isinstance(max_group, int) and not isinstance(max_group, bool) and max_group >= 1
    require(ok, "engine_kwargs.flowroll.max_group", "be an integer >= 1", max_group, "leave it out for 64")
    return ServerOptions(
        model=_model(model_config),
        algorithm=read(model_config, "algorithm") or "flow_grpo",
        adapter=_adapter(config, model_config),
        dtype=read(config, "dtype") or "auto",
        layout=layout,
        variant=own.get("variant"),
        device=own.get("device") or "auto",
        gather_s=gather_ms / 1000,
        max_group=max_group,
        abort_drain_s=drain_s,
        frees_memory=bool(read(config, "free_cache_engine")),
        mode=mode,
        replica_rank=replica_rank,
    )


def read(config: Any, name: str) -> Any:
    """Returns a value of a mapping or of an object, or None where there is none or it is not set."""
    if config is None:
        return None
    try:
        return config.get(name) if isinstance(config, Mapping) or hasattr(config, "get") else getattr(config, name, None)
    except Exception as error:  # omegaconf raises its own for a value that must be given and was not
        if type(error).__name__ == "MissingMandatoryValue":
            return None
        raise


def _model(model_config: Any) -> str:
    path = read(model_config, "local_path") or read(model_config, "path")
    require(isinstance(path, str) and path != "", "model.path", "be the folder of a checkpoint", path, "set it")
    assert isinstance(path, str)
    if Path(path).exists() or "/" not in path or importlib.util.find_spec("verl_omni") is None:
        return path
    try:
        resolve = importlib.import_module("verl_omni.utils.fs").resolve_model_local_dir
        return str(resolve(path))
    except Exception as error:
        raise InvalidRequestError(
            f"model.path must be a folder, or a model that verl-omni can fetch, got {path[:200]} ({error}); fetch it first.",
            field="model.path",
        ) from error


def _adapter(config: Any, model_config: Any) -> str:
    """Returns `rollout.rollout_adapter`; the old policy of verl-omni is an adapter beside the one in training."""
    has_adapters = bool(read(model_config, "lora_rank") or read(model_config, "lora_adapter_path"))
    # verl-omni would send the weights under the adapter first, and sends those of FSDP2's blocks alone.
    load_format = read(config, "load_format") or ""
    rule, remedy = "be safetensors for a model with LoRA", "set it: the checkpoint is loaded in any case"
    require(not has_adapters or "dummy" not in load_format, "rollout.load_format", rule, load_format, remedy)
    adapter = read(config, "rollout_adapter") or "default"
    require(
        adapter in _ADAPTERS, "rollout.rollout_adapter", f"be one of {', '.join(_ADAPTERS)}", adapter, "choose one of these"
    )
    if adapter != "default":
        held = tuple(read(model_config, "policy_state_adapters") or ("default",))
        rule, remedy = "be one of model.policy_state_adapters", "set policy_state_adapters=[default,old]"
        require(adapter in held, "rollout.rollout_adapter", rule, adapter, remedy)
        require(has_adapters, "rollout.rollout_adapter", "be default for a model without LoRA", adapter, "set model.lora_rank")
    return str(adapter)


def _drain_s() -> float:
    given = os.environ.get(_DRAIN_VARIABLE)
    try:
        return _DRAIN_S if given is None else float(given)
    except ValueError:
        raise InvalidRequestError(
            f"{_DRAIN_VARIABLE} must be a number of seconds, got {given!r}; unset it for 120.", field=_DRAIN_VARIABLE
        ) from None


def _number(own: Any, name: str, default: float, *, most: float) -> float:
    value = own.get(name)
    value = default if value is None else value
    ok = is_finite(value) and 0 <= value <= most
    require(ok, f"engine_kwargs.flowroll.{name}", f"be a number from 0 to {most:g}", value, "leave it out for the default")
    return float(value)
