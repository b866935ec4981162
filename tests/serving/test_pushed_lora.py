"""SGLang's weight_update_mode "lora_merge": a trainer pushes an adapter as bare factors, and every request runs with it."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from peft import get_peft_model_state_dict
from tests.adapters import policy, saved
from tests.pickling import pushed, text, trainer
from tests.rollouts import tensors_of
from tests.serving.servers import error_of, serving
from tests.serving.test_shared_tensor_route import ROUTE, is_holding, send
from tests.weights import REQUEST, with_other
from torch import Tensor

from flowroll import Rollout
from flowroll.client import Client
from flowroll.engine import AdapterLimits, Engine
from flowroll.engine.service import EngineService
from flowroll.replay import adapter_checksum

LORA: dict[str, Any] = {"weight_update_mode": "lora_merge", "lora_alpha": 6, "lora_rank": 4}


@pytest.fixture(autouse=True)
def as_a_trainer() -> Iterator[None]:
    with trainer():
        yield


@pytest.fixture(params=["z_image", "qwen_image"])
def engine(request: pytest.FixtureRequest, checkpoints: dict[str, Path]) -> Iterator[Engine]:
    with Engine(checkpoints[request.param], device="cpu") as engine:
        yield engine


@pytest.fixture
def z_image(z_image_checkpoint: Path) -> Iterator[Engine]:
    with Engine(z_image_checkpoint, device="cpu") as engine:
        yield engine


@pytest.fixture
def server(z_image: Engine) -> Iterator[httpx.Client]:
    with EngineService(z_image, max_queue=4) as service, serving(service, allow_pickle_weights=True) as client:
        yield client


def factors(model: Any) -> dict[str, Tensor]:
    """The factors of a peft model under the names that miles gives them, A before B."""
    found = {}
    for name, tensor in sorted(model.state_dict().items()):
        if match := re.fullmatch(r"base_model\.model\.(.+)\.(lora_[AB])\.default\.weight", name):
            found[f"{match[1]}.{match[2]}"] = tensor
    return found


def parts(tensors: Mapping[str, Tensor], count: int = 2) -> list[dict[str, Tensor]]:
    """Buckets of whole layers."""
    layers = list(dict.fromkeys(name.rpartition(".")[0] for name in tensors))
    return [
        {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[0] in layers[place::count]}
        for place in range(count)
    ]


def push(server: httpx.Client, tensors: Mapping[str, Tensor], *, version: str | None = None, **changes: Any) -> httpx.Response:
    ((body, _),) = pushed(tensors, version=version, bucket_bytes=2**40, **{**LORA, **changes})
    answer = server.post(ROUTE, json=body)
    assert answer.status_code == 200, answer.text
    return answer


def assert_same_tensors(a: Rollout, b: Rollout) -> None:
    left, right = dict(tensors_of(a)), dict(tensors_of(b))
    assert left.keys() == right.keys()
    assert all(torch.equal(tensor, right[name]) for name, tensor in left.items())


@pytest.mark.parametrize("mode", ["dynamic", "merge"])
def test_every_request_runs_with_the_pushed_adapter_as_with_the_trainers_own(mode: Any, engine: Engine, tmp_path: Path) -> None:
    model, merged = policy(engine._model.transformer), mode == "merge"
    engine.load_lora_adapter(saved(model, tmp_path / "a"), name="truth", merged=merged)
    (base,) = engine.rollout(**REQUEST)
    (expected,) = engine.rollout(**REQUEST, lora_name="truth")
    with (
        EngineService(engine, max_queue=4) as service,
        serving(service, allow_pickle_weights=True, lora_merge_mode=mode) as server,
        Client(str(server.base_url)) as client,
    ):
        for bucket in parts(factors(model)):
            answer = push(server, bucket, version="12").json()
            assert answer["weight_version"] == "12" and answer["is_complete"] is True
            assert "layers of the adapter are in place" in answer["message"]
        (got,) = client.rollout(**REQUEST)
        assert_same_tensors(got, expected)
        assert not torch.equal(got.image, base.image)
        assert got.sampling.lora is not None and got.weight_version == "12"
        assert got.sampling.lora.sha256 == adapter_checksum(model) and got.sampling.lora.merged is merged
        # The weights below are what they were, and so are adapters that are chosen by name.
        assert_same_tensors(client.rollout(**REQUEST, lora_name="truth")[0], expected)
        server.post("/unload_lora_adapter", json={"lora_name": "lora_merge"}).raise_for_status()
        assert_same_tensors(client.rollout(**REQUEST)[0], base)


def test_a_push_replaces_the_layers_that_it_holds_and_no_sample_starts_between_its_buckets(
    server: httpx.Client, z_image: Engine, tmp_path: Path
) -> None:
    first, second = (policy(z_image._model.transformer, seed) for seed in (0, 1))
    z_image.load_lora_adapter(saved(second, tmp_path / "b"), name="truth")
    expected = z_image.rollout(**REQUEST, lora_name="truth")[0]
    push(server, factors(first), version="1")
    one, other = parts(factors(second))
    assert push(server, one, version="2").json()["is_complete"] is False
    # The other layers are those of before.
    mixed = z_image._model.adapters.factors("lora_merge")
    for name, tensor in {**factors(first), **one}.items():
        layer, _, factor = name.rpartition(".")
        assert torch.equal(mixed[layer].down if factor == "lora_A" else mixed[layer].up, tensor), name
    # A bucket that is refused while it is put in place has not come.
    spoilt = {name: tensor * float("nan") for name, tensor in other.items()}
    answer = send(server, {"transformer": list(spoilt.items())}, weight_version="2", **LORA)
    assert answer.status_code == 422 and "finite" in error_of(answer)["message"]
    assert is_holding(server)
    assert push(server, other, version="2").json()["is_complete"] is True and not is_holding(server)
    assert_same_tensors(z_image.rollout(**REQUEST)[0], expected)


@pytest.mark.parametrize("way", ["unloaded", "loaded"])
def test_an_adapter_that_is_removed_or_replaced_ends_its_push(
    way: str, server: httpx.Client, z_image: Engine, tmp_path: Path
) -> None:
    one, other = parts(factors(policy(z_image._model.transformer)))
    for bucket in (one, other):
        push(server, bucket, version="1")
    assert push(server, one, version="2").json()["is_complete"] is False and is_holding(server)
    # Adapters of other names have nothing to do with it.
    z_image.load_lora_adapter(saved(policy(z_image._model.transformer), tmp_path / "a"), name="transformer")
    server.post("/unload_lora_adapter", json={"lora_name": "transformer"}).raise_for_status()
    assert is_holding(server)
    with Client(str(server.base_url)) as client:
        if way == "loaded":
            model = policy(z_image._model.transformer, 1)
            config = model.peft_config["default"].to_dict()
            client.load_lora_adapter_from_tensors(get_peft_model_state_dict(model), config, name="lora_merge")
        else:
            client.unload_lora_adapter("lora_merge")
    assert not is_holding(server)
    # Layers that are not pushed any more are not waited for.
    assert push(server, one, version="3").json()["is_complete"] is True and not is_holding(server)


@pytest.mark.parametrize("merged", [False, True])
def test_ranks_and_scales_are_each_layers_own(merged: bool, z_image: Engine, tmp_path: Path) -> None:
    """A layer's rank is that of its factors, whatever the request says; without an alpha its scale is 1."""
    mode = "merge" if merged else "dynamic"
    with (
        EngineService(z_image, max_queue=4) as service,
        serving(
            service,
            allow_pickle_weights=True,
            lora_merge_mode=mode,  # type: ignore[arg-type]
        ) as server,
    ):
        transformer = z_image._model.transformer
        for alpha in (None, 3):
            pattern = {"to_q": 2, "w1": 7}
            scales = {} if alpha else {"alpha_pattern": pattern}
            model = policy(transformer, rank_pattern=pattern, lora_alpha=alpha or 4, **scales)
            z_image.load_lora_adapter(saved(model, tmp_path / "truth"), name="truth", merged=merged)
            push(server, factors(model), lora_alpha=alpha, lora_rank=4)
            (got,), (expected,) = z_image.rollout(**REQUEST), z_image.rollout(**REQUEST, lora_name="truth")
            assert_same_tensors(got, expected)
            assert got.sampling.lora is not None and got.sampling.lora.sha256 == adapter_checksum(model)


def test_new_weights_below_reach_the_pushed_adapter(
    z_image_checkpoint: Path, server: httpx.Client, z_image: Engine, tmp_path: Path
) -> None:
    model = policy(z_image._model.transformer)
    push(server, factors(model))
    with Engine(with_other(z_image_checkpoint, tmp_path / "other"), device="cpu") as fresh:
        tensors = {name: tensor.clone() for name, tensor in fresh._model.transformer.state_dict().items()}
        assert send(server, {"transformer": list(tensors.items())}).json()["is_complete"]
        fresh.load_lora_adapter(saved(model, tmp_path / "a"), name="truth")
        assert_same_tensors(z_image.rollout(**REQUEST)[0], fresh.rollout(**REQUEST, lora_name="truth")[0])


@pytest.mark.parametrize("names", ["{}", "{}.weight", "{}.default.weight", "base_model.model.{}.default.weight"])
def test_factors_may_have_pefts_names(names: str, server: httpx.Client, z_image: Engine) -> None:
    tensors = factors(policy(z_image._model.transformer))
    push(server, {names.format(name): tensor for name, tensor in tensors.items()})
    assert z_image._model.adapters.factors("lora_merge").keys() == {name.rpartition(".")[0] for name in tensors}


def test_what_is_no_adapter_of_the_model_is_refused_and_changes_nothing(server: httpx.Client, z_image: Engine) -> None:
    good = factors(policy(z_image._model.transformer))
    name = next(iter(good))
    layer = name.rpartition(".")[0]
    up, down = f"{layer}.lora_B", f"{layer}.lora_A"
    (before,) = z_image.rollout(**REQUEST)

    def changed(**changes: Tensor | None) -> list[tuple[str, Tensor]]:
        both = {down: good[down], up: good[up]}
        both |= {key.replace("__", "."): value for key, value in changes.items() if value is not None}
        return [(key, value) for key, value in both.items() if key not in changes or changes[key] is not None]

    wrong: list[tuple[list[tuple[str, Tensor]], str]] = [
        ([(down, good[down])], "both factors of every layer"),
        ([*changed(), (f"{layer}.weight", torch.zeros(2, 2))], "lora_A and <layer>.lora_B alone"),
        ([*changed(), (f"{down}.weight", good[down])], "each factor once"),
        ([("no.such.lora_A", good[down]), ("no.such.lora_B", good[up])], "the transformer's layers, got no.such"),
        ([("layers.0.lora_A", good[down]), ("layers.0.lora_B", good[up])], ""),
        ([(down, good[down][:2]), (up, good[up])], "[rank, in] and [out, rank]"),
        ([(down, good[down][:, :-1]), (up, good[up])], layer),
        ([(down, good[down].double()), (up, good[up])], "float32, float16 or bfloat16"),
        ([(down, good[down] * float("nan")), (up, good[up])], "finite"),
        ([], ""),
    ]
    for value, words in wrong:
        answer = send(server, {"transformer": value}, **LORA)
        assert answer.status_code in (400, 422) and words in error_of(answer)["message"], answer.text
    assert z_image.lora_adapters() == () and z_image.weight_version == "0" and not is_holding(server)
    assert_same_tensors(z_image.rollout(**REQUEST)[0], before)


def test_an_adapter_is_as_large_as_adapters_may_be(z_image_checkpoint: Path) -> None:
    limits = AdapterLimits(max_adapter_bytes=1000)
    with (
        Engine(z_image_checkpoint, device="cpu", adapter_limits=limits) as engine,
        EngineService(engine, max_queue=1) as service,
        serving(service, allow_pickle_weights=True, adapter_limits=limits) as server,
    ):
        answer = send(server, {"transformer": list(factors(policy(engine._model.transformer)).items())}, **LORA)
        assert answer.status_code == 422 and "at most 1000 bytes" in error_of(answer)["message"]
        assert server.post(ROUTE, json={"serialized_named_tensors": [text([])], **LORA}).status_code == 422
