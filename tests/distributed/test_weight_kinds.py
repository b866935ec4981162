"""Every kind of change over HTTP, on several ranks of the other family: the bits of one rank that has it."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from tests.adapters import policy
from tests.distributed.test_rank_group import no_torchrun  # noqa: F401  # an autouse fixture
from tests.distributed.test_weight_updates import EVERY_LAYOUT, LAYOUTS, REQUEST
from tests.rollouts import assert_same_bits, tensors_of
from tests.serving.servers import serving
from tests.weights import WEIGHTS, with_other

from flowroll import Rollout
from flowroll.client import Client
from flowroll.engine import Engine
from flowroll.engine.service import EngineService

LORA = {"lora_name": "a"}
# On some CPUs (an AMD EPYC with AVX512_BF16) a part of a weight's columns has other bits than the whole in bfloat16, and an
# engine refuses to split it.
DTYPES = {"tp2": "float32"}


def one_rank(folder: Path, dtype: str, adapter: tuple[Any, Any] | None = None) -> Rollout:
    with Engine(folder, device="cpu", dtype=dtype) as engine:
        if adapter is None:
            return engine.rollout(**REQUEST)[0]
        engine.load_lora_adapter_from_tensors(*adapter, name="a")
        return engine.rollout(**REQUEST, **LORA)[0]


@pytest.mark.parametrize("layout", EVERY_LAYOUT)
def test_several_ranks_take_every_kind_of_change_over_http(qwen_checkpoint: Path, tmp_path: Path, layout: str) -> None:
    other, dtype = with_other(qwen_checkpoint, tmp_path / "other"), DTYPES.get(layout, "bfloat16")
    with Engine(qwen_checkpoint, device="cpu", dtype=dtype) as engine:
        trained = policy(engine._model.transformer)
        adapter = peft.get_peft_model_state_dict(trained), trained.peft_config["default"].to_dict()
    old, new, adapted = (
        one_rank(folder, dtype, lora) for folder, lora in ((qwen_checkpoint, None), (other, None), (qwen_checkpoint, adapter))
    )
    with (
        Engine(qwen_checkpoint, device="cpu", dtype=dtype, layout=LAYOUTS[layout], rank_timeout_s=30.0) as engine,
        EngineService(engine, max_queue=4) as service,
        serving(service, weights_roots=(str(tmp_path),)) as http,
        Client(str(http.base_url)) as client,
    ):
        client.update_weights_from_disk(other)
        assert_same_bits(client.rollout(**REQUEST)[0], new)
        client.update_weights(load_file(qwen_checkpoint / "transformer" / WEIGHTS), bucket_bytes=2**16)
        assert_same_bits(client.rollout(**REQUEST)[0], old)
        client.load_lora_adapter_from_tensors(*adapter, name="a")
        (found,) = client.rollout(**REQUEST, **LORA)
        # The versions differ, since more has changed here.
        assert found.sampling.lora.sha256 == adapted.sampling.lora.sha256
        wanted = dict(tensors_of(adapted))
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in tensors_of(found))
        assert_same_bits(client.rollout(**REQUEST)[0], old)
