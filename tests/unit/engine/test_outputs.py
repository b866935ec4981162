"""No answer holds NaN or infinity: such a sample is an error that names the tensor and the sample, at every door."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.guiding import PicturedEngine, guided
from tests.rollouts import tensors_of
from tests.serving.servers import SMALL, error_of, serving
from tests.unit.cli.invoking import assert_one_line_error, run_cli
from tests.weights import change
from torch import Tensor, nn

from flowroll.engine import Engine
from flowroll.engine.service import EngineService
from flowroll.errors import CheckpointError, EngineError, InvalidRequestError
from flowroll.families import FAMILIES, Prompt
from flowroll.types import all_finite

REQUEST: dict[str, Any] = {"prompt": "a red fox", "seed": 7, "height": 64, "width": 64, "num_inference_steps": 2}
BROKEN_VAE = "image of the sample with seed 7 must be finite, got NaN or infinity from the VAE"
EVERYTHING = {"debug_mode": True, "return_denoising_env": True, "return_dit_trajectory": True}


@pytest.fixture(scope="module", params=list(FAMILIES))
def engine(request: pytest.FixtureRequest, checkpoints: dict[str, Path]) -> Iterator[Engine]:
    with PicturedEngine(checkpoints[request.param], device="cpu") as engine:
        yield engine


@pytest.fixture(scope="module")
def blind(z_image_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose VAE returns NaN, although its weights are finite."""
    folder = tmp_path_factory.mktemp("blind") / "model"
    shutil.copytree(z_image_checkpoint, folder)
    name = "decoder.conv_out.weight"
    change(folder / "vae", lambda tensors: {**tensors, name: torch.full_like(tensors[name], 3e38)})
    return folder


def _spoilt(module: nn.Module, value: float) -> Callable[[], None]:
    """Has every output of a module hold one such number; the result takes it back."""

    def spoil(_: object, __: object, output: Any) -> Any:
        for tensor in _tensors(output):
            if tensor.is_floating_point():
                tensor.view(-1)[0] = value
        return output

    return module.register_forward_hook(spoil).remove


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    else:
        for part in output:
            yield from _tensors(part)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_number_that_is_none_leaves_the_engine(engine: Engine, value: float) -> None:
    pipeline = engine._pipeline
    modules = {
        # The first encoder of FLUX.1 makes the pooled projection alone.
        f"pos_cond_kwargs.({engine._model.family.embeds_key}|pooled_projections) of the prompt": (
            pipeline.text_encoder.get_input_embeddings()
        ),
        "latents of the sample with seed 7": pipeline.transformer,
        "image of the sample with seed 7": pipeline.vae.decoder,
    }
    for words, module in modules.items():
        restore = _spoilt(module, value)
        if words.startswith("image") and engine.info.family.startswith("qwen_image") and value == float("inf"):
            restore()  # The VAEs of Qwen-Image themselves cut pictures at black and white
            continue
        try:
            for ask in (
                engine.generate,
                lambda **f: engine.rollout(**f, **EVERYTHING),
                lambda **f: engine.rollout(**f, rollout=False),
            ):
                with pytest.raises(EngineError, match=words):
                    # Of another text than in the other tests, whose encoding is kept.
                    ask(**{**REQUEST, "prompt": f"a fox and {value}"})
        finally:
            restore()
    # The engine goes on.
    (rollout,) = engine.rollout(**REQUEST, **EVERYTHING)
    assert all(all_finite(tensor) for _, tensor in tensors_of(rollout))


@pytest.mark.parametrize("part", ["mean", "noise", "velocity", "latents"])
def test_what_is_recorded_alone_is_looked_at_too(engine: Engine, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from flowroll.engine.runner.recorder import Recorder

    wait = Recorder.wait

    def spoil(self: Recorder) -> None:
        wait(self)
        rows = self._states if part == "latents" else self.fields[part]
        assert rows is not None
        rows[0].fill_(torch.nan)

    monkeypatch.setattr(Recorder, "wait", spoil)
    with pytest.raises(EngineError, match=r"(debug_tensors|dit_trajectory)\.\w+ of the sample with seed 7 must be finite"):
        engine.rollout(**REQUEST, **EVERYTHING)


def test_one_broken_sample_ends_its_request_alone(engine: Engine) -> None:
    # Of two prompts, the text encoder breaks on one.
    (good,) = engine.generate(**REQUEST)
    encode = engine._model.family.encode

    def broken(pipeline: Any, prompt: Prompt) -> Any:
        encoded = dict(encode(pipeline, prompt))
        if prompt.text == "broken":
            encoded[engine._model.family.embeds_key].view(-1)[3] = torch.inf
        return encoded

    engine._model.family.encode = broken  # type: ignore[method-assign]
    try:
        name = engine._model.family.embeds_key
        with pytest.raises(EngineError, match=f"pos_cond_kwargs.{name} of the prompt must be finite"):
            engine.rollout(**{**REQUEST, "prompt": "broken"})
        with pytest.raises(EngineError, match=f"neg_cond_kwargs.{name} of the negative prompt must be finite"):
            engine.generate(**guided(engine.info.family, 4.0, **REQUEST, negative_prompt="broken"))
        (again,) = engine.generate(**REQUEST)
        assert torch.equal(again.image, good.image)
    finally:
        del engine._model.family.encode


@pytest.mark.parametrize(("value", "words"), [(3e38, "give finite embeddings"), (torch.nan, "hold finite weights")])
def test_a_text_encoder_of_nan_is_refused_at_the_start(
    value: float, words: str, z_image_checkpoint: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    shutil.copytree(z_image_checkpoint, folder)
    file = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    tensors |= {name: torch.full_like(tensors[name], value) for name in tensors if name.endswith("input_layernorm.weight")}
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"text_encoder must {words}"):
        Engine(folder, device="cpu")


def test_every_route_answers_with_the_error(blind: Path) -> None:
    with Engine(blind, device="cpu") as engine, EngineService(engine, max_queue=4) as service, serving(service) as client:
        for route, body in (
            ("/rollout/generate", SMALL),
            ("/generate", {key: value for key, value in SMALL.items() if not key.startswith("rollout")}),
            ("/v1/images/generations", {"prompt": "a red fox", "size": "64x64", "seed": 7, "num_inference_steps": 2}),
        ):
            answer = client.post(route, json=body)
            assert answer.status_code == 500, answer.text[:300]
            assert (error_of(answer)["code"], BROKEN_VAE in error_of(answer)["message"]) == ("engine_error", True)


@pytest.mark.parametrize("options", [(), ("--rollout",)])
def test_the_command_line_writes_no_black_picture(blind: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    small = ("--prompt", "a fox", "--width", 64, "--height", 64, "--num-inference-steps", 2, "--seed", 7)
    result = run_cli("generate", blind, *small, *options, "--out", tmp_path / "out")
    assert_one_line_error(result, BROKEN_VAE)
    assert not list((tmp_path / "out").glob("*"))


def test_latents_to_decode_have_to_be_finite(engine: Engine) -> None:
    (image,) = engine.generate(**REQUEST)
    assert torch.equal(engine.decode(image.latents, height=64, width=64), image.image)
    with pytest.raises(InvalidRequestError, match="latents must be finite") as refused:
        engine.decode(image.latents * torch.nan, height=64, width=64)
    assert refused.value.field == "latents"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_finite_numbers_whose_sum_is_not_are_finite(dtype: torch.dtype) -> None:
    largest = torch.full((4, 5), torch.finfo(dtype).max, dtype=dtype)
    assert all_finite(largest) and all_finite(-largest) and all_finite(torch.empty(0, dtype=dtype))
    assert all_finite(torch.zeros(3, dtype=torch.bool))
    for value in (torch.nan, torch.inf, -torch.inf):
        largest[2, 1] = value
        assert not all_finite(largest)
    assert not all_finite(torch.tensor([torch.inf, -torch.inf], dtype=dtype))
