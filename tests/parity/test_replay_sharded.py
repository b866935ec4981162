"""Replay through FSDP-wrapped transformers, on one rank and on two real processes."""

import copy
import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.guiding import PicturedEngine
from tests.pairs import dealt
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from flowroll import replay
from flowroll.engine import Engine
from flowroll.families import FAMILIES
from flowroll.wire.files import load_rollout, save_rollout

REQUEST = {"prompt": "a red apple", "height": 64, "width": 64, "num_inference_steps": 2, "seed": 5}
KEPT = {"return_denoising_env": True, "return_dit_trajectory": True}


def sharded(transformer: nn.Module, **options: Any) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in getattr(transformer, "transformer_blocks", None) or transformer.layers:
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(transformer, mesh=mesh, **options)


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
@dealt(name=tuple(FAMILIES), precision=("mixed", "bfloat16", "float32"))
def test_the_ratio_is_exactly_one_through_fsdp(
    engine_of: Callable[[str, str], Engine],
    pipeline_of: Callable[[str, str], Any],
    one_rank: None,
    name: str,
    precision: str,
) -> None:
    dtype, mixed = ("bfloat16", True) if precision == "mixed" else (precision, False)
    if engine_of(name, dtype).info.device != "cpu":
        pytest.skip("one device is enough")
    group = engine_of(name, dtype).rollout(**REQUEST, **KEPT, num_outputs_per_prompt=2)
    # Mixed precision: float32 weights of the same values, cast to bfloat16 for the forward.
    weights = copy.deepcopy(pipeline_of(name, dtype).transformer)
    # What replay passes has the right dtypes; a timestep in float32 is to stay so, and the table between FLUX's blocks.
    cast = FAMILIES[name].timesteps_in == "model" and FAMILIES[name].conditioning.table is None
    if mixed:
        transformer = sharded(
            weights.float(), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, cast_forward_inputs=cast)
        )
    else:
        transformer = sharded(weights)
    log_probs = replay.log_prob(transformer, group)
    recorded = torch.stack([rollout.log_probs for rollout in group])
    assert torch.equal(log_probs.detach(), recorded)
    log_probs.sum().backward()
    assert any(weight.grad is not None and weight.grad.to_local().any() for weight in transformer.parameters())
    assert replay.audit(transformer, group).is_exact


def _replay_on_rank(rank: int, port: int, checkpoint: Path, cls: str, file: Path, out: Path) -> None:
    import diffusers

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    transformer = getattr(diffusers, cls).from_pretrained(checkpoint / "transformer", torch_dtype=torch.float32)
    log_probs = replay.log_prob(sharded(transformer), [load_rollout(file)])
    log_probs.sum().backward()
    torch.save(log_probs.detach(), out / str(rank))
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if number else []) for number, name in enumerate(FAMILIES)]
)
def test_two_ranks_recompute_the_log_probs_of_one(checkpoints: dict[str, Path], tmp_path: Path, name: str) -> None:
    with PicturedEngine(checkpoints[name], dtype="float32", device="cpu") as engine:
        rollout = engine.rollout(**REQUEST, **KEPT)[0]
    save_rollout(tmp_path / "rollout", rollout)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    cls = json.loads((checkpoints[name] / "model_index.json").read_text())["transformer"][1]
    arguments = (port, checkpoints[name], cls, tmp_path / "rollout", tmp_path)
    torch.multiprocessing.spawn(_replay_on_rank, arguments, nprocs=2)
    for rank in ("0", "1"):
        assert torch.equal(torch.load(tmp_path / rank)[0], rollout.log_probs)
