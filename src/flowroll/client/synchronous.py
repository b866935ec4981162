"""The blocking client."""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping, Sequence
from os import PathLike
from types import TracebackType
from typing import Any, TypeVar

import httpx
from torch import Tensor

from flowroll.client import calls, exchange, pushing
from flowroll.client.calls import UpdateMode
from flowroll.client.exchange import Call
from flowroll.client.pushing import NamedTensors
from flowroll.errors import ServerConnectionError, ShuttingDownError
from flowroll.replay.scoring import Scores
from flowroll.types import (
    AdapterChange,
    GeneratedImage,
    LoraAdapter,
    MemoryChange,
    Number,
    Rollout,
    SamplingParams,
    WeightUpdate,
)
from flowroll.wire.codec import WireFormat

T = TypeVar("T")


class Client:
    """Talks to one flowroll server. Threads may share it. A context manager: `close` closes its connections.

    With msgpack, the large tensors of an answer lie in one buffer, which lives as long as any of them: clone what you keep
    of an answer whose rest you drop.

    Args:
        base_url: E.g. "http://127.0.0.1:30000".
        api_key: The server's bearer token, if it demands one.
        timeout_s: Longest silence of the server; a rollout is silent while it is made.
        wire_format: "msgpack", or "json", which is larger and slower, and easy to look at.
        transport: Another httpx transport, e.g. to an app in this process.

    Raises:
        InvalidRequestError: The URL or the key cannot be used in HTTP.
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None = None,
        timeout_s: Number = exchange.DEFAULT_TIMEOUT_S,
        wire_format: WireFormat = "msgpack",
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._http = httpx.Client(**exchange.client_options(base_url, api_key), transport=transport)
        self._timeout_s = timeout_s
        self._wire_format: WireFormat = wire_format

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections; may be called twice."""
        self._http.close()

    def rollout(self, params: SamplingParams | None = None, /, **values: Any) -> list[Rollout]:
        """Rolls out one request: one `Rollout` per sample.

        Args:
            params: The request, of which what differs from the defaults is sent; or give the fields by name.
            **values: Fields of `SamplingParams`; only what is given is sent.

        Raises:
            InvalidRequestError: A value breaks a rule.
            QueueFullError: Too many requests wait; carries `retry_after_s`.
            ServerConnectionError: The server cannot be reached, or broke off.
            FlowrollError: Whatever else the server raised.
        """
        return self._send(calls.rollout_call(params, values, self._wire_format))

    def generate(self, params: SamplingParams | None = None, /, **values: Any) -> list[GeneratedImage]:
        """Plain text-to-image generation: one `GeneratedImage` per sample.

        Args:
            params: The request, without rollout fields; or give the fields by name.
            **values: Fields of `SamplingParams` that are no rollout fields.

        Raises:
            FlowrollError: As for `rollout`.
        """
        return self._send(calls.generate_call(params, values, self._wire_format))

    def update_weights_from_disk(
        self,
        path: str | PathLike[str],
        *,
        module: str = "transformer",
        weight_version: str | None = None,
        mode: UpdateMode = "drain",
    ) -> WeightUpdate:
        """Has the server take new weights from its disk: all of them, or, whatever goes wrong, none.

        Args:
            path: On the server's disk, absolute, inside a folder of its --weights-root: a checkpoint folder, the module's own,
                or one .safetensors file.
            module: "transformer" or "vae".
            weight_version: Of the new weights; None: the server counts.
            mode: As for `update_weights`.

        Raises:
            ForbiddenError: The server may not read there.
            WeightsRejectedError: Files that cannot be read to their end, or are not the module's. Everything is as it was.
            FlowrollError: As for `rollout`.
        """
        return self._send(calls.update_from_disk_call(path, module, weight_version, mode))

    def update_weights(
        self,
        named_tensors: NamedTensors,
        *,
        module: str = "transformer",
        weight_version: str | None = None,
        mode: UpdateMode = "drain",
        bucket_bytes: int = pushing.BUCKET_BYTES,
        partial: bool = False,
    ) -> WeightUpdate:
        """Sends the server new weights over HTTP: it takes all of them, or, whatever goes wrong, none.

        They go in buckets, while the server goes on with its requests; its weights change at the end, between two requests.

        Args:
            named_tensors: By the names of the module's state_dict, e.g. `trainer.state_dict()`, or a generator of pairs; on any
                device. Only one bucket of them is held at a time, and none is copied as a whole. Of a trainer sharded by
                FSDP2 (DTensors), every rank makes this call with `trainer.state_dict()`: all gather, the first rank of the
                mesh sends, and every rank gets the same answer or error.
            module: "transformer" or "vae".
            weight_version: Of the new weights; None: the server counts.
            mode: What becomes of the requests that run there: "drain": they finish first; "abort": they are done again, wholly,
                with the new weights.
            bucket_bytes: Size of a bucket; at most the server's --max-weights-body-bytes.
            partial: Whether what is not sent stays as it is; otherwise it is an error.

        Raises:
            WeightsRejectedError: The tensors are not the module's. Everything is as it was.
            WeightsBusyError: Another update is under way.
            FlowrollError: As for `rollout`. After a `ServerConnectionError` at the end, `server_info` tells the version.
        """
        steps = pushing.push_weights(
            named_tensors,
            module=module,
            weight_version=weight_version,
            partial=partial,
            mode=mode,
            bucket_bytes=bucket_bytes,
        )
        return self._send_all(steps)

    def weights_checksum(self, module: str = "transformer") -> str:
        """sha256 over the server's weights; `flowroll.replay.weights_checksum` is the same for a trainer's module.

        Args:
            module: "transformer", "text_encoder" or "vae".
        """
        return self._send(calls.checksum_call(module))

    def verify_weights(self, expected: Mapping[str, str], *, module: str = "transformer") -> int:
        """Has the server compare its weights with the trainer's, tensor by tensor.

        Args:
            expected: sha256 of every tensor by its name, as `flowroll.replay.tensor_checksums` makes them.
            module: "transformer", "text_encoder" or "vae".

        Returns:
            How many tensors were compared.

        Raises:
            WeightsMismatchError: It names those that differ, are missing or unknown.
        """
        return self._send(calls.verify_call(expected, module))

    def load_lora_adapter(
        self,
        path: str | PathLike[str],
        *,
        name: str,
        merged: bool = False,
        weight_version: str | None = None,
        mode: UpdateMode = "drain",
    ) -> AdapterChange:
        """Has the server load a LoRA adapter, or replace the one of that name; requests choose it by `lora_name`.

        Args:
            path: On the server's disk, absolute, inside a folder of its --weights-root: what peft's `save_pretrained` wrote.
            name: Printable text of 1 to 128 characters.
            merged: Add it to a copy of the weights that it changes, instead of running it beside them.
            weight_version: Of the server's weights from now on; None: the server counts.
            mode: As for `update_weights`.

        Raises:
            ForbiddenError: The server may not read there.
            WeightsRejectedError: No plain LoRA adapter of the server's model, or there is no room. Everything is as it was.
            FlowrollError: As for `rollout`.
        """
        return self._send(calls.load_adapter_call(name, path, merged, weight_version, mode))

    def load_lora_adapter_from_tensors(
        self,
        tensors: Mapping[str, Tensor],
        config: Mapping[str, Any],
        *,
        name: str,
        merged: bool = False,
        weight_version: str | None = None,
        mode: UpdateMode = "drain",
    ) -> AdapterChange:
        """Sends the server a LoRA adapter; see `load_lora_adapter`.

        Args:
            tensors: `peft.get_peft_model_state_dict(model)`; sharded ones as for `update_weights`.
            config: `model.peft_config["default"].to_dict()`.
            name: See `load_lora_adapter`, as for the rest.
            merged: The same.
            weight_version: The same.
            mode: The same.
        """
        return self._send_all(pushing.push_adapter(tensors, config, name, merged, weight_version, mode))

    def unload_lora_adapter(self, name: str, *, weight_version: str | None = None, mode: UpdateMode = "drain") -> AdapterChange:
        """Has the server forget an adapter.

        Args:
            name: Of the adapter.
            weight_version: Of the server's weights from now on; None: the server counts.
            mode: As for `update_weights`.
        """
        return self._send(calls.unload_adapter_call(name, weight_version, mode))

    def lora_adapters(self) -> list[LoraAdapter]:
        """The server's adapters, in the order of loading."""
        return self._send(calls.adapters_call())

    def release_memory(self, mode: str = "offload") -> MemoryChange:
        """Has the server release the memory of its weights, once the requests that run have finished.

        Args:
            mode: "offload": to pinned memory of the host; "disk": to a file without a name.

        Raises:
            FlowrollError: As for `rollout`.
        """
        return self._send(calls.release_memory_call(mode))

    def resume_memory(self) -> MemoryChange:
        """Has the server take the memory of its weights again; they are as they were."""
        return self._send(calls.resume_memory_call())

    def score(
        self,
        rollouts: Sequence[Rollout],
        *,
        steps: Sequence[int] | None = None,
        log_probs_only: bool = False,
        min_weight_version: str | None = None,
    ) -> Scores:
        """Has the server score steps of rollouts again, under the weights it has now: `replay.score`, without a transformer.

        All of it is scored by the weights of one version, which the answer tells, and every step alone: before an update the
        log-probs are the recorded bits. The whole call is one request.

        Args:
            rollouts: Of one or several requests, with env and trajectory.
            steps: Which steps, 0-based; None: all, for rollouts of one length.
            log_probs_only: Leave means and velocities out of the answer, which are most of its bytes.
            min_weight_version: Refuse weights that are older than this version.

        Raises:
            InvalidRequestError: A rollout cannot be replayed, or not by this server's model.
            OutdatedWeightsError: The server's weights are older than `min_weight_version`.
            PayloadTooLargeError: Too much at once; score fewer rollouts at a time.
            FlowrollError: As for `rollout`.
        """
        return self._send(calls.score_call(rollouts, steps, log_probs_only, min_weight_version, self._wire_format))

    def health(self) -> dict[str, Any]:
        """What GET /health says; raises if the server is not healthy."""
        return self._send(calls.object_call("/health"))

    def server_info(self) -> dict[str, Any]:
        """The model that is served, the limits, the versions."""
        return self._send(calls.object_call("/server_info"))

    def models(self) -> list[dict[str, Any]]:
        """The entries of GET /v1/models."""
        return self._send(calls.models_call())

    def metrics(self) -> str:
        """The Prometheus metrics, as text."""
        return self._send(calls.metrics_call())

    def wait_ready(self, timeout_s: Number = exchange.DEFAULT_TIMEOUT_S) -> None:
        """Waits until the server takes requests.

        Raises:
            ServerConnectionError: It does not within `timeout_s` seconds; says why.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                self._send(calls.readiness_call(deadline - time.monotonic()))
                return
            except (ServerConnectionError, ShuttingDownError) as error:
                if time.monotonic() + exchange.READY_POLL_S > deadline:
                    raise exchange.not_ready(timeout_s, error) from error
            time.sleep(exchange.READY_POLL_S)

    def _send_all(self, steps: Generator[Call[Any], Any, T]) -> T:
        """Sends one call after the other; each step gets the answer, or the error, of its call."""
        try:
            call = next(steps)
            while True:
                try:
                    answer = self._send(call)
                except BaseException as error:
                    call = steps.throw(error)
                else:
                    call = steps.send(answer)
        except StopIteration as ended:
            return ended.value  # type: ignore[no-any-return]

    def _send(self, call: Call[T]) -> T:
        timeout = call.timeout(self._timeout_s)
        body = bytearray()
        try:
            with self._http.stream(
                call.method, call.path, content=call.body(), headers=call.headers, timeout=timeout
            ) as response:
                for piece in response.iter_bytes():
                    body += piece
        except httpx.HTTPError as error:
            exchange.raise_connection_error(error, self._http.base_url)
        return exchange.conclude(call, response, body)
