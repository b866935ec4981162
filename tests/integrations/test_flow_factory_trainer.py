"""Flow-Factory's own trainers, unmodified and from its own entry point, on flowroll; skipped where it is not installed."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.serving.servers import serving

from flowroll.engine import Engine
from flowroll.engine.service import EngineService
from flowroll.integrations.flow_factory import FlowrollMixin

Train = Callable[..., Any]
HERE = "tests.integrations.flow_factory_parts"
ADAPTERS = {"sd3": "SD3_5Adapter", "z_image": "ZImageAdapter"}
STEPS, EPOCHS = 6, 2


@pytest.fixture
def train(checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Train]:
    """Runs a trainer to its end, as `ff-train` starts it; returns it with what it has logged."""
    pytest.importorskip("flow_factory")
    pytest.importorskip("accelerate")
    pytest.importorskip("datasets")
    import yaml
    from accelerate.state import AcceleratorState
    from flow_factory import train as entry
    from tests.integrations import flow_factory_parts as parts

    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    monkeypatch.setattr(parts, "LOGGED", [])
    for split in ("train", "test"):
        (tmp_path / f"{split}.txt").write_text("a red cat\na blue dog\n")
    trainers: list[Any] = []
    load = entry.load_trainer
    monkeypatch.setattr(entry, "load_trainer", lambda config: trainers.append(load(config)) or trainers[-1])

    def run(
        trainer: str = "grpo", family: str = "sd3", precision: str = "bf16", finetune: str = "lora", **model: Any
    ) -> tuple[Any, list[dict[str, Any]]]:
        config = {
            "launcher": "accelerate",
            "num_processes": 1,
            "mixed_precision": precision,
            "data": {"dataset_dir": str(tmp_path), "dataloader_num_workers": 0, "cache_dir": str(tmp_path / "cache")},
            "model": {
                "model_type": f"flowroll.integrations.flow_factory.{ADAPTERS[family]}",
                "model_name_or_path": str(checkpoints[family]),
                "finetune_type": finetune,
                "target_modules": "default" if finetune == "lora" else "all",
                "master_weight_dtype": "fp32" if precision == "no" else "bf16",
                "lora_rank": 4,
                "lora_alpha": 8,
                **model,
            },
            "log": {"run_name": "one", "logging_backend": f"{HERE}.Log", "save_dir": str(tmp_path), "save_freq": 0},
            "train": {
                "trainer_type": trainer,
                "resolution": 64,
                "num_inference_steps": STEPS,
                "guidance_scale": 1.0,
                "per_device_batch_size": 4 if trainer == "dgpo" else 2,
                "group_size": 4,
                "unique_sample_num_per_epoch": 2,
                "gradient_step_per_epoch": 2,
                "learning_rate": 1e-2,
                "enable_gradient_checkpointing": False,
                "ema_decay": 0.9,
                "ema_device": "cpu",
                "ema_update_interval": 1,
                "max_epochs": EPOCHS,
                "ref_param_device": "cpu",
            },
            "scheduler": {"dynamics_type": "Flow-SDE", "noise_level": 0.8, "num_sde_steps": 2, "sde_steps": [0, 1, 2, 3]},
            "eval": {"resolution": 64, "guidance_scale": 1.0, "num_inference_steps": STEPS, "eval_freq": 1},
            "rewards": [{"name": "red", "reward_model": f"{HERE}.Redness", "device": "cpu", "dtype": "float32"}],
        }
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        monkeypatch.setattr(sys, "argv", ["ff-train", str(tmp_path / "config.yaml")])
        entry.main()
        return trainers[-1], parts.LOGGED

    yield run
    AcceleratorState._reset_state(reset_partial_state=True)
    for trainer in trainers:
        if engine := getattr(trainer.adapter._backend, "engine", None):
            engine.close()


def ratio_errors(logged: list[dict[str, Any]]) -> list[float]:
    """The largest |ratio - 1| of each optimizer step."""
    steps = [one for one in logged if "train/ratio_max" in one]
    return [max(abs(float(one["train/ratio_max"]) - 1), abs(float(one["train/ratio_min"]) - 1)) for one in steps]


@pytest.mark.parametrize(
    ("trainer", "family", "precision", "finetune"),
    [
        ("grpo", "sd3", "bf16", "lora"),
        ("grpo", "sd3", "bf16", "full"),
        ("grpo", "sd3", "no", "full"),
        ("grpo", "z_image", "bf16", "lora"),
        ("grpo-guard", "sd3", "bf16", "lora"),
    ],
)
def test_the_ratio_of_the_first_inner_step_is_exactly_one(
    train: Train, trainer: str, family: str, precision: str, finetune: str
) -> None:
    """Its trainers always run under autocast to bfloat16, also with `mixed_precision: no`."""
    ended, logged = train(trainer, family, precision, finetune)
    assert isinstance(ended.adapter, FlowrollMixin) and ended.epoch == EPOCHS
    first, second, third, fourth = ratio_errors(logged)
    # Two optimizer steps an epoch: the samples of the first are of the weights that it starts with.
    assert first == third == 0
    assert second > 0 and fourth > 0


def test_the_engines_log_probs_are_near_those_of_the_trainers_forward(train: Train) -> None:
    """The engine has no autocast; the distance is that of norms and sums in bfloat16."""
    _, logged = train(flowroll_log_probs="engine")
    first, _, third, _ = ratio_errors(logged)
    assert 0 < first < 5e-4 and 0 < third < 5e-4


@pytest.mark.parametrize("trainer", ["nft", "awm", "crd", "dpo", "dgpo"])
def test_trainers_without_log_probs_run_to_their_end(train: Train, trainer: str) -> None:
    ended, logged = train(trainer)
    losses = [float(value) for one in logged for key, value in one.items() if key == "train/loss"]
    assert ended.epoch == EPOCHS and losses and all(torch.tensor(losses).isfinite())
    # Eight samples to train on and two to evaluate in each epoch, all of them made here.
    assert sum("eval/reward_red_mean" in one for one in logged) == EPOCHS
    assert ended.adapter._backend.engine.scheduler.load().requests.completed == EPOCHS * (8 + 2)


def test_a_trainer_on_a_server_has_a_ratio_of_one(
    train: Train, checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server's dtype need not be that of the weights in training, whose embeddings are rounded to it."""
    with (
        Engine(checkpoints["sd3"], device="cpu", dtype="bfloat16") as engine,
        EngineService(engine, max_queue=16) as service,
        serving(service) as http,
    ):
        _, logged = train(precision="no", finetune="full", flowroll_url=str(http.base_url))
        errors = ratio_errors(logged)
        assert errors[0] == errors[2] == 0
        assert int(engine.weight_version) >= EPOCHS
