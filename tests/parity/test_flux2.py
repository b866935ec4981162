"""What is particular to FLUX.2: two pipelines, three variants, its schedule, integer position ids, a processor's tokenizer."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux2.pipeline_flux2 import Flux2Pipeline, compute_empirical_mu
from safetensors.torch import load_file
from tests.rollouts import assert_same_bits
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM
from transformers.processing_utils import ProcessorMixin

from flowroll import Rollout, replay
from flowroll.engine import Engine
from flowroll.engine.checkpoint import examine_checkpoint
from flowroll.errors import InvalidRequestError, UnsupportedModelError
from flowroll.families import FAMILIES, ModelSpec
from flowroll.families.alignment import align_weights
from flowroll.families.rotary import rotary_table
from flowroll.sampling.schedule import ScheduleConfig, shifted_schedule
from flowroll.testing import make_checkpoint
from flowroll.testing.tokenizer import make_mistral_tokenizer
from flowroll.types import Layout
from flowroll.wire.dialects import LayoutError, env_from_wire, env_to_wire

FAMILY = FAMILIES["flux2"]
BUILT: Mapping[str, dict[str, Any]] = {
    "klein-base": {},
    "klein": {"is_distilled": True},
    "dev": {"guidance_embeds": True},
}
REQUEST: dict[str, Any] = {"prompt": "a red cup", "height": 48, "width": 80, "num_inference_steps": 2}
EVERYTHING = {"return_denoising_env": True, "return_dit_trajectory": True}
EngineOf = Callable[[str, str], Engine]
PipelineOf = Callable[[str, str], Any]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("flux2")
    return {variant: make_checkpoint("flux2", folder / variant, **options) for variant, options in BUILT.items()}


@pytest.fixture(scope="module")
def engine(folders: dict[str, Path]) -> Iterator[EngineOf]:
    """An engine of a variant and a dtype."""
    opened: dict[tuple[str, str], Engine] = {}

    def get(variant: str, dtype: str) -> Engine:
        if (variant, dtype) not in opened:
            opened[variant, dtype] = Engine(folders[variant], device="cpu", dtype=dtype)
        return opened[variant, dtype]

    yield get
    for one in opened.values():
        one.close()


@pytest.fixture(scope="module")
def pipeline(folders: dict[str, Path]) -> PipelineOf:
    """The pipeline of a variant and a dtype."""
    loaded: dict[tuple[str, str], Any] = {}

    def get(variant: str, dtype: str) -> Any:
        if (variant, dtype) not in loaded:
            found = DiffusionPipeline.from_pretrained(folders[variant], dtype=getattr(torch, dtype))
            found.set_progress_bar_config(disable=True)
            align_weights(found.transformer)
            loaded[variant, dtype] = found
        return loaded[variant, dtype]

    return get


def picture_of(pipeline: Any, *, negative_prompt: str | None = None, **request: Any) -> Tensor:
    """The picture of the pipeline, which takes a negative prompt as an embedding."""
    negative = {}
    if negative_prompt is not None:
        with torch.no_grad():
            negative = {"negative_prompt_embeds": pipeline.encode_prompt(negative_prompt)[0]}
    generator = torch.Generator().manual_seed(7)
    return pipeline(**{**REQUEST, **request}, **negative, generator=generator, output_type="pt").images[0]


LONG = "a blue vase beside a wooden table, " * 80
# What is asked for, of which variants; what is not for every run is marked.
ASKED: Mapping[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "nothing": (tuple(BUILT), {}),
    "a scale of 1": (tuple(BUILT), {"guidance_scale": 1.0, "num_inference_steps": 1}),
    "another scale": (tuple(BUILT), {"guidance_scale": 3.3, "prompt": ""}),
    "a negative prompt": (("klein-base",), {"negative_prompt": "blurry", "guidance_scale": 7.0}),
    "three tokens": (tuple(BUILT), {"height": 16, "width": 48, "num_inference_steps": 3}),
    "one token": (tuple(BUILT), {"height": 16, "width": 16, "prompt": LONG}),
    "an odd size": (tuple(BUILT), {"height": 272, "width": 368, "num_inference_steps": 5}),
    "many tokens and steps": (tuple(BUILT), {"height": 512, "width": 528, "num_inference_steps": 12, "prompt": LONG}),
}
OFTEN = ("nothing", "a negative prompt", "three tokens")


def marks(variant: str, dtype: str, name: str) -> Any:
    is_often = name in OFTEN and (dtype == "float32") == (variant != "dev")
    return [] if is_often else pytest.mark.slow


ROWS = [
    pytest.param(variant, dtype, name, marks=marks(variant, dtype, name))
    for name, (variants, _) in ASKED.items()
    for variant in variants
    for dtype in ("float32", "bfloat16")
]


@pytest.mark.parametrize(("variant", "dtype", "name"), ROWS)
def test_every_variant_has_the_bits_of_its_pipeline(
    engine: EngineOf, pipeline: PipelineOf, variant: str, dtype: str, name: str
) -> None:
    asked = ASKED[name][1]
    expected = picture_of(pipeline(variant, dtype), **asked)
    (found,) = engine(variant, dtype).generate(**{**REQUEST, **asked}, seed=7)
    assert torch.equal(found.image[:, 0], expected)
    (rollout,) = engine(variant, dtype).rollout(**{**REQUEST, **asked}, seed=7, sde_type="ode")
    assert torch.equal(rollout.image, found.image)
    record, scale = found.sampling, asked.get("guidance_scale", 4.0)
    assert record.variant == variant
    assert record.guidance_rule == ("true_cfg" if variant == "klein-base" and scale > 1 else "none")
    assert record.embedded_guidance_scale == (scale if variant == "dev" else None)


@pytest.mark.parametrize("variant", ["klein", "dev"])
def test_the_other_variants_replay_exactly(engine: EngineOf, pipeline: PipelineOf, variant: str) -> None:
    """In one group, and with what no pipeline of theirs has: an unconditional branch of its own scale."""
    for asked in ({}, {"true_cfg_scale": 3.0, "negative_prompt": "blurry"}):
        group = engine(variant, "bfloat16").rollout(**REQUEST, **EVERYTHING, **asked, seed=7, num_outputs_per_prompt=2)
        assert [one.sampling.guidance_rule for one in group] == ["true_cfg" if asked else "none"] * 2
        log_probs = replay.log_prob(pipeline(variant, "bfloat16").transformer, group).detach()
        assert torch.equal(log_probs, torch.stack([one.log_probs for one in group]))
        (alone,) = engine(variant, "bfloat16").rollout(**REQUEST, **EVERYTHING, **asked, seed=8)
        assert torch.equal(alone.log_probs, group[1].log_probs)


@pytest.mark.parametrize(("variant", "dtype"), [("klein-base", "bfloat16"), ("klein", "float32"), ("dev", "bfloat16")])
def test_embeds_give_the_picture_of_the_pipeline_that_is_given_them(
    engine: EngineOf, pipeline: PipelineOf, variant: str, dtype: str
) -> None:
    with torch.no_grad():
        embeds, negative = (pipeline(variant, dtype).encode_prompt(text)[0] for text in ("a red cup", "blurry"))
    given = {"prompt_embeds": embeds, **({"negative_prompt_embeds": negative} if variant == "klein-base" else {})}
    expected = picture_of(pipeline(variant, dtype), prompt=None, **given)
    request = {name: value for name, value in REQUEST.items() if name != "prompt"}
    assert torch.equal(engine(variant, dtype).generate(**request, **given, seed=7)[0].image[:, 0], expected)
    # Without padding: another text, to the pipeline too.
    short = {name: tensor[:, :9] for name, tensor in given.items()}
    expected = picture_of(pipeline(variant, dtype), prompt=None, **short)
    assert torch.equal(engine(variant, dtype).generate(**request, **short, seed=7)[0].image[:, 0], expected)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["sp2", "tp2", "cfg2", "sp2xtp2"])
@pytest.mark.parametrize("variant", ["klein", "dev"])
def test_the_other_variants_have_the_bits_of_one_rank_on_several(
    folders: dict[str, Path], engine: EngineOf, monkeypatch: pytest.MonkeyPatch, variant: str, layout: str
) -> None:
    """The embedded scale goes to every rank, and so does a branch that no pipeline of theirs has."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    size = {"height": 192, "width": 192, "num_inference_steps": 2, "prompt": "a red cup"}
    asked = [{}, {"guidance_scale": 2.5}, {"true_cfg_scale": 3.0, "negative_prompt": "blurry", "num_outputs_per_prompt": 2}]
    requests = [{**size, **EVERYTHING, **options, "seed": 7} for options in asked]
    width = engine(variant, "bfloat16")._model.spec.widths["text"]
    requests[1] = {**requests[1], "prompt": None, "prompt_embeds": torch.randn(9, width).bfloat16()}
    expected = [engine(variant, "bfloat16").rollout(**request) for request in requests]
    with Engine(folders[variant], device="cpu", dtype="bfloat16", layout=Layout.parse(layout), rank_timeout_s=60.0) as several:
        for request, answers in zip(requests, expected, strict=True):
            for found, one in zip(several.rollout(**request), answers, strict=True):
                assert_same_bits(found, one)
        assert sum(several.received_bytes.values()) > 0


def test_the_defaults_are_the_pipelines_and_those_of_kleins_model_card(engine: EngineOf) -> None:
    found = {variant: engine(variant, "bfloat16").info for variant in BUILT}
    assert {variant: info.variant for variant, info in found.items()} == {variant: variant for variant in BUILT}
    assert {info.pipeline for info in found.values()} == set(FAMILY.pipeline_classes)
    steps = {variant: (info.defaults.num_inference_steps, info.defaults.guidance_scale) for variant, info in found.items()}
    assert steps == {"klein-base": (50, 4.0), "klein": (4, 1.0), "dev": (50, 4.0)}


@pytest.mark.parametrize(("variant", "other"), [("klein-base", "klein"), ("klein", "klein-base"), ("dev", "klein")])
def test_a_folder_says_which_variant_it_is(folders: dict[str, Path], variant: str, other: str) -> None:
    assert examine_checkpoint(folders[variant], variant=None).variant == variant
    with pytest.raises(UnsupportedModelError, match=f"variant must be one of {variant} for flux2, got {other}"):
        examine_checkpoint(folders[variant], variant=other)


def test_the_shift_is_the_pipelines() -> None:
    config = ScheduleConfig(use_dynamic_shifting=True, shift=3.0)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    spec = ModelSpec(latent_channels=32, vae_scale_factor=8, widths={})
    for rows, columns in ((1, 1), (4, 6), (64, 64), (50, 86), (61, 71), (128, 128)):
        geometry = FAMILY.geometry(spec, height=16 * rows, width=16 * columns)
        for steps in (1, 2, 4, 10, 28, 50, 200, 333):
            mu = FAMILY.shift_exponent(config, geometry, steps)
            assert mu == compute_empirical_mu(rows * columns, steps)
            base = FAMILY.base_grid(spec, config, steps)
            scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
            found = shifted_schedule(config, base, num_tokens=rows * columns, mu=mu)
            assert torch.equal(found.sigmas, scheduler.sigmas) and torch.equal(found.timesteps, scheduler.timesteps)


@pytest.fixture(scope="module")
def recorded(engine: EngineOf, pipeline: PipelineOf) -> tuple[Rollout, Any]:
    """A rollout of dev in bfloat16, and the transformer that a trainer has."""
    (rollout,) = engine("dev", "bfloat16").rollout(**REQUEST, **EVERYTHING, seed=7, guidance_scale=5.3)
    return rollout, pipeline("dev", "bfloat16").transformer


def test_arguments_are_the_pipelines(recorded: tuple[Rollout, Any], pipeline: PipelineOf) -> None:
    env, seen = recorded[0].denoising_env, {}
    dev = pipeline("dev", "bfloat16")
    handle = dev.transformer.register_forward_pre_hook(lambda _, __, given: seen.update(given), with_kwargs=True)
    picture_of(dev, num_inference_steps=1, guidance_scale=5.3)
    handle.remove()
    assert env is not None and env.guidance is not None
    for name in ("txt_ids", "img_ids", "encoder_hidden_states"):
        value, theirs = env.pos_cond_kwargs[name], seen[name]
        assert isinstance(value, Tensor) and value.dtype == theirs.dtype and torch.equal(value[None], theirs), name
    assert env.guidance.dtype == seen["guidance"].dtype and torch.equal(env.guidance[None], seen["guidance"])


@pytest.mark.parametrize("name", ["txt_ids", "img_ids"])
def test_other_positions_are_refused_and_narrower_integers_are_not(
    engine: EngineOf, recorded: tuple[Rollout, Any], name: str
) -> None:
    rollout, _ = recorded
    assert rollout.denoising_env is not None and rollout.dit_trajectory is not None
    states, kwargs = rollout.dit_trajectory.latents, rollout.denoising_env.pos_cond_kwargs

    def score(value: Any) -> Any:
        env = replace(rollout.denoising_env, pos_cond_kwargs={**kwargs, name: value})  # type: ignore[type-var]
        given = {"latents": states[0], "next_latents": states[1], "step": 0, "env": env, "record": rollout.sampling}
        return engine("dev", "bfloat16").score(**given, sde_step_indices=rollout.sde_step_indices)

    ids: Any = kwargs[name]
    assert torch.equal(score(ids.to(torch.int32)).log_prob, rollout.log_probs[0])
    for value in (ids + 1, ids[:-1], ids.float()):
        with pytest.raises(InvalidRequestError) as caught:
            score(value)
        assert caught.value.field == f"denoising_env.pos_cond_kwargs.{name}"


def test_sglangs_names_stand_for_the_same_env(recorded: tuple[Rollout, Any]) -> None:
    rollout, transformer = recorded
    env, record = rollout.denoising_env, rollout.sampling
    assert env is not None
    sent = env_to_wire(env, "sglang", FAMILY.conditioning, record)
    assert set(sent.pos_cond_kwargs) == {"encoder_hidden_states", "freqs_cis"}
    ids = torch.cat([env.pos_cond_kwargs["txt_ids"], env.pos_cond_kwargs["img_ids"]])  # type: ignore[list-item]
    for part, table in zip(sent.pos_cond_kwargs["freqs_cis"], transformer.pos_embed(ids), strict=True):  # type: ignore[arg-type]
        assert torch.equal(part.repeat_interleave(2, dim=1), table)  # type: ignore[union-attr]
    back = env_from_wire(sent, lambda leaf: leaf, FAMILY.conditioning, record)
    for (name, tensor), (other, theirs) in zip(sorted(env.tensors()), sorted(back.tensors()), strict=True):
        assert name == other and tensor.dtype == theirs.dtype and torch.equal(tensor, theirs)
    with pytest.raises(LayoutError, match="freqs_cis"):
        env_from_wire(sent, lambda leaf: leaf, FAMILY.conditioning, replace(record, rope_axes=(4, 6, 6)))


def test_the_table_has_the_bits_of_sglangs() -> None:
    """The fixture holds what SGLang-Diffusion's own code gave; see tests/data/README.md."""
    known = load_file(Path(__file__).parents[1] / "data" / "sglang_flux2_freqs.safetensors")
    assert FAMILY.conditioning.table is not None
    assert torch.equal(torch.cat(FAMILY.conditioning.table.ids(5, 3, 4)), known["ids"])
    for axes in ((32, 32, 32, 32), (4, 4, 4, 4)):
        name = "x".join(map(str, axes))
        table = rotary_table(known["ids"], axes, FAMILY.conditioning.table.theta)
        for part, theirs in zip(table, (known[f"{name}.cos"], known[f"{name}.sin"]), strict=True):
            assert part.dtype == theirs.dtype and torch.equal(part, theirs)


class TextProcessor(ProcessorMixin):
    """A processor of transformers that has a tokenizer alone; the others add only what images need."""

    def __init__(self, tokenizer: Any = None, chat_template: str | None = None) -> None:
        super().__init__(tokenizer, chat_template=chat_template)


@pytest.mark.parametrize("prompt", ["", "a red [IMG] cup", LONG])
def test_a_processor_makes_the_tokens_of_its_tokenizer(prompt: str) -> None:
    """dev's folders name Pixtral's processor, whose class needs torchvision; only its code for images is its own."""
    tokenizer, seen = make_mistral_tokenizer(), []

    class Encoder:
        dtype, device = torch.float32, torch.device("cpu")

        def __call__(self, **given: Any) -> Any:
            seen.append(given)
            raise StopIteration

    for component in (tokenizer, TextProcessor(tokenizer, chat_template=tokenizer.chat_template)):
        with pytest.raises(StopIteration):
            Flux2Pipeline._get_mistral_3_small_prompt_embeds(Encoder(), component, prompt)  # type: ignore[arg-type]
    for name in ("input_ids", "attention_mask"):
        assert seen[0][name].shape == (1, 512) and torch.equal(seen[0][name], seen[1][name])


def test_a_folder_that_names_pixtrals_processor_is_loaded_with_its_tokenizer(
    folders: dict[str, Path], engine: EngineOf, tmp_path: Path
) -> None:
    folder = edited(folders["dev"], tmp_path / "dev", "model_index.json", tokenizer=["transformers", "PixtralProcessor"])
    with Engine(folder, device="cpu", dtype="bfloat16") as named:
        assert isinstance(named._pipeline.tokenizer, PreTrainedTokenizerFast)
        (found,) = named.generate(**REQUEST, seed=7)
    (expected,) = engine("dev", "bfloat16").generate(**REQUEST, seed=7)
    assert torch.equal(found.image, expected.image)


def edited(folder: Path, target: Path, file: str, **values: Any) -> Path:
    """A copy of a folder with other values in one of its JSON files."""
    shutil.copytree(folder, target)
    (target / file).write_text(json.dumps(json.loads((target / file).read_text()) | values))
    return target


@pytest.mark.parametrize(
    ("option", "value"), [("patch_size", 2), ("out_channels", 64), ("rope_theta", 10_000), ("in_channels", 64)]
)
def test_another_kind_of_transformer_is_refused(tmp_path: Path, option: str, value: int) -> None:
    folder = make_checkpoint("flux2", tmp_path, **{option: value})
    with pytest.raises(UnsupportedModelError, match=f"transformer option {option} must be"):
        Engine(folder, device="cpu")


def test_a_text_encoder_without_the_layers_that_are_read_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "short"
    shutil.copytree(folders["klein"], folder)
    encoder = Qwen3ForCausalLM.from_pretrained(folder / "text_encoder")
    encoder.model.layers, encoder.config.layer_types = encoder.model.layers[:26], encoder.config.layer_types[:26]
    encoder.config.num_hidden_layers = 26
    encoder.save_pretrained(folder / "text_encoder")
    with pytest.raises(
        UnsupportedModelError, match="text_encoder must have at least 27 layers, of which the last is read, got 26"
    ):
        Engine(folder, device="cpu")
