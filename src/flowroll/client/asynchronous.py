"""The asyncio client: `Client`, with `await`."""

from __future__ import annotations

import asyncio
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


class AsyncClient:
    """Talks to one flowroll server from asyncio; requests may run at the same time. See `Client` for arguments and errors.

    An asynchronous context manager: `close` closes its connections.

    Args:
        base_url: E.g. "http://127.0.0.1:30000".
        api_key: The server's bearer token, if it demands one.
        timeout_s: Longest silence of the server.
        wire_format: "msgpack" or "json".
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
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._http = httpx.AsyncClient(**exchange.client_options(base_url, api_key), transport=transport)
        self._timeout_s = timeout_s
        self._wire_format: WireFormat = wire_format

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connections; may be called twice."""
        await self._http.aclose()

    async def rollout(self, params: SamplingParams | None = None, /, **values: Any) -> list[Rollout]:
        """Rolls out one request: one `Rollout` per sample. See `Client.rollout`."""
        return await self._send(calls.rollout_call(params, values, self._wire_format))

    async def generate(self, params: SamplingParams | None = None, /, **values: Any) -> list[GeneratedImage]:
        """Plain text-to-image generation: one `GeneratedImage` per sample. See `Client.generate`."""
        return await self._send(calls.generate_call(params, values, self._wire_format))

    async def update_weights_from_disk(
        self,
        path: str | PathLike[str],
        *,
        module: str = "transformer",
        weight_version: str | None = None,
        mode: UpdateMode = "drain",
    ) -> WeightUpdate:
        """Has the server take new weights from its disk. See `Client.update_weights_from_disk`."""
        return await self._send(calls.update_from_disk_call(path, module, weight_version, mode))

    async def update_weights(
        self,
        named_tensors: NamedTensors,
        *,
        module: str = "transformer",
        weight_version: str | None = None,
        mode: UpdateMode = "drain",
        bucket_bytes: int = pushing.BUCKET_BYTES,
        partial: bool = False,
    ) -> WeightUpdate:
        """Sends the server new weights over HTTP. See `Client.update_weights`."""
        steps = pushing.push_weights(
            named_tensors,
            module=module,
            weight_version=weight_version,
            partial=partial,
            mode=mode,
            bucket_bytes=bucket_bytes,
        )
        return await self._send_all(steps)

    async def weights_checksum(self, module: str = "transformer") -> str:
        """sha256 over the server's weights. See `Client.weights_checksum`."""
        return await self._send(calls.checksum_call(module))

    async def verify_weights(self, expected: Mapping[str, str], *, module: str = "transformer") -> int:
        """Has the server compare its weights with the trainer's. See `Client.verify_weights`."""
        return await self._send(calls.verify_call(expected, module))

    async def load_lora_adapter(
        self,
        path: str | PathLike[str],
        *,
        name: str,
        merged: bool = False,
        weight_version: str | None = None,
        mode: UpdateMode = "drain",
    ) -> AdapterChange:
        """Has the server load a LoRA adapter. See `Client.load_lora_adapter`."""
        return await self._send(calls.load_adapter_call(name, path, merged, weight_version, mode))

    async def load_lora_adapter_from_tensors(
        self,
        tensors: Mapping[str, Tensor],
        config: Mapping[str, Any],
        *,
        name: str,
        merged: bool = False,
        weight_version: str | None = None,
        mode: UpdateMode = "drain",
    ) -> AdapterChange:
        """Sends the server a LoRA adapter. See `Client.load_lora_adapter_from_tensors`."""
        return await self._send_all(pushing.push_adapter(tensors, config, name, merged, weight_version, mode))

    async def unload_lora_adapter(
        self, name: str, *, weight_version: str | None = None, mode: UpdateMode = "drain"
    ) -> AdapterChange:
        """Has the server forget an adapter. See `Client.unload_lora_adapter`."""
        return await self._send(calls.unload_adapter_call(name, weight_version, mode))

    async def lora_adapters(self) -> list[LoraAdapter]:
        """The server's adapters, in the order of loading."""
        return await self._send(calls.adapters_call())

    async def release_memory(self, mode: str = "offload") -> MemoryChange:
        """Has the server release the memory of its weights. See `Client.release_memory`."""
        return await self._send(calls.release_memory_call(mode))

    async def resume_memory(self) -> MemoryChange:
        """Has the server take the memory of its weights again. See `Client.resume_memory`."""
        return await self._send(calls.resume_memory_call())

    async def score(
        self,
        rollouts: Sequence[Rollout],
        *,
        steps: Sequence[int] | None = None,
        log_probs_only: bool = False,
        min_weight_version: str | None = None,
    ) -> Scores:
        """Has the server score steps of rollouts again. See `Client.score`."""
        # Encoding takes long enough to hold up the caller's event loop, as decoding does.
        call = await asyncio.to_thread(calls.score_call, rollouts, steps, log_probs_only, min_weight_version, self._wire_format)
        return await self._send(call)

    async def health(self) -> dict[str, Any]:
        """What GET /health says; raises if the server is not healthy."""
        return await self._send(calls.object_call("/health"))

    async def server_info(self) -> dict[str, Any]:
        """The model that is served, the limits, the versions."""
        return await self._send(calls.object_call("/server_info"))

    async def models(self) -> list[dict[str, Any]]:
        """The entries of GET /v1/models."""
        return await self._send(calls.models_call())

    async def metrics(self) -> str:
        """The Prometheus metrics, as text."""
        return await self._send(calls.metrics_call())

    async def wait_ready(self, timeout_s: Number = exchange.DEFAULT_TIMEOUT_S) -> None:
        """Waits until the server takes requests.

        Raises:
            ServerConnectionError: It does not within `timeout_s` seconds; says why.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                await self._send(calls.readiness_call(deadline - time.monotonic()))
                return
            except (ServerConnectionError, ShuttingDownError) as error:
                if time.monotonic() + exchange.READY_POLL_S > deadline:
                    raise exchange.not_ready(timeout_s, error) from error
            await asyncio.sleep(exchange.READY_POLL_S)

    async def _send_all(self, steps: Generator[Call[Any], Any, T]) -> T:
        """Sends one call after the other; each step gets the answer, or the error, of its call."""
        try:
            call = next(steps)
            while True:
                try:
                    answer = await self._send(call)
                except BaseException as error:
                    call = steps.throw(error)
                else:
                    call = steps.send(answer)
        except StopIteration as ended:
            return ended.value  # type: ignore[no-any-return]

    async def _send(self, call: Call[T]) -> T:
        timeout = call.timeout(self._timeout_s)
        body = bytearray()
        try:
            async with self._http.stream(
                call.method, call.path, content=call.async_body(), headers=call.headers, timeout=timeout
            ) as response:
                async for piece in response.aiter_bytes():
                    body += piece
        except httpx.HTTPError as error:
            exchange.raise_connection_error(error, self._http.base_url)
        # Decoding a rollout takes long enough to hold up the caller's event loop.
        return await asyncio.to_thread(exchange.conclude, call, response, body)
