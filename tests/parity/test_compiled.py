"""Compiled blocks: a set of kernels of their own, exact among themselves, and refused beside eager ones."""

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.guiding import PicturedEngine, guided, in_words_of
from tests.pairs import DTYPES, paired
from tests.weights import with_other
from torch._inductor import cpp_builder, exc

from flowroll import Rollout, replay
from flowroll.engine import Engine
from flowroll.engine.weights import staged
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
# Its blocks take least time to compile, so that its proof is in `make test`.
QUICKEST = "qwen_image_21"
# Other sizes and texts than the request has, which is the one that blocks are compiled for.
OTHERS: tuple[dict[str, Any], ...] = (
    {"height": 96, "prompt": "a red apple on a table"},
    {"width": 128, "prompt": "a"},
    {"height": 32, "width": 32},
)


def num_compiled() -> int:
    """How many graphs this process has compiled, read from a cache or not."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def log_probs_of(rollouts: list[Rollout]) -> torch.Tensor:
    return torch.stack([rollout.log_probs for rollout in rollouts if rollout.log_probs is not None])


def latents_of(rollouts: list[Rollout]) -> torch.Tensor:
    return torch.stack([rollout.dit_trajectory.latents for rollout in rollouts if rollout.dit_trajectory is not None])


def rollouts_of_many_shapes(family: str, dtype: str, device: str, checkpoint: Path) -> list[list[Rollout]]:
    """Groups of other shapes, and with guidance and without, after a group of which the first sample is as alone."""
    request = in_words_of(family, REQUEST)
    with PicturedEngine(checkpoint, device=device, dtype=dtype, compile=True) as engine:
        known = num_compiled()
        group = engine.rollout(**request, num_outputs_per_prompt=2)
        assert num_compiled() == known
        groups = [group, engine.rollout(**guided(family, 4.0, **REQUEST))]
        known = num_compiled()
        assert torch.equal(latents_of(engine.rollout(**request)), latents_of(group)[:1])
        for other in OTHERS:
            groups.append(engine.rollout(**in_words_of(family, {**REQUEST, **other})))
            groups.append(engine.rollout(**guided(family, 4.0, **{**REQUEST, **other})))
        assert num_compiled() == known
    return groups


def check_replay(transformer: Any, groups: list[list[Rollout]]) -> None:
    """Every ratio is one, with gradients and without, and other shapes than the first are not compiled."""
    for group in groups[:2]:
        log_probs = replay.log_prob(transformer, group)
        assert log_probs.requires_grad and torch.equal(log_probs.detach(), log_probs_of(group))
        log_probs.sum().backward()
    assert all(weight.grad is None or weight.grad.isfinite().all() for weight in transformer.parameters())
    with torch.no_grad():
        assert torch.equal(replay.log_prob(transformer, groups[0]), log_probs_of(groups[0]))
    known = num_compiled()
    for group in groups[2:]:
        log_probs = replay.log_prob(transformer, group)
        assert torch.equal(log_probs.detach(), log_probs_of(group))
        log_probs.sum().backward()
        with torch.no_grad():
            assert torch.equal(replay.log_prob(transformer, group), log_probs_of(group))
    assert num_compiled() == known


def check_a_family(
    family: str, dtype: str, device: str, checkpoints: dict[str, Path], pipeline_of: Callable[[str, str], Any]
) -> tuple[Any, list[list[Rollout]]]:
    """The trainer compiles for another shape first than the engine, and its blocks have the engine's bits in every shape."""
    groups = rollouts_of_many_shapes(family, dtype, device, checkpoints[family])[::-1]
    transformer = copy.deepcopy(pipeline_of(family, dtype).transformer).requires_grad_(True)
    with pytest.raises(InvalidRequestError, match="compile_blocks"):
        replay.log_prob(transformer, groups[0])
    check_replay(replay.compile_blocks(transformer), groups)
    return transformer, groups


def test_a_compiled_replay_of_a_compiled_rollout_has_ratio_one(
    device: str, checkpoints: dict[str, Path], pipeline_of: Callable[[str, str], Any]
) -> None:
    torch.compiler.reset()
    known = num_compiled()
    check_a_family(QUICKEST, "bfloat16", device, checkpoints, pipeline_of)
    # Its blocks are all alike, so that there is one graph without gradients and one with them.
    assert num_compiled() == known + 2


@pytest.mark.proof
@paired(family=tuple(FAMILIES), dtype=DTYPES)
def test_every_compiled_family_has_ratio_one(
    family: str, dtype: str, device: str, checkpoints: dict[str, Path], pipeline_of: Callable[[str, str], Any]
) -> None:
    check_a_family(family, dtype, device, checkpoints, pipeline_of)


@pytest.mark.proof
def test_bits_do_not_depend_on_the_shape_that_was_compiled_first(
    device: str, checkpoints: dict[str, Path], pipeline_of: Callable[[str, str], Any]
) -> None:
    transformer, groups = check_a_family(QUICKEST, "bfloat16", device, checkpoints, pipeline_of)
    # Nothing that was compiled is found again, in memory or on disk.
    torch.compiler.reset()
    known = num_compiled()
    with torch._inductor.config.patch(force_disable_caches=True):
        check_replay(transformer, groups[::-1])
    assert num_compiled() > known


@pytest.mark.proof
def test_another_process_compiles_nothing_anew(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    def count() -> tuple[int, int]:
        found = subprocess.run(
            [sys.executable, "-c", COUNTING, str(checkpoints[QUICKEST])],
            env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        hits, misses = found.stdout.split()[-2:]
        return int(hits), int(misses)

    hits, misses = count()
    assert misses
    files = set(tmp_path.rglob("*.cpp"))
    assert files
    again = count()
    assert again == (hits + misses, 0) and set(tmp_path.rglob("*.cpp")) == files


COUNTING = """
import sys, torch
from flowroll.engine import Engine
with Engine(sys.argv[1], device="cpu", dtype="bfloat16", compile=True) as engine:
    engine.rollout(prompt="a", height=64, width=64, num_inference_steps=2, seed=5)
counted = torch._dynamo.utils.counters["inductor"]
print(counted["fxgraph_cache_hit"], counted["fxgraph_cache_miss"])
"""


@pytest.mark.proof
def test_compiled_blocks_sleep_take_weights_and_refuse_adapters(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, other = checkpoints[QUICKEST], with_other(checkpoints[QUICKEST], tmp_path / "other")
    with Engine(own, device="cpu", dtype="bfloat16", compile=True) as engine:
        first = engine.rollout(**REQUEST)
        engine.sleep()
        engine.wake()
        assert torch.equal(latents_of(engine.rollout(**REQUEST)), latents_of(first))
        engine.update_weights_from_disk(other)
        updated = engine.rollout(**REQUEST)
        assert not torch.equal(latents_of(updated), latents_of(first))
        # As on a GPU.
        monkeypatch.setattr(staged, "is_overwritten", lambda weight: True)
        engine.update_weights_from_disk(own)
        assert torch.equal(latents_of(engine.rollout(**REQUEST)), latents_of(first))
        with pytest.raises(InvalidRequestError, match="adapters must be left out"):
            engine.stage_pushed_lora({}, merged=False)
    with Engine(other, device="cpu", dtype="bfloat16", compile=True) as engine:
        assert torch.equal(latents_of(engine.rollout(**REQUEST)), latents_of(updated))


def test_compiled_and_eager_kernels_do_not_meet(
    device: str, engine_of: Callable[[str, str], Engine], pipeline_of: Callable[[str, str], Any]
) -> None:
    group = engine_of("qwen_image", "float32").rollout(**REQUEST)
    proof = group[0].provenance
    assert proof is not None and proof.compiled is None
    transformer = copy.deepcopy(pipeline_of("qwen_image", "float32").transformer)
    name = compiled.compiled_kernels(torch.device(device))
    made_compiled = [replace(group[0], provenance=replace(proof, compiled=name))]
    with pytest.raises(InvalidRequestError, match=r"got eager.*compile_blocks"):
        replay.log_prob(transformer, made_compiled)
    assert compiled.kernels_of(replay.compile_blocks(transformer)) == name
    with pytest.raises(InvalidRequestError, match="eager"):
        replay.log_prob(transformer, group)


def test_a_transformer_that_was_not_proved_is_compiled_with_other_settings_alone(
    device: str, pipeline_of: Callable[[str, str], Any]
) -> None:
    transformer = copy.deepcopy(pipeline_of(QUICKEST, "float32").transformer)
    transformer.__class__ = type("Unknown", (type(transformer),), {})
    with pytest.raises(InvalidRequestError, match=r"compile must be off but for .*got Unknown"):
        replay.compile_blocks(transformer)
    assert compiled.kernels_of(transformer) == "eager"
    name = compiled.kernels_of(replay.compile_blocks(transformer, {"epilogue_fusion": False}))
    assert name is not None and name != compiled.compiled_kernels(torch.device(device))


def test_every_family_was_proved_and_other_dtypes_are_refused(
    checkpoints: dict[str, Path], pipeline_of: Callable[[str, str], Any]
) -> None:
    configs = [json.loads((folder / "transformer" / "config.json").read_text()) for folder in checkpoints.values()]
    assert {config["_class_name"] for config in configs} == compiled._PROVED
    assert {getattr(torch, dtype) for dtype in DTYPES} == compiled._PROVED_DTYPES
    transformer = copy.deepcopy(pipeline_of(QUICKEST, "float32").transformer).half()
    with pytest.raises(InvalidRequestError, match=r"compile must be off but for .*got \w+ in float16"):
        replay.compile_blocks(transformer)


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
