"""What is particular to Qwen-Image-Edit: reference images, beside the prompt and in the sequence."""

import dataclasses
import hashlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLQwenImage, DiffusionPipeline
from PIL import Image
from tests.guiding import image_file, opened
from tests.pairs import dealt
from tests.processors import load_without_torchvision
from torch import Tensor

from flowroll import replay
from flowroll.cli.verify import encoded_again
from flowroll.engine import Engine
from flowroll.errors import EngineError, InvalidRequestError, UnsupportedModelError
from flowroll.families import FAMILIES
from flowroll.families.alignment import align_weights
from flowroll.testing import make_checkpoint
from flowroll.testing.parts import fill_vae
from flowroll.types import Layout, env_digests
from flowroll.wire.dialects import env_from_wire, env_to_wire

FAMILY = FAMILIES["qwen_image_edit"]
REQUEST: dict[str, Any] = {"prompt": "a red cup", "height": 96, "width": 64, "num_inference_steps": 3}
GUIDED = {"negative_prompt": "blurry", "true_cfg_scale": 4.0}
EVERYTHING = {"return_denoising_env": True, "return_dit_trajectory": True}
# Of several proportions and kinds; 1:3, 16:9 and a square.
THREE = (image_file(40, 120), image_file(160, 90, seed=1, kind="JPEG"), image_file(64, 64, seed=2, kind="WEBP", mode="RGBA"))
ONE = THREE[1:2]
# The checkpoint folders of this file, beside the one that all families' tests share: of the pipeline that takes one image; of a
# model that takes reference images as clean; with a VAE of 8 pixels a cell, as the real one.
KINDS: dict[str, dict[str, Any]] = {"plus": {}, "base": {"takes_several": False}, "clean": {"zero_cond_t": True}, "8x": {}}
EngineOf = Callable[[str, str], Engine]
PipelineOf = Callable[[str, str], Any]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    load_without_torchvision()
    root = tmp_path_factory.mktemp("edit")

    def get(kind: str) -> Path:
        folder = root / kind
        if not folder.exists():
            make_checkpoint(FAMILY.name, folder, **KINDS[kind])
            if kind == "8x":
                vae = AutoencoderKLQwenImage(base_dim=8, dim_mult=[1] * 4, num_res_blocks=0)
                fill_vae(vae, 0)
                vae.save_pretrained(folder / "vae")
        return folder

    return get


@pytest.fixture(scope="module")
def engine(folders: Callable[[str], Path]) -> Iterator[EngineOf]:
    opened_engines: dict[tuple[str, str], Engine] = {}

    def get(kind: str, dtype: str) -> Engine:
        if (kind, dtype) not in opened_engines:
            opened_engines[kind, dtype] = Engine(folders(kind), dtype=dtype, device="cpu")
        return opened_engines[kind, dtype]

    yield get
    for one in opened_engines.values():
        one.close()


@pytest.fixture(scope="module")
def pipeline(folders: Callable[[str], Path]) -> PipelineOf:
    loaded: dict[tuple[str, str], Any] = {}

    def get(kind: str, dtype: str) -> Any:
        if (kind, dtype) not in loaded:
            one = DiffusionPipeline.from_pretrained(folders(kind), dtype=getattr(torch, dtype))
            one.set_progress_bar_config(disable=True)
            align_weights(one.transformer)
            loaded[kind, dtype] = one
        return loaded[kind, dtype]

    return get


def pictures(files: tuple[bytes, ...]) -> Any:
    """As the pipelines take them: several in a list, one alone."""
    return [opened(file) for file in files] if len(files) > 1 else opened(files[0])


def latents_of(pipeline: Any, files: tuple[bytes, ...], **request: Any) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return pipeline(image=pictures(files), **request, generator=generator, output_type="latent").images[0]


CASES: dict[str, tuple[str, str, tuple[bytes, ...], dict[str, Any]]] = {
    "three images": ("plus", "float32", THREE, GUIDED),
    "one image": ("plus", "bfloat16", ONE, {}),
    "three images in bfloat16": ("plus", "bfloat16", THREE, {"height": 32, "width": 160, "negative_prompt": ""}),
    "the pipeline for one image": ("base", "float32", ONE, GUIDED),
    "the pipeline for one image in bfloat16": ("base", "bfloat16", THREE[:1], {"prompt": ""}),
    "reference images as clean": ("clean", "float32", THREE[:2], GUIDED),
    "reference images as clean in bfloat16": ("clean", "bfloat16", ONE, {"num_inference_steps": 5}),
    "a long prompt": ("plus", "float32", ONE, {"prompt": "a red cup " * 200}),
    "a scale without a negative prompt": ("plus", "float32", ONE, {"true_cfg_scale": 4.0}),
}
# Where a CPU has no bfloat16, the VAE takes ten times as long for a reference image in it.
FIRST = ("three images", "one image", "the pipeline for one image", "reference images as clean")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in FIRST else [pytest.mark.slow]) for name in CASES])
def test_every_sample_has_the_bits_of_its_pipeline(engine: EngineOf, pipeline: PipelineOf, name: str) -> None:
    kind, dtype, files, asked = CASES[name]
    request = {**REQUEST, **asked}
    expected = latents_of(pipeline(kind, dtype), files, **request)
    (plain,) = engine(kind, dtype).generate(**request, images=files, seed=7)
    (rollout,) = engine(kind, dtype).rollout(**request, images=files, seed=7, sde_type="ode", return_dit_trajectory=True)
    assert rollout.dit_trajectory is not None
    for latents in (plain.latents, rollout.dit_trajectory.latents[-1]):
        assert latents.dtype == expected.dtype and torch.equal(latents, expected)
    assert torch.equal(plain.image, rollout.image)
    is_guided = request.get("negative_prompt") is not None
    assert plain.sampling.guidance_rule == ("cfg_norm_rescale" if is_guided else "none")


@pytest.mark.slow
@pytest.mark.parametrize("files", [ONE, THREE], ids=["one", "three"])
def test_the_real_checkpoints_scale_of_the_vae(engine: EngineOf, pipeline: PipelineOf, files: tuple[bytes, ...]) -> None:
    """Sixteen pixels a token, so that a reference image is about 4,096 tokens."""
    request = {**REQUEST, "height": 48, "width": 80, "num_inference_steps": 2, **GUIDED}
    (found,) = engine("8x", "float32").rollout(**request, images=files, seed=7, rollout=True, **EVERYTHING)
    (plain,) = engine("8x", "float32").generate(**request, images=files, seed=7)
    assert found.denoising_env is not None
    latents = found.denoising_env.image_kwargs["image_latents"]
    assert isinstance(latents, Tensor) and 4_000 < len(latents) / len(files) < 4_200
    assert torch.equal(plain.latents, latents_of(pipeline("8x", "float32"), files, **request))
    assert torch.equal(replay.log_prob(pipeline("8x", "float32").transformer, [found]).detach()[0], found.log_probs)


@dealt(kind=("plus", "base"), files=(THREE[:1], ONE, THREE[2:]))
def test_the_size_is_that_of_the_pipeline(engine: EngineOf, pipeline: PipelineOf, kind: str, files: tuple[bytes, ...]) -> None:
    """An area of about 1024^2 in the proportions of the last image; whoever asks for a side changes that side alone."""
    model = pipeline(kind, "bfloat16")
    sizes, prepare = [], model.prepare_latents

    def spy(*args: Any, **kwargs: Any) -> Any:
        sizes.append(args[3:5])
        raise StopIteration

    model.prepare_latents = spy
    try:
        for asked in ({}, {"height": 64}, {"width": 96}):
            with pytest.raises(StopIteration):
                model(image=pictures(files), prompt="a", **asked)
            params = dict(prompt="a", images=files, **asked)
            geometry = engine(kind, "bfloat16").plan(_params(**params)).geometry
            assert (geometry.height, geometry.width) == sizes[-1]
    finally:
        model.prepare_latents = prepare


def test_the_last_image_says_the_size(engine: EngineOf) -> None:
    heights = [
        engine("plus", "bfloat16").plan(_params(prompt="a", images=files)).geometry.height for files in (THREE, THREE[:1])
    ]
    assert heights == [1024, 1760]


def _params(**fields: Any) -> Any:
    from flowroll import SamplingParams

    return SamplingParams(**fields)


@dealt(kind=("plus", "clean", "base"), dtype=("float32", "bfloat16"), asked=(GUIDED, {}), sde_type=("sde", "cps"))
def test_replay_has_the_images(
    engine: EngineOf, pipeline: PipelineOf, kind: str, dtype: str, asked: dict[str, Any], sde_type: str
) -> None:
    """From the env and the record alone: the ratio is exactly one, whole and in micro-batches."""
    files = ONE if kind == "base" else THREE[:2]
    request = {**REQUEST, **asked, **EVERYTHING, "images": files, "sde_type": sde_type, "seed": 7}
    group = engine(kind, dtype).rollout(**request, num_outputs_per_prompt=2)
    recorded = torch.stack([one.log_probs for one in group if one.log_probs is not None])
    transformer = pipeline(kind, dtype).transformer
    assert torch.equal(replay.log_prob(transformer, group).detach(), recorded)
    assert replay.audit(transformer, group).is_exact
    alone = [engine(kind, dtype).rollout(**{**request, "seed": seed})[0] for seed in (7, 8)]
    assert torch.equal(torch.stack([one.log_probs for one in alone if one.log_probs is not None]), recorded)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["sp2", "sp3", "cfg2", "tp2"])
def test_ranks_share_the_rows_of_reference_images_that_are_taken_as_clean(
    engine: EngineOf, folders: Callable[[str], Path], layout: str
) -> None:
    request = {**REQUEST, **GUIDED, "images": THREE[:2], "seed": 7, "num_inference_steps": 2, "num_outputs_per_prompt": 2}
    alone = engine("clean", "float32").rollout(**request)
    with Engine(folders("clean"), dtype="float32", device="cpu", layout=Layout.parse(layout), rank_timeout_s=120.0) as ranks:
        found = ranks.rollout(**request)
    for one, other in zip(found, alone, strict=True):
        assert torch.equal(one.log_probs, other.log_probs) and torch.equal(one.image, other.image)


def test_the_environment_and_the_record_have_the_images(engine: EngineOf, pipeline: PipelineOf) -> None:
    (rollout,) = engine("plus", "float32").rollout(**REQUEST, **EVERYTHING, images=THREE, seed=7)
    env, record, model = rollout.denoising_env, rollout.sampling, pipeline("plus", "float32")
    assert env is not None and record.images is not None
    assert [(one.sha256, one.width, one.height) for one in record.images] == [
        (hashlib.sha256(file).hexdigest(), *size) for file, size in zip(THREE, ((40, 120), (160, 90), (64, 64)), strict=True)
    ]
    seen: dict[str, Any] = {}

    def spy(_: Any, __: Any, given: dict[str, Any]) -> None:
        seen.update(given)

    handle = model.transformer.register_forward_pre_hook(spy, with_kwargs=True)
    latents_of(model, THREE, **{**REQUEST, "num_inference_steps": 1})
    handle.remove()
    assert torch.equal(env.image_kwargs["image_latents"], seen["hidden_states"][0, 6:])
    assert torch.equal(env.pos_cond_kwargs["encoder_hidden_states"], seen["encoder_hidden_states"][0])
    assert env.pos_cond_kwargs["img_shapes"] == [[list(shape) for shape in seen["img_shapes"][0]]]
    # Another image, another environment.
    (other,) = engine("plus", "float32").rollout(**REQUEST, **EVERYTHING, images=THREE[::-1], seed=7)
    assert other.sampling.pos_cond_sha256 != record.pos_cond_sha256


def test_prompts_are_encoded_again_where_the_files_are_at_hand(engine: EngineOf) -> None:
    one = engine("plus", "float32")
    (rollout,) = one.rollout(**REQUEST, **GUIDED, **EVERYTHING, images=THREE[:2], seed=7)
    files = {hashlib.sha256(file).hexdigest(): file for file in THREE}
    again = encoded_again(one._model, one._pipeline, rollout, files)
    assert again is not None and rollout.denoising_env is not None
    assert env_digests(again) == env_digests(rollout.denoising_env)
    del files[hashlib.sha256(THREE[1]).hexdigest()]
    assert encoded_again(one._model, one._pipeline, rollout, files) is None


def test_sglangs_names(engine: EngineOf) -> None:
    """SGLang-Diffusion 0.5.23 has the embeds in a list, and none of the reference latents; those keep their name."""
    (rollout,) = engine("plus", "float32").rollout(**REQUEST, **EVERYTHING, images=ONE, seed=7)
    env = rollout.denoising_env
    assert env is not None
    sent = env_to_wire(env, "sglang", FAMILY.conditioning, rollout.sampling)
    assert set(sent.image_kwargs) == {"image_latents"}
    assert set(sent.pos_cond_kwargs) == {"encoder_hidden_states", "img_shapes", "txt_seq_lens"}
    assert isinstance(sent.pos_cond_kwargs["encoder_hidden_states"], list)
    received = env_from_wire(sent, lambda leaf: leaf, FAMILY.conditioning, rollout.sampling)
    assert dict(received.tensors()).keys() == dict(env.tensors()).keys()


def test_scores_are_those_of_the_rollout_and_other_images_are_refused(engine: EngineOf) -> None:
    one = engine("plus", "float32")
    (rollout,) = one.rollout(**REQUEST, **EVERYTHING, images=THREE[:2], seed=7)
    env, record, trajectory = rollout.denoising_env, rollout.sampling, rollout.dit_trajectory
    assert env is not None and trajectory is not None and rollout.log_probs is not None and record.images is not None
    states = {"latents": trajectory.latents[0], "next_latents": trajectory.latents[1], "step": 0}
    assert torch.equal(one.score(**states, env=env, record=record).log_prob, rollout.log_probs[0])
    latents = env.image_kwargs["image_latents"]
    assert isinstance(latents, Tensor)
    for changed, words in (
        ({"env": dataclasses.replace(env, image_kwargs={})}, "image_latents in image_kwargs"),
        ({"env": dataclasses.replace(env, image_kwargs={"image_latents": latents[:-1]})}, "image_latents must be a tensor"),
        ({"env": dataclasses.replace(env, image_kwargs={"image_latents": latents.double()})}, "of torch.float32"),
        ({"env": dataclasses.replace(env, image_kwargs={"image_latents": latents, "x": 1})}, "must be one of image_latents"),
        ({"record": dataclasses.replace(record, images=None)}, "images must hold 1 to"),
        ({"record": dataclasses.replace(record, images=record.images[:1])}, "image_latents must be a tensor"),
    ):
        with pytest.raises(InvalidRequestError, match=words):
            one.score(**{**states, "env": env, "record": record, **changed})


def test_images_are_refused_by_other_families_and_demanded_by_this_one(
    engine: EngineOf, engine_of: Callable[[str, str], Engine]
) -> None:
    with pytest.raises(InvalidRequestError, match="images must be left out for z_image") as caught:
        engine_of("z_image", "float32").generate(prompt="a", images=ONE)
    assert caught.value.field == "images"
    with pytest.raises(InvalidRequestError, match="images must be given for qwen_image_edit, got none"):
        engine("plus", "float32").generate(prompt="a")
    with pytest.raises(InvalidRequestError, match="images must hold at most 1 for this checkpoint"):
        engine("base", "float32").generate(prompt="a", images=THREE)
    with pytest.raises(InvalidRequestError, match="images must hold at most 16 files, got 17"):
        engine("plus", "float32").generate(prompt="a", images=ONE * 17)


@pytest.mark.parametrize("field", ["prompt", "negative_prompt"])
def test_a_text_cannot_stand_for_an_image(engine: EngineOf, field: str) -> None:
    for text in ("a <|image_pad|>", "<|video_pad|>"):
        with pytest.raises(InvalidRequestError, match=f"{field} must be without <") as caught:
            engine("plus", "float32").plan(_params(**{"prompt": "a", field: text}, images=ONE))
        assert caught.value.field == field


@pytest.mark.parametrize("kind", ["plus", "base"])
def test_token_ids_have_the_images(engine: EngineOf, pipeline: PipelineOf, kind: str) -> None:
    """What the pipeline's processor makes of text and images; other numbers of images are refused before any model work."""
    one, model, heard = engine(kind, "float32"), pipeline(kind, "float32"), []
    files = THREE[:2] if kind == "plus" else ONE
    forward = model.text_encoder.register_forward_pre_hook(
        lambda _, __, given: heard.append(tuple(given["input_ids"][0].tolist())), with_kwargs=True
    )
    expected = latents_of(model, files, **REQUEST, **GUIDED)
    forward.remove()
    ids = dict(zip(("prompt_token_ids", "negative_prompt_token_ids"), ((one,) for one in heard), strict=True))
    request = {**REQUEST, "true_cfg_scale": 4.0, "prompt": None, "images": files, "seed": 7}
    (found,) = one.generate(**request, **ids)
    assert torch.equal(found.latents, expected) and found.sampling.prompt_token_ids == ids["prompt_token_ids"]
    (whole,) = ids["prompt_token_ids"]
    image_id = one._model.spec.vision.token_id
    place = whole.index(image_id)
    for wrong in ((*whole, image_id), (*whole[:place], *whole[place + 1 :]), (*whole[: place + 3], 5, *whole[place + 3 :])):
        with pytest.raises(InvalidRequestError, match=f"hold the id {image_id} .* times in a row, for the request's images"):
            one.generate(**request, prompt_token_ids=(wrong,))


@pytest.mark.parametrize("kind", ["plus", "base"])
def test_sides_that_the_pipeline_cannot_take_are_refused(engine: EngineOf, pipeline: PipelineOf, kind: str) -> None:
    taken, refused = image_file(2, 360), image_file(1, 1200)
    engine(kind, "float32").plan(_params(prompt="a", images=(taken,)))
    with pytest.raises(InvalidRequestError, match=r"images\[0\] must have sides of which one is at most 200 times"):
        engine(kind, "float32").plan(_params(prompt="a", images=(refused,)))
    with pytest.raises(ValueError):
        latents_of(pipeline(kind, "float32"), (refused,), **REQUEST)


def test_texts_end_where_the_position_table_ends(engine: EngineOf) -> None:
    with pytest.raises(InvalidRequestError, match="prompt must have at most 4080 tokens beside images of this size") as caught:
        engine("plus", "float32").generate(**{**REQUEST, "prompt": "a red cup " * 1400}, images=THREE[2:])
    assert caught.value.field == "prompt"


@pytest.mark.parametrize("option", ["use_layer3d_rope", "use_additional_t_cond", "guidance_embeds"])
def test_models_of_other_pipelines_are_refused(tmp_path: Path, option: str) -> None:
    make_checkpoint(FAMILY.name, tmp_path, **{option: True})
    with pytest.raises(UnsupportedModelError, match=f"transformer option {option} must be False"):
        Engine(tmp_path)


def test_an_image_that_the_vae_cannot_encode_is_an_error(engine: EngineOf) -> None:
    one = engine("plus", "float32")
    weight = one._pipeline.vae.encoder.conv_out.weight
    before = weight.detach().clone()
    try:
        weight.data.fill_(float("nan"))
        with pytest.raises(EngineError, match="image_latents of the images must be finite, got NaN or infinity from the VAE"):
            one.generate(**REQUEST, images=ONE)
    finally:
        weight.data.copy_(before)


def test_the_slow_way_of_the_processor_is_the_one_with_pillow(pipeline: PipelineOf) -> None:
    """Without torchvision transformers takes the processor that resizes with Pillow; the pipeline and flowroll both do."""
    processor = pipeline("plus", "float32").processor.image_processor
    assert type(processor).__name__ in ("Qwen2VLImageProcessorPil", "Qwen2VLImageProcessor")
    picture = Image.open(io.BytesIO(ONE[0])).resize((392, 224))
    found = processor(images=[picture], return_tensors="pt")
    assert found["image_grid_thw"].tolist() == [[1, 8, 14]]
