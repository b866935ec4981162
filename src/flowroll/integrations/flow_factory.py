"""Model adapters of Flow-Factory whose `inference` runs on flowroll, in this process or over HTTP.

Flow-Factory takes any dotted path as the type of its model: `flowroll.integrations.flow_factory.QwenImageAdapter` as
`model_type` is all that a configuration needs. The adapter's own `inference` makes its samples: it encodes the prompts, draws
x_T and keeps what it is asked to keep. Only its transformer does not run: at the first step the whole trajectory is rolled out
on flowroll, and each step is answered from it.

Reference: src/flow_factory/models/abc.py, models/*/*.py, scheduler/flow_match_euler_discrete.py and trainers/ of
X-GenGroup/Flow-Factory at a0b2bc5a.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from flowroll.errors import InvalidRequestError
from flowroll.types import Rollout, SamplingParams
from flowroll.types.rules import require

if TYPE_CHECKING:
    from flowroll.client import Client
    from flowroll.engine import Engine

# The adapters of Flow-Factory whose models flowroll has, and the modules that they are in.
ADAPTERS: Mapping[str, str] = {
    "QwenImageAdapter": "flow_factory.models.qwen_image.qwen_image",
    "SD3_5Adapter": "flow_factory.models.stable_diffusion.sd3_5",
    "ZImageAdapter": "flow_factory.models.z_image.z_image",
    "Flux1Adapter": "flow_factory.models.flux.flux1",
}
_DYNAMICS: Mapping[str, str] = {"Flow-SDE": "sde", "Dance-SDE": "dance", "CPS": "cps", "ODE": "ode"}
# The policy of the weights that are being trained, and the names of Flow-Factory's other ones.
DEFAULT, EMA, REFERENCE = "default", "ema", "reference"
# What a step's callbacks may ask for, with the field of a request that returns it.
_RETURNED: Mapping[str, str] = {"noise_pred": "velocity", "next_latents_mean": "mean", "std_dev_t": "std"}
_MAX_REQUESTS = 16


class Backend(Protocol):
    """Where samples are rolled out."""

    def rollouts(self, requests: Sequence[SamplingParams]) -> list[Rollout]:
        """Runs requests of one sample each, in their order."""
        ...

    def update_weights(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        """Takes new weights of the transformer."""
        ...

    def load_adapter(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any], name: str) -> None:
        """Loads an adapter, or replaces the one of that name."""
        ...

    def copy_policy(self, name: str) -> None:
        """Keeps the weights that were taken last under a name."""
        ...


class EngineBackend:
    """Rolls out on an engine of this process."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def rollouts(self, requests: Sequence[SamplingParams]) -> list[Rollout]:
        """See `Backend`. All requests are under way together, and share forwards."""
        plans = [self.engine.plan(request) for request in requests]
        futures = [self.engine.submit(plan, "rollout") for plan in plans]
        try:
            return [rollout for future in futures for rollout in future.result()]
        except BaseException:
            for future in futures:
                self.engine.scheduler.cancel(future)
            raise

    def update_weights(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        """See `Backend`."""
        self.engine.update_weights_from_tensors(weights)

    def load_adapter(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any], name: str) -> None:
        """See `Backend`."""
        self.engine.load_lora_adapter_from_tensors(tensors, config, name=name)

    def copy_policy(self, name: str) -> None:
        """See `Backend`."""
        self.engine.copy_policy(name)


class ClientBackend:
    """Rolls out on a server."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self._pool = ThreadPoolExecutor(max_workers=_MAX_REQUESTS, thread_name_prefix="flowroll-rollout")

    def rollouts(self, requests: Sequence[SamplingParams]) -> list[Rollout]:
        """See `Backend`. Sixteen requests are under way at a time."""
        answers = self._pool.map(self.client.rollout, requests)
        return [rollout for answer in answers for rollout in answer]

    def update_weights(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        """See `Backend`."""
        self.client.update_weights(weights)

    def load_adapter(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any], name: str) -> None:
        """See `Backend`."""
        self.client.load_lora_adapter_from_tensors(dict(tensors), dict(config), name=name)

    def copy_policy(self, name: str) -> None:
        """See `Backend`."""
        self.client.copy_policy(name)


class _Run:
    """One call of `inference`: its trajectories, and which step comes next.

    Args:
        adapter: The adapter.
        keys: What the call's callbacks ask for.
    """

    def __init__(self, adapter: Any, keys: Sequence[str]) -> None:
        self._adapter, self._keys = adapter, tuple(key for key in keys if key in _RETURNED)
        self._step = 0
        self.rollouts: list[Rollout] = []

    def step(self, values: Mapping[str, Any]) -> Any:
        """Answers the call of `forward` for the next step, in the way of the scheduler."""
        if not self.rollouts:
            self.rollouts = self._adapter.flowroll_backend.rollouts(self._requests(values))
        step, self._step = self._step, self._step + 1
        device = values["latents"].device
        trajectories = [one.dit_trajectory for one in self.rollouts if one.dit_trajectory is not None]
        assert len(trajectories) == len(values["latents"])
        # One for each sample, in as many dimensions as the latents have.
        shape = (len(trajectories), *[1] * trajectories[0].latents[0].ndim)
        dt = (trajectories[0].sigmas[step + 1] - trajectories[0].sigmas[step]).expand(shape)
        made: dict[str, Any] = {
            "next_latents": torch.stack([one.latents[step + 1].float() for one in trajectories]).to(device),
            "dt": dt.to(device),
        }
        if values.get("compute_log_prob"):
            rows = [one.log_probs[step] for one in self.rollouts if one.log_probs is not None]
            made["log_prob"] = torch.stack(rows).to(device)
        for key in self._keys:
            field = _RETURNED[key]
            rows = [one.step_tensors.tensors[field][step] for one in self.rollouts if one.step_tensors is not None]
            stacked = torch.stack(rows).to(device)
            made[key] = self._std_dev(stacked.reshape(shape), made["dt"]) if key == "std_dev_t" else stacked
        scheduler = importlib.import_module("flow_factory.scheduler")
        return scheduler.SDESchedulerOutput(**made)

    def _std_dev(self, std: Tensor, dt: Tensor) -> Tensor:
        """Returns what Flow-Factory has as `std_dev_t`: without the square root of the step's length, but for CPS."""
        return std if self._adapter.scheduler.dynamics_type == "CPS" else std / torch.sqrt(-dt)

    def images(self) -> Tensor:
        """Returns the pictures, float32 in [0, 1], [batch, colors, height, width]."""
        pictures = [one.image[:, 0] for one in self.rollouts if isinstance(one.image, Tensor)]
        return torch.stack(pictures).to(self._adapter.device)

    def _requests(self, values: Mapping[str, Any]) -> list[SamplingParams]:
        """Makes a request for each sample of the batch, which begins with the adapter's own x_T and embeddings."""
        scheduler, latents = self._adapter.scheduler, values["latents"]
        for name, usual in (("cfg_normalization", False), ("cfg_truncation", 1.0)):
            given = values.get(name, usual)
            require(given == usual, name, f"be {usual} for flowroll", given, "leave it at its default")
        height, width = self._adapter.flowroll_size
        common = {
            "height": height,
            "width": width,
            "sigmas": tuple(scheduler.sigmas.tolist()),
            **_dynamics(scheduler),
            **self._adapter.flowroll_policy_fields(),
            "rollout_return_dit_trajectory": True,
            "return_fields": tuple(_RETURNED[key] for key in self._keys) or None,
        }
        # Of torch's own generator, from which Flow-Factory's scheduler draws its noise.
        seeds = torch.randint(2**32, (len(latents),)).tolist()
        return [
            SamplingParams(**common, **_prompt(values, index), latents=_start(latents[index]), seed=seeds[index])
            for index in range(len(latents))
        ]


class FlowrollMixin:
    """What turns a model adapter of Flow-Factory into one that rolls out on flowroll; see `on_flowroll`."""

    flowroll_make_backend: Callable[[Any], Backend] | None = None
    _run: _Run | None = None
    _backend: Backend | None = None

    @property
    def flowroll_backend(self) -> Backend:
        """Where samples are rolled out; made when it is first asked for."""
        if self._backend is None:
            self._backend = (type(self).flowroll_make_backend or make_backend)(self)
        return self._backend

    # Sampling

    def inference(self: Any, *args: Any, **values: Any) -> Any:
        """Makes samples as the adapter does, with trajectories of flowroll."""
        own = super().inference  # type: ignore[misc]
        values = _by_name(own, args, values)
        self._sync()
        self.flowroll_size = int(values["height"]), int(values["width"])
        self._run = run = _Run(self, values.get("extra_call_back_kwargs") or ())
        try:
            samples = own(**values)
        finally:
            self._run = None
        for sample, rollout in zip(samples, run.rollouts, strict=True):
            sample.extra_kwargs["flowroll_noise_seed"] = rollout.seed
            sample.extra_kwargs["flowroll_weight_version"] = rollout.weight_version
        return samples

    def forward(self: Any, *args: Any, **values: Any) -> Any:
        """Answers a step of `inference` from its trajectory; in training it is the adapter's own."""
        own = super().forward  # type: ignore[misc]
        return own(*args, **values) if self._run is None else self._run.step(_by_name(own, args, values))

    def decode_latents(self: Any, *args: Any, **values: Any) -> Any:
        """Returns the pictures of `inference`; outside of it, it is the adapter's own."""
        return super().decode_latents(*args, **values) if self._run is None else self._run.images()  # type: ignore[misc]

    def cast_latents(self: Any, latents: Tensor, *args: Any, **values: Any) -> Tensor:
        """Keeps the states of a trajectory as they are, since their log-probs are those of these bits."""
        if self._run is not None and self._run.rollouts:
            return latents
        cast: Tensor = super().cast_latents(latents, *args, **values)  # type: ignore[misc]
        return cast

    # Weights

    def train(self: Any, mode: bool = True) -> None:
        """Notes that the weights are about to change."""
        if mode:
            self._stale(DEFAULT)
        super().train(mode)  # type: ignore[misc]

    def ema_step(self: Any, *args: Any, **values: Any) -> Any:
        """Notes that the moving average is about to change."""
        self._stale(EMA)
        return super().ema_step(*args, **values)  # type: ignore[misc]

    def add_named_parameters(self: Any, name: str, *args: Any, **values: Any) -> Any:
        """Notes that a named copy is about to change."""
        self._stale(name)
        return super().add_named_parameters(name, *args, **values)  # type: ignore[misc]

    def update_named_parameters(self: Any, name: str, *args: Any, **values: Any) -> Any:
        """Notes that a named copy is about to change."""
        self._stale(name)
        return super().update_named_parameters(name, *args, **values)  # type: ignore[misc]

    def load_checkpoint(self: Any, *args: Any, **values: Any) -> Any:
        """Notes that all weights are about to change."""
        self.__dict__.pop("_synced", None)
        return super().load_checkpoint(*args, **values)  # type: ignore[misc]

    @contextlib.contextmanager
    def use_ema_parameters(self: Any) -> Iterator[None]:
        """Has samples made with the moving average, where there is one."""
        with super().use_ema_parameters(), self._policy(EMA if getattr(self, "ema_wrapper", None) else None):  # type: ignore[misc]
            yield

    @contextlib.contextmanager
    def use_ref_parameters(self: Any) -> Iterator[None]:
        """Has samples made with the weights from before the training, where there are any."""
        is_lora = self.model_args.finetune_type == "lora"
        there = is_lora or getattr(self, "_ref_ema", None) is not None
        with super().use_ref_parameters(), self._policy(REFERENCE if there else None):  # type: ignore[misc]
            yield

    @contextlib.contextmanager
    def use_named_parameters(self: Any, name: str) -> Iterator[None]:
        """Has samples made with a named copy of the weights."""
        with super().use_named_parameters(name), self._policy(name):  # type: ignore[misc]
            yield

    @contextlib.contextmanager
    def _policy(self: Any, name: str | None) -> Iterator[None]:
        require(name != DEFAULT, "name", f"not be {DEFAULT!r}, which are the weights in training", name, "choose another")
        before = self.__dict__.get("_active", DEFAULT)
        self._active = before if name is None else name
        try:
            yield
        finally:
            self._active = before

    def _stale(self: Any, name: str) -> None:
        self.__dict__.setdefault("_synced", set()).discard(name)

    def flowroll_policy_fields(self: Any) -> dict[str, str]:
        """Returns the fields of a request that choose the policy which is active."""
        active = self.__dict__.get("_active", DEFAULT)
        if self.model_args.finetune_type == "lora":
            return {} if active == REFERENCE else {"lora_name": _policy_name(active)}
        return {} if active == DEFAULT else {"policy": _policy_name(active)}

    def _sync(self: Any) -> None:
        """Sends the active policy's weights if they have changed since they were sent. All ranks call it together."""
        active, synced = self.__dict__.get("_active", DEFAULT), self.__dict__.setdefault("_synced", set())
        is_lora = self.model_args.finetune_type == "lora"
        if active in synced or (is_lora and active == REFERENCE):
            return
        if self.transformer_names != ["transformer"] or set(self.target_module_map) - {"transformer"}:
            raise InvalidRequestError(
                f"target_components must be the transformer alone for flowroll, got {sorted(self.target_module_map)}; "
                "train nothing else.",
                field="target_components",
            )
        # Whole weights are gathered by all ranks. Each rank has an engine of its own, or the first one sends to the server.
        state = self.get_state_dict(self.get_component("transformer"))
        sends = not isinstance(self.flowroll_backend, ClientBackend) or self.accelerator.is_main_process
        if sends and is_lora:
            self._send_adapter(state, _policy_name(active))
        elif sends:
            self.flowroll_backend.update_weights(iter(state.items()))
            if active != DEFAULT:
                self.flowroll_backend.copy_policy(_policy_name(active))
        self.accelerator.wait_for_everyone()
        if self.mode != "train":
            # In training weights change between two calls, and nothing says so.
            synced.add(active)
        if not is_lora and active != DEFAULT:
            # The weights in place are now this policy's.
            synced.discard(DEFAULT)

    def _send_adapter(self: Any, state: Mapping[str, Tensor], name: str) -> None:
        config = self.get_component_unwrapped("transformer").peft_config["default"].to_dict()
        factors = {key.replace(".default.", "."): value for key, value in state.items() if "lora_" in key}
        self.flowroll_backend.load_adapter(factors, config, name)


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


def make_backend(adapter: Any) -> Backend:
    """Makes the backend that an adapter's configuration names.

    `flowroll_url` under `model` is the address of a server; without it an engine is made in this process, on the adapter's
    device and with the dtype of its transformer.
    """
    extra = getattr(adapter.model_args, "extra_kwargs", None) or {}
    if url := extra.get("flowroll_url"):
        from flowroll.client import Client

        return ClientBackend(Client(url, api_key=extra.get("flowroll_api_key")))
    from flowroll.engine import Engine

    dtype = str(adapter.pipeline.transformer.dtype).removeprefix("torch.")
    variant = extra.get("flowroll_variant")
    return EngineBackend(
        Engine(adapter.model_args.model_name_or_path, variant=variant, dtype=dtype, device=str(adapter.device))
    )


def __getattr__(name: str) -> Any:
    """Makes the adapter of a name in `ADAPTERS` when it is first asked for, which imports Flow-Factory."""
    if name not in ADAPTERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    made = on_flowroll(getattr(importlib.import_module(ADAPTERS[name]), name))
    globals()[name] = made
    return made


def _with_signature_of(own: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(own)
    def method(self: Any, *args: Any, **values: Any) -> Any:
        return ours(self, *args, **values)

    return method


def _by_name(method: Callable[..., Any], args: tuple[Any, ...], values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns all arguments of a call by their names, with the defaults of the method."""
    bound = inspect.signature(method).bind(*args, **values)
    bound.apply_defaults()
    return dict(bound.arguments)


def _policy_name(active: str) -> str:
    return f"flow-factory-{active}"


def _dynamics(scheduler: Any) -> dict[str, Any]:
    """Returns the dynamics and the noise level of each step, as the scheduler has them for its seed."""
    kind = scheduler.dynamics_type
    known = ", ".join(_DYNAMICS)
    require(kind in _DYNAMICS, "dynamics_type", f"be one of {known}", kind, "choose one of these")
    if scheduler.is_eval or kind == "ODE":
        return {"rollout_sde_type": "ode", "rollout_noise_level": 0}
    levels = scheduler.get_noise_levels().double().tolist()
    # In the scheduler's own number, of which its tensor holds float32.
    exact = tuple(float(scheduler.noise_level) if level else 0 for level in levels)
    return {
        "rollout_sde_type": _DYNAMICS[kind],
        "rollout_noise_levels": exact,
        "rollout_log_prob_no_const": kind == "CPS",
    }


def _start(latents: Tensor) -> Tensor:
    """Returns x_T on the CPU; what Flow-Factory stores in float16 is given in float32."""
    given = latents.detach().cpu()
    return given.float() if given.dtype == torch.float16 else given


def _prompt(values: Mapping[str, Any], index: int) -> dict[str, Any]:
    """Returns the embeddings of one sample, without padding, and the guidance scale."""
    found: dict[str, Any] = {}
    for prefix in ("", "negative_"):
        embeds = values.get(f"{prefix}prompt_embeds")
        if embeds is None:
            continue
        row, mask = embeds[index], values.get(f"{prefix}prompt_embeds_mask")
        found[f"{prefix}prompt_embeds"] = (row if mask is None else row[mask[index].bool()]).detach().cpu()
        pooled = values.get(f"{prefix}pooled_prompt_embeds")
        if pooled is not None:
            found[f"{prefix}pooled_prompt_embeds"] = pooled[index].detach().cpu()
    scale = values.get("guidance_scale")
    scale = scale[index] if isinstance(scale, list | tuple | Tensor) and len(torch.as_tensor(scale).shape) else scale
    return _guided(found, None if scale is None else float(scale), embeds_scale="img_ids" in values)


def _guided(found: dict[str, Any], scale: float | None, *, embeds_scale: bool) -> dict[str, Any]:
    """Adds the guidance scale; without a negative prompt there is no guidance, but for a model that is given the scale."""
    if embeds_scale:
        return {**found, "guidance_scale": scale}
    if "negative_prompt_embeds" not in found:
        return {**found, "guidance_scale": 0.0}
    return {**found, "guidance_scale": scale}
