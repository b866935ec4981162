"""LoRA adapters against a trainer's own peft model, and against a checkpoint that peft merged; the model as it is untouched."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tests.adapters import policy, saved
from tests.rollouts import assert_same_bits
from tests.weights import REQUEST, WEIGHTS

from flowroll import Rollout, replay
from flowroll.engine import Engine

GROUP: dict[str, Any] = {**REQUEST, "guidance_scale": 3.0, "num_outputs_per_prompt": 2}
# An adapter that is trained in float32 over bfloat16 weights is what peft makes by default.
CASES = [("qwen_image", "float32", "float32"), ("qwen_image", "bfloat16", "bfloat16"), ("z_image", "float32", "float32")]
CASES += [("z_image", "bfloat16", "bfloat16"), ("qwen_image", "bfloat16", "float32"), ("flux", "float32", "float32")]


def assert_replayed(trainer: Any, group: list[Rollout]) -> None:
    """Every step's velocity, mean and log-prob are those of the trainer's model; so the ratio is exactly one."""
    with torch.no_grad():
        scores = replay.score(trainer, group)
    recorded = torch.stack([rollout.log_probs for rollout in group])
    assert torch.equal(replay.ratio(scores.log_probs.cpu(), recorded), torch.ones_like(recorded))
    for rollout, means, velocities in zip(group, scores.means, scores.velocities, strict=True):
        assert torch.equal(velocities.float().cpu(), rollout.debug_tensors.model_output)
        assert torch.equal(means.float().cpu(), rollout.debug_tensors.prev_sample_mean)


@pytest.mark.parametrize(("family", "dtype", "adapter_dtype"), CASES)
def test_an_adapter_has_the_bits_of_a_trainers_peft_model_and_leaves_the_model_without_it_alone(
    family: str,
    dtype: str,
    adapter_dtype: str,
    engine_of: Callable[[str, str], Engine],
    pipeline_of: Callable[[str, str], Any],
    tmp_path: Path,
) -> None:
    engine, base = engine_of(family, dtype), pipeline_of(family, dtype).transformer
    before, checksum = engine.rollout(**GROUP), engine.weights_checksum()
    trainers = {}
    for seed, name in enumerate(("old", "new")):
        trainers[name] = policy(base, seed, autocast=adapter_dtype != dtype)
        change = engine.load_lora_adapter(saved(trainers[name], tmp_path / name), name=name)
        assert change.adapter.sha256 == replay.adapter_checksum(trainers[name])
    for name, trainer in trainers.items():
        group = engine.rollout(**GROUP, lora_name=name)
        assert_replayed(trainer, group)
        assert not torch.equal(group[0].debug_tensors.model_output, before[0].debug_tensors.model_output)
        assert {rollout.sampling.lora.sha256 for rollout in group} == {replay.adapter_checksum(trainer)}
        # The engine's own scores of them, with the adapter that their record names.
        scores = engine.score(
            latents=group[0].dit_trajectory.latents[0],
            next_latents=group[0].dit_trajectory.latents[1],
            step=0,
            env=group[0].denoising_env,
            record=group[0].sampling,
        )
        assert torch.equal(scores.velocity, group[0].debug_tensors.model_output[0])
    assert engine.weights_checksum() == checksum
    for again, rollout in zip(engine.rollout(**GROUP), before, strict=True):
        assert_same_bits(again, rollout)
    for name in trainers:
        engine.unload_lora_adapter(name)
    assert engine.lora_adapters() == () and engine.weights_checksum() == checksum
    assert_same_bits(engine.rollout(**GROUP)[0], before[0])


@pytest.mark.parametrize(("family", "dtype", "adapter_dtype"), CASES)
def test_a_merged_adapter_has_the_bits_of_a_checkpoint_that_peft_merged(
    family: str,
    dtype: str,
    adapter_dtype: str,
    checkpoints: dict[str, Path],
    device: str,
    engine_of: Callable[[str, str], Engine],
    pipeline_of: Callable[[str, str], Any],
    tmp_path: Path,
) -> None:
    engine = engine_of(family, dtype)
    trainer = policy(pipeline_of(family, dtype).transformer, autocast=adapter_dtype != dtype)
    folder = saved(trainer, tmp_path / "adapter")
    shutil.copytree(checkpoints[family], tmp_path / "merged")
    weights = trainer.merge_and_unload().state_dict()
    save_file(
        {name: tensor.cpu().contiguous() for name, tensor in weights.items()}, tmp_path / "merged" / "transformer" / WEIGHTS
    )
    with Engine(tmp_path / "merged", dtype=dtype, device=device) as fresh:
        expected = fresh.rollout(**GROUP)
    before, checksum = engine.rollout(**GROUP), engine.weights_checksum()
    engine.load_lora_adapter(folder, name="merged", merged=True)
    group = engine.rollout(**GROUP, lora_name="merged")
    assert group[0].sampling.lora.merged
    for rollout, other in zip(group, expected, strict=True):
        assert_same_bits(replace(rollout, sampling=replace(rollout.sampling, lora=None)), other)
    assert not torch.equal(group[0].image, before[0].image)
    assert engine.weights_checksum() == checksum
    assert_same_bits(engine.rollout(**GROUP)[0], before[0])
    engine.unload_lora_adapter("merged")
    assert_same_bits(engine.rollout(**GROUP)[0], before[0])
