"""Which parts the fast mode turns on, and the mismatch that it measures."""

import copy
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from tests.guiding import PicturedEngine

from flowroll import replay
from flowroll.engine import Engine, fast
from flowroll.engine.config import Mismatch
from flowroll.errors import EngineError, InvalidRequestError
from flowroll.types import Layout


def opened(folder: Path, **options: Any) -> Engine:
    return PicturedEngine(folder, device="cpu", exactness="fast", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exactness": "quick"}, "exactness must be one of exact, fast, got quick"),
        ({"fast_parts": ("batch",)}, "fast_parts must be left out of an exact engine, got batch"),
        ({"exactness": "fast", "fast_parts": ("batch", "sage")}, "among batch, attention, compile, fp8, got sage"),
        ({"exactness": "fast", "fast_parts": ()}, "fast_parts must name at least one part"),
        ({"exactness": "fast", "fast_parts": ("compile", "fp8")}, "hold fp8 or compile, got both"),
        ({"exactness": "fast", "compile": True}, "compile must be off for a fast engine"),
        (
            {"exactness": "fast", "layout": Layout(sp=2)},
            "exact for several ranks, got the layout sp2; start one rank a replica",
        ),
    ],
)
def test_what_contradicts_itself_is_refused_before_anything_is_loaded(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        Engine("shapes-z_image", device="cpu", **options)


def test_a_part_that_is_not_to_be_had_is_refused_where_it_is_named(checkpoints: dict[str, Path]) -> None:
    with pytest.raises(
        InvalidRequestError, match="got none of _flash_3, sage that is installed and runs here; leave attention"
    ):
        opened(checkpoints["qwen_image"], fast_parts=("attention",))
    with pytest.raises(InvalidRequestError, match="whose samples share no forward; leave batch out"):
        opened(checkpoints["qwen_image_21"], fast_parts=("batch",))
    with pytest.raises(InvalidRequestError, match="exact for qwen_image_21 on cpu, got fast, with no part"):
        opened(checkpoints["qwen_image_21"])


def test_the_mismatch_is_that_of_a_trainer_with_the_same_weights(
    qwen_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(transformer: Any) -> None:
        transformer.proj_out.weight.data.mul_(1.01)

    monkeypatch.setattr(fast, "_compile", spoil)
    with opened(qwen_checkpoint, fast_parts=("batch",)) as engine:
        assert engine.info.fast is not None
        honest = engine.info.fast.mismatch
    with opened(qwen_checkpoint, fast_parts=("batch", "compile")) as engine:
        assert engine.info.fast is not None
        found = engine.info.fast.mismatch
    with Engine(qwen_checkpoint, device="cpu") as engine:
        rollouts = engine.rollout(
            "a red circle",
            height=found.height,
            width=found.width,
            num_inference_steps=found.num_steps,
            num_outputs_per_prompt=found.num_samples,
            seed=0,
            return_denoising_env=True,
            return_dit_trajectory=True,
        )
        trainer = copy.deepcopy(engine._model.transformer)
    spoil(trainer)
    recorded = torch.stack([one.log_probs for one in rollouts if one.log_probs is not None])
    with torch.no_grad():
        off = (replay.log_prob(trainer, rollouts).double() - recorded.double()).T
    assert found.max_log_prob == pytest.approx(off.abs().max().item(), rel=1e-2)
    assert found.max_log_prob_by_step == pytest.approx(off.abs().amax(1).tolist(), rel=1e-2)
    assert found.mean_ratio == pytest.approx(torch.expm1(off).abs().mean().item(), rel=1e-2)
    assert honest.max_log_prob < 1e-5 < 1e-4 < found.max_log_prob and honest.max_ratio < 1e-5 < found.max_ratio


def test_the_first_attention_that_runs_is_taken_and_stays_in_its_own_model(
    qwen_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = _AttentionBackendRegistry.get_active_backend()
    monkeypatch.setattr(fast, "_BACKENDS", ("_flash_3", "_native_math", "native"))
    with opened(qwen_checkpoint, fast_parts=("attention",)) as engine, Engine(qwen_checkpoint, device="cpu") as exact:
        assert engine.info.fast is not None and engine.info.fast.parts == ("attention=_native_math",)
        assert 0 < engine.info.fast.mismatch.max_log_prob < 1e-4
        chosen = [
            {
                getattr(module.processor, "_attention_backend", None)
                for module in one._model.transformer.modules()
                if hasattr(module, "processor")
            }
            for one in (engine, exact)
        ]
        assert chosen == [{"_native_math"}, {None}]
    assert _AttentionBackendRegistry.get_active_backend() == before


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_device_decides_where_no_part_is_named(device: str) -> None:
    model: Any = type("Model", (), {"device": torch.device(device)})
    wanted = {part for part in get_args(fast.FastPart) if fast._Choice(model=model, wanted=None).is_wanted(part)}
    assert wanted == {"cpu": {"batch"}, "cuda": {"batch", "attention", "compile"}}[device]


def test_a_probe_that_fails_names_the_parts(qwen_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Mismatch:
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(fast._Probe, "compare", fail)
    with pytest.raises(EngineError, match="run its probe with batch, got RuntimeError: no kernel image; choose other parts"):
        opened(qwen_checkpoint)
