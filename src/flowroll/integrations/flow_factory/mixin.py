"""What turns a model adapter of Flow-Factory into one that rolls out on flowroll."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from flowroll.errors import InvalidRequestError
from flowroll.integrations.flow_factory.backends import Backend, ClientBackend, make_backend
from flowroll.integrations.flow_factory.run import Run
from flowroll.types.rules import require

# The policy of the weights that are being trained, and the names of Flow-Factory's other ones.
DEFAULT, EMA, REFERENCE = "default", "ema", "reference"


class FlowrollMixin:
    """What turns a model adapter of Flow-Factory into one that rolls out on flowroll; see `on_flowroll`."""

    flowroll_make_backend: Callable[[Any], Backend] | None = None
    _run: Run | None = None
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
        own_forward = super().forward if self._takes_own_log_probs() else None  # type: ignore[misc]
        self._run = run = Run(self, values.get("extra_call_back_kwargs") or (), own_forward)
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
        if self._run is None:
            return cast
        # Of weights in another dtype the engine's pipeline would have drawn x_T in its own.
        dtype = self.flowroll_backend.dtype
        rounded = cast if dtype == self.pipeline.transformer.dtype else cast.to(dtype)
        # It is stored beside the later states, and only one dtype stacks on every device.
        return rounded.float()

    def _takes_own_log_probs(self: Any) -> bool:
        """Whether log-probs are those of the adapter's own forward, under the autocast that its trainer has on."""
        chosen = (getattr(self.model_args, "extra_kwargs", None) or {}).get("flowroll_log_probs", "trainer")
        ok = chosen in ("trainer", "engine")
        require(ok, "flowroll_log_probs", 'be "trainer" or "engine"', chosen, "choose one of the two")
        return bool(chosen == "trainer")

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


def _by_name(method: Callable[..., Any], args: tuple[Any, ...], values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns all arguments of a call by their names, with the defaults of the method."""
    bound = inspect.signature(method).bind(*args, **values)
    bound.apply_defaults()
    return dict(bound.arguments)


def _policy_name(active: str) -> str:
    return f"flow-factory-{active}"
