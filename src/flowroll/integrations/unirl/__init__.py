"""flowroll as a rollout engine of UniRL, chosen by `_target_: flowroll.integrations.unirl.FlowrollEngineConfig`.

The engine is a client of a flowroll server, which has an environment of its own; UniRL's process needs flowroll's client alone.
It owns the translation between UniRL's `Sample` and flowroll's requests and rollouts, and of UniRL's calls about weights to the
server's routes. It must not know how UniRL schedules its workers.

- The driver's sigmas are sent verbatim, and compared with those that the rollouts were made with, bit for bit.
- x_T is `NoiseRecipe.from_sample(sample).resolve()`, sent as `latents`.
- The noise of the stochastic steps is keyed by sample id: its seed is that of `derive_denoise_step_seed` for step 0, folded to
  32 bits. It is not the noise that UniRL's own sampler draws.

Source: the wheel unirl 0.2.0, `unirl/rollout/engine/base.py`, `.../sglang_diffusion/engine.py` and `.../adapters/image.py`.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from flowroll.client import Client
from flowroll.errors import FlowrollError, MissingExtraError
from flowroll.types import Rollout
from flowroll.types.rules import require
from flowroll.wire.group import DestroyGroupRequest, InitGroupRequest, UpdateFromGroupRequest
from flowroll.wire.names import DESTROY_GROUP_ROUTE, INIT_GROUP_ROUTE, UPDATE_FROM_GROUP_ROUTE, UPDATE_FROM_TENSOR_ROUTE
from flowroll.wire.weight_updates import UpdateFromTensorRequest

try:
    from unirl.distributed.group.dispatch import Dispatch, distributed
    from unirl.rollout.engine.base import BaseEngineConfig, BaseRolloutEngine
    from unirl.sde.noise import derive_denoise_step_seed
    from unirl.sde.runtime import FlowMatchSchedulePolicy, ensure_sample_sigmas
    from unirl.types.noise_recipe import NoiseRecipe
    from unirl.types.primitives import Texts
    from unirl.types.sampling import DiffusionSamplingParams

    from flowroll.integrations.unirl.samples import NAME, PACKED, common_fields, filled, fold_seed, pack_latents
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] == "flowroll":
        raise
    raise MissingExtraError(
        f"flowroll.integrations.unirl must have unirl, got none ({error}); run: pip install unirl 'flowroll[client]'."
    ) from error

_PEFT_PREFIX, _COMPONENT_PREFIX = "base_model.model.", "transformer."


@dataclass
class FlowrollEngineConfig(BaseEngineConfig):  # type: ignore[misc]  # of a library without types
    """The `rollout.engine` of a UniRL experiment.

    Attributes:
        url: The server's URL, e.g. "http://127.0.0.1:30000".
        api_key: Its bearer token, if it demands one.
        timeout_s: The longest silence of the server, in seconds.
        max_requests: The number of prompts that are asked for at once.
        populate_conditions: Whether the text conditions are returned, which replay needs.
    """

    url: str = "http://127.0.0.1:30000"
    api_key: str | None = None
    timeout_s: float = 3600.0
    max_requests: int = 16
    populate_conditions: bool = True

    def make_engine(self, **deps: Any) -> FlowrollRolloutEngine:
        """Makes the engine; UniRL's other dependencies (device, ports, rank) concern engines on its own GPUs."""
        return FlowrollRolloutEngine(self, strategy=deps.get("strategy"), model_config=deps.get("model_config"))


class FlowrollRolloutEngine(BaseRolloutEngine):  # type: ignore[misc]
    """Fills UniRL samples with rollouts of a flowroll server.

    Args:
        config: Where the server is.
        strategy: UniRL's SDE strategy, which names the dynamics; None: forward processes alone.
        model_config: The model that UniRL trains; it is looked at where the driver has pinned no sigmas.
    """

    _component_name = NAME

    def __init__(self, config: FlowrollEngineConfig, *, strategy: Any = None, model_config: Any = None) -> None:
        super().__init__()
        require(config.max_requests >= 1, "max_requests", "be at least 1", config.max_requests, "use 16")
        self.cfg, self.strategy, self.model_config = config, strategy, model_config
        self._client = Client(config.url, api_key=config.api_key, timeout_s=config.timeout_s)
        self._threads = ThreadPoolExecutor(config.max_requests, thread_name_prefix="flowroll-unirl")
        self._numbers, self._running = itertools.count(), set[str]()
        self._lock = threading.Lock()
        self._lora_name: str | None = None
        self._family: str | None = None
        self._is_offloaded, self._is_shut_down = False, False
        self._version = 0

    @distributed(dispatch_mode=Dispatch.DP_SCATTER)  # type: ignore[untyped-decorator]
    def generate(self, sample: Any) -> Any:
        """Fills the last part of a sample: latents, sigmas, log-probs, text conditions and pictures.

        Raises:
            InvalidRequestError: The sample asks for what flowroll does not offer.
            RuntimeError: The rollouts were not made with the driver's sigmas.
            FlowrollError: The server raised any other error.
        """
        if self._is_shut_down:
            raise RuntimeError("the engine must run to generate, got a call after shutdown.")
        gen = sample.frontier_gen_part(DiffusionSamplingParams)
        self._pin_sigmas(sample)
        requests = self._requests(sample)
        futures = [self._threads.submit(self._ask, request) for request in requests]
        rollouts: list[Rollout] = []
        try:
            for future in futures:
                rollouts += future.result()
        except BaseException:
            for future in futures:
                future.cancel()
            self.abort()
            raise
        require(len(rollouts) == gen.batch_size, "rollouts", "be one per sample", len(rollouts), "look at the server")
        return self._stamp_output_version(filled(sample, rollouts, has_conditions=self.cfg.populate_conditions))

    def abort(self, ids: Sequence[str] | None = None) -> list[Any]:
        """Aborts what this engine has asked for; requests have no partial results."""
        with self._lock:
            running = list(self._running)
        for request_id in running:
            try:
                self._client.abort_request(request_id)
            except FlowrollError:
                # It ends all the same, only later.
                continue
        return []

    def pause(self) -> None:
        """Has the server refuse new requests until `resume`; what runs goes on."""
        self._client.post_object("/pause_generation", {})

    def resume(self) -> None:
        """Has the server take requests again."""
        self._client.post_object("/continue_generation", {})

    @distributed(dispatch_mode=Dispatch.BROADCAST)  # type: ignore[untyped-decorator]
    def sleep(self) -> None:
        """Releases the memory of the server's weights."""
        self._client.release_memory()
        self._is_offloaded = True

    @distributed(dispatch_mode=Dispatch.BROADCAST)  # type: ignore[untyped-decorator]
    def wake_up(self) -> None:
        """Restores the server's weights, with adapters."""
        self._client.resume_memory()
        self._is_offloaded = False

    @property
    def is_offloaded(self) -> bool:
        """Whether this engine has released the server's memory."""
        return self._is_offloaded

    def health_check(self) -> bool:
        """Whether the server answers that it is healthy."""
        try:
            self._client.health()
        except FlowrollError:
            return False
        return True

    def shutdown(self) -> None:
        """Aborts what runs and closes the connections; the server lives on. It may be called twice."""
        if self._is_shut_down:
            return
        self._is_shut_down = True
        self.abort()
        self._threads.shutdown(cancel_futures=True)
        self._client.close()

    # Weights

    def update_weights_from_tensor(
        self,
        *,
        serialized_named_tensors: list[str],
        target_modules: list[str] | None = None,
        load_format: str | None = None,
        flush_cache: bool = True,
        track_prefix: str = "",
    ) -> None:
        """Has the server take weights from this machine's shared memory or CUDA IPC; it must run with --allow-pickle-weights.

        The server has no cache of prompts that `flush_cache` could mean.
        """
        _check_prefix(track_prefix)
        self._client.post_object(
            UPDATE_FROM_TENSOR_ROUTE,
            UpdateFromTensorRequest(
                serialized_named_tensors=serialized_named_tensors,
                target_modules=target_modules,  # type: ignore[arg-type]  # the server says which there are
                load_format=load_format,  # type: ignore[arg-type]
            ),
        )

    def init_weights_update_group(
        self,
        *,
        master_address: str,
        master_port: int,
        rank_offset: int,
        world_size: int,
        group_name: str,
        backend: str = "nccl",
        track_prefix: str = "",
    ) -> None:
        """Has the server join the trainer's process group, as one member of rank `rank_offset`."""
        _check_prefix(track_prefix)
        self._client.post_object(
            INIT_GROUP_ROUTE,
            InitGroupRequest(
                master_address=master_address,
                master_port=master_port,
                rank_offset=rank_offset,
                world_size=world_size,
                group_name=group_name,
                backend=backend,  # type: ignore[arg-type]
            ),
        )

    def update_weights_from_distributed(
        self,
        *,
        names: list[str],
        dtypes: list[str],
        shapes: list[list[int]],
        group_name: str,
        target_modules: list[str] | None = None,
        flush_cache: bool = True,
        track_prefix: str = "",
    ) -> None:
        """Has the server receive a bucket from the process group: rank 0 broadcasts each tensor in this order."""
        _check_prefix(track_prefix)
        self._client.post_object(
            UPDATE_FROM_GROUP_ROUTE,
            UpdateFromGroupRequest(
                names=names,
                dtypes=dtypes,
                shapes=shapes,
                group_name=group_name,
                target_modules=target_modules,  # type: ignore[arg-type]
            ),
        )

    def destroy_weights_update_group(self, *, group_name: str, track_prefix: str = "") -> None:
        """Has the server leave the process group."""
        _check_prefix(track_prefix)
        self._client.post_object(DESTROY_GROUP_ROUTE, DestroyGroupRequest(group_name=group_name))

    def update_weights_from_ipc(
        self,
        *,
        peft_config: Mapping[str, Any] | None = None,
        base_sync_done: bool = False,
        use_shm: bool = False,
        track_prefix: str = "",
    ) -> None:
        """Is not offered: it is a channel of vLLM-Omni's workers.

        Raises:
            NotImplementedError: Always; the tensor sync is CUDA IPC too.
        """
        raise NotImplementedError(
            "flowroll receives CUDA IPC handles by update_weights_from_tensor; choose UniRL's tensor sync, the group, or LoRA."
        )

    def set_lora_from_tensors(
        self, adapter_name: str, lora_tensors: Mapping[str, Tensor], *, peft_config: Mapping[str, Any] | None = None
    ) -> None:
        """Sends the server an adapter, which all following rollouts run with; one of the same name is replaced.

        Args:
            adapter_name: Its name.
            lora_tensors: UniRL's canonical names, `<layer>.lora_A.weight`, behind "transformer." or peft's prefix or neither.
            peft_config: Its configuration in peft.

        Raises:
            InvalidRequestError: There is no configuration, which the rank and alpha of the adapter are read from.
            WeightsRejectedError: The adapter does not fit the model.
        """
        require(bool(peft_config), "peft_config", "be given", peft_config, "send model.peft_config[name].to_dict()")
        assert peft_config is not None
        named = {f"{_PEFT_PREFIX}{_layer_of(name)}": tensor for name, tensor in lora_tensors.items()}
        self._client.load_lora_adapter_from_tensors(named, peft_config, name=adapter_name)
        self._lora_name = adapter_name

    def loaded_param_checksums(self, *, names: list[str]) -> dict[int, list[dict[str, str]]]:
        """Returns the checksums of the server's modules, in the form of UniRL's verifier."""
        checksum: Any = self._client.weights_checksum
        return {0: [{name: str(checksum(name)) for name in names}]}

    # Requests

    def _pin_sigmas(self, sample: Any) -> None:
        """Has the model's own schedule where the driver has pinned none, as UniRL's engines do."""
        diffusion = sample.frontier_gen_part(DiffusionSamplingParams).sampling_params
        if diffusion.sigmas is not None:
            return
        model = self.model_config
        require(model is not None, "sigmas", "be pinned by the driver where there is no model_config", None, "pin them")
        policy = FlowMatchSchedulePolicy.from_pretrained(
            model.pretrained_model_ckpt_path,
            shift=float(model.shift),
            require_dynamic=bool(getattr(model, "use_dynamic_shifting", False)),
            dynamic_overrides=getattr(model, "dynamic_shift_overrides", None),
        )
        ensure_sample_sigmas(sample, policy)

    def _requests(self, sample: Any) -> list[dict[str, Any]]:
        """Returns a request for each run of samples of one prompt, in their order."""
        gen = sample.frontier_gen_part(DiffusionSamplingParams)
        diffusion = gen.sampling_params
        common = {
            **common_fields(diffusion, self.strategy),
            "rollout_return_denoising_env": self.cfg.populate_conditions,
            "lora_name": self._lora_name,
        }
        prompts = sample.text_conditioning()
        require(len(prompts) == 1, "prompts", "be one text per sample", len(prompts), "use a single text turn")
        texts = prompts[0].content
        assert isinstance(texts, Texts)
        recipe = NoiseRecipe.from_sample(sample)
        start = recipe.resolve()
        base_seed = int(diffusion.seed) if diffusion.seed is not None else 0
        own = [fold_seed(derive_denoise_step_seed(base_seed, 0, sample_id)) for sample_id in gen.sample_ids]
        shared = [fold_seed(derive_denoise_step_seed(base_seed, 0, key)) for key in recipe.noise_group_ids] or own
        requests, first = [], 0
        for text, group in itertools.groupby(texts.texts):
            last = first + len(list(group))
            request = {**common, "prompt": text, "seeds": own[first:last], "request_id": self._name_request()}
            if start is None:
                request["init_seed"] = shared[first:last]
            else:
                size = common["height"], common["width"]
                request["latents"] = pack_latents(start[first:last], *size, packed=self._is_packed())
            requests.append(request)
            first = last
        return requests

    def _is_packed(self) -> bool:
        """Whether the latents of the server's model are patches in a row."""
        if self._family is None:
            self._family = str(self._client.server_info()["family"])
        return self._family in PACKED

    def _name_request(self) -> str:
        return f"unirl-{id(self):x}-{next(self._numbers)}"

    def _ask(self, request: Mapping[str, Any]) -> list[Rollout]:
        request_id = str(request["request_id"])
        with self._lock:
            self._running.add(request_id)
        try:
            return self._client.rollout(**request)
        finally:
            with self._lock:
                self._running.discard(request_id)

    # Answers


def _layer_of(name: str) -> str:
    return name.removeprefix(_PEFT_PREFIX).removeprefix(_COMPONENT_PREFIX)


def _check_prefix(track_prefix: str) -> None:
    require(not track_prefix, "track_prefix", "be empty, a server has one model", track_prefix, "use one engine per model")
