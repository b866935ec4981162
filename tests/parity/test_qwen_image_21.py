"""What is particular to Qwen-Image-2.1: keys and values that are kept, guidance on request, its own grid, an alpha channel."""

import dataclasses
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from tests.pairs import DTYPES, dealt
from tests.processors import load_without_torchvision
from torch import Tensor

from flowroll import Rollout, replay
from flowroll.engine import Engine
from flowroll.errors import InvalidRequestError, UnsupportedModelError
from flowroll.families import FAMILIES
from flowroll.families.alignment import align_weights
from flowroll.families.qwen_image_21 import PrefixCache
from flowroll.testing import make_checkpoint
from flowroll.types.pictures import encode_png
from flowroll.wire.dialects import env_from_wire, env_to_wire

FAMILY = FAMILIES["qwen_image_21"]
REQUEST: dict[str, Any] = {"prompt": "a red cup", "height": 96, "width": 64, "num_inference_steps": 3}
# So few image tokens that products have other bits beside those of the text.
SMALL: dict[str, Any] = {**REQUEST, "height": 32}
GUIDED = {"negative_prompt": "blurry", "true_cfg_scale": 4.0}
EVERYTHING = {"return_denoising_env": True, "return_dit_trajectory": True}
EngineOf = Callable[[str, str], Engine]
PipelineOf = Callable[[str, str], Any]


def latents_of(pipeline: Any, **request: Any) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return pipeline(**request, generator=generator, output_type="latent").images[0]


# What is asked for, and whether the pipeline runs the unconditional branch for it.
ASKED: dict[str, tuple[dict[str, Any], bool]] = {
    "nothing": ({}, False),
    "a negative prompt without a scale": ({"negative_prompt": "blurry"}, False),
    "a scale without a negative prompt": ({"true_cfg_scale": 4.0}, False),
    "a scale of 1": ({"negative_prompt": "blurry", "true_cfg_scale": 1.0}, False),
    "both": (GUIDED, True),
    "an empty negative prompt": ({"negative_prompt": "", "true_cfg_scale": 1.5}, True),
}


@dealt(name=tuple(ASKED), dtype=DTYPES)
def test_guidance_runs_where_the_pipeline_runs_it(engine_of: EngineOf, pipeline_of: PipelineOf, name: str, dtype: str) -> None:
    asked, is_guided = ASKED[name]
    (found,) = engine_of(FAMILY.name, dtype).generate(**REQUEST, **asked, seed=7)
    assert torch.equal(found.latents, latents_of(pipeline_of(FAMILY.name, dtype), **REQUEST, **asked))
    expected = ("true_cfg", asked["true_cfg_scale"]) if is_guided else ("none", 1)
    assert (found.sampling.guidance_rule, found.sampling.guidance_scale) == expected
    assert found.sampling.negative_prompt == (asked["negative_prompt"] if is_guided else None)


def test_the_engine_keeps_keys_and_values_as_the_pipeline_does(engine_of: EngineOf, pipeline_of: PipelineOf) -> None:
    """The bits are those with the cache also where a step without it has others."""
    pipeline = pipeline_of(FAMILY.name, "float32")
    kept, not_kept = (latents_of(pipeline, **SMALL, **GUIDED, use_kv_cache=use) for use in (True, False))
    if torch.equal(kept, not_kept):
        pytest.skip("on this CPU a step has the same bits without the cache, so nothing can be told apart")
    (found,) = engine_of(FAMILY.name, "float32").generate(**SMALL, **GUIDED, seed=7)
    assert torch.equal(found.latents, kept)


@dealt(dtype=DTYPES, request_=(SMALL, REQUEST), asked=(GUIDED, {}))
def test_replay_runs_what_fills_the_cache(
    engine_of: EngineOf, pipeline_of: PipelineOf, dtype: str, request_: dict[str, Any], asked: dict[str, Any]
) -> None:
    group = engine_of(FAMILY.name, dtype).rollout(**request_, **asked, **EVERYTHING, seed=7, num_outputs_per_prompt=2)
    found = replay.log_prob(pipeline_of(FAMILY.name, dtype).transformer, group)
    assert torch.equal(found.detach(), torch.stack([one.log_probs for one in group if one.log_probs is not None]))


def test_a_step_with_the_cache_has_the_gradient_of_the_text(engine_of: EngineOf, pipeline_of: PipelineOf) -> None:
    """The weights that only the text goes through reach the log-prob of a later step through the cache alone."""
    (rollout,) = engine_of(FAMILY.name, "float32").rollout(**REQUEST, **EVERYTHING, seed=7)
    transformer = pipeline_of(FAMILY.name, "float32").transformer
    weight = transformer.txt_in.out_layer.weight
    (gradient,) = torch.autograd.grad(replay.log_prob(transformer, [rollout], steps=[1]).sum(), weight)
    (whole,) = torch.autograd.grad(replay.log_prob(transformer, [rollout], micro_batch=3).sum(), weight)
    steps = [torch.autograd.grad(replay.log_prob(transformer, [rollout], steps=[step]).sum(), weight)[0] for step in range(3)]
    assert torch.allclose(whole, sum(steps), rtol=1e-4, atol=1e-5 * whole.abs().max().item())
    # Moved along its gradient, the log-prob changes as the gradient says.
    step, own, found = 1e-2 / gradient.norm(), weight.detach().clone(), []
    with torch.no_grad():
        for sign in (1, -1):
            weight.copy_(own + sign * step * gradient)
            found.append(replay.log_prob(transformer, [rollout], steps=[1]).sum().double())
        weight.copy_(own)
    assert (found[0] - found[1]) / (2 * step) == pytest.approx(gradient.double().square().sum().item(), rel=0.05)


def test_the_engine_runs_one_forward_a_step_and_a_replayed_step_two(engine_of: EngineOf, pipeline_of: PipelineOf) -> None:
    engine, trainers = engine_of(FAMILY.name, "float32"), pipeline_of(FAMILY.name, "float32").transformer
    calls: list[str] = []

    def note(_: Any, __: Any, given: dict[str, Any]) -> None:
        calls.append(given["kv_cache_mode"])

    strides = set()

    def note_strides(_: Any, __: Any, given: dict[str, Any]) -> None:
        strides.add(given["hidden_states"].stride()[1:])

    pipeline = pipeline_of(FAMILY.name, "float32")
    handles = [one.register_forward_pre_hook(note_strides, with_kwargs=True) for one in (engine._model.transformer, trainers)]
    handles += [one.register_forward_pre_hook(note, with_kwargs=True) for one in (engine._model.transformer, trainers)]
    try:
        (rollout,) = engine.rollout(**REQUEST, **EVERYTHING, seed=7)
        assert calls == ["extract", "cached", "cached"]
        calls.clear()
        replay.log_prob(trainers, [rollout])
        assert calls == ["extract", "extract", "cached", "extract", "cached"]
        calls.clear()
        # The steps of a sample share the cache within a micro-batch.
        assert torch.equal(replay.log_prob(trainers, [rollout], micro_batch=3).detach()[0], rollout.log_probs)
        assert calls == ["extract", "cached", "cached"]
        latents_of(pipeline, **REQUEST)
        # What the model is given lies in memory as the pipeline has it, channel by channel.
        assert strides == {(1, 24)}
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_cache_has_the_same_bits_whichever_latents_fill_it(
    engine_of: EngineOf, pipeline_of: PipelineOf, dtype: str
) -> None:
    """So the samples of a request may share one, and replay may fill it with the latents of any step."""
    transformer = pipeline_of(FAMILY.name, dtype).transformer
    (rollout,) = engine_of(FAMILY.name, dtype).rollout(**SMALL, **EVERYTHING, seed=7)
    assert rollout.denoising_env is not None and rollout.dit_trajectory is not None
    (fixed,) = FAMILY.conditioning.fixed_inputs(rollout.denoising_env, is_guided=False)
    caches = []
    for step in (0, 2):
        caches.append(PrefixCache())
        latents = rollout.dit_trajectory.latents[step : step + 1].to(getattr(torch, dtype))
        timestep = rollout.dit_trajectory.timesteps[step : step + 1].to(latents.dtype) / 1000
        with torch.no_grad():
            transformer(
                hidden_states=latents,
                timestep=timestep,
                **fixed,
                kv_cache=caches[-1],
                kv_cache_mode="extract",
                return_dict=False,
            )
    assert len(caches[0].layers) == len(transformer.transformer_blocks)
    for index, layer in caches[0].layers.items():
        assert all(torch.equal(one, other) for one, other in zip(layer.get(), caches[1].get_layer(index).get(), strict=True))


GRID = [0.98, 0.83, 0.5, 0.27]


@pytest.fixture(scope="module")
def own_grid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(FAMILY.name, tmp_path_factory.mktemp("grid"), sample_sigmas=GRID)


@pytest.fixture(scope="module")
def grid_engine(own_grid: Path) -> Iterator[Engine]:
    with Engine(own_grid, device="cpu", dtype="float32") as engine:
        yield engine


def test_a_checkpoint_is_sampled_on_its_own_grid(own_grid: Path, grid_engine: Engine) -> None:
    load_without_torchvision()
    pipeline = DiffusionPipeline.from_pretrained(own_grid)
    align_weights(pipeline.transformer)
    asked = {name: value for name, value in REQUEST.items() if name != "num_inference_steps"}
    expected = latents_of(pipeline, **asked)
    for steps in ({}, {"num_inference_steps": len(GRID)}):
        (found,) = grid_engine.generate(**asked, **steps, seed=7)
        assert torch.equal(found.latents, expected) and found.sampling.num_inference_steps == len(GRID)
    assert grid_engine.info.defaults.num_inference_steps == len(GRID)


def test_other_step_counts_than_the_grids_are_refused_and_other_sigmas_are_not(grid_engine: Engine) -> None:
    with pytest.raises(
        InvalidRequestError, match="num_inference_steps must be 4, the number of the checkpoint's sample_sigmas"
    ):
        grid_engine.generate(**REQUEST)
    asked = {**REQUEST, "num_inference_steps": None, "sigmas": (1.0, 0.4, 0.0)}
    assert grid_engine.generate(**asked)[0].sampling.num_inference_steps == 2


@pytest.mark.parametrize("grid", [[0.5, 0.5], [0.2, 0.6], [1.5, 0.5], [0.5, 0.0], []])
def test_a_grid_that_does_not_descend_to_zero_is_refused(tmp_path: Path, grid: list[float]) -> None:
    folder = make_checkpoint(FAMILY.name, tmp_path, sample_sigmas=grid)
    with pytest.raises(UnsupportedModelError, match="sample_sigmas must descend"):
        Engine(folder, device="cpu")


@pytest.mark.parametrize(("option", "value"), [("causal_condition", False), ("out_channels", 8)])
def test_another_kind_of_transformer_is_refused(tmp_path: Path, option: str, value: Any) -> None:
    folder = make_checkpoint(FAMILY.name, tmp_path, **{option: value})
    with pytest.raises(UnsupportedModelError, match=f"transformer option {option} must be"):
        Engine(folder, device="cpu")


def test_a_picture_has_the_alpha_channel_that_the_pipelines_has(engine_of: EngineOf, pipeline_of: PipelineOf) -> None:
    (found,) = engine_of(FAMILY.name, "float32").generate(**REQUEST, seed=7)
    picture = pipeline_of(FAMILY.name, "float32")(**REQUEST, generator=torch.Generator().manual_seed(7)).images[0]
    assert found.image.shape == (4, 1, 96, 64) and picture.mode == "RGBA"
    sent = Image.open(io.BytesIO(encode_png(found.image)))
    assert sent.mode == "RGBA" and np.array_equal(np.asarray(sent), np.asarray(picture))


def test_a_prompt_beyond_the_position_table_is_refused(engine_of: EngineOf, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(FAMILY.name, "float32")
    monkeypatch.setattr(engine._pipeline, "encode_prompt", lambda *_, **__: (torch.zeros(1, 8192, 64), None, None))
    with pytest.raises(InvalidRequestError, match="prompt must have at most 8191 tokens") as caught:
        engine.generate(**{**REQUEST, "prompt": "a text that was not encoded before"})
    assert caught.value.field == "prompt"


@pytest.mark.parametrize("size", [{"height": 80, "width": 64}, {"height": 64, "width": 32 * 1025}])
def test_sizes_are_multiples_of_32_within_the_position_table(engine_of: EngineOf, size: dict[str, int]) -> None:
    with pytest.raises(InvalidRequestError, match=r"must be (a multiple of 32|at most 32768)"):
        engine_of(FAMILY.name, "float32").generate(**{**REQUEST, **size})


@pytest.mark.parametrize("field", ["img_mask", "img_shapes"])
def test_an_env_of_another_size_is_refused_by_name(engine_of: EngineOf, field: str) -> None:
    engine = engine_of(FAMILY.name, "float32")
    rollout, other = (engine.rollout(**{**REQUEST, "height": side}, **EVERYTHING, seed=7)[0] for side in (96, 64))
    assert rollout.denoising_env is not None and other.denoising_env is not None and rollout.dit_trajectory is not None
    branch = {**rollout.denoising_env.pos_cond_kwargs, field: other.denoising_env.pos_cond_kwargs[field]}
    latents = rollout.dit_trajectory.latents
    with pytest.raises(InvalidRequestError) as caught:
        engine.score(
            latents=latents[0],
            next_latents=latents[1],
            step=0,
            env=dataclasses.replace(rollout.denoising_env, pos_cond_kwargs=branch),
            record=rollout.sampling,
        )
    assert caught.value.field == f"denoising_env.pos_cond_kwargs.{field}"


def test_the_sglang_dialect_lists_the_text_embedding(engine_of: EngineOf) -> None:
    rollout: Rollout = engine_of(FAMILY.name, "bfloat16").rollout(**REQUEST, **GUIDED, **EVERYTHING, seed=7)[0]
    env = rollout.denoising_env
    assert env is not None
    sent = env_to_wire(env, "sglang", FAMILY.conditioning, rollout.sampling)
    assert isinstance(sent.pos_cond_kwargs["encoder_hidden_states"], list)
    back = env_from_wire(sent, lambda leaf: leaf, FAMILY.conditioning, rollout.sampling)
    for (name, tensor), (other, theirs) in zip(sorted(env.tensors()), sorted(back.tensors()), strict=True):
        assert name == other and tensor.dtype == theirs.dtype and torch.equal(tensor, theirs)
