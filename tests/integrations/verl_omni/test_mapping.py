from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.integrations.verl_omni.cases import RECORDED, prompt_of, sampling

from flowroll import replay
from flowroll.engine import Engine
from flowroll.errors import InvalidRequestError
from flowroll.integrations.verl_omni import rollout_of
from flowroll.integrations.verl_omni.mapping import group_request, output_fields, sample_request
from flowroll.integrations.verl_omni.windows import window_of
from flowroll.types import Rollout, SamplingParams

FAMILIES = ("qwen_image", "sd3")


@pytest.fixture(scope="module")
def engines(checkpoints: dict[str, Path]) -> Iterator[dict[str, Engine]]:
    made = {family: Engine(checkpoints[family], device="cpu", dtype="float32") for family in FAMILIES}
    yield made
    for engine in made.values():
        engine.close()


def run(engine: Engine, folder: Path, **changes: Any) -> tuple[Any, Rollout, dict[str, Any]]:
    family = engine.info.family
    algorithm, text = changes.pop("algorithm", "flow_grpo"), changes.pop("negative", "blurry")
    prompt = prompt_of(folder, engine.facts, negative=text)
    request = sample_request(prompt, sampling(family, **changes), facts=engine.facts, algorithm=algorithm)
    (rollout,) = engine.rollout(group_request(request.params, [request.noise_seed]))
    return request, rollout, output_fields(rollout, request, global_steps=7)


def transformer_of(folder: Path, family: str) -> torch.nn.Module:
    import diffusers

    name = {"qwen_image": "QwenImageTransformer2DModel", "sd3": "SD3Transformer2DModel"}[family]
    made = getattr(diffusers, name).from_pretrained(folder / "transformer").eval()
    replay.align_weights(made)
    return made


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sde_type", ["sde", "cps", "dance_sde"])
def test_the_ratio_of_a_trainers_own_forward_is_exactly_one(
    engines: dict[str, Engine], checkpoints: dict[str, Path], family: str, sde_type: str
) -> None:
    request, rollout, output = run(engines[family], checkpoints[family], sde_type=sde_type, noise_level=0.6)
    # verl-omni's log-prob of CPS is the squared distance alone.
    assert rollout.sampling.log_prob_no_const == (sde_type == "cps")
    row = {**output["extra_fields"], "rollout_log_probs": output["log_probs"]}
    # As verl-omni's agent loop pads the embeddings of a batch.
    for name in [name for name in row if "prompt_embeds" in name and "pooled" not in name]:
        longer = torch.zeros(400, *row[name].shape[1:], dtype=row[name].dtype)
        longer[: len(row[name])] = row[name]
        row[name] = longer
    again = replay.log_prob(transformer_of(checkpoints[family], family), [rollout_of(row)], steps=list(request.window))
    assert torch.equal(again[0], output["log_probs"]) and again.requires_grad


@pytest.mark.parametrize("family", FAMILIES)
def test_an_output_has_the_fields_that_the_trainer_reads(
    engines: dict[str, Engine], checkpoints: dict[str, Path], family: str
) -> None:
    request, rollout, output = run(engines[family], checkpoints[family])
    assert list(output) == RECORDED["diffusion_output"]
    extra, size = output["extra_fields"], len(request.window)
    assert output["diffusion_output"].dtype == torch.uint8 and output["diffusion_output"].shape == (3, 64, 64)
    assert output["log_probs"].shape == (size,) and output["stop_reason"] == "completed" and extra["global_steps"] == 7
    latent = {"qwen_image": (16, 64), "sd3": (16, 8, 8)}[family]
    assert extra["all_latents"].shape == (size + 1, *latent) and extra["all_latents"].dtype == torch.float32
    assert extra["all_timesteps"].tolist() == list(rollout.sampling.timesteps[request.window.start : request.window.stop])
    tokens = len(extra["prompt_embeds"])
    assert extra["prompt_embeds_mask"].tolist() == [1] * tokens and extra["prompt_embeds_mask"].dtype == torch.int64
    assert (
        (tokens == 333 and "negative_pooled_prompt_embeds" in extra) if family == "sd3" else "pooled_prompt_embeds" not in extra
    )
    assert len(extra["negative_prompt_embeds"]) == len(extra["negative_prompt_embeds_mask"])
    assert (extra["flowroll_seed"], extra["flowroll_noise_seed"]) == (request.seed, rollout.seed)
    assert rollout.seed == request.noise_seed
    # The window's part of the whole trajectory is what is returned.
    every = replace(group_request(request.params, [request.noise_seed]), rollout_return_step_indices=None)
    (whole,) = engines[family].rollout(every)
    assert whole.dit_trajectory is not None
    states = whole.dit_trajectory.latents[request.window.start : request.window.stop + 1]
    assert torch.equal(states.float(), extra["all_latents"])


@pytest.mark.parametrize("row", RECORDED["schedules"], ids=lambda row: f"{row['family']}-{row['height']}x{row['width']}")
def test_timesteps_are_those_of_the_trainers_schedule_bit_for_bit(engines: dict[str, Engine], row: dict[str, Any]) -> None:
    engine = engines[row["family"]]
    params = {"height": row["height"], "width": row["width"], "num_inference_steps": row["steps"]}
    record = engine.plan(SamplingParams(prompt="", **params)).record
    assert list(record.timesteps) == row["timesteps"] and list(record.sigmas) == row["sigmas"]


@pytest.mark.parametrize("row", RECORDED["windows"], ids=str)
def test_windows_begin_where_verl_omni_begins_them(row: dict[str, Any]) -> None:
    given = {"sde_window_size": row["size"], "sde_window_range": row["range"]}
    if row["windows"] == [[0, 0]]:
        with pytest.raises(InvalidRequestError, match="num_inference_steps must be above 1"):
            window_of(given, algorithm="flow_grpo", num_steps=row["steps"], noise_seed=0)
        return
    found = [window_of(given, algorithm="flow_grpo", num_steps=row["steps"], noise_seed=seed) for seed in range(400)]
    assert sorted({(one.start, one.stop) for one in found}) == [tuple(one) for one in row["windows"]]
    assert found == [window_of(given, algorithm="flow_grpo", num_steps=row["steps"], noise_seed=seed) for seed in range(400)]


@pytest.mark.parametrize("row", RECORDED["mix_grpo_windows"], ids=str)
def test_windows_of_mix_grpo_are_those_of_verl_omni(row: dict[str, Any]) -> None:
    found = window_of(row["sampling"], algorithm="mix_grpo", num_steps=12, noise_seed=1)
    assert [found.start, found.stop] == row["window"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sde_window_range": [0, 9]}, "sde_window_range must hold the 2 steps of a window among the 6 steps"),
        ({"sde_window_range": [4, 5]}, "sde_window_range must hold the 2 steps"),
        ({"sde_window_range": "x"}, "sde_window_range must hold two integers"),
        ({"sde_window_size": 0}, "sde_window_size must be an integer >= 1"),
        ({"sde_window_size": 1.5}, "sde_window_size must be an integer"),
        ({"noise_level": 0.0}, "noise_level must be above 0 where log-probs are asked for"),
        ({"sde_type": "euler"}, "sde_type must be one of sde, cps, dance_sde"),
        ({"num_frames": 81}, "num_frames must be None or 1 for pictures"),
        ({"guidance_scale": 3.5}, "guidance_scale must be left out"),
        ({"output_type": "both"}, "output_type must be one of image, latent for qwen_image"),
        ({"hieght": 64}, "hieght must be known to flowroll"),
        ({"seed": -1}, "seed must be an integer from 0"),
        ({"height": 63}, "height must be a multiple of 16"),
        ({"max_sequence_length": 0}, "max_sequence_length must be an integer >= 1"),
    ],
)
def test_what_has_no_meaning_is_refused_before_any_model_work(
    engines: dict[str, Engine], checkpoints: dict[str, Path], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        run(engines["qwen_image"], checkpoints["qwen_image"], **changes)


def test_prompts_of_sd3_need_the_ids_of_each_encoder(engines: dict[str, Engine], checkpoints: dict[str, Path]) -> None:
    facts = engines["sd3"].facts
    prompt = prompt_of(checkpoints["qwen_image"], engines["qwen_image"].facts)
    with pytest.raises(InvalidRequestError, match=r"extra_prompt_ids must hold the token ids clip and t5.*extra_tokenizers"):
        sample_request(prompt, sampling("sd3"), facts=facts)
    whole = prompt_of(checkpoints["sd3"], facts)
    with pytest.raises(InvalidRequestError, match=r"max_sequence_length must be 256 for sd3.*max_prompt_embed_length=333"):
        sample_request(whole, sampling("sd3", max_sequence_length=512), facts=facts)
    with pytest.raises(InvalidRequestError, match="algorithm must be one of flow_grpo for sd3, got 'dance_grpo'"):
        sample_request(whole, sampling("sd3"), facts=facts, algorithm="dance_grpo")


def test_guidance_runs_where_verl_omni_runs_it(engines: dict[str, Engine], checkpoints: dict[str, Path]) -> None:
    for family, changes, runs in (
        ("qwen_image", {}, True),
        ("qwen_image", {"negative": None}, False),
        ("qwen_image", {"true_cfg_scale": 1.0}, False),
        ("sd3", {}, True),
        ("sd3", {"negative": None}, True),
        ("sd3", {"guidance_scale": 1.0}, False),
        ("sd3", {"guidance_scale": None}, False),
    ):
        _, rollout, output = run(engines[family], checkpoints[family], **changes)
        assert (rollout.sampling.guidance_rule != "none") == runs, (family, changes)
        # verl-omni names the fields in any case, and has None in them.
        assert (output["extra_fields"]["negative_prompt_embeds"] is not None) == runs


def test_prompts_are_cut_at_the_length_that_the_configuration_says(
    engines: dict[str, Engine], checkpoints: dict[str, Path]
) -> None:
    _, _, output = run(engines["qwen_image"], checkpoints["qwen_image"], max_sequence_length=2)
    assert len(output["extra_fields"]["prompt_embeds"]) == 2
    _, _, whole = run(engines["qwen_image"], checkpoints["qwen_image"])
    assert torch.allclose(output["extra_fields"]["prompt_embeds"], whole["extra_fields"]["prompt_embeds"][:2], atol=1e-5)


def test_validation_gives_a_picture_without_log_probs(engines: dict[str, Engine], checkpoints: dict[str, Path]) -> None:
    engine, folder = engines["qwen_image"], checkpoints["qwen_image"]
    prompt = prompt_of(folder, engine.facts)
    request = sample_request(prompt, sampling("qwen_image_validation"), facts=engine.facts)
    (rollout,) = engine.rollout(group_request(request.params, [request.noise_seed]))
    output = output_fields(rollout, request, global_steps=None)
    assert output["log_probs"] is None and request.window == range(7) and output["extra_fields"]["flowroll_noise_seed"] == 42
    # No step is stochastic: the picture is that of the diffusers pipeline.
    (plain,) = engine.generate(
        prompt_token_ids=request.params.prompt_token_ids,
        negative_prompt_token_ids=request.params.negative_prompt_token_ids,
        **{name: getattr(request.params, name) for name in ("height", "width", "num_inference_steps", "true_cfg_scale")},
        seed=42,
    )
    assert torch.equal((plain.image * 255).round().to(torch.uint8)[:, 0], output["diffusion_output"])


def test_latents_are_returned_in_the_place_of_a_picture(engines: dict[str, Engine], checkpoints: dict[str, Path]) -> None:
    _, rollout, output = run(engines["qwen_image"], checkpoints["qwen_image"], output_type="latent")
    assert output["diffusion_output"].dtype == torch.float32 and torch.equal(output["diffusion_output"], rollout.latents)
    _, _, both = run(engines["sd3"], checkpoints["sd3"], output_type="both")
    assert both["diffusion_output"].dtype == torch.uint8 and both["extra_fields"]["latents_clean"].shape == (16, 8, 8)


@pytest.mark.parametrize(("algorithm", "has_timesteps"), [("diffusion_nft", True), ("dpo", False)])
def test_forward_process_algorithms_get_clean_latents(
    engines: dict[str, Engine], checkpoints: dict[str, Path], algorithm: str, has_timesteps: bool
) -> None:
    engine = engines["qwen_image"]
    _, rollout, output = run(engine, checkpoints["qwen_image"], algorithm=algorithm, logprobs=False)
    extra = output["extra_fields"]
    assert output["log_probs"] is None and "all_latents" not in extra and rollout.sde_step_indices == ()
    assert extra["latents_clean"].shape == (16, 64) and ("train_timesteps" in extra) == has_timesteps
    if has_timesteps:
        assert torch.equal(extra["train_timesteps"], torch.tensor(rollout.sampling.timesteps))


def test_a_row_without_its_fields_is_refused(engines: dict[str, Engine], checkpoints: dict[str, Path]) -> None:
    _, _, output = run(engines["qwen_image"], checkpoints["qwen_image"])
    row = {**output["extra_fields"], "log_probs": output["log_probs"]}
    with pytest.raises(InvalidRequestError, match="rollout_log_probs must be in the row"):
        rollout_of(output["extra_fields"])
    with pytest.raises(InvalidRequestError, match="flowroll_rollout must be the text that flowroll wrote"):
        rollout_of({**row, "flowroll_rollout": "{}"})
