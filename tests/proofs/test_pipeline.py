"""alone == pipeline: plain generation and ODE rollouts have the bits of the diffusers pipeline, run for that one sample."""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import pytest
import torch
from tests.guiding import in_words_of, in_words_of_pipeline, pictured
from tests.pairs import FAMILY_WITH_DTYPE, pairs
from tests.proofs.cases import DTYPES, FAMILIES, Request
from tests.proofs.conftest import EngineOf, PipelineOf
from torch import Tensor

PROMPTS = ("a photo of two wine glasses", "", "x" * 4_000, "一只红色的猫坐在窗台上 🐈 été")
ROWS = pairs(
    family=FAMILIES,
    dtype=DTYPES,
    # The pipelines differ in where guidance begins.
    scale=(0.0, 0.5, 1.0, 4.0),
    size=((64, 64), (96, 64), (80, 144), (256, 256)),
    steps=(2, 5),
    prompt=PROMPTS,
)


def pipeline_output(pipeline: Any, output_type: str, request: Request) -> Tensor:
    """What the pipeline makes of a request, with classifier-free guidance of the same scale; latents are its last step's."""
    arguments = {name: value for name, value in request.items() if name != "seed"}
    has_true_cfg = "true_cfg_scale" in inspect.signature(pipeline.__call__).parameters
    if has_true_cfg and "true_cfg_scale" not in request:
        arguments["true_cfg_scale"] = arguments.pop("guidance_scale")
    generator, last = torch.Generator(pipeline.device).manual_seed(request["seed"]), {}
    found = pipeline(
        **in_words_of_pipeline(pipeline, arguments),
        generator=generator,
        output_type=output_type,
        callback_on_step_end=lambda _, __, ___, tensors: last.update(tensors) or {},
    ).images[0]
    return (last["latents"][0] if output_type == "latent" else found).cpu()


def request_of(row: dict[str, Any]) -> dict[str, Any]:
    height, width = row["size"]
    size = {"height": height, "width": width, "num_inference_steps": row["steps"]}
    guided = {"negative_prompt": "blurry", "guidance_scale": row["scale"]}
    return {"prompt": row["prompt"], "seed": 11, **in_words_of(row["family"], {**guided, **size})}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join(str(value)[:20] for value in row.values()))
def test_latents_are_the_pipelines_bits(row: dict[str, Any], engine_of: EngineOf, pipeline_of: PipelineOf) -> None:
    request = request_of(row)
    engine, pipeline = engine_of(row["family"], row["dtype"]), pipeline_of(row["family"], row["dtype"])
    expected = pipeline_output(pipeline, "latent", request)
    (plain,) = engine.generate(**request)
    (rollout,) = engine.rollout(**request, sde_type="ode", return_dit_trajectory=True)
    assert rollout.dit_trajectory is not None
    for latents in (plain.latents, rollout.dit_trajectory.latents[-1]):
        assert latents.dtype == expected.dtype
        assert torch.equal(latents, expected)
    assert torch.equal(plain.image, rollout.image)


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        pytest.param(*row, marks=[] if row in FAMILY_WITH_DTYPE else [pytest.mark.slow])
        for row in itertools.product(FAMILIES, DTYPES)
    ],
)
def test_pictures_of_default_requests_are_the_pipelines_bits(
    family: str, dtype: str, engine_of: EngineOf, pipeline_of: PipelineOf
) -> None:
    """What a request leaves open is the family's; the pipeline is given the values that the engine says it has."""
    engine = engine_of(family, dtype)
    defaults = engine.info.defaults
    request = pictured(family, {"prompt": PROMPTS[0], "seed": 11, "height": 64, "width": 96})
    names = ("num_inference_steps", "guidance_scale", "negative_prompt", "true_cfg_scale")
    filled = {name: getattr(defaults, name) for name in names if getattr(defaults, name) is not None}
    expected = pipeline_output(pipeline_of(family, dtype), "pt", {**request, **filled}).float()
    assert torch.equal(engine.rollout(**request, rollout=False)[0].image[:, 0], expected)
    assert torch.equal(engine.generate(**request)[0].image[:, 0], expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_bits_agree_at_another_thread_count(family: str, engine_of: EngineOf, pipeline_of: PipelineOf) -> None:
    request = request_of({"family": family, "prompt": PROMPTS[0], "size": (80, 144), "steps": 3, "scale": 4.0})
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        expected = pipeline_output(pipeline_of(family, "float32"), "latent", request)
        assert torch.equal(engine_of(family, "float32").generate(**request)[0].latents, expected)
    finally:
        torch.set_num_threads(threads)
