import asyncio
import importlib.util
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.integrations.verl_omni.cases import RECORDED, arguments_of, prompt_of, sampling

from flowroll import replay
from flowroll.errors import (
    AsleepError,
    FlowrollError,
    InvalidRequestError,
    MissingExtraError,
    WeightsMismatchError,
    WeightsRejectedError,
)
from flowroll.integrations.verl_omni import register, rollout_of, updates
from flowroll.integrations.verl_omni.options import ServerOptions, server_options
from flowroll.integrations.verl_omni.server import RolloutServer
from flowroll.integrations.verl_omni.weights import pack, send_weights

Generate = Callable[..., Coroutine[Any, Any, Any]]


def options_of(folder: Path, **changes: Any) -> ServerOptions:
    return replace(ServerOptions(model=str(folder), dtype="float32", device="cpu", gather_s=0.05), **changes)


@asynccontextmanager
async def serving(folder: Path, **changes: Any) -> AsyncIterator[tuple[RolloutServer, Generate]]:
    """A server, and its `generate` for a prompt of text."""
    receive = changes.pop("receive_weights", None)
    server = RolloutServer(options_of(folder, **changes), receive)
    await server.launch_server()

    async def generate(request_id: str = "a", text: str = "a red cat", **values: Any) -> Any:
        prompt = prompt_of(folder, server._engine.facts, text)
        return await server.generate(
            **arguments_of(prompt), request_id=request_id, sampling_params=sampling("qwen_image", **values)
        )

    try:
        yield server, generate
    finally:
        await server.shutdown()


def rows(outputs: list[Any]) -> list[Any]:
    return [rollout_of({**output.extra_fields, "log_probs": output.log_probs}) for output in outputs]


def transformer_of(folder: Path) -> torch.nn.Module:
    from diffusers import QwenImageTransformer2DModel

    made = QwenImageTransformer2DModel.from_pretrained(folder / "transformer").eval()
    replay.align_weights(made)
    return made


def assert_ratio_is_one(transformer: torch.nn.Module, outputs: list[Any], steps: list[int]) -> None:
    with torch.no_grad():
        again = replay.log_prob(transformer, rows(outputs), steps=steps)
    assert torch.equal(again, torch.stack([output.log_probs for output in outputs]))


async def send(server: RolloutServer, tensors: dict[str, torch.Tensor], **values: Any) -> str:
    update = await server.begin_weights(**values)
    for name, tensor in tensors.items():
        await server.put_weights(update, [pack(name, tensor)])
    return await server.commit_weights(update)


def moved(transformer: torch.nn.Module) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in transformer.parameters():
            weight.add_(0.01 * torch.randn(weight.shape, generator=generator))
    # As verl-omni names them.
    return {f"transformer.{name}": tensor.clone() for name, tensor in transformer.state_dict().items()}


def test_the_server_has_the_methods_that_verl_omni_calls() -> None:
    import inspect

    for method, arguments in RECORDED["server_methods"].items():
        if method in ("run_server", "run_headless"):  # vLLM's own start
            continue
        ours = list(inspect.signature(getattr(RolloutServer, method)).parameters)[1:]
        assert ours[: len(arguments)] == arguments, method


def test_samples_of_one_prompt_share_a_request_and_have_the_bits_of_samples_alone(qwen_checkpoint: Path) -> None:
    window = {"sde_window_range": [1, 3]}

    async def together() -> tuple[list[Any], int]:
        async with serving(qwen_checkpoint) as (server, generate):
            outputs = await asyncio.gather(*[generate(seed=seed, **window) for seed in (1, 2, 3, 2)])
            return list(outputs), server._gatherer.groups_sent

    async def alone() -> list[Any]:
        async with serving(qwen_checkpoint, gather_s=0.0) as (_, generate):
            return [await generate(seed=seed, **window) for seed in (1, 2, 3, 2)]

    gathered, sent = asyncio.run(together())
    assert sent == 1
    for one, other in zip(gathered, asyncio.run(alone()), strict=True):
        assert torch.equal(one.diffusion_output, other.diffusion_output) and torch.equal(one.log_probs, other.log_probs)
        assert torch.equal(one.extra_fields["all_latents"], other.extra_fields["all_latents"])
    assert torch.equal(gathered[1].diffusion_output, gathered[3].diffusion_output)


def test_other_prompts_and_other_windows_are_other_requests(qwen_checkpoint: Path) -> None:
    async def main() -> tuple[int, int]:
        async with serving(qwen_checkpoint, max_group=2) as (server, generate):
            one = {"sde_window_range": [0, 2]}
            calls = [generate(seed=seed, **one) for seed in (1, 2, 3)]  # a group of two, and one of one
            calls += [generate(seed=4, sde_window_range=[1, 3]), generate(seed=5, text="a dog", **one)]
            outputs = await asyncio.gather(*calls)
            return server._gatherer.groups_sent, len(outputs)

    assert asyncio.run(main()) == (4, 5)


def test_a_refused_request_ends_alone(qwen_checkpoint: Path) -> None:
    async def main() -> list[Any]:
        async with serving(qwen_checkpoint) as (_, generate):
            return await asyncio.gather(generate(seed=1), generate(seed=2, height=63), return_exceptions=True)

    good, bad = asyncio.run(main())
    assert good.stop_reason == "completed" and isinstance(bad, InvalidRequestError) and bad.field == "height"


def test_weights_come_back_whole_or_not_at_all(qwen_checkpoint: Path) -> None:
    window, steps = {"sde_window_range": [0, 2]}, [0, 1]

    async def main() -> None:
        transformer = transformer_of(qwen_checkpoint)
        async with serving(qwen_checkpoint) as (server, generate):
            await server.set_global_steps(3)
            before = await generate(seed=1, **window)
            assert before.extra_fields["global_steps"] == 3
            assert_ratio_is_one(transformer, [before], steps)
            tensors = moved(transformer)
            lacking = dict(list(tensors.items())[1:])
            with pytest.raises(WeightsRejectedError, match="must be all of the transformer's"):
                await send(server, lacking, global_steps=9)
            with pytest.raises(WeightsRejectedError):
                await send(server, {**tensors, "transformer.more": torch.zeros(1)}, global_steps=9)
            same = await generate(seed=1, **window)
            assert torch.equal(same.diffusion_output, before.diffusion_output) and same.extra_fields["global_steps"] == 3
            version = await send(server, tensors, global_steps=4)
            after = list(await asyncio.gather(*[generate(seed=seed, **window) for seed in (1, 2)]))
            assert [one.extra_fields["global_steps"] for one in after] == [4, 4]
            assert [one.extra_fields["flowroll_weight_version"] for one in after] == [version, version]
            assert not torch.equal(after[0].diffusion_output, before.diffusion_output)
            assert_ratio_is_one(transformer, after, steps)

    asyncio.run(main())


class Handle:
    """A handle of Ray's around a server of this process."""

    def __init__(self, server: RolloutServer) -> None:
        self._server, self.buckets = server, []

    def __getattr__(self, name: str) -> Any:
        def remote(*args: Any, **values: Any) -> Any:
            if name == "put_weights":
                self.buckets.append(sum(packed.data.size for packed in args[1]))
            return getattr(self._server, name)(*args, **values)

        return SimpleNamespace(remote=remote)


def test_a_trainer_sends_its_weights_in_buckets_and_gives_all_of_them_whatever_happens(qwen_checkpoint: Path) -> None:
    async def main() -> None:
        transformer = transformer_of(qwen_checkpoint)
        tensors = moved(transformer)
        async with serving(qwen_checkpoint) as (server, generate):
            handle = Handle(server)
            await send_weights(handle, iter(tensors.items()), max_bytes=100_000, global_steps=2)
            assert len(handle.buckets) > 3 and max(handle.buckets[:-1]) <= max(100_000, max(t.nbytes for t in tensors.values()))
            assert sum(handle.buckets) == sum(tensor.nbytes for tensor in tensors.values())
            sent = await generate(seed=1, sde_window_range=[0, 2])
            assert sent.extra_fields["global_steps"] == 2
            assert_ratio_is_one(transformer, [sent], [0, 1])

            async def given() -> AsyncIterator[tuple[str, torch.Tensor]]:
                for name, tensor in tensors.items():
                    taken.append(name)
                    yield name, tensor if len(taken) != 2 else tensor.to(torch.complex64)

            # A rank beside the first one gathers, and sends nothing; a fault is raised after the last tensor.
            taken: list[str] = []
            await send_weights(None, given(), max_bytes=1, global_steps=3)
            assert taken == list(tensors)
            taken = []
            with pytest.raises(WeightsRejectedError, match="got complex64"):
                await send_weights(handle, given(), max_bytes=1, global_steps=3)
            assert taken == list(tensors) and (await generate(seed=1)).extra_fields["global_steps"] == 2
            await server.sleep()
            taken = []
            with pytest.raises(AsleepError):
                await send_weights(handle, given(), max_bytes=1, global_steps=3)
            assert taken == list(tensors)
            await server.wake_up()
            assert (await generate(seed=1)).extra_fields["global_steps"] == 2

    asyncio.run(main())


def test_an_update_that_began_later_ends_the_one_before(qwen_checkpoint: Path) -> None:
    async def main() -> None:
        async with serving(qwen_checkpoint) as (server, _):
            first = await server.begin_weights()
            second = await server.begin_weights()
            for call in (server.put_weights(first, []), server.commit_weights(first)):
                with pytest.raises(WeightsRejectedError, match="of the update that began last"):
                    await call
            await server.drop_weights(second)
            with pytest.raises(WeightsRejectedError, match="of the update that began last"):
                await server.commit_weights(second)

    asyncio.run(main())


def test_an_adapter_runs_unmerged_with_the_bits_of_the_trainers(qwen_checkpoint: Path) -> None:
    peft = pytest.importorskip("peft")
    window, steps = {"sde_window_range": [0, 2]}, [0, 1]

    async def main() -> None:
        transformer = transformer_of(qwen_checkpoint)
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_k"], init_lora_weights="gaussian")
        transformer.add_adapter(config)
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for name, weight in transformer.named_parameters():
                if "lora_B" in name:
                    weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))
        factors = peft.get_peft_model_state_dict(transformer)
        tensors = {f"transformer.{name}": tensor.detach() for name, tensor in factors.items()}
        given = transformer.peft_config["default"].to_dict()
        async with serving(qwen_checkpoint) as (server, generate):
            before = await generate(seed=1, **window)
            await server.collective_rpc("set_pending_lora_peft_config", kwargs={"peft_config": given})
            await send(server, tensors, global_steps=1)
            after = await generate(seed=1, **window)
            # Not by log-probs, which are those of the noise whatever the weights are.
            assert not torch.equal(after.diffusion_output, before.diffusion_output) and after.extra_fields["global_steps"] == 1
            assert_ratio_is_one(transformer, [after], steps)
            # The weights under the adapter leave it in place; whole weights of a policy do not.
            base = {f"transformer.{name}": tensor for name, tensor in transformer_of(qwen_checkpoint).state_dict().items()}
            await send(server, base, peft_config=given, base_sync_done=False)
            assert torch.equal((await generate(seed=1, **window)).diffusion_output, after.diffusion_output)
            await send(server, base, global_steps=2)
            assert torch.equal((await generate(seed=1, **window)).diffusion_output, before.diffusion_output)
            with pytest.raises(WeightsRejectedError, match="must be a factor of an adapter"):
                await send(server, base, peft_config=given)

    asyncio.run(main())


def test_samples_are_of_the_old_policy_where_the_trainer_says_so(qwen_checkpoint: Path) -> None:
    """Two adapters as verl-omni's trainer holds them; it sends the one that `rollout_adapter` names, under the same names."""
    peft = pytest.importorskip("peft")
    window, steps = {"sde_window_range": [0, 2]}, [0, 1]

    async def main() -> None:
        transformer = transformer_of(qwen_checkpoint)
        for name in ("default", "old"):
            transformer.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), adapter_name=name)
        config = transformer.peft_config["default"].to_dict()
        base = {f"transformer.{name}": tensor for name, tensor in transformer_of(qwen_checkpoint).state_dict().items()}
        held = {name: f"transformer.{name}" for name in peft.get_peft_model_state_dict(transformer, adapter_name="old")}
        old = peft.get_peft_model_state_dict(transformer, adapter_name="old")
        async with serving(qwen_checkpoint, adapter="old") as (server, generate):
            with pytest.raises(WeightsMismatchError, match="with the adapter old, got none so far"):
                await generate(seed=1, **window)
            await send(server, base, peft_config=config, base_sync_done=False)
            with pytest.raises(WeightsMismatchError, match="with the adapter old, got none so far"):
                await generate(seed=1, **window)
            await send(server, {held[name]: one.detach() for name, one in old.items()}, peft_config=config, global_steps=1)
            made = await generate(seed=1, **window)
            assert (made.extra_fields["flowroll_adapter"], made.extra_fields["global_steps"]) == ("old", 1)
            assert rows([made])[0].sampling.lora.name == "old"
            transformer.set_adapter("old")
            assert_ratio_is_one(transformer, [made], steps)
            transformer.set_adapter("default")
            with torch.no_grad():
                other = replay.log_prob(transformer, rows([made]), steps=steps)
            assert not torch.equal(other[0], made.log_probs)
            # Whole weights are the policy in training, whatever they are named.
            with pytest.raises(WeightsRejectedError, match="must be the factors of the adapter old"):
                await send(server, base, global_steps=2)
            assert torch.equal((await generate(seed=1, **window)).diffusion_output, made.diffusion_output)

    asyncio.run(main())


def test_a_trainer_that_falls_silent_past_ray_is_not_waited_for(qwen_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(updates, "_MOST_WAIT_S", 0.2)
    tensors, speaks = moved(transformer_of(qwen_checkpoint)), threading.Event()

    def receive(**_: Any) -> list[tuple[str, torch.Tensor]]:
        assert speaks.wait(60)
        return list(tensors.items())

    async def main() -> None:
        async with serving(qwen_checkpoint, receive_weights=receive) as (server, generate):
            values = {"peft_config": None, "base_sync_done": True}
            before = await generate(seed=1)
            with pytest.raises(WeightsRejectedError, match=r"must arrive within 0\.2 s"):
                await server.collective_rpc("update_weights_from_ipc", kwargs=values)
            speaks.set()
            assert torch.equal((await generate(seed=1)).diffusion_output, before.diffusion_output)
            await server.collective_rpc("update_weights_from_ipc", kwargs=values)
            assert not torch.equal((await generate(seed=1)).diffusion_output, before.diffusion_output)

    asyncio.run(main())


def test_weights_that_come_past_ray_are_taken(qwen_checkpoint: Path) -> None:
    transformer = transformer_of(qwen_checkpoint)
    tensors = moved(transformer)
    seen: list[dict[str, Any]] = []

    def receive(**place: Any) -> list[tuple[str, torch.Tensor]]:
        seen.append(place)
        return list(tensors.items())

    async def main() -> None:
        async with serving(qwen_checkpoint, receive_weights=receive) as (server, generate):
            values = {"peft_config": None, "base_sync_done": True, "use_shm": True, "zmq_update_id": "step-4-seq-0"}
            await server.collective_rpc("update_weights_from_ipc", kwargs=values)
            made = await generate(seed=1, sde_window_range=[0, 2])
            assert_ratio_is_one(transformer, [made], [0, 1])
            # The id of the update is all that names its step there.
            assert made.extra_fields["global_steps"] == 4
            with pytest.raises(InvalidRequestError, match="method must be one of set_pending_lora_peft_config"):
                await server.collective_rpc("load_weights")
        assert seen == [{"use_shm": True, "zmq_update_id": "step-4-seq-0"}]

    asyncio.run(main())


def test_an_abort_lets_samples_end_and_holds_those_that_come(qwen_checkpoint: Path) -> None:
    async def main() -> None:
        async with serving(qwen_checkpoint) as (server, generate):
            running = asyncio.create_task(generate("r", seed=1))
            await asyncio.sleep(0.01)
            assert await server.abort_all_requests() == {"aborted_count": 0, "request_ids": [], "drained": True}
            assert (await running).stop_reason == "completed"
            late = asyncio.create_task(generate("l", seed=2))
            await asyncio.sleep(0.2)
            assert not late.done()
            # A replica that leaves the balancer sends its samples elsewhere.
            await server.abort_all_requests(reject_request=True)
            refused = await generate("x", seed=3)
            assert refused.stop_reason == "aborted" and refused.diffusion_output.shape == (0,)
            assert refused.diffusion_output.dtype == torch.uint8 and refused.log_probs is None
            await server.resume_generation()
            assert (await late).stop_reason in ("completed", "aborted")
            assert (await generate("y", seed=4)).stop_reason == "completed"

    asyncio.run(main())


def test_what_does_not_end_in_time_is_aborted(qwen_checkpoint: Path) -> None:
    async def main() -> None:
        async with serving(qwen_checkpoint, abort_drain_s=0.1) as (server, generate):
            running = [asyncio.create_task(generate(f"r{seed}", seed=seed, num_inference_steps=900)) for seed in (1, 2)]
            await asyncio.sleep(0.2)
            report = await server.abort_all_requests()
            assert report == {"aborted_count": 2, "request_ids": ["r1", "r2"], "drained": False}
            assert [one.stop_reason for one in await asyncio.gather(*running)] == ["aborted", "aborted"]
            await server.resume_generation()
            assert (await generate(seed=1)).stop_reason == "completed"
            await server.wait_for_requests_to_drain()

    asyncio.run(main())


def test_one_sample_of_a_group_is_aborted_alone(qwen_checkpoint: Path) -> None:
    async def main() -> None:
        async with serving(qwen_checkpoint) as (server, generate):
            window = {"sde_window_range": [0, 2]}
            running = [
                asyncio.create_task(generate(f"r{seed}", seed=seed, num_inference_steps=60, **window)) for seed in (1, 2)
            ]
            await asyncio.sleep(0.1)
            assert (await server.abort_request("r1"))["aborted"]
            assert not (await server.abort_request("r3"))["aborted"]
            assert [one.stop_reason for one in await asyncio.gather(*running)] == ["aborted", "completed"]

    asyncio.run(main())


def test_sleep_releases_and_waking_gives_the_same_bits(qwen_checkpoint: Path) -> None:
    async def main() -> None:
        async with serving(qwen_checkpoint) as (server, generate):
            before = await generate(seed=1)
            await server.sleep()
            with pytest.raises(AsleepError):
                await generate(seed=1)
            await server.wake_up(tags=["kv_cache"])
            with pytest.raises(AsleepError):
                await generate(seed=1)
            await server.wake_up(tags=["weights"])
            assert torch.equal((await generate(seed=1)).diffusion_output, before.diffusion_output)
        async with serving(qwen_checkpoint, mode="standalone") as (server, generate):
            await server.sleep()
            assert (await generate(seed=1)).stop_reason == "completed"

    asyncio.run(main())


@pytest.mark.parametrize("name", ["image_data", "video_data", "audio_data", "mm_processor_kwargs"])
def test_other_inputs_than_text_are_refused(name: str) -> None:
    async def main() -> None:
        server = RolloutServer(ServerOptions(model="none"))
        server._engine = server._gatherer = object()  # type: ignore[assignment]
        with pytest.raises(InvalidRequestError, match=f"{name} must be left out"):
            await server.generate([1], {}, "a", **{name: [1]})

    asyncio.run(main())


def test_registering_without_verl_says_what_to_install() -> None:
    if importlib.util.find_spec("verl") is not None:
        pytest.skip("verl is installed")
    with pytest.raises(MissingExtraError, match=r"pip install 'flowroll\[verl\]'"):
        register()


def test_a_server_that_was_not_launched_says_so() -> None:
    with pytest.raises(FlowrollError, match="call launch_server first"):
        asyncio.run(RolloutServer(ServerOptions(model="none")).generate([1], {}, "a"))


CONFIG = {"tensor_model_parallel_size": 2, "dtype": "bfloat16", "free_cache_engine": True}


def test_options_come_from_verls_configuration() -> None:
    own = {"flowroll": {"gather_ms": 2, "device": "cpu", "layout": "sp2", "max_group": 8}}
    made = server_options({**CONFIG, "engine_kwargs": own}, {"path": "shapes-sd3", "algorithm": "mix_grpo"}, mode="hybrid")
    assert (made.gather_s, made.layout.name, made.max_group, made.algorithm) == (0.002, "sp2", 8, "mix_grpo")
    assert (made.model, made.dtype, made.abort_drain_s, made.sleeps) == ("shapes-sd3", "bfloat16", 120.0, True)
    assert server_options(CONFIG, {"path": "m"}, mode="hybrid").layout.name == "tp2"
    assert not server_options(CONFIG, {"path": "m"}, mode="standalone").sleeps


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engine_kwargs": {"flowroll": {"gather": 1}}}, "engine_kwargs.flowroll must hold some of variant"),
        ({"engine_kwargs": {"flowroll": {"gather_ms": -1}}}, "gather_ms must be a number from 0"),
        ({"engine_kwargs": {"flowroll": {"max_group": 0}}}, "max_group must be an integer >= 1"),
        ({"engine_kwargs": {"flowroll": {"layout": "sp4"}}}, "layout must be a product of 2 ranks"),
        ({"data_parallel_size": 2}, "rollout.data_parallel_size must be 1"),
        ({"pipeline_model_parallel_size": 2}, "rollout.pipeline_model_parallel_size must be 1"),
        ({"quantization": "fp8"}, "rollout.quantization must be left out"),
    ],
)
def test_options_that_flowroll_does_not_have_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        server_options({**CONFIG, **changes}, {"path": "m"}, mode="hybrid")
    with pytest.raises(InvalidRequestError, match="must be the folder of a checkpoint"):
        server_options(CONFIG, {}, mode="hybrid")


def test_the_old_policy_is_an_adapter_that_the_trainer_holds() -> None:
    config = {**CONFIG, "rollout_adapter": "old"}
    model = {"path": "m", "policy_state_adapters": ["default", "old"], "lora_rank": 64}
    assert server_options(config, model, mode="hybrid").adapter == "old"
    assert server_options(CONFIG, model, mode="hybrid").adapter == "default"
    for changes, message in (
        ({"policy_state_adapters": ["default"]}, "rollout_adapter must be one of model.policy_state_adapters, got 'old'"),
        ({"lora_rank": 0}, "rollout_adapter must be default for a model without LoRA, got 'old'; set model.lora_rank"),
    ):
        with pytest.raises(InvalidRequestError, match=message):
            server_options(config, {**model, **changes}, mode="hybrid")
    with pytest.raises(InvalidRequestError, match="rollout_adapter must be one of default, old, got 'new'"):
        server_options({**CONFIG, "rollout_adapter": "new"}, model, mode="hybrid")
    # Of the weights under an adapter verl-omni's FSDP2 engine sends those of the blocks alone.
    with pytest.raises(InvalidRequestError, match="load_format must be safetensors for a model with LoRA, got 'dummy'"):
        server_options({**CONFIG, "load_format": "dummy"}, model, mode="hybrid")
    assert server_options({**CONFIG, "load_format": "dummy"}, {"path": "m"}, mode="hybrid").adapter == "default"


def test_the_drain_of_an_abort_is_verl_omnis_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VERL_OMNI_ABORT_DRAIN_TIMEOUT_S", "7.5")
    assert server_options(CONFIG, {"path": "m"}, mode="hybrid").abort_drain_s == 7.5
    monkeypatch.setenv("VERL_OMNI_ABORT_DRAIN_TIMEOUT_S", "soon")
    with pytest.raises(InvalidRequestError, match="VERL_OMNI_ABORT_DRAIN_TIMEOUT_S must be a number"):
        server_options(CONFIG, {"path": "m"}, mode="hybrid")
