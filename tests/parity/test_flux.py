"""What is particular to FLUX.1: two guidance scales, schnell, position ids, SGLang's rotary table, refusals."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from tests.guiding import guided
from torch import Tensor

from flowroll import DenoisingEnv, Rollout, replay
from flowroll.engine import Engine
from flowroll.errors import InvalidRequestError, UnsupportedModelError
from flowroll.families import FAMILIES
from flowroll.families.alignment import align_weights
from flowroll.families.rotary import rotary_table
from flowroll.testing import make_checkpoint
from flowroll.wire.dialects import LayoutError, env_from_wire, env_to_wire

REQUEST: dict[str, Any] = {"prompt": "a red cup", "height": 80, "width": 112, "num_inference_steps": 3}
EVERYTHING = {"return_denoising_env": True, "return_dit_trajectory": True}
CONDITIONING = FAMILIES["flux"].conditioning
Recorded = tuple[Rollout, Any]


def load(folder: Path, dtype: str = "float32") -> Any:
    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=getattr(torch, dtype))
    pipeline.set_progress_bar_config(disable=True)
    align_weights(pipeline.transformer)
    return pipeline


def latents_of(pipeline: Any, **request: Any) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return pipeline(**{**REQUEST, **request}, generator=generator, output_type="latent").images[0]


@pytest.fixture(scope="module")
def schnell(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("flux", tmp_path_factory.mktemp("flux") / "schnell", guidance_embeds=False)


@pytest.fixture(scope="module")
def schnell_engine(schnell: Path) -> Iterator[Engine]:
    with Engine(schnell, device="cpu", dtype="float32", variant="schnell") as engine:
        yield engine


@pytest.fixture(scope="module")
def recorded(engine_of: Callable[[str, str], Engine], pipeline_of: Callable[[str, str], Any]) -> Recorded:
    """A guided rollout in bfloat16, and the transformer that a trainer has."""
    (rollout,) = engine_of("flux", "bfloat16").rollout(**guided("flux", 4.0, **REQUEST, **EVERYTHING), seed=7)
    return rollout, pipeline_of("flux", "bfloat16").transformer


# What is asked for, and whether the pipeline runs the unconditional branch for it.
ASKED: dict[str, tuple[dict[str, Any], bool]] = {
    "nothing": ({}, False),
    "a model's scale of 0": ({"guidance_scale": 0.0}, False),
    "another model's scale": ({"guidance_scale": 7.25}, False),
    "a negative prompt without a scale": ({"negative_prompt": "blurry"}, False),
    "a scale without a negative prompt": ({"true_cfg_scale": 4.0}, False),
    "a scale of 1": ({"negative_prompt": "blurry", "true_cfg_scale": 1.0}, False),
    "both": ({"negative_prompt": "blurry", "true_cfg_scale": 4.0}, True),
    "an empty negative prompt": ({"negative_prompt": "", "true_cfg_scale": 1.5, "guidance_scale": 1.0}, True),
}


@pytest.mark.parametrize("name", ASKED)
def test_true_guidance_runs_where_the_pipeline_runs_it(
    engine_of: Callable[[str, str], Engine], pipeline_of: Callable[[str, str], Any], name: str
) -> None:
    asked, is_guided = ASKED[name]
    (found,) = engine_of("flux", "float32").generate(**REQUEST, **asked, seed=7)
    assert torch.equal(found.latents, latents_of(pipeline_of("flux", "float32"), **asked))
    record = found.sampling
    expected = ("true_cfg", asked["true_cfg_scale"]) if is_guided else ("none", 1.0)
    assert (record.guidance_rule, record.guidance_scale) == expected
    assert record.embedded_guidance_scale == asked.get("guidance_scale", 3.5)
    assert record.negative_prompt == (asked["negative_prompt"] if is_guided else None)


def test_the_defaults_are_the_pipelines_and_those_of_schnells_model_card(
    engine_of: Callable[[str, str], Engine], schnell_engine: Engine
) -> None:
    dev, schnell = engine_of("flux", "float32").info, schnell_engine.info
    assert (dev.variant, schnell.variant) == ("dev", "schnell")
    assert (dev.defaults.num_inference_steps, dev.defaults.guidance_scale) == (28, 3.5)
    assert (schnell.defaults.num_inference_steps, schnell.defaults.guidance_scale) == (4, 0.0)


@pytest.mark.parametrize("asked", [{}, {"guidance_scale": 3.5}, {"negative_prompt": "", "true_cfg_scale": 3.0}])
def test_schnell_has_the_pipelines_bits_and_is_given_no_scale(schnell: Path, schnell_engine: Engine, asked: Any) -> None:
    """The pipeline takes a scale for schnell too, and has no use for it."""
    request = {name: value for name, value in REQUEST.items() if name != "num_inference_steps"} | asked
    expected = latents_of(load(schnell), **asked, num_inference_steps=4, max_sequence_length=256)
    (found,) = schnell_engine.rollout(**request, **EVERYTHING, seed=7, sde_type="ode")
    env, trajectory = found.denoising_env, found.dit_trajectory
    assert env is not None and trajectory is not None
    assert torch.equal(trajectory.latents[-1], expected)
    assert env.guidance is None and found.sampling.embedded_guidance_scale is None
    assert (found.sampling.guidance_rule == "none") == ("true_cfg_scale" not in asked)
    embeds = env.pos_cond_kwargs["encoder_hidden_states"]
    assert isinstance(embeds, Tensor) and len(embeds) == 256


def test_schnell_replays_exactly_and_its_env_is_checked(schnell_engine: Engine) -> None:
    (rollout,) = schnell_engine.rollout(**REQUEST, **EVERYTHING, seed=7)
    assert torch.equal(replay.log_prob(schnell_engine._model.transformer, [rollout]).detach()[0], rollout.log_probs)
    record = dataclasses.replace(rollout.sampling, embedded_guidance_scale=3.5)
    assert rollout.denoising_env is not None
    env = dataclasses.replace(rollout.denoising_env, guidance=torch.tensor(3.5))
    with pytest.raises(InvalidRequestError, match=r"embedded_guidance_scale must be null for this model, got 3\.5"):
        score(schnell_engine, rollout, env=env, record=record)


def score(engine: Engine, rollout: Rollout, **changes: Any) -> Any:
    assert rollout.dit_trajectory is not None
    latents = rollout.dit_trajectory.latents
    given = {"latents": latents[0], "next_latents": latents[1], "step": 0, "env": rollout.denoising_env}
    return engine.score(**{**given, "record": rollout.sampling, "sde_step_indices": rollout.sde_step_indices, **changes})


def test_scales_of_several_samples_go_through_one_forward(
    engine_of: Callable[[str, str], Engine], caplog: pytest.LogCaptureFixture
) -> None:
    from tests.unit.engine.scheduler.hand import Hand

    requests = [{**REQUEST, "seed": seed, "guidance_scale": scale} for seed, scale in ((1, 0.0), (2, 3.5), (3, 7.25))]
    hand = Hand(engine_of("flux", "bfloat16"), max_batch_samples=8)
    together = hand.finish(*hand.begin(*requests))
    # A warning: the samples ran one by one.
    assert hand.scheduler.load().batches == {3: 3} and not caplog.records
    alone = [hand.alone(**request) for request in requests]
    for (found,), (expected,) in zip(together, alone, strict=True):
        assert torch.equal(found.image, expected.image) and torch.equal(found.log_probs, expected.log_probs)


def test_position_ids_are_the_pipelines(recorded: Recorded, pipeline_of: Callable[[str, str], Any]) -> None:
    env, seen = recorded[0].denoising_env, {}
    pipeline = pipeline_of("flux", "bfloat16")
    handle = pipeline.transformer.register_forward_pre_hook(lambda _, __, given: seen.update(given), with_kwargs=True)
    latents_of(pipeline, num_inference_steps=1, guidance_scale=5.5)
    handle.remove()
    assert env is not None and env.guidance is not None
    for name in ("txt_ids", "img_ids", "encoder_hidden_states", "pooled_projections"):
        value, theirs = env.pos_cond_kwargs[name], seen[name]
        assert isinstance(value, Tensor) and value.dtype == theirs.dtype
        assert torch.equal(value if name.endswith("ids") else value[None], theirs), name
    assert env.guidance.dtype == seen["guidance"].dtype and torch.equal(env.guidance[None], seen["guidance"])


# An altered part of what is sent to be scored, and what is said about it.
SPOILT: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no scale in the env": ({"guidance": None}, {}, "denoising_env must hold the tensor guidance"),
    "another scale in the env": ({"guidance": torch.tensor(9.0)}, {}, "guidance must be the record's 5.5, got 9"),
    "a batch of scales": ({"guidance": torch.tensor([5.5])}, {}, r"guidance must be a tensor \[\] of torch.float32"),
    "no scale in the record": ({}, {"embedded_guidance_scale": None}, "must be a number for this model, got null"),
    "another model's axes": ({}, {"rope_axes": (16, 56, 56)}, "rope_axes must be"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_what_does_not_fit_the_models_own_guidance_is_refused(
    engine_of: Callable[[str, str], Engine], recorded: Recorded, name: str
) -> None:
    parts, record, words = SPOILT[name]
    (rollout, _), engine = recorded, engine_of("flux", "bfloat16")
    env = dataclasses.replace(rollout.denoising_env, **parts)  # type: ignore[type-var]
    with pytest.raises(InvalidRequestError, match=words):
        score(engine, rollout, env=env, record=dataclasses.replace(rollout.sampling, **record))


@pytest.mark.parametrize("name", ["txt_ids", "img_ids", "pooled_projections"])
@pytest.mark.parametrize("change", [lambda tensor: tensor[:-1], lambda tensor: tensor.float()])
def test_a_changed_env_is_refused_by_name(
    engine_of: Callable[[str, str], Engine], recorded: Recorded, name: str, change: Callable[[Tensor], Tensor]
) -> None:
    assert_refused(engine_of("flux", "bfloat16"), recorded[0], name, change)


@pytest.mark.parametrize("name", ["txt_ids", "img_ids"])
def test_other_positions_are_refused(engine_of: Callable[[str, str], Engine], recorded: Recorded, name: str) -> None:
    assert_refused(engine_of("flux", "bfloat16"), recorded[0], name, lambda tensor: tensor + 1)


def assert_refused(engine: Engine, rollout: Rollout, name: str, change: Callable[[Any], Any]) -> None:
    env = rollout.denoising_env
    assert env is not None
    branch = {**env.pos_cond_kwargs, name: change(env.pos_cond_kwargs[name])}
    with pytest.raises(InvalidRequestError) as caught:
        score(engine, rollout, env=dataclasses.replace(env, pos_cond_kwargs=branch))
    assert caught.value.field == f"denoising_env.pos_cond_kwargs.{name}"


def test_an_audit_names_another_scale_of_the_models_own_guidance(recorded: Recorded) -> None:
    rollout, transformer = recorded
    env = dataclasses.replace(rollout.denoising_env, guidance=torch.tensor(2.0))  # type: ignore[type-var]
    report = replay.audit(transformer, [dataclasses.replace(rollout, denoising_env=env)])
    assert [cause.kind for cause in report.causes] == ["guidance"]
    assert "the record says 5.5, the env holds 2" in str(report)


@pytest.mark.parametrize(("option", "value"), [("patch_size", 2), ("out_channels", 32)])
def test_another_kind_of_transformer_is_refused(tmp_path: Path, option: str, value: int) -> None:
    folder = make_checkpoint("flux", tmp_path, **{option: value})
    with pytest.raises(UnsupportedModelError, match=f"transformer option {option} must be"):
        Engine(folder, device="cpu")


def test_sglangs_names_stand_for_the_same_env(recorded: Recorded) -> None:
    rollout, transformer = recorded
    env, record = rollout.denoising_env, rollout.sampling
    assert env is not None and env.neg_cond_kwargs is not None
    sent = env_to_wire(env, "sglang", CONDITIONING, record)
    for own, branch in ((env.pos_cond_kwargs, sent.pos_cond_kwargs), (env.neg_cond_kwargs, sent.neg_cond_kwargs or {})):
        assert set(branch) == {"encoder_hidden_states", "pooled_projections", "freqs_cis"}
        # SGLang-Diffusion holds each angle once, the model twice in a row.
        ids = torch.cat([own["txt_ids"], own["img_ids"]])  # type: ignore[list-item]
        for part, table in zip(branch["freqs_cis"], transformer.pos_embed(ids), strict=True):  # type: ignore[arg-type]
            assert torch.equal(part.repeat_interleave(2, dim=1), table)  # type: ignore[union-attr]
    back = env_from_wire(sent, lambda leaf: leaf, CONDITIONING, record)
    for (name, tensor), (other, theirs) in zip(sorted(env.tensors()), sorted(back.tensors()), strict=True):
        assert name == other and tensor.dtype == theirs.dtype and torch.equal(tensor, theirs)


def test_the_table_has_the_bits_of_sglangs() -> None:
    """The fixture holds what SGLang-Diffusion's own code gave; see tests/data/README.md."""
    known = load_file(Path(__file__).parents[1] / "data" / "sglang_flux_freqs.safetensors")
    for axes in ((16, 56, 56), (4, 6, 6)):
        name = "x".join(map(str, axes))
        for part, theirs in zip(
            rotary_table(known["ids"], axes, 10_000), (known[f"{name}.cos"], known[f"{name}.sin"]), strict=True
        ):
            assert part.dtype == theirs.dtype and torch.equal(part, theirs)


TABLES: dict[str, Callable[[list[Tensor]], Any]] = {
    "other positions": lambda table: [table[0].flip(0), table[1].flip(0)],
    "a token less": lambda table: [part[:-1] for part in table],
    "half of it": lambda table: table[:1],
    "other widths": lambda table: [part[:, :-1] for part in table],
    "no list": lambda table: table[0],
    "numbers": lambda table: [1.0, 2.0],
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_of_another_image_is_refused(recorded: Recorded, name: str) -> None:
    env, record = recorded[0].denoising_env, recorded[0].sampling
    assert isinstance(env, DenoisingEnv)
    sent = env_to_wire(env, "sglang", CONDITIONING, record)
    spoilt: Any = {**sent.pos_cond_kwargs, "freqs_cis": TABLES[name](sent.pos_cond_kwargs["freqs_cis"])}  # type: ignore[arg-type]
    with pytest.raises(LayoutError, match="freqs_cis"):
        env_from_wire(type(sent)(pos_cond_kwargs=spoilt), lambda leaf: leaf, CONDITIONING, record)


@pytest.mark.parametrize("changes", [{"rope_axes": None}, {"rope_axes": (4, 6, 8)}, {"height": 64}, {"width": 0}])
def test_a_table_beside_a_record_that_does_not_fit_is_refused(recorded: Recorded, changes: dict[str, Any]) -> None:
    env, record = recorded[0].denoising_env, recorded[0].sampling
    assert isinstance(env, DenoisingEnv)
    sent = env_to_wire(env, "sglang", CONDITIONING, record)
    with pytest.raises(LayoutError, match="freqs_cis"):
        env_from_wire(sent, lambda leaf: leaf, CONDITIONING, dataclasses.replace(record, **changes))
