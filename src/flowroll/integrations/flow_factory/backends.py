"""Where an adapter of Flow-Factory rolls out: an engine of its process, or a server."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from flowroll.types import Rollout, SamplingParams

if TYPE_CHECKING:
    from flowroll.client import Client
    from flowroll.engine import Engine

_MAX_REQUESTS = 16


@runtime_checkable
class Backend(Protocol):
    """Where samples are rolled out.

    Attributes:
        dtype: The dtype of its transformer, and so of the embeddings that it takes.
    """

    dtype: torch.dtype

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
        self.engine, self.dtype = engine, _dtype_of(engine.info.dtype)

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
        self.client, self.dtype = client, _dtype_of(client.server_info()["dtype"])
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


def make_backend(adapter: Any) -> Backend:
    """Makes the backend that an adapter's configuration names.

    `flowroll_url` under `model` is the address of a server; without it an engine is made in this process, on the adapter's
    device and with the dtype of its transformer, or with `flowroll_dtype`.
    """
    extra = getattr(adapter.model_args, "extra_kwargs", None) or {}
    if url := extra.get("flowroll_url"):
        from flowroll.client import Client

        return ClientBackend(Client(url, api_key=extra.get("flowroll_api_key")))
    from flowroll.engine import Engine

    dtype = extra.get("flowroll_dtype") or str(adapter.pipeline.transformer.dtype).removeprefix("torch.")
    variant = extra.get("flowroll_variant")
    return EngineBackend(
        Engine(adapter.model_args.model_name_or_path, variant=variant, dtype=dtype, device=str(adapter.device))
    )


def _dtype_of(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype
