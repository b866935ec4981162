"""verl-omni's own agent loop and training adapters, unmodified, on rollouts of flowroll; skipped where it is not installed."""

import asyncio
import importlib
import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tests.integrations.verl_omni.cases import arguments_of, prompt_of, sampling
from tests.integrations.verl_omni.test_mapping import transformer_of
from tests.integrations.verl_omni.test_server import options_of

from flowroll import replay
from flowroll.integrations.verl_omni import rollout_of
from flowroll.integrations.verl_omni.server import RolloutServer
from flowroll.integrations.verl_omni.transfer import update_handle, zmq_handle

_ADAPTERS = {
    "qwen_image": ("verl_omni.pipelines.qwen_image_flow_grpo.diffusers_training_adapter", "QwenImage"),
    "sd3": ("verl_omni.pipelines.sd3_flow_grpo.diffusers_training_adapter", "StableDiffusion3FlowGRPO"),
}


def batch_of(loop: Any, outputs: list[Any], length: int) -> Any:
    """The batch that verl-omni's agent loop makes of what a server returned."""
    from transformers import BatchEncoding

    class Tokenizer:
        def pad(self, *_: Any, max_length: int, **__: Any) -> Any:
            ids = torch.zeros(1, max_length, dtype=torch.int64)
            return BatchEncoding({"input_ids": ids, "attention_mask": ids})

    worker = SimpleNamespace(
        max_prompt_embed_length=length,
        tokenizer=Tokenizer(),
        rollout_config=SimpleNamespace(prompt_length=8),
        reward_loop_worker_handles=None,
    )
    kind = loop.DiffusionAgentLoopWorker

    async def score(output: Any, **_: Any) -> None:
        output.reward_score = 0.0

    worker._compute_score = score

    async def padded(output: Any) -> Any:
        made = loop.DiffusionAgentLoopOutput(
            prompt_ids=[1],
            response_diffusion_output=output.diffusion_output,
            response_logprobs=output.log_probs,
            metrics={},
            extra_fields=output.extra_fields,
        )
        return await kind._agent_loop_postprocess(worker, made, raw_prompt="a red cat")

    rows = [asyncio.run(padded(output)) for output in outputs]
    return kind._postprocess(worker, rows, input_non_tensor_batch={"uid": np.array(["a"] * len(rows), dtype=object)})


@pytest.mark.parametrize("family", list(_ADAPTERS))
@pytest.mark.parametrize("sde_type", ["sde", "cps", "dance_sde"])
def test_a_batch_of_the_agent_loop_trains_at_a_ratio_of_one(
    verl_omni: Path, checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch, family: str, sde_type: str
) -> None:
    folder = checkpoints[family]
    loop = importlib.import_module("verl_omni.agent_loop.diffusion_agent_loop")
    module, name = _ADAPTERS[family]
    adapter = getattr(importlib.import_module(module), name)
    # verl takes a machine without a device for one with CUDA.
    monkeypatch.setattr(importlib.import_module(module), "get_device_name", lambda: "cpu")
    window = {"sde_window_size": 2, "sde_window_range": [1, 3], "sde_type": sde_type, "noise_level": 0.6}

    async def rollouts() -> list[Any]:
        server = RolloutServer(options_of(folder))
        await server.launch_server()
        prompt = arguments_of(prompt_of(folder, server._engine.facts))
        calls = [
            server.generate(**prompt, request_id=str(seed), sampling_params=sampling(family, seed=seed, **window))
            for seed in (1, 2**62)
        ]
        outputs = list(await asyncio.gather(*calls))
        await server.shutdown()
        return outputs

    outputs = asyncio.run(rollouts())
    assert type(outputs[0]).__name__ == "DiffusionOutput"
    batch = batch_of(loop, outputs, 333 if family == "sd3" else 64)
    assert batch.batch["responses"].shape == (2, 3, 64, 64) and batch.batch["responses"].dtype == torch.uint8
    assert batch.non_tensor_batch["flowroll_seed"].tolist() == [1, 2**62]

    transformer = transformer_of(folder, family)
    given = sampling(family)
    pipeline = SimpleNamespace(**{key: given[key] for key in ("height", "width", "num_inference_steps")})
    pipeline.true_cfg_scale, pipeline.guidance_scale = given["true_cfg_scale"], given["guidance_scale"]
    config = SimpleNamespace(
        pipeline=pipeline, algo=SimpleNamespace(noise_level=0.6, sde_type=sde_type), local_path=str(folder)
    )
    scheduler = adapter.build_scheduler(config)
    rows = batch.batch
    assert torch.isin(rows["all_timesteps"].flatten(), scheduler.timesteps).all()
    for index in range(2):
        row = rows[index : index + 1]
        kept = {
            prefix: row[f"{prefix}prompt_embeds_mask"].bool()[0] for prefix in ("", "negative_")
        }  # as verl-omni's engine takes the padding off
        embeds = {prefix: row[f"{prefix}prompt_embeds"][:, mask] for prefix, mask in kept.items()}
        masks = {prefix: row[f"{prefix}prompt_embeds_mask"][:, mask] for prefix, mask in kept.items()}
        for step in range(2):
            micro_batch = adapter_inputs(row, pipeline)
            inputs = adapter.prepare_model_inputs(
                transformer,
                config,
                row["all_latents"],
                row["all_timesteps"],
                embeds[""],
                masks[""],
                embeds["negative_"],
                masks["negative_"],
                micro_batch,
                step,
            )
            with torch.no_grad():
                log_prob, *_ = adapter.forward_and_sample_previous_step(transformer, scheduler, config, *inputs, row, step)
            ratio = torch.exp(log_prob - row["rollout_log_probs"][:, step])
            assert (ratio - 1).abs().max() < 2e-6
    # The same rows, replayed: the ratio is exactly one.
    names = [name for name in rows.keys() if name != "responses"]  # noqa: SIM118  # a TensorDict is no mapping
    again = [
        rollout_of(
            {
                **{name: rows[name][index] for name in names},
                **{name: values[index] for name, values in batch.non_tensor_batch.items()},
            }
        )
        for index in range(2)
    ]
    with torch.no_grad():
        assert torch.equal(replay.log_prob(transformer, again, steps=[1, 2]), rows["rollout_log_probs"])


def adapter_inputs(row: Any, pipeline: Any) -> Any:
    """The micro-batch of one row, with what verl-omni's engine adds to it."""
    from verl.utils import tensordict_utils

    made = row.clone()
    tensordict_utils.assign_non_tensor(made, height=pipeline.height, width=pipeline.width, vae_scale_factor=8)
    return made


def test_the_address_of_an_update_is_that_of_verl_omni(verl_omni: Path) -> None:
    spec = importlib.util.spec_from_file_location("zmq_utils", verl_omni / "workers/rollout/vllm_rollout/zmq_utils.py")
    assert spec is not None and spec.loader is not None
    theirs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    handle = zmq_handle("01000000", 3, 1)
    for steps in (None, 7):
        update_id = theirs.make_update_zmq_id(steps, 2)
        assert update_handle(handle, update_id) == theirs.make_update_zmq_handle(handle, update_id)
