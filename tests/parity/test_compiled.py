"""Compiled blocks: a set of kernels of their own, exact among themselves, and refused beside eager ones."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.guiding import PicturedEngine, in_words_of
from tests.pairs import DTYPES
from tests.weights import with_other
from torch._inductor import cpp_builder, exc

from flowroll import Rollout, replay
from flowroll.engine import Engine
from flowroll.errors import InvalidRequestError
from flowroll.exact import compiled
from flowroll.families import FAMILIES
from flowroll.types import Layout

REQUEST: dict[str, Any] = {
    "prompt": "a red apple",
    "height": 64,
    "width": 64,
    "num_inference_steps": 2,
    "seed": 5,
    "return_denoising_env": True,
    "return_dit_trajectory": True,
}
# Both have the one transformer.
PROVED = ("qwen_image", "qwen_image_edit")


def log_probs_of(rollouts: list[Rollout]) -> torch.Tensor:
    return torch.stack([rollout.log_probs for rollout in rollouts if rollout.log_probs is not None])


@pytest.mark.proof
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", PROVED)
def test_a_compiled_replay_of_a_compiled_rollout_has_ratio_one(
    family: str, dtype: str, checkpoints: dict[str, Path], pipeline_of: Callable[[str, str], Any]
) -> None:
    request = in_words_of(family, REQUEST)
    with PicturedEngine(checkpoints[family], device="cpu", dtype=dtype, compile=True) as engine:
        group = engine.rollout(**request, num_outputs_per_prompt=2)
        alone = engine.rollout(**request)
        known = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        for side in (96, 128):
            engine.rollout(**{**request, "height": side}, num_outputs_per_prompt=2)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == known
    assert torch.equal(log_probs_of(group)[:1], log_probs_of(alone))
    transformer = copy.deepcopy(pipeline_of(family, dtype).transformer).requires_grad_(True)
    with pytest.raises(InvalidRequestError, match="compile_blocks"):
        replay.log_prob(transformer, group)
    log_probs = replay.log_prob(replay.compile_blocks(transformer), group)
    assert log_probs.requires_grad and torch.equal(log_probs.detach(), log_probs_of(group))
    log_probs.sum().backward()


@pytest.mark.proof
def test_compiled_blocks_sleep_take_weights_and_refuse_adapters(qwen_checkpoint: Path, tmp_path: Path) -> None:
    other = with_other(qwen_checkpoint, tmp_path / "other")
    with Engine(qwen_checkpoint, device="cpu", compile=True) as engine:
        first = engine.rollout(**REQUEST)
        engine.sleep()
        engine.wake()
        assert torch.equal(log_probs_of(engine.rollout(**REQUEST)), log_probs_of(first))
        engine.update_weights_from_disk(other)
        updated = engine.rollout(**REQUEST)
        with pytest.raises(InvalidRequestError, match="adapters must be left out"):
            engine.stage_pushed_lora({}, merged=False)
    with Engine(other, device="cpu", compile=True) as engine:
        assert torch.equal(log_probs_of(engine.rollout(**REQUEST)), log_probs_of(updated))


def test_compiled_and_eager_kernels_do_not_meet(
    engine_of: Callable[[str, str], Engine], pipeline_of: Callable[[str, str], Any]
) -> None:
    group = engine_of("qwen_image", "float32").rollout(**REQUEST)
    proof = group[0].provenance
    assert proof is not None and proof.compiled is None
    transformer = copy.deepcopy(pipeline_of("qwen_image", "float32").transformer)
    name = compiled.compiled_kernels(torch.device("cpu"))
    made_compiled = [replace(group[0], provenance=replace(proof, compiled=name))]
    with pytest.raises(InvalidRequestError, match=r"got eager.*compile_blocks"):
        replay.log_prob(transformer, made_compiled)
    assert compiled.kernels_of(replay.compile_blocks(transformer)) == name
    with pytest.raises(InvalidRequestError, match="eager"):
        replay.log_prob(transformer, group)


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - set(PROVED)))
def test_a_transformer_that_was_not_proved_is_refused(family: str, checkpoints: dict[str, Path]) -> None:
    with pytest.raises(InvalidRequestError, match="compile must be off but for QwenImageTransformer2DModel"):
        PicturedEngine(checkpoints[family], device="cpu", compile=True)


def test_what_cannot_be_compiled_is_refused_before_anything_is_loaded(
    z_image_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InvalidRequestError, match="leave compile out, or start one rank"):
        Engine(z_image_checkpoint, device="cpu", compile=True, layout=Layout(sp=2))

    def missing(*_: object) -> str:
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing)
    compiled._cpp_compiler.cache_clear()
    with pytest.raises(InvalidRequestError, match=r"install g\+\+"):
        Engine(z_image_checkpoint, device="cpu", compile=True)
    compiled._cpp_compiler.cache_clear()
