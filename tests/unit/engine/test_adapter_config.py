"""Adapter configurations are compared by their effect, with peft itself as the judge of what has one."""

import copy
import dataclasses
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import peft
import pytest
import torch
from tests.adapters import policy, saved
from tests.rollouts import assert_same_bits
from tests.serving.servers import error_of, serving
from tests.weights import REQUEST
from torch import Tensor, nn

from flowroll.client import Client
from flowroll.engine import Engine
from flowroll.engine.adapters.config import lora_config, shape_key
from flowroll.engine.service import EngineService
from flowroll.errors import InvalidRequestError, WeightsRejectedError

PLAIN = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": ["layers.0", "layers.1"]}
# Every adapter has these.
NEEDED = {"peft_type", "r", "lora_alpha", "target_modules"}
# As `save_pretrained` of that release of peft wrote `LoraConfig(r=4, lora_alpha=6, target_modules=["to_q"])`, all from 0.8.2 on
# with `init_lora_weights="gaussian"`.
RELEASES: dict[str, dict[str, Any]] = json.loads((Path(__file__).parents[2] / "data" / "adapter_configs.json").read_text())


class Model(nn.Module):
    """Two linears that are adapted, and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])
        self.head = nn.Linear(8, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        for layer in self.layers:
            inputs = layer(inputs).relu()
        return self.head(inputs)


def _trained(base: Model, **options: Any) -> tuple[Tensor, dict[str, Tensor], set[str]]:
    """What peft's model with these options computes, the weights below, and the names of what it saves."""
    given = {key: value for key, value in PLAIN.items() if key != "peft_type"}
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**given | options)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("lora_A.default.weight", "lora_B.default.weight")):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        output = model(torch.randn(5, 8, generator=generator))
    own = ("lora_", "modules_to_save", "original_module")
    below = {name: tensor for name, tensor in model.state_dict().items() if not any(part in name for part in own)}
    return output, below, set(peft.get_peft_model_state_dict(model))


def _has_effect(key: str, value: Any) -> bool | None:
    """Whether an option changes what is computed or saved, or the weights below; None: peft does not take it."""
    torch.manual_seed(0)
    base = Model()
    output, below, names = _trained(base)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            own_output, own_below, own_names = _trained(base, **{key: value})
    except Exception:  # whatever peft raises
        return None
    same_below = below.keys() == own_below.keys() and all(torch.equal(below[name], own_below[name]) for name in below)
    return not (torch.equal(output, own_output) and same_below and names == own_names)


ANY = [None, False, True, "", [], {}, ["head"], "all", 3, {"rho": 3.0}]
STARTS = [
    "gaussian",
    "Gaussian",
    "orthogonal",
    "eva",
    "mica",
    "olora",
    "pissa",
    "pissa_niter_4",
    "corda",
    "loftq",
    "lora_ga",
    "x",
]
OWN: dict[str, list[Any]] = {
    "bias": ["none", "lora_only"],
    "init_lora_weights": STARTS,
    "velora_config": [{"num_groups": 2}],
    "kasa_config": [{"beta": 0.1}],
    "alora_invocation_tokens": [[1]],
    "runtime_config": [{"ephemeral_gpu_offload": True}],
    "loftq_config": [{"loftq_bits": 4}],
    "layers_to_transform": [[0], 0, [1], 1],
    "exclude_modules": [["layers.1"], "layers.1"],
    "rank_pattern": [{"layers.1": 2}],
    "alpha_pattern": [{"layers.1": 2}],
}
OPTIONS = [field.name for field in dataclasses.fields(peft.LoraConfig) if field.name not in NEEDED]
# Their effect is followed, not refused.
FOLLOWED = {"use_rslora", "rank_pattern", "alpha_pattern", "exclude_modules", "layers_to_transform", "layers_pattern"}
# Never looked at, whatever is in them.
UNREAD = {
    *(field.name for field in dataclasses.fields(peft.PeftConfig)),
    *("lora_dropout", "runtime_config", "megatron_core", "qalora_group_size", "fan_in_fan_out", "ensure_weight_tying"),
    *("eva_config", "corda_config", "lora_ga_config", "loftq_config"),
}
# What these did to the weights of a trainer happened before the adapter was made, so that peft's model does not show it.
BEFOREHAND = [("init_lora_weights", "lora_ga")]


def _is_taken(key: str, value: Any) -> bool:
    try:
        lora_config({**PLAIN, key: value})
    except WeightsRejectedError as error:
        assert error.message.startswith((key, "r must", "lora_alpha must")) or "`layers_pattern`" in error.message
        return False
    return True


@pytest.mark.parametrize("key", OPTIONS)
def test_an_option_is_taken_only_if_it_has_no_effect_in_peft_or_is_followed(key: str) -> None:
    for value in [*ANY, *OWN.get(key, [])]:
        is_empty = value is None or value is False or value in ("", [], {})
        effect, taken = _has_effect(key, value), _is_taken(key, value)
        if effect:
            assert not taken or key in FOLLOWED, value
        elif effect is None:
            # What is empty is off, also where peft stumbles over it.
            assert not taken or is_empty or key in UNREAD, value
        if not effect and ((is_empty and value != {}) or key in UNREAD):
            assert taken, value
        if (key, value) in BEFOREHAND:
            assert not taken


@pytest.mark.parametrize("start", [None, False, True, "", "gaussian", "Gaussian", "orthogonal", "eva", "mica"])
def test_a_start_that_leaves_the_weights_below_is_taken(start: Any) -> None:
    assert _is_taken("init_lora_weights", start) and not _has_effect("init_lora_weights", start)


def test_an_empty_object_is_off_unless_peft_makes_an_option_of_it() -> None:
    nested = [key for key in OPTIONS if key not in UNREAD and _is_taken(key, {})]
    assert {"loftq_config", "megatron_config", "modules_to_save", "rank_pattern", "use_dora"} <= {*nested, *UNREAD}
    for key in ("kasa_config", "velora_config", "monteclora_config"):
        assert _has_effect(key, {}) and key not in nested


@pytest.mark.parametrize("key", sorted(FOLLOWED))
def test_what_is_off_is_off_however_it_is_written(key: str) -> None:
    for value in (None, "", [], {}, False):
        own = {**PLAIN, key: value}
        assert lora_config(own) == lora_config(PLAIN)
        assert shape_key(own) == shape_key(PLAIN)


def test_the_first_layer_is_not_off() -> None:
    first = lora_config({**PLAIN, "layers_to_transform": 0, "layers_pattern": "layers"})
    assert first.layers_to_transform == 0
    assert shape_key({**PLAIN, "layers_to_transform": 0}) != shape_key(PLAIN)


@pytest.mark.parametrize(("key", "value"), [("r", None), ("r", False), ("lora_alpha", None), ("lora_alpha", [])])
def test_a_rank_and_a_scale_are_never_off(key: str, value: Any) -> None:
    with pytest.raises(WeightsRejectedError, match=f"{key} must be"):
        lora_config({**PLAIN, key: value})


def test_what_a_later_peft_adds_is_taken_while_it_is_off() -> None:
    for value in (None, False, "", [], {}):
        lora_config({**PLAIN, "use_magic": value})
    for off in (True, "x", {"rho": 1}, 1):
        with pytest.raises(WeightsRejectedError, match="use_magic must be known to the engine's peft"):
            lora_config({**PLAIN, "use_magic": off})


@pytest.fixture(scope="module")
def engine(z_image_checkpoint: Path) -> Iterator[Engine]:
    with Engine(z_image_checkpoint, device="cpu") as engine:
        yield engine


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def server(engine: Engine, root: Path) -> Iterator[httpx.Client]:
    with EngineService(engine, max_queue=4) as service, serving(service, weights_roots=(str(root),)) as client:
        yield client


@pytest.mark.parametrize("release", RELEASES)
def test_what_several_releases_of_peft_save_is_one_adapter(
    release: str, engine: Engine, server: httpx.Client, root: Path
) -> None:
    trainer = policy(engine._model.transformer, targets=["to_q"])
    folder = saved(trainer, root / "adapter")
    now = engine.load_lora_adapter(folder, name="now").adapter
    assert now is not None
    config = RELEASES[release]
    assert config.get("peft_version", release) == release
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with Client(str(server.base_url)) as client:
        # From the server's disk, over HTTP, and in the engine's own process.
        then = client.load_lora_adapter(folder, name="then").adapter
        sent = client.load_lora_adapter_from_tensors(peft.get_peft_model_state_dict(trainer), config, name="sent").adapter
        assert then is not None and sent is not None
        assert now.sha256 == then.sha256 == sent.sha256 and now.num_layers == then.num_layers
        for name in ("now", "then", "sent"):
            client.unload_lora_adapter(name)


def test_every_form_of_pefts_own_configuration_gives_the_same_bits(engine: Engine, server: httpx.Client) -> None:
    trainer = policy(engine._model.transformer)
    tensors, own = peft.get_peft_model_state_dict(trainer), trainer.peft_config["default"]
    as_saved = own.to_dict()
    spelled = {**as_saved, "modules_to_save": [], "use_rslora": None, "rank_pattern": None, "exclude_modules": [], "bias": None}
    rollouts = []
    with Client(str(server.base_url)) as client:
        for config in (as_saved, dataclasses.asdict(own), spelled):
            for door in (client, engine):
                change = door.load_lora_adapter_from_tensors(tensors, config, name="p", weight_version="7")
                assert change.adapter is not None
                rollouts += engine.rollout(**REQUEST, lora_name="p")
                door.unload_lora_adapter("p", weight_version="6")
    for rollout in rollouts[1:]:
        assert_same_bits(rollout, rollouts[0])


@pytest.mark.parametrize(
    ("key", "value"), [("use_dora", True), ("kasa_config", {}), ("bias", "lora_only"), ("lora_bias", True)]
)
def test_what_is_on_is_refused_by_name_at_every_door(
    key: str, value: Any, engine: Engine, server: httpx.Client, root: Path
) -> None:
    trainer = policy(engine._model.transformer)
    tensors, config = peft.get_peft_model_state_dict(trainer), trainer.peft_config["default"].to_dict()
    folder = saved(trainer, root / "refused")
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    with Client(str(server.base_url)) as client:
        for door in (client, engine):
            with pytest.raises(WeightsRejectedError, match=f"^{key} must be "):
                door.load_lora_adapter(folder, name="p")
            with pytest.raises(WeightsRejectedError, match=f"^{key} must be "):
                door.load_lora_adapter_from_tensors(tensors, {**config, key: value}, name="p")
    answer = server.post("/load_lora_adapter", json={"lora_name": "p", "lora_path": str(folder)})
    assert answer.status_code == 422 and error_of(answer)["message"].startswith(f"{key} must be ")


def test_a_configuration_that_is_none_is_the_callers_mistake(engine: Engine, server: httpx.Client) -> None:
    trainer = policy(engine._model.transformer)
    tensors, config = peft.get_peft_model_state_dict(trainer), trainer.peft_config["default"].to_dict()
    with Client(str(server.base_url)) as client:
        for door in (client, engine):
            with pytest.raises(InvalidRequestError, match=r"config must be what adapter_config.json holds, got .*dtype"):
                door.load_lora_adapter_from_tensors(tensors, {**config, "dtype": torch.float32}, name="p")
