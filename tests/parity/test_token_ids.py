"""Prompts as token ids: the bits of the texts that a pipeline's own tokenizers make these ids of."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.guiding import PICTURE, in_words_of, opened, takes_images
from tests.pairs import FAMILY_WITH_DTYPE
from tests.rollouts import tensors_of
from transformers import PreTrainedTokenizerBase

from flowroll.engine import Engine
from flowroll.errors import InvalidRequestError
from flowroll.families import FAMILIES

EngineOf = Callable[[str, str], Engine]
PipelineOf = Callable[[str, str], Any]
IdsOf = Callable[[str], tuple[tuple[int, ...], ...]]
WHOLE = {"return_denoising_env": True, "return_dit_trajectory": True}
REQUEST: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 2, "seed": 3, "guidance_scale": 4.0, **WHOLE}
TEXTS = {"short": "a red apple", "empty": "", "odd": "猫が好き 🦊 <|im_end|>", "long": "a photo of a red car, " * 300}


@pytest.fixture
def ids_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, str], IdsOf]:
    """What the tokenizers of a pipeline of diffusers return for a text, cut as it has them cut, and without their padding."""
    call, heard = PreTrainedTokenizerBase.__call__, dict[int, tuple[int, ...]]()

    def spy(tokenizer: Any, *args: Any, **options: Any) -> Any:
        made = call(tokenizer, *args, **options)
        # Not where a template alone is tokenized, without padding.
        if options.get("padding"):
            ids, mask = torch.as_tensor(made.input_ids[0]), torch.as_tensor(made.attention_mask[0])
            heard.setdefault(id(tokenizer), tuple(ids[mask.bool()].tolist()))
        return made

    def of(pipeline: Any, family: str) -> IdsOf:
        def ids(text: str) -> tuple[tuple[int, ...], ...]:
            heard.clear()
            made, kinds = FAMILIES[family], FAMILIES[family].variants
            with monkeypatch.context() as patched, torch.no_grad():
                patched.setattr(PreTrainedTokenizerBase, "__call__", spy)
                images = (opened(PICTURE),) if takes_images(family) else ()
                made.encode(pipeline, made.prompt(text, next(iter(kinds)), images))
            own = [getattr(pipeline, name, None) for name in made.tokenizers[: len(made.text_encoders)]]
            return tuple(heard[id(getattr(one, "tokenizer", one))] for one in own if one is not None)

        return ids

    return of


@pytest.mark.parametrize("kind", ["short", pytest.param("empty", marks=pytest.mark.slow), "odd", "long"])
@pytest.mark.parametrize(("name", "dtype"), FAMILY_WITH_DTYPE)
def test_ids_have_the_bits_of_their_text(
    engine_of: EngineOf, pipeline_of: PipelineOf, ids_of: Callable[[Any, str], IdsOf], name: str, dtype: str, kind: str
) -> None:
    engine, ids = engine_of(name, dtype), ids_of(pipeline_of(name, dtype), name)
    request = {key: value for key, value in in_words_of(name, REQUEST).items() if key != "negative_prompt"}
    (by_text,) = engine.rollout(**request, prompt=TEXTS[kind], negative_prompt="blurry, bad")
    positive, negative = ids(TEXTS[kind]), ids("blurry, bad")
    (by_ids,) = engine.rollout(**request, prompt_token_ids=positive, negative_prompt_token_ids=negative)
    left, right = dict(tensors_of(by_text)), dict(tensors_of(by_ids))
    assert left.keys() == right.keys() and any(key.startswith("neg_cond_kwargs") for key in left)
    for field, tensor in left.items():
        assert torch.equal(tensor, right[field]), field
    assert by_ids.prompt is None and by_ids.sampling.prompt_token_ids == positive
    assert (by_ids.sampling.negative_prompt, by_ids.sampling.negative_prompt_token_ids) == (None, negative)
    (labelled,) = engine.generate(**in_words_of(name, {"seed": 3}), **SMALL, prompt="only a label", prompt_token_ids=positive)
    assert labelled.prompt == "only a label"
    assert torch.equal(
        labelled.latents, engine.generate(**in_words_of(name, {"seed": 3}), **SMALL, prompt=TEXTS[kind])[0].latents
    )


SMALL: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 1}


@pytest.mark.parametrize("name", FAMILIES)
def test_ids_that_no_text_of_this_pipeline_has_are_refused(
    engine_of: EngineOf, pipeline_of: PipelineOf, ids_of: Callable[[Any, str], IdsOf], name: str
) -> None:
    dtype = dict(FAMILY_WITH_DTYPE)[name]
    engine = engine_of(name, dtype)
    first, *rest = ids_of(pipeline_of(name, dtype), name)("a red apple")
    facts = engine._model.tokenizers[0]
    too_long = facts.template + (first[-1],) * (facts.max_tokens + 1)
    for lists, message in (
        (((*first[:-1], facts.num_ids), *rest), f"hold ids below {facts.num_ids} for {facts.name}"),
        ((too_long, *rest), f"to {facts.max_tokens} ids for {facts.name}, got {len(too_long)}; tokenize with truncation=True"),
        ((first, *rest, first), f"hold one list for each of {facts.name}"),
    ):
        for field in ("prompt_token_ids", "negative_prompt_token_ids"):
            with pytest.raises(InvalidRequestError, match=message) as caught:
                engine.rollout(**SMALL, **{"prompt_token_ids": (first, *rest), field: lists})
            assert caught.value.field == field


def test_ids_without_the_template_that_the_pipeline_leaves_out_are_refused(
    engine_of: EngineOf, pipeline_of: PipelineOf, ids_of: Callable[[Any, str], IdsOf]
) -> None:
    engine = engine_of("qwen_image", "float32")
    (whole,) = ids_of(pipeline_of("qwen_image", "float32"), "qwen_image")("a red apple")
    for ids in (whole[34:], (whole[0],) * 40, whole[:20]):
        with pytest.raises(InvalidRequestError, match="begin with the 34 ids of the pipeline's template for tokenizer"):
            engine.rollout(**SMALL, prompt_token_ids=(ids,))
    with pytest.raises(InvalidRequestError, match="hold 35 to 1058 ids for tokenizer, got 34"):
        engine.rollout(**SMALL, prompt_token_ids=(whole[:34],))


def test_a_request_without_any_prompt_is_refused(engine_of: EngineOf) -> None:
    with pytest.raises(InvalidRequestError, match="prompt must be given"):
        engine_of("z_image", "float32").rollout(**SMALL)
    with pytest.raises(InvalidRequestError, match="negative_prompt_token_ids must be given without negative_prompt"):
        engine_of("z_image", "float32").rollout(**SMALL, prompt="", negative_prompt="", negative_prompt_token_ids=((1,),))
