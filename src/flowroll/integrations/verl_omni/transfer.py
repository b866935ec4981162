"""Weights that verl-omni sends past Ray: the factors of an adapter, through a socket and shared memory of the host.

It imports verl, which has both ends of this way, when it is called.
"""

from __future__ import annotations

import importlib
import importlib.util
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

_MODULE = "verl.workers.rollout.vllm_rollout.bucketed_weight_transfer"


def zmq_handle(job_id: str, replica_rank: int, local_rank: int) -> str:
    """Returns the address at which a rank of the trainer offers weights to the replica's server on its host."""
    folder = Path(tempfile.gettempdir())
    return f"ipc://{folder}/flowroll-{job_id}-replica-{replica_rank}-rank-{local_rank}.sock"


def update_handle(handle: str, update_id: str | None) -> str:
    """Returns the address of one update, as verl-omni's trainer makes it of that of its rank.

    Reference: `make_update_zmq_handle` in verl_omni/workers/rollout/vllm_rollout/zmq_utils.py.
    """
    return handle if update_id is None else f"{handle.removesuffix('.sock')}-update-{update_id}.sock"


def receive_weights(
    *, job_id: str, replica_rank: int, num_ranks: int, use_shm: bool = True, zmq_update_id: str | None = None
) -> list[tuple[str, Tensor]]:
    """Receives the weights that each rank of a replica's trainer sends, and returns copies of those of the first rank.

    All ranks send the same, and each waits until somebody has received it.

    Args:
        job_id: The id of Ray's job.
        replica_rank: The number of the replica.
        num_ranks: The number of the replica's ranks on this host.
        use_shm: Whether they come in shared memory of the host; otherwise by CUDA IPC, which has not been run yet.
        zmq_update_id: The id of the update.
    """
    transfer = _transfer_module()
    device = torch.device("cpu" if use_shm else f"cuda:{torch.cuda.current_device()}")
    kept: list[tuple[str, Tensor]] = []
    lock = threading.Lock()

    def receive(rank: int) -> None:
        def take(weights: Sequence[tuple[str, Tensor]], *_: Any) -> None:
            if rank == 0:
                with lock:
                    kept.extend((name, tensor.detach().to("cpu", copy=True)) for name, tensor in weights)

        address = update_handle(zmq_handle(job_id, replica_rank, rank), zmq_update_id)
        transfer.BucketedWeightReceiver(zmq_handle=address, device=device, use_shm=use_shm).receive_weights(take)

    with ThreadPoolExecutor(max_workers=num_ranks, thread_name_prefix="flowroll-receive") as pool:
        for done in [pool.submit(receive, rank) for rank in range(num_ranks)]:
            done.result()
    return kept


def _transfer_module() -> ModuleType:
    """Imports verl's module, whose package cannot be imported where there is no vLLM, and which does without it."""
    if importlib.util.find_spec("vllm") is not None:
        return importlib.import_module(_MODULE)
    workers = importlib.util.find_spec("verl.workers.rollout")
    assert workers is not None and workers.submodule_search_locations
    path = Path(workers.submodule_search_locations[0]) / "vllm_rollout" / "bucketed_weight_transfer.py"
    spec = importlib.util.spec_from_file_location("flowroll_bucketed_weight_transfer", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
