"""Prompts as embeddings: the bits of the text that they came from, and of the pipeline that is given the same embeddings."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from tests.guiding import in_words_of, takes_images
from tests.pairs import FAMILY_WITH_DTYPE
from tests.rollouts import assert_same_bits, tensors_of
from torch import Tensor

from flowroll import Rollout, SamplingParams, replay
from flowroll.engine import Engine
from flowroll.engine.runner import pipeline as runner
from flowroll.errors import InvalidRequestError
from flowroll.families import FAMILIES
from flowroll.types import branch_digest
from flowroll.types.prompts import NEGATIVE, PROMPT_TENSORS

EngineOf = Callable[[str, str], Engine]
PipelineOf = Callable[[str, str], Any]
WHOLE = {"return_denoising_env": True, "return_dit_trajectory": True}
SMALL: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 2, "seed": 3}
TEXTS = ("a red apple beside a blue cup", "blurry, bad")


def fields_of(rollout: Rollout, family: str, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of one branch of a rollout's environment, by the names that a request has for them."""
    assert rollout.denoising_env is not None
    branch = getattr(rollout.denoising_env, "neg_cond_kwargs" if prefix else "pos_cond_kwargs")
    declared = FAMILIES[family].conditioning.prompt_fields
    return {prefix + name: branch[field.name] for name, field in declared.items() if field.name in branch}


def encoded(pipeline: Any, text: str, prefix: str = "") -> dict[str, Any]:
    """What `encode_prompt` of a pipeline of diffusers returns, by the names of the arguments that take it again."""
    asked: dict[str, Any] = {"prompt": text}
    known = inspect.signature(pipeline.encode_prompt).parameters
    if "do_classifier_free_guidance" in known:
        asked["do_classifier_free_guidance"] = False
    if "prompt_3" in known:
        asked |= {"prompt_2": None, "prompt_3": None}
    with torch.no_grad():
        made = pipeline.encode_prompt(**asked)
    names = {
        "StableDiffusion3Pipeline": (0, 2, None),
        "FluxPipeline": (0, 1, None),
        "QwenImagePipeline": (0, None, 1),
        "QwenImage21Pipeline": (0, None, 1),
    }.get(type(pipeline).__name__, (0, None, None))
    found = {name: made[place] for name, place in zip(PROMPT_TENSORS, names, strict=True) if place is not None}
    return {prefix + name: tensor for name, tensor in found.items() if tensor is not None}


def picture_of(pipeline: Any, request: Mapping[str, Any], tensors: Mapping[str, Any]) -> Tensor:
    """The picture that a pipeline makes of embeddings, with classifier-free guidance of the request's scale."""
    given = {name: value for name, value in request.items() if name not in ("seed", "images")}
    if "true_cfg_scale" in inspect.signature(pipeline.__call__).parameters and "true_cfg_scale" not in given:
        given["true_cfg_scale"] = given.pop("guidance_scale")
    generator = torch.Generator(pipeline.device).manual_seed(request["seed"])
    return pipeline(**given, **tensors, generator=generator, output_type="pt").images[0].cpu().float()


def asked_of(family: str) -> dict[str, Any]:
    request = in_words_of(family, {**SMALL, "guidance_scale": 4.0})
    return {name: value for name, value in request.items() if name != "negative_prompt"}


@pytest.mark.parametrize(("family", "dtype"), FAMILY_WITH_DTYPE)
def test_embeds_have_the_bits_of_the_text_that_they_came_from(
    engine_of: EngineOf, pipeline_of: PipelineOf, monkeypatch: pytest.MonkeyPatch, family: str, dtype: str
) -> None:
    engine, request = engine_of(family, dtype), asked_of(family)
    (by_text,) = engine.rollout(**request, **WHOLE, prompt=TEXTS[0], negative_prompt=TEXTS[1])
    positive, negative = fields_of(by_text, family), fields_of(by_text, family, NEGATIVE)
    with monkeypatch.context() as patch:
        # No text encoder has anything to do.
        patch.setattr(type(engine._model.family), "encode", lambda *_: pytest.fail("encoded"))
        (found,) = engine.rollout(**request, **WHOLE, **positive, **negative)
        (batched,) = engine.rollout(**request, **WHOLE, **{key: tensor[None] for key, tensor in (positive | negative).items()})
    left, right = dict(tensors_of(by_text)), dict(tensors_of(found))
    assert left.keys() == right.keys() and any(key.startswith("neg_cond_kwargs") for key in left)
    for key, tensor in left.items():
        assert torch.equal(tensor, right[key]), key
    assert_same_bits(batched, found)
    record = found.sampling
    assert (found.prompt, record.negative_prompt, record.prompt_token_ids) == (None, None, None)
    declared = FAMILIES[family].conditioning.prompt_fields
    for digest, prefix, tensors in (
        (record.prompt_embeds_sha256, "", positive),
        (record.negative_prompt_embeds_sha256, NEGATIVE, negative),
    ):
        assert digest == branch_digest({declared[key.removeprefix(prefix)].name: tensor for key, tensor in tensors.items()})
    assert (by_text.sampling.prompt_embeds_sha256, by_text.sampling.negative_prompt_embeds_sha256) == (None, None)
    # What the text encoder would make of no text is no cause of anything.
    report = replay.audit(pipeline_of(family, dtype).transformer, [found], encode=lambda _: pytest.fail("encoded again"))
    assert report.is_exact


@pytest.mark.parametrize(("family", "dtype"), FAMILY_WITH_DTYPE)
def test_embeds_give_the_picture_of_the_pipeline_that_is_given_them(
    engine_of: EngineOf, pipeline_of: PipelineOf, family: str, dtype: str
) -> None:
    engine, pipeline, request = engine_of(family, dtype), pipeline_of(family, dtype), asked_of(family)
    if takes_images(family):
        # Encoding sees the picture, as large as the pipeline's call makes it.
        (by_text,) = engine.rollout(**request, **WHOLE, prompt=TEXTS[0], negative_prompt=TEXTS[1])
        found = fields_of(by_text, family) | fields_of(by_text, family, NEGATIVE)
        tensors: dict[str, Any] = {name: tensor[None] for name, tensor in found.items()}
    else:
        tensors = encoded(pipeline, TEXTS[0]) | encoded(pipeline, TEXTS[1], NEGATIVE)
    expected = picture_of(pipeline, request, tensors)
    ours = {name: value[0] if isinstance(value, list) else value for name, value in tensors.items()}
    assert torch.equal(engine.generate(**request, **ours)[0].image[:, 0], expected)
    # Any numbers are taken as they are, not those of a text alone.
    changed = {name: value.flip(-1) if value.is_floating_point() else value for name, value in ours.items()}
    as_pipeline = {name: [value] if isinstance(tensors[name], list) else value for name, value in changed.items()}
    assert torch.equal(engine.generate(**request, **changed)[0].image[:, 0], picture_of(pipeline, request, as_pipeline))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_padding_is_masked_as_the_pipeline_masks_it(engine_of: EngineOf, pipeline_of: PipelineOf, dtype: str) -> None:
    engine, pipeline, request = engine_of("qwen_image", dtype), pipeline_of("qwen_image", dtype), asked_of("qwen_image")
    tensors = {}
    for prefix, text, padding in (("", TEXTS[0], 5), (NEGATIVE, TEXTS[1], 0)):
        embeds = encoded(pipeline, text)["prompt_embeds"]
        mask = torch.ones(1, embeds.shape[1] + padding, dtype=torch.long)
        mask[:, embeds.shape[1] :] = 0
        tensors[f"{prefix}prompt_embeds"] = torch.cat([embeds, embeds.new_ones(1, padding, embeds.shape[2])], dim=1)
        tensors[f"{prefix}prompt_embeds_mask"] = mask
    (found,) = engine.generate(**request, **tensors)
    assert torch.equal(found.image[:, 0], picture_of(pipeline, request, tensors))
    alone, other = engine.rollout(**request, **WHOLE, **tensors, num_outputs_per_prompt=2)
    assert_same_bits(alone, engine.rollout(**request, **WHOLE, **tensors)[0])
    env = alone.denoising_env
    assert env is not None and env.pos_cond_kwargs["encoder_hidden_states_mask"].dtype == torch.bool
    # A mask of text alone says nothing.
    assert env.neg_cond_kwargs is not None and "encoder_hidden_states_mask" not in env.neg_cond_kwargs
    assert replay.audit(pipeline.transformer, [alone, other]).is_exact


def test_one_branch_may_be_a_text_and_the_other_an_embedding(engine_of: EngineOf) -> None:
    engine, request = engine_of("sd3", "bfloat16"), asked_of("sd3")
    (by_text,) = engine.rollout(**request, **WHOLE, prompt=TEXTS[0], negative_prompt=TEXTS[1])
    (one,) = engine.rollout(**request, **WHOLE, **fields_of(by_text, "sd3"), negative_prompt=TEXTS[1])
    (two,) = engine.rollout(**request, **WHOLE, **fields_of(by_text, "sd3", NEGATIVE), prompt=TEXTS[0])
    assert torch.equal(one.image, by_text.image) and torch.equal(two.image, by_text.image)
    assert one.sampling.negative_prompt == TEXTS[1] and two.prompt == TEXTS[0]
    # Not used, and not recorded.
    (off,) = engine.rollout(**{**request, "guidance_scale": 1}, **fields_of(by_text, "sd3", NEGATIVE), prompt=TEXTS[0])
    assert off.sampling.negative_prompt_embeds_sha256 is None


def test_what_is_sent_is_copied(engine_of: EngineOf) -> None:
    engine, request = engine_of("z_image", "float32"), asked_of("z_image")
    embeds = torch.randn(9, 2, engine._model.spec.widths["text"])[:, 1]
    plan = engine.plan(SamplingParams(**request, prompt_embeds=embeds))
    expected = engine.rollout(**request, prompt_embeds=embeds.clone())[0].image
    embeds.zero_()
    assert torch.equal(engine.rollout(plan)[0].image, expected)


NAN = float("nan")
# A change of good tensors of a family, the field that is blamed, and what is said.
WRONG: tuple[tuple[str, Mapping[str, Any], str, str], ...] = (
    ("sd3", {"pooled_prompt_embeds": None}, "pooled_prompt_embeds", "be given beside prompt_embeds for sd3, got nothing"),
    ("flux", {"pooled_prompt_embeds": None}, "pooled_prompt_embeds", "be given beside prompt_embeds for flux, got nothing"),
    ("sd3", {"prompt_embeds": lambda e: e[:205]}, "prompt_embeds", r"be a tensor \[333, \d+\] of torch.float32 for sd3"),
    ("flux", {"prompt_embeds": lambda e: e[:, 1:]}, "prompt_embeds", r"be a tensor \[tokens, \d+\] of torch.bfloat16 for flux"),
    ("flux", {"prompt_embeds": lambda e: e.double()}, "prompt_embeds", "of torch.float64; send what the pipeline's"),
    ("flux", {"prompt_embeds": lambda e: e[None].repeat(2, 1, 1)}, "prompt_embeds", "send .* for one prompt"),
    ("flux", {"prompt_embeds": lambda e: e[:0]}, "prompt_embeds", "hold 1 to 512 tokens for flux, got 0"),
    ("flux", {"prompt_embeds": lambda e: e[:1].repeat(513, 1)}, "prompt_embeds", "hold 1 to 512 tokens for flux, got 513"),
    ("flux", {"prompt_embeds": lambda e: e * NAN}, "prompt_embeds", "be finite, got NaN or infinity"),
    ("flux", {"pooled_prompt_embeds": lambda e: e / 0}, "pooled_prompt_embeds", "be finite"),
    ("flux", {"pooled_prompt_embeds": lambda e: e[1:]}, "pooled_prompt_embeds", r"be a tensor \[\d+\] of torch.bfloat16"),
    ("z_image", {"pooled_prompt_embeds": torch.ones(3)}, "pooled_prompt_embeds", "be left out for z_image"),
    ("qwen_image", {"prompt_embeds_mask": torch.ones(2)}, "prompt_embeds_mask", "be a tensor of booleans or integers"),
    ("qwen_image", {"prompt_embeds_mask": torch.ones(3, dtype=torch.long)}, "prompt_embeds_mask", r"be of the shape \[\d+\]"),
    ("qwen_image", {"prompt_embeds_mask": lambda e: (0 * e[:, 0]).long()}, "prompt_embeds_mask", "mark a token, got none"),
    ("qwen_image", {"prompt_embeds_mask": lambda e: (0 * e[:, 0]).long() + 2}, "prompt_embeds_mask", "hold 0 and 1 alone"),
    ("flux2", {"prompt_embeds_mask": lambda e: torch.arange(len(e)) > 3}, "prompt_embeds_mask", "mark every token for flux2"),
    ("z_image", {"prompt_embeds": [[1.0]]}, "prompt_embeds", "be a tensor of floats, got 'list'"),
    ("z_image", {"prompt_embeds": None, "prompt_embeds_mask": torch.ones(2).bool()}, "prompt_embeds_mask", "be given beside"),
    ("z_image", {"prompt": "a cup"}, "prompt_embeds", "be given without prompt, got 'both'; send one of the two"),
    ("z_image", {"prompt_token_ids": ((3,),)}, "prompt_embeds", "be given without prompt_token_ids, got 'both'"),
)


@pytest.mark.parametrize("prefix", ["", NEGATIVE])
@pytest.mark.parametrize(("family", "change", "field", "message"), WRONG, ids=range(len(WRONG)))
def test_what_does_not_fit_the_declaration_is_refused_before_any_work(
    engine_of: EngineOf, monkeypatch: pytest.MonkeyPatch, family: str, change: Any, field: str, message: str, prefix: str
) -> None:
    engine = engine_of(family, dict(FAMILY_WITH_DTYPE)[family])
    monkeypatch.setattr(runner, "encode_branch", lambda *_: pytest.fail("encoded"))
    spec, dtype = engine._model.spec, engine._model.dtype
    declared = FAMILIES[family].conditioning.prompt_fields
    good = {
        name: torch.ones(own.sizes({**spec.widths, "tokens": 7}), dtype=dtype)
        for name, own in declared.items()
        if own.is_required
    }
    changed = {name: value(good["prompt_embeds"]) if callable(value) else value for name, value in change.items()}
    if "pooled_prompt_embeds" in change and callable(value := change["pooled_prompt_embeds"]):
        changed["pooled_prompt_embeds"] = value(good["pooled_prompt_embeds"])
    sent = {prefix + name: value for name, value in {**good, **changed}.items()}
    others = {"prompt": "a cup"} if prefix or sent.get("prompt_embeds") is None else {}
    for word in ("beside", "without"):
        message = message.replace(f"{word} prompt", f"{word} {prefix}prompt")
    with pytest.raises(InvalidRequestError, match=message) as caught:
        engine.rollout(**SMALL, **others, **{name: value for name, value in sent.items() if value is not None})
    assert caught.value.field == prefix + field
