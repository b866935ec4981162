"""What requests share beside the steps: the encoding of a text, and a call of the VAE."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from flowroll.checkpoints import shapes_checkpoint
from flowroll.engine import Engine
from flowroll.engine.runner import pipeline as runner
from flowroll.engine.runner import texts

ASKED: dict[str, Any] = {"height": 32, "width": 32, "num_inference_steps": 2, "guidance_scale": 4.0, "seed": 3}


@pytest.fixture
def engine() -> Iterator[Engine]:
    with Engine(shapes_checkpoint("z_image"), device="cpu") as engine:
        yield engine


@pytest.fixture
def calls(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """The number of samples in each call of the VAE, and the texts that were encoded."""
    found: dict[str, list[Any]] = {"decoded": [], "encoded": []}
    pipeline = engine._pipeline
    decode, encode = pipeline.vae.decode, pipeline.encode_prompt

    def decoding(z: torch.Tensor, **options: Any) -> Any:
        found["decoded"].append(len(z))
        return decode(z, **options)

    def encoding(prompt: str, **options: Any) -> Any:
        found["encoded"].append(prompt)
        return encode(prompt, **options)

    monkeypatch.setattr(pipeline.vae, "decode", decoding)
    monkeypatch.setattr(pipeline, "encode_prompt", encoding)
    return found


def test_samples_that_end_together_are_decoded_in_one_call(engine: Engine, calls: dict[str, list[Any]]) -> None:
    group = [engine.generate("a red circle", num_outputs_per_prompt=5, **ASKED) for _ in range(2)][1]
    assert calls["decoded"] == [1, 1, 1, 1, 4, 1, 4, 1]
    for index, image in enumerate(group):
        (alone,) = engine.generate("a red circle", **{**ASKED, "seed": 3 + index})
        assert torch.equal(alone.image, image.image) and torch.equal(alone.latents, image.latents)


def test_large_pictures_are_decoded_one_by_one(
    engine: Engine, calls: dict[str, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "_MOST_PIXELS", 2 * 32 * 32 - 1)
    engine.generate("a red circle", num_outputs_per_prompt=3, **ASKED)
    assert calls["decoded"] == [1, 1, 1]


def test_samples_are_decoded_one_by_one_where_several_at_once_fail(
    engine: Engine, calls: dict[str, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = engine._pipeline.vae.decode

    def failing(z: torch.Tensor, **options: Any) -> Any:
        if len(z) > 1:
            raise RuntimeError("out of memory")
        return decode(z, **options)

    monkeypatch.setattr(engine._pipeline.vae, "decode", failing)
    assert len(engine.generate("a red circle", num_outputs_per_prompt=2, **ASKED)) == 2


def test_a_text_is_encoded_once_for_several_requests(engine: Engine, calls: dict[str, list[Any]]) -> None:
    first = engine.rollout("a red circle", negative_prompt="grey", return_denoising_env=True, **ASKED)[0]
    for tensor in dict(first.denoising_env.tensors()).values():  # type: ignore[union-attr]
        tensor.zero_()
    engine.generate("a blue circle", negative_prompt="grey", **ASKED)
    again = engine.generate("a red circle", negative_prompt="grey", **ASKED)[0]
    assert calls["encoded"] == ["a red circle", "grey", "a blue circle"]
    engine.sleep()
    engine.wake()
    engine.generate("a blue circle", negative_prompt="grey", **ASKED)
    assert calls["encoded"][3:] == ["a blue circle", "grey"]
    with Engine(shapes_checkpoint("z_image"), device="cpu") as other:
        assert torch.equal(other.generate("a red circle", negative_prompt="grey", **ASKED)[0].latents, again.latents)


def test_few_texts_are_kept_and_none_of_another_number_of_threads(
    engine: Engine, calls: dict[str, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = torch.get_num_threads()
    engine.generate("a red circle", **{**ASKED, "guidance_scale": 0.0})
    torch.set_num_threads(3 - before if before < 3 else 1)
    try:
        engine.generate("a red circle", **{**ASKED, "guidance_scale": 0.0})
    finally:
        torch.set_num_threads(before)
    assert calls["encoded"] == ["a red circle"] * 2
    monkeypatch.setattr(texts, "_MOST_BYTES", 1)
    for _ in range(2):
        engine.generate("a blue circle", **{**ASKED, "guidance_scale": 0.0})
    assert calls["encoded"] == ["a red circle"] * 2 + ["a blue circle"] * 2
