"""What is particular to Stable Diffusion 3: T5 that was not saved, lengths of texts, shifts, kinds of attention, refusals."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.parity.sd3 import NO_T5, REQUEST, edited, latents_of, load
from torch import Tensor

from flowroll import replay
from flowroll.engine import Engine
from flowroll.errors import InvalidRequestError
from flowroll.testing import make_checkpoint

EVERYTHING = {"return_denoising_env": True, "return_dit_trajectory": True}


@pytest.fixture(scope="module")
def without_t5(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sd3") / "without_t5"
    load(checkpoints["sd3"], **NO_T5).save_pretrained(folder)
    assert json.loads((folder / "model_index.json").read_text())["text_encoder_3"] == [None, None]
    return folder


@pytest.fixture(scope="module")
def engine(without_t5: Path) -> Iterator[Engine]:
    with Engine(without_t5, device="cpu", dtype="float32") as engine:
        yield engine


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scale", [1.0, 7.0])
def test_without_t5_the_bits_are_the_pipelines(without_t5: Path, dtype: str, scale: float) -> None:
    expected = latents_of(load(without_t5, dtype, **NO_T5), num_inference_steps=3, guidance_scale=scale)
    with Engine(without_t5, device="cpu", dtype=dtype) as engine:
        (found,) = engine.generate(**REQUEST, seed=7, num_inference_steps=3, guidance_scale=scale)
    assert found.latents.dtype == expected.dtype and torch.equal(found.latents, expected)


def test_without_t5_zeros_of_256_rows_stand_in_and_replay_is_exact(engine: Engine) -> None:
    (rollout,) = engine.rollout(**REQUEST, **EVERYTHING, num_inference_steps=3, guidance_scale=7.0)
    env = rollout.denoising_env
    assert env is not None and env.neg_cond_kwargs is not None
    for branch in (env.pos_cond_kwargs, env.neg_cond_kwargs):
        embeds = branch["encoder_hidden_states"]
        assert isinstance(embeds, Tensor) and embeds.shape == (77 + 256, 64)
        assert not embeds[77:].any() and embeds[:77].any()
    assert torch.equal(replay.log_prob(engine._model.transformer, [rollout])[0], rollout.log_probs)


def test_what_was_not_saved_has_no_weights_to_ask_for(engine: Engine) -> None:
    assert engine.modules == ("transformer", "text_encoder", "text_encoder_2", "vae")
    assert len({engine.weights_checksum(name) for name in engine.modules}) == 4
    with pytest.raises(InvalidRequestError, match="one of transformer, text_encoder, text_encoder_2, vae, got text_encoder_3"):
        engine.weights_checksum("text_encoder_3")


@pytest.mark.parametrize("name", ["text_encoder", "text_encoder_2", "text_encoder_3"])
def test_no_text_encoder_is_updated(engine: Engine, checkpoints: dict[str, Path], name: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"module must be transformer or vae, got {name}; start an engine on other"):
        engine.update_weights_from_disk(checkpoints["sd3"], module=name)


def test_an_engine_without_t5_sleeps_and_wakes_to_the_same_bits(engine: Engine) -> None:
    request = {**REQUEST, "seed": 1, "num_inference_steps": 2}
    before = engine.generate(**request)[0].image
    engine.sleep(mode="disk")
    engine.wake()
    assert torch.equal(engine.generate(**request)[0].image, before)


# CLIP takes 75 words of one token, T5 255; both cut what is longer, and fill up what is shorter.
@pytest.mark.parametrize(("words", "negative"), [(0, 75), (1, 255), (75, 0), (76, 256), (255, 76), (256, 1), (600, 600)])
def test_texts_are_cut_and_filled_up_as_in_the_pipeline(
    engine_of: Callable[[str, str], Engine], pipeline_of: Callable[[str, str], Any], words: int, negative: int
) -> None:
    texts = {"prompt": "cat " * words, "negative_prompt": "blur " * negative}
    request = {**REQUEST, **texts, "guidance_scale": 4.0, "num_inference_steps": 1}
    (found,) = engine_of("sd3", "float32").generate(**request, seed=7)
    assert torch.equal(found.latents, latents_of(pipeline_of("sd3", "float32"), **request).cpu())


# From one token to the whole width of the position table.
@pytest.mark.parametrize(("height", "width", "steps"), [(16, 16, 1), (16, 1536, 2), (1536, 16, 3), (176, 464, 5)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_size_has_the_pipelines_bits(
    engine_of: Callable[[str, str], Engine],
    pipeline_of: Callable[[str, str], Any],
    dtype: str,
    height: int,
    width: int,
    steps: int,
) -> None:
    request = {**REQUEST, "height": height, "width": width, "num_inference_steps": steps, "guidance_scale": 4.0}
    (found,) = engine_of("sd3", dtype).generate(**request, seed=7)
    assert torch.equal(found.latents, latents_of(pipeline_of("sd3", dtype), **request).cpu())


SCHEDULERS: dict[str, dict[str, Any]] = {
    "static": {},
    "no shift": {"shift": 1.0},
    "dynamic": {"use_dynamic_shifting": True},
    "dynamic, linear": {"use_dynamic_shifting": True, "time_shift_type": "linear"},
    "terminal": {"shift_terminal": 0.1},
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_shift_and_number_of_steps_gives_the_pipelines_bits(
    checkpoints: dict[str, Path], tmp_path: Path, name: str
) -> None:
    folder = edited(checkpoints["sd3"], tmp_path / "model", "scheduler/scheduler_config.json", **SCHEDULERS[name])
    pipeline = load(folder)
    with Engine(folder, device="cpu", dtype="float32") as engine:
        for steps in (1, 2, 7, 28) if name != "terminal" else (2, 7):
            (found,) = engine.generate(**REQUEST, seed=7, num_inference_steps=steps, guidance_scale=1.0)
            assert torch.equal(found.latents, latents_of(pipeline, num_inference_steps=steps, guidance_scale=1.0)), steps
            assert found.sampling.sigmas == tuple(pipeline.scheduler.sigmas.tolist())


# As Stable Diffusion 3, as 3.5 large, and with more of a second attention than 3.5 medium has.
ATTENTION: list[dict[str, Any]] = [
    {"dual_attention_layers": (), "qk_norm": None},
    {"dual_attention_layers": ()},
    {"dual_attention_layers": (0, 1, 2)},
]


@pytest.mark.parametrize("options", ATTENTION)
def test_every_kind_of_attention_has_the_pipelines_bits(tmp_path: Path, options: dict[str, Any]) -> None:
    folder = make_checkpoint("sd3", tmp_path, **options)
    with Engine(folder, device="cpu", dtype="float32") as engine:
        (found,) = engine.generate(**REQUEST, seed=7, num_inference_steps=2, guidance_scale=4.0)
    assert torch.equal(found.latents, latents_of(load(folder), num_inference_steps=2, guidance_scale=4.0))


def test_the_defaults_are_the_pipelines_and_those_of_the_model_card(checkpoints: dict[str, Path]) -> None:
    with Engine(checkpoints["sd3"], device="cpu") as base:
        assert (base.info.defaults.num_inference_steps, base.info.defaults.guidance_scale) == (28, 7.0)
    with Engine(checkpoints["sd3"], device="cpu", variant="3.5-medium") as medium:
        assert (medium.info.defaults.num_inference_steps, medium.info.defaults.guidance_scale) == (40, 4.5)


def test_an_image_beyond_the_position_table_is_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    folder = make_checkpoint("sd3", tmp_path, pos_embed_max_size=8, sample_size=16)
    with Engine(folder, device="cpu") as engine:
        with pytest.raises(InvalidRequestError, match="width must be at most 128, where the position table ends, got 144"):
            engine.generate(prompt="a", height=64, width=144)
        assert engine.generate(prompt="a", height=128, width=128, num_inference_steps=1)


@pytest.mark.parametrize("change", [lambda tensor: tensor[:-1], lambda tensor: tensor * torch.nan])
@pytest.mark.parametrize("name", ["encoder_hidden_states", "pooled_projections"])
def test_a_changed_env_is_refused_by_name(engine: Engine, name: str, change: Callable[[Tensor], Tensor]) -> None:
    (rollout,) = engine.rollout(**REQUEST, **EVERYTHING, num_inference_steps=2)
    env, trajectory = rollout.denoising_env, rollout.dit_trajectory
    assert env is not None and trajectory is not None
    branch = {**env.pos_cond_kwargs, name: change(env.pos_cond_kwargs[name])}  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError) as caught:
        engine.score(
            latents=trajectory.latents[0],
            next_latents=trajectory.latents[1],
            step=0,
            env=type(env)(pos_cond_kwargs=branch, neg_cond_kwargs=env.neg_cond_kwargs),
            record=rollout.sampling,
            sde_step_indices=rollout.sde_step_indices,
        )
    # A shape is compared with the other branch's first, which is an error about both.
    assert caught.value.field in ("denoising_env", f"denoising_env.pos_cond_kwargs.{name}")
    assert name in caught.value.message
