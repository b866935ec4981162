"""alone == pipeline and ratio == 1 for what no table lists: drawn checkpoints, schedules, sizes, prompts, steps and scales.

And mixed == alone for drawn mixtures of requests that share prompts, forwards and kept texts, with new weights in between.
A draw is the same in every run, by the name of its family and its number.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from tests.guiding import UNITS, image_file, in_words_of
from tests.processors import load_without_torchvision
from tests.proofs.cases import DTYPES, DYNAMICS, EVERYTHING, FAMILIES
from tests.proofs.doors import WAIT_S, assert_same_samples, one_by_one
from tests.proofs.test_pipeline import pipeline_output
from tests.weights import WEIGHTS

from flowroll import Rollout, SamplingParams, replay
from flowroll.engine import BatchLimits, Engine
from flowroll.engine.loading import modules_of
from flowroll.exact import Merged
from flowroll.testing import make_checkpoint

DRAWS = 8
# The kinds of checkpoints of a family: what makes one, its variant if the folder does not say it, and what its pipeline has to
# be told. "plain" ones take no negative prompt.
KINDS: Mapping[str, tuple[dict[str, Any], ...]] = {
    "flux": (
        {},
        {"made": {"guidance_embeds": False}, "variant": "schnell", "pipeline": {"max_sequence_length": 256}},
    ),
    "flux2": ({}, {"made": {"is_distilled": True}, "plain": True}, {"made": {"guidance_embeds": True}, "plain": True}),
    "qwen_image_edit": ({}, {"made": {"takes_several": False}, "images": 1}, {"made": {"zero_cond_t": True}}),
    "sd3": ({}, {"absent": {"text_encoder_3": None, "tokenizer_3": None}}, {"made": {"qk_norm": None}}),
}
WORDS = ("a", "red", "wine", "glass", "beside", "(two)", "cats,", "été", "猫", "🐈", "4K", "“quoted”", "x" * 60, "\n", "<b>")
SCALES = (0, 0.5, 1, 1.01, 3, 7.5)
NOT_READ = ("README.md", "model.ckpt", "{}/pytorch_model.bin", "{}/other.safetensors.txt", "{}/config.json.orig")


def drawn_scheduler(draw: random.Random) -> dict[str, Any]:
    return {
        "use_dynamic_shifting": draw.random() < 0.6,
        "shift": draw.choice((0.5, 1, 1.0, 3, draw.uniform(0.3, 6))),
        "base_shift": draw.uniform(0.4, 0.9),
        "max_shift": draw.uniform(0.9, 1.5),
        "max_image_seq_len": draw.choice((2048, 4096, 8192)),
        "shift_terminal": draw.choice((None, 0.02, draw.uniform(0.01, 0.3))),
        "time_shift_type": draw.choice(("exponential", "linear")),
    }


def drawn_folder(draw: random.Random, family: str, kind: Mapping[str, Any], tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """A checkpoint folder, and what diffusers has to be told to load it."""
    absent = kind.get("absent", {})
    made = make_checkpoint(family, tmp_path / "made", seed=draw.randrange(100), **kind.get("made", {}))
    stored = getattr(torch, draw.choice(("float32", "float16", "bfloat16")))
    variant, size = draw.choice((None, "fp16", "ema")), draw.choice(("10GB", "400KB", "90KB"))
    pipeline = DiffusionPipeline.from_pretrained(made, dtype=stored, **absent)
    folder = tmp_path / "model"
    pipeline.save_pretrained(folder, variant=variant, max_shard_size=size)
    for name in NOT_READ:
        (folder / name.format(draw.choice(tuple(modules_of(pipeline))))).write_text("This is not read.")
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **drawn_scheduler(draw)}))
    return folder, {"variant": variant, **absent}


def drawn_text(draw: random.Random) -> str:
    return " ".join(draw.choices(WORDS, k=draw.choice((0, 1, 7, 40, 300))))


def drawn_request(draw: random.Random, family: str, kind: Mapping[str, Any]) -> dict[str, Any]:
    unit = UNITS.get(family, 16)
    request: dict[str, Any] = {
        "prompt": drawn_text(draw),
        "seed": draw.randrange(2**32),
        "height": unit * draw.randint(1, 320 // unit),
        "width": unit * draw.randint(1, 320 // unit),
        # A schedule that ends at a terminal sigma has more than one step.
        "num_inference_steps": draw.randint(2, 9),
        "guidance_scale": draw.choice(SCALES),
    }
    if family == "qwen_image_edit":
        sizes = [(draw.randint(20, 300), draw.randint(20, 300)) for _ in range(kind.get("images", draw.randint(1, 3)))]
        request["images"] = tuple(image_file(*size, seed=number) for number, size in enumerate(sizes))
    if kind.get("plain"):
        return request
    return in_words_of(family, {"negative_prompt": drawn_text(draw), **request})


@pytest.mark.proof
@pytest.mark.parametrize("number", range(DRAWS))
@pytest.mark.parametrize("family", FAMILIES)
def test_a_drawn_request_has_the_bits_of_its_pipeline_and_replays_exactly(family: str, number: int, tmp_path: Path) -> None:
    load_without_torchvision()
    draw = random.Random(f"{family}/{number}")
    kinds = KINDS.get(family, ({},))
    kind, dtype = kinds[number % len(kinds)], draw.choice(DTYPES)
    folder, parts = drawn_folder(draw, family, kind, tmp_path)
    request = drawn_request(draw, family, kind)
    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=getattr(torch, dtype), **parts)
    pipeline.set_progress_bar_config(disable=True)
    for module in modules_of(pipeline).values():
        replay.align_weights(module)
    expected = pipeline_output(pipeline, "latent", {**request, **kind.get("pipeline", {})})
    options = {"sde_type": draw.choice(DYNAMICS), "noise_level": draw.uniform(0.1, 1.0)}
    with Engine(folder, device="cpu", dtype=dtype, variant=kind.get("variant")) as engine:
        (plain,) = engine.generate(**request)
        (ode,) = engine.rollout(**request, sde_type="ode", return_dit_trajectory=True)
        (rollout,) = engine.rollout(**request, **options, **EVERYTHING)
    assert ode.dit_trajectory is not None
    assert plain.sampling.sigmas == tuple(pipeline.scheduler.sigmas.tolist())
    for latents in (plain.latents, ode.dit_trajectory.latents[-1]):
        assert latents.dtype == expected.dtype and torch.equal(latents, expected)
    assert torch.equal(plain.image, ode.image)
    assert torch.equal(replay.log_prob(pipeline.transformer, [rollout]).detach()[0], rollout.log_probs)


# So many samples, which start together, and so many steps that a shared forward is known and runs without the model's code.
GROUP: Mapping[str, Any] = {"num_outputs_per_prompt": 3, "num_inference_steps": 6}
ROUNDS, REQUESTS = 2, 7


def drawn_company(draw: random.Random, family: str, prompts: list[str]) -> dict[str, Any]:
    """A rollout of a few sizes, prompts, scales and numbers of steps, so that others are likely to share its forwards."""
    steps = draw.choice((3, 6))
    kept = {name: draw.random() < 0.7 for name in EVERYTHING}
    scale = draw.choice((1, 4.0, 4.0, 2.5))
    options: dict[str, Any] = {"prompt": draw.choice(prompts), "guidance_scale": scale, "seed": draw.randrange(2**31)}
    options |= {"height": 64, "width": draw.choice((64, 64, 96)), "num_outputs_per_prompt": draw.choice((1, 2, 3))}
    options["num_inference_steps"] = steps
    options |= {"sde_type": draw.choice(DYNAMICS), "noise_level": draw.uniform(0.1, 1.0), **kept}
    if draw.random() < 0.4:
        options["negative_prompt"] = draw.choice(prompts)
    if draw.random() < 0.3 and options["sde_type"] == "sde":
        options["sde_step_indices"] = tuple(sorted(draw.sample(range(steps), draw.randint(1, steps))))
    if draw.random() < 0.3:
        options["return_fields"] = tuple(draw.sample(("x0", "velocity", "mean", "std", "noise"), 2))
    if draw.random() < 0.3:
        options["decode_step_indices"] = (draw.randrange(steps),)
    return in_words_of(family, options)


def num_programs(engine: Engine) -> int:
    """How many kinds of shared forwards run without the model's code."""
    strategy = engine._model.strategy
    assert isinstance(strategy, Merged)
    known = (one.programs for one in strategy._shared._known.values() if one.programs is not None)
    return sum(candidate.is_confirmed for programs in known for candidate in programs._candidates.values())


# A short one is part of every run.
MIXTURES = [
    pytest.param(family, number, marks=() if (family, number) == ("qwen_image", 0) else pytest.mark.proof)
    for family in FAMILIES
    for number in range(4)
]


@pytest.mark.parametrize(("family", "number"), MIXTURES)
def test_drawn_mixtures_keep_their_bits_through_new_weights(checkpoints: dict[str, Path], family: str, number: int) -> None:
    """Requests are sent while others run, and new weights come before all have ended: each has the bits of its version."""
    draw = random.Random(f"mixture/{family}/{number}")
    prompts, dtype = [drawn_text(draw)[:200] for _ in range(2)], draw.choice(DTYPES)
    weights = load_file(checkpoints[family] / "transformer" / WEIGHTS)
    limits = BatchLimits(max_batch_samples=1, max_running_samples=1)
    folder = checkpoints[family]
    with (
        Engine(folder, dtype=dtype, device="cpu") as engine,
        Engine(folder, dtype=dtype, device="cpu", batching=limits) as alone,
    ):
        group = {
            **drawn_company(random.Random(7), family, prompts),
            **GROUP,
            "sde_step_indices": None,
            "decode_step_indices": None,
        }
        assert_same_samples(engine.rollout(**group), one_by_one(alone, group))
        if engine._model.family.shares_forwards:
            assert num_programs(engine)
        waiting: list[tuple[dict[str, Any], Any]] = []

        def compare(version: str) -> None:
            for request, future in list(waiting):
                found: list[Rollout] = future.result(WAIT_S)
                if found[0].weight_version == version:
                    assert_same_samples(found, one_by_one(alone, request))
                    waiting.remove((request, future))

        for _ in range(ROUNDS if number else 1):
            sent = [drawn_company(draw, family, prompts) for _ in range(REQUESTS if number else 3)] + [
                {**group, "seed": draw.randrange(2**31)}
            ]
            waiting += [(one, engine.submit(engine.plan(SamplingParams(**one)), "rollout")) for one in sent]
            version, factor = engine.weight_version, draw.uniform(0.9, 1.1)
            new = {name: one * factor if one.is_floating_point() else one for name, one in weights.items()}
            engine.update_weights_from_tensors(new, mode=draw.choice(("drain", "abort")))
            compare(version)
            alone.update_weights_from_tensors(new)
        compare(engine.weight_version)
        assert not waiting
