"""The fast mode: never the default, the bits of the pipeline's own batch, named in what it makes, never replayed as exact."""

import copy
import inspect
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.adapters import policy, saved
from tests.guiding import PicturedEngine, in_words_of, in_words_of_pipeline
from tests.pairs import FAMILY_WITH_DTYPE
from tests.weights import with_other
from torch import Tensor

from flowroll import Rollout, replay
from flowroll.engine import Engine
from flowroll.errors import InvalidRequestError, WeightsRejectedError
from flowroll.families import FAMILIES
from flowroll.wire.files import load_rollout, save_rollout

REQUEST: dict[str, Any] = {
    "prompt": "a red apple",
    "height": 64,
    "width": 64,
    "num_inference_steps": 3,
    "seed": 5,
    "num_outputs_per_prompt": 4,
    "return_denoising_env": True,
    "return_dit_trajectory": True,
}
SHARING = [(family, dtype) for family, dtype in FAMILY_WITH_DTYPE if FAMILIES[family].shares_forwards]
# Every part that a CPU has but compiled blocks, which take a minute.
PARTS = [("batch",), ("batch", "fp8")]


@pytest.fixture(scope="module")
def group(qwen_checkpoint: Path) -> list[Rollout]:
    with Engine(qwen_checkpoint, device="cpu", exactness="fast") as engine:
        return engine.rollout(**REQUEST)


def log_probs_of(rollouts: list[Rollout]) -> Tensor:
    return torch.stack([rollout.log_probs for rollout in rollouts if rollout.log_probs is not None])


def states_of(rollouts: list[Rollout]) -> Tensor:
    return torch.stack([rollout.dit_trajectory.latents for rollout in rollouts if rollout.dit_trajectory is not None])


def test_the_default_is_exact_and_says_so(
    engine_of: Callable[[str, str], Engine], pipeline_of: Callable[[str, str], Any], device: str
) -> None:
    engine = engine_of("qwen_image", "float32")
    assert (engine.info.exactness, engine.info.fast) == ("exact", None)
    rollouts = engine.rollout(**REQUEST)
    for one in rollouts:
        assert one.provenance is not None
        assert (one.provenance.exactness, one.provenance.fast_parts) == ("exact", ())
        assert one.provenance.strategy == ("merged" if device == "cpu" else "alone")
    assert engine.generate("a cat", height=64, width=64, num_inference_steps=1)[0].exactness == "exact"
    log_probs = replay.log_prob(pipeline_of("qwen_image", "float32").transformer, rollouts)
    assert torch.equal(log_probs.cpu(), log_probs_of(rollouts))


def test_a_fast_sample_names_its_mode_wherever_it_goes(group: list[Rollout], tmp_path: Path) -> None:
    for one in group:
        assert one.provenance is not None
        assert (one.provenance.exactness, one.provenance.fast_parts) == ("fast", ("batch",))
        assert one.provenance.strategy == "fast"
    save_rollout(tmp_path / "one.safetensors", group[0])
    assert load_rollout(tmp_path / "one.safetensors").provenance == group[0].provenance


@pytest.mark.parametrize(("family", "dtype"), SHARING)
def test_a_fast_group_has_the_bits_of_the_pipelines_batch(
    family: str, dtype: str, checkpoints: dict[str, Path], pipeline_of: Callable[[str, str], Any]
) -> None:
    request = in_words_of(family, {"height": 64, "width": 64, "num_inference_steps": 2, "guidance_scale": 0.0})
    pipeline, last = pipeline_of(family, dtype), {}
    arguments: dict[str, Any] = {name: value for name, value in request.items() if name != "images"}
    if "true_cfg_scale" in inspect.signature(pipeline.__call__).parameters and "true_cfg_scale" not in request:
        arguments["true_cfg_scale"] = arguments.pop("guidance_scale")
    generators = [torch.Generator(pipeline.device).manual_seed(7 + number) for number in range(4)]
    pictures = pipeline(
        prompt="a photo of two wine glasses",
        **in_words_of_pipeline(pipeline, arguments),
        num_images_per_prompt=4,
        generator=generators,
        output_type="pt",
        callback_on_step_end=lambda _, __, ___, tensors: last.update(tensors) or {},
    ).images
    with PicturedEngine(checkpoints[family], dtype=dtype, device=str(pipeline.device), exactness="fast") as engine:
        found = engine.generate("a photo of two wine glasses", seed=7, num_outputs_per_prompt=4, **request)
    assert torch.equal(torch.stack([one.latents for one in found]), last["latents"].cpu())
    assert torch.equal(torch.stack([one.image[:, 0] for one in found]), pictures.cpu())


def test_replay_refuses_a_fast_rollout_unless_it_may_be_off(
    group: list[Rollout], pipeline_of: Callable[[str, str], Any], tmp_path: Path
) -> None:
    transformer = pipeline_of("qwen_image", "float32").transformer
    for merge in ("alone", "exact"):
        with pytest.raises(InvalidRequestError, match=r'rollout 0 of a fast one \(batch\); pass merge="fast"'):
            replay.log_prob(transformer, group, merge=merge)
        with pytest.raises(InvalidRequestError, match='pass merge="fast"'):
            next(replay.micro_batches(transformer, group, merge=merge))
        with pytest.raises(InvalidRequestError, match='pass merge="fast"'):
            replay.score(transformer, group, merge=merge)
    with pytest.warns(UserWarning, match=r"the engine that made the rollouts was fast itself \(batch\).* off"):
        scores = replay.score(transformer, group, merge="fast", steps=[0, 1, 2])
    assert scores.exactness == "fast" and torch.allclose(scores.log_probs.detach().cpu(), log_probs_of(group), atol=1e-5)


def test_an_audit_names_the_mode_even_where_no_bit_differs(
    group: list[Rollout], engine_of: Callable[[str, str], Engine], pipeline_of: Callable[[str, str], Any]
) -> None:
    transformer = pipeline_of("qwen_image", "float32").transformer
    exact = engine_of("qwen_image", "float32").rollout(**REQUEST)
    assert exact[0].provenance is not None
    said = [replace(exact[0], provenance=replace(exact[0].provenance, exactness="fast", fast_parts=("attention=sage",)))]
    report = replay.audit(transformer, said)
    assert report.steps[0].is_exact and not report.is_exact and "not exact (attention=sage)" in str(report)
    assert replay.audit(transformer, exact).is_exact
    other = copy.deepcopy(transformer)
    other.proj_out.weight.data.mul_(1.1)
    found = replay.audit(other, group)
    assert {cause.kind for cause in found.causes} == {"exactness"} and found.steps[0].max_ratio_error > 1e-4


@pytest.mark.parametrize("parts", PARTS, ids="-".join)
def test_a_fast_engine_takes_weights_and_sleeps(parts: tuple[str, ...], qwen_checkpoint: Path, tmp_path: Path) -> None:
    other = with_other(qwen_checkpoint, tmp_path / "other", factor=1.1)
    with Engine(other, device="cpu", exactness="fast", fast_parts=parts) as engine:
        started, checksum = engine.rollout(**REQUEST), engine.weights_checksum()
    with Engine(qwen_checkpoint, device="cpu", exactness="fast", fast_parts=parts) as engine:
        before, dtypes = engine.rollout(**REQUEST), {one.dtype for one in engine._model.transformer.parameters()}
        assert (torch.float8_e4m3fn in dtypes) == ("fp8" in parts)
        engine.copy_policy("old")
        for mode in ("offload", "disk"):
            engine.sleep(mode)
            engine.wake()
            assert torch.equal(states_of(engine.rollout(**REQUEST)), states_of(before))
        engine.update_weights_from_disk(other, weight_version="disk")
        assert {one.dtype for one in engine._model.transformer.parameters()} == dtypes
        assert engine.weights_checksum() == checksum
        updated = engine.rollout(**REQUEST)
        assert torch.equal(states_of(engine.rollout(**REQUEST, policy="old")), states_of(before))
        assert torch.equal(states_of(engine.rollout(**REQUEST)), states_of(updated))
    assert updated[0].provenance is not None and updated[0].provenance.weights_sha256 == checksum
    assert torch.equal(states_of(updated), states_of(started))
    assert not torch.equal(states_of(updated), states_of(before))


def test_tensors_that_arrive_while_float8_layers_run_are_kept_as_float8(
    qwen_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = with_other(qwen_checkpoint, tmp_path / "other", factor=1.1)
    with Engine(other, device="cpu", exactness="fast", fast_parts=("fp8",)) as engine:
        checksum = engine.weights_checksum()
    with Engine(other, device="cpu") as engine:
        given = {name: tensor.clone() for name, tensor in engine._model.transformer.state_dict().items()}
    with Engine(qwen_checkpoint, device="cpu", exactness="fast", fast_parts=("fp8",)) as engine:
        incoming = engine.receive_weights()
        expected = incoming.num_bytes
        layer = engine._model.transformer.img_in
        kept: list[int] = []

        def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            if weight is layer.weight and not kept:
                # While the layer runs, its weights are wide.
                assert weight.dtype == torch.float32
                kept.append(engine.receive_weights().num_bytes)
                incoming.put(list(given.items()))
            return plain(inputs, weight, bias)

        plain = torch.nn.functional.linear
        monkeypatch.setattr(torch.nn.functional, "linear", linear)
        engine.rollout(**REQUEST)
        monkeypatch.undo()
        assert kept == [expected]
        engine.commit_weights(incoming.stage())
        assert {one.dtype for one in engine._model.transformer.img_in.parameters()} == {torch.float8_e4m3fn}
        assert engine.weights_checksum() == checksum


def test_new_weights_that_float8_cannot_hold_are_refused(qwen_checkpoint: Path) -> None:
    with Engine(qwen_checkpoint, device="cpu", exactness="fast", fast_parts=("fp8",)) as engine:
        checksum, weight = engine.weights_checksum(), engine._model.transformer.img_in.weight
        # The largest number of float8 is 448.
        too_large = {"img_in.weight": torch.full(weight.shape, 1000.0)}
        with pytest.raises(WeightsRejectedError, match=r"finite weights, got NaN or infinity in img_in.weight as torch.float8"):
            engine.update_weights_from_tensors(too_large, partial=True)
        assert engine.weights_checksum() == checksum


def test_adapters_run_in_batches_and_are_refused_beside_float8(qwen_checkpoint: Path, tmp_path: Path) -> None:
    found = []
    for exactness in ("fast", "exact"):
        with Engine(qwen_checkpoint, device="cpu", exactness=exactness) as engine:
            if not found:
                saved(policy(engine._model.transformer, 0), tmp_path / "a")
            engine.load_lora_adapter(tmp_path / "a", name="a")
            found.append(states_of(engine.rollout(**REQUEST, lora_name="a")))
            plain = states_of(engine.rollout(**REQUEST))
    assert torch.allclose(*found, atol=1e-5) and not torch.allclose(found[0], plain, atol=1e-3)
    with (
        Engine(qwen_checkpoint, device="cpu", exactness="fast", fast_parts=("fp8",)) as engine,
        pytest.raises(InvalidRequestError, match="adapters must be left out"),
    ):
        engine.stage_pushed_lora({}, merged=False)


@pytest.mark.proof
def test_compiled_blocks_run_in_batches(qwen_checkpoint: Path, tmp_path: Path) -> None:
    other = with_other(qwen_checkpoint, tmp_path / "other", factor=1.1)
    with Engine(qwen_checkpoint, device="cpu", exactness="fast", fast_parts=("batch", "compile")) as engine:
        assert engine.info.fast is not None and engine.info.fast.parts == ("batch", "compile")
        assert engine.info.fast.mismatch.max_log_prob < 1e-3
        assert re.match("compiled by torch .* with its own settings", engine.info.compiled or "")
        engine.update_weights_from_disk(other)
        rollouts = engine.rollout(**REQUEST)
        with pytest.raises(InvalidRequestError, match="adapters must be left out"):
            engine.stage_pushed_lora({}, merged=False)
    with Engine(other, device="cpu") as engine:
        assert torch.allclose(states_of(engine.rollout(**REQUEST)), states_of(rollouts), atol=1e-3)
