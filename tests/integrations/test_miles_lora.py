"""What miles' `lora_merge` means, in numbers: the engine after it has the weights that miles' own train-side merge sends.

The weights are recorded (tests/data/miles/lora_merge.safetensors): base, factors, and what miles' updater
`DiffusionUpdateWeightFromTensorLoRA` made of them, in three combinations of dtypes.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.pickling import pushed, trainer
from tests.serving.servers import serving
from tests.weights import REQUEST
from torch import Tensor

from flowroll import Rollout
from flowroll.client import Client
from flowroll.engine import Engine
from flowroll.engine.service import EngineService

RECORDED = load_file(Path(__file__).parents[1] / "data" / "miles" / "lora_merge.safetensors")
LORA = {"weight_update_mode": "lora_merge", "lora_alpha": 6, "lora_rank": 4}
ENGINE_DTYPES = {"float32": "float32", "bfloat16": "bfloat16", "mixed": "bfloat16"}


@pytest.fixture(autouse=True)
def as_a_trainer() -> Iterator[None]:
    with trainer():
        yield


def recorded(label: str, part: str) -> dict[str, Tensor]:
    start = f"{label}.{part}."
    return {name.removeprefix(start): tensor for name, tensor in RECORDED.items() if name.startswith(start)}


def sent_names(factors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The factors under the names that miles' LoRA updaters send them by."""
    return {re.sub(r"^base_model\.model\.|\.default\.weight$", "", name): tensor for name, tensor in factors.items()}


def difference(a: Rollout, b: Rollout) -> float:
    return float((a.dit_trajectory.latents.float() - b.dit_trajectory.latents.float()).abs().max())


@pytest.mark.parametrize("label", ["float32", "bfloat16", pytest.param("mixed", marks=pytest.mark.slow)])
def test_after_lora_merge_the_weights_are_those_that_miles_own_merge_sends(label: str, z_image_checkpoint: Path) -> None:
    base, merged, factors = (recorded(label, part) for part in ("base", "merged", "factor"))
    assert base.keys() == merged.keys() and len(factors) == 2 * len(base)
    with (
        Engine(z_image_checkpoint, device="cpu", dtype=ENGINE_DTYPES[label]) as engine,
        EngineService(engine, max_queue=4) as service,
        serving(service, allow_pickle_weights=True, lora_merge_mode="merge") as server,
        Client(str(server.base_url)) as client,
    ):
        whole = {name: tensor.clone() for name, tensor in engine._model.transformer.state_dict().items()}
        engine.update_weights_from_tensors({**whole, **merged})
        (expected,) = client.rollout(**REQUEST)
        engine.update_weights_from_tensors({**whole, **base})
        (unadapted,) = client.rollout(**REQUEST)
        for body, _ in pushed(sent_names(factors), version="3", bucket_bytes=2**40, **LORA):
            server.post("/update_weights_from_tensor", json=body).raise_for_status()
        (got,) = client.rollout(**REQUEST)
        weights = engine._model.adapters.transformer("lora_merge").state_dict()
        for name, tensor in merged.items():
            down, up = (factors[f"base_model.model.{name.removesuffix('.weight')}.lora_{one}.default.weight"] for one in "AB")
            exact = base[name].double() + 6 / 4 * (up.double() @ down.double())
            found = weights[name]
            error, theirs = ((one.double() - exact).abs().max() for one in (found, tensor))
            assert error <= 2 * torch.finfo(found.dtype).eps * exact.abs().max(), name
            # miles rounds the product, its scaling and the sum; here, as in SGLang by default, a product in float32 is scaled.
            assert torch.equal(found, tensor) if label == "float32" else error <= theirs, name
        if label == "float32":
            assert difference(got, expected) == 0 and torch.equal(got.log_probs, expected.log_probs)
        assert difference(got, expected) < difference(got, unadapted)
