"""The plug-in for Flow-Factory where that is not installed: against recorded schedulers and signatures of it."""

import importlib.util
import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.serving.servers import serving

from flowroll import Client, replay
from flowroll.engine import Engine
from flowroll.engine.service import EngineService
from flowroll.errors import InvalidRequestError, MissingExtraError
from flowroll.integrations import flow_factory as plugin
from flowroll.integrations.flow_factory.run import dynamics_fields, prompt_fields
from flowroll.types import SamplingParams

RECORDED: dict[str, Any] = json.loads((Path(__file__).parents[1] / "data" / "flow_factory.json").read_text())


def scheduler_of(row: dict[str, Any]) -> Any:
    return SimpleNamespace(
        dynamics_type=row["dynamics_type"],
        noise_level=row["noise_level"],
        is_eval=row["is_eval"],
        sigmas=torch.tensor(row["sigmas"]),
        timesteps=torch.tensor(row["timesteps"]),
        get_noise_levels=lambda: torch.tensor(row["noise_levels"]),
    )


@pytest.mark.parametrize(
    "row", RECORDED["schedulers"], ids=lambda row: f"{row['dynamics_type']}-{row['is_eval']}-{row['noise_level']}"
)
def test_each_step_has_the_noise_level_that_the_scheduler_gives_it(row: dict[str, Any]) -> None:
    scheduler = scheduler_of(row)
    made = dynamics_fields(scheduler)
    params = SamplingParams(prompt="", sigmas=tuple(row["sigmas"]), **made)
    if row["is_eval"] or row["dynamics_type"] == "ODE":
        assert params.rollout_sde_type == "ode" and params.rollout_noise_level == 0
        return
    assert list(params.rollout_noise_levels or ()) == row["levels_in_the_loop"]
    stochastic = [index for index, level in enumerate(params.rollout_noise_levels or ()) if level]
    assert stochastic == row["current_sde_steps"]


def test_unknown_dynamics_are_refused() -> None:
    scheduler = scheduler_of({**RECORDED["schedulers"][0], "dynamics_type": "UniPC"})
    with pytest.raises(InvalidRequestError, match="dynamics_type must be one of Flow-SDE, Dance-SDE, CPS, ODE"):
        dynamics_fields(scheduler)


def test_padding_is_taken_off_and_the_scale_follows_the_negative_prompt() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    embeds = torch.arange(12.0).reshape(2, 3, 2)
    values = {"prompt_embeds": embeds, "prompt_embeds_mask": mask, "negative_prompt_embeds": None, "guidance_scale": 3}
    made = prompt_fields(values, 0, torch.float32)
    assert torch.equal(made["prompt_embeds"], embeds[0, :2]) and made["guidance_scale"] == 0.0
    # The preprocessed ones are float32, and the engine takes those of its own dtype alone.
    assert prompt_fields(values, 0, torch.bfloat16)["prompt_embeds"].dtype == torch.bfloat16
    guided = prompt_fields({**values, "negative_prompt_embeds": embeds, "negative_prompt_embeds_mask": mask}, 1, torch.float32)
    assert guided["negative_prompt_embeds"].shape == (3, 2) and guided["guidance_scale"] == 3.0
    # FLUX.1 is given the scale, with or without a negative prompt.
    assert prompt_fields({**values, "img_ids": None}, 1, torch.float32)["guidance_scale"] == 3.0


def test_without_flow_factory_the_error_says_where_it_is() -> None:
    if importlib.util.find_spec("flow_factory") is not None:
        pytest.skip("Flow-Factory is installed")
    with pytest.raises(MissingExtraError, match=r"X-GenGroup/Flow-Factory and run: pip install 'flowroll\[flow-factory\]'"):
        _ = plugin.SD3_5Adapter


def test_the_mixin_stands_in_for_methods_with_the_recorded_arguments() -> None:
    for method, arguments in RECORDED["base"].items():
        ours = getattr(plugin.FlowrollMixin, method, None)
        if ours is None:
            continue
        taken = inspect.signature(inspect.unwrap(ours)).parameters
        assert "values" in taken or [name for name in taken if name != "self"] == arguments, method


class Loop:
    """Samples as Flow-Factory's SD3 adapter does, in the order of its calls; its forward must not be reached."""

    transformer_names = ("transformer",)

    def __init__(self, pipeline: Any, row: dict[str, Any]) -> None:
        self.pipeline, self.scheduler = pipeline, scheduler_of(row)
        self.transformer_names = ["transformer"]
        self.target_module_map: dict[str, Any] = {"transformer": None}
        self.model_args = SimpleNamespace(finetune_type="full", extra_kwargs={"flowroll_log_probs": "engine"})
        self.accelerator = SimpleNamespace(is_main_process=True, wait_for_everyone=lambda: None)
        self.device, self.mode = torch.device("cpu"), "rollout"

    def inference(
        self, prompt_embeds: Any, pooled_prompt_embeds: Any, height: int = 64, width: int = 64, guidance_scale: float = 1.0
    ) -> list[Any]:
        generator = torch.Generator().manual_seed(1)
        latents = self.cast_latents(torch.randn(len(prompt_embeds), 16, 8, 8, generator=generator))
        kept, log_probs = [latents], []
        for step, timestep in enumerate(self.scheduler.timesteps):
            output = self.forward(
                t=timestep,
                latents=latents,
                prompt_embeds=prompt_embeds,
                pooled_prompt_embeds=pooled_prompt_embeds,
                guidance_scale=guidance_scale,
                compute_log_prob=bool(self.scheduler.get_noise_levels()[step]),
            )
            latents = self.cast_latents(output.next_latents, default_dtype=torch.bfloat16)
            kept.append(latents)
            log_probs.append(output.log_prob)
        images = self.decode_latents(latents=latents, output_type="pt")
        return [
            SimpleNamespace(
                all_latents=torch.stack([one[index] for one in kept]),
                log_probs=[None if one is None else one[index] for one in log_probs],
                image=images[index],
                extra_kwargs={},
            )
            for index in range(len(prompt_embeds))
        ]

    def forward(
        self,
        t: Any,
        latents: Any,
        prompt_embeds: Any,
        pooled_prompt_embeds: Any,
        guidance_scale: float,
        compute_log_prob: bool = True,
    ) -> Any:
        raise AssertionError("the trainer's transformer must not run in sampling")

    def decode_latents(self, latents: Any, output_type: str = "pil") -> Any:
        raise AssertionError("the trainer's VAE must not run in sampling")

    def cast_latents(self, latents: Any, default_dtype: Any = None) -> Any:
        return latents.to(default_dtype or latents.dtype)

    def train(self, mode: bool = True) -> None:
        self.mode = "train"

    @contextmanager
    def use_named_parameters(self, name: str) -> Iterator[None]:
        yield

    def use_ema_parameters(self) -> Any:
        return nullcontext()

    def get_component(self, name: str) -> Any:
        return self.pipeline.transformer

    def get_state_dict(self, module: Any) -> dict[str, torch.Tensor]:
        return dict(module.state_dict())


def test_sampling_runs_on_flowroll_and_its_trajectory_replays(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:

    from diffusers import StableDiffusion3Pipeline

    # All that the plug-in takes from Flow-Factory while it samples.
    fake = SimpleNamespace(SDESchedulerOutput=lambda **made: SimpleNamespace(**{"log_prob": None, **made}))
    real = importlib.import_module
    monkeypatch.setattr(importlib, "import_module", lambda name: fake if name == "flow_factory.scheduler" else real(name))
    pipeline = StableDiffusion3Pipeline.from_pretrained(checkpoints["sd3"])
    row = next(one for one in RECORDED["schedulers"] if one["current_sde_steps"] == [1, 4])
    with Engine(checkpoints["sd3"], device="cpu", dtype="float32") as engine:
        adapter = plugin.on_flowroll(Loop, lambda _: plugin.EngineBackend(engine))(pipeline, row)
        assert list(inspect.signature(adapter.inference).parameters)[:2] == ["prompt_embeds", "pooled_prompt_embeds"]
        embeds, _, pooled, _ = pipeline.encode_prompt(["a cat", "a dog"], None, None, do_classifier_free_guidance=False)
        rollouts: list[Any] = []
        own = adapter.flowroll_backend.rollouts

        def noted(requests: Any) -> Any:
            wanted = [
                type(one)(**{**{name: getattr(one, name) for name in one.__slots__}, "rollout_return_denoising_env": True})
                for one in requests
            ]
            rollouts[:] = own(wanted)
            return rollouts

        monkeypatch.setattr(adapter.flowroll_backend, "rollouts", noted)
        torch.manual_seed(0)
        samples = adapter.inference(embeds, pooled)
        assert [index for index, one in enumerate(samples[0].log_probs) if one is not None] == [1, 4]
        assert samples[0].image.shape == (3, 64, 64)
        for sample, rollout in zip(samples, rollouts, strict=True):
            assert torch.equal(sample.all_latents, rollout.dit_trajectory.latents.float())
        assert samples[0].extra_kwargs["flowroll_noise_seed"] == rollouts[0].seed != rollouts[1].seed
        replay.align_weights(pipeline.transformer)
        with torch.no_grad():
            again = replay.log_prob(pipeline.transformer, rollouts, steps=[1, 4])
        for index, sample in enumerate(samples):
            assert torch.equal(again[index], torch.stack([sample.log_probs[step] for step in (1, 4)]))
        # Nothing is sent again until the weights may have changed.
        version = samples[0].extra_kwargs["flowroll_weight_version"]
        assert adapter.inference(embeds, pooled)[0].extra_kwargs["flowroll_weight_version"] == version
        with adapter.use_named_parameters("old"):
            old = adapter.inference(embeds, pooled)[0].extra_kwargs["flowroll_weight_version"]
        assert old != version
        # The weights of "old" were sent last, so those in training are sent again.
        version = adapter.inference(embeds, pooled)[0].extra_kwargs["flowroll_weight_version"]
        assert version not in (samples[0].extra_kwargs["flowroll_weight_version"], old)
        adapter.train()
        adapter.mode = "rollout"
        assert adapter.inference(embeds, pooled)[0].extra_kwargs["flowroll_weight_version"] not in (version, old)
        # In training itself, weights are sent every time.
        adapter.mode = "train"
        adapter.train()
        seen = {adapter.inference(embeds, pooled)[0].extra_kwargs["flowroll_weight_version"] for _ in range(2)}
        assert len(seen) == 2


def test_log_probs_are_the_trainers_own_unless_it_wants_the_engines(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its forward is asked once for each stochastic step, with the engine's states."""

    from diffusers import StableDiffusion3Pipeline

    class Scored(Loop):
        def forward(
            self,
            t: Any,
            latents: Any,
            prompt_embeds: Any,
            pooled_prompt_embeds: Any,
            guidance_scale: float,
            compute_log_prob: bool = True,
            next_latents: Any = None,
            return_kwargs: Any = (),
        ) -> Any:
            asked.append((latents, next_latents, list(return_kwargs)))
            return SimpleNamespace(log_prob=torch.tensor([-0.5, -0.25]))

    asked: list[Any] = []
    fake = SimpleNamespace(SDESchedulerOutput=lambda **made: SimpleNamespace(**{"log_prob": None, **made}))
    real = importlib.import_module
    monkeypatch.setattr(importlib, "import_module", lambda name: fake if name == "flow_factory.scheduler" else real(name))
    pipeline = StableDiffusion3Pipeline.from_pretrained(checkpoints["sd3"])
    row = next(one for one in RECORDED["schedulers"] if one["current_sde_steps"] == [1, 4])
    with Engine(checkpoints["sd3"], device="cpu", dtype="float32") as engine:
        adapter = plugin.on_flowroll(Scored, lambda _: plugin.EngineBackend(engine))(pipeline, row)
        adapter.model_args.extra_kwargs = {}
        embeds, _, pooled, _ = pipeline.encode_prompt(["a cat", "a dog"], None, None, do_classifier_free_guidance=False)
        samples = adapter.inference(embeds, pooled)
        for sample, own in zip(samples, (-0.5, -0.25), strict=True):
            assert [None if one is None else one.item() for one in sample.log_probs] == [None, own, None, None, own, None]
        for step, (latents, next_latents, wanted) in zip((1, 4), asked, strict=True):
            assert wanted == ["log_prob"] and latents.dtype == next_latents.dtype == torch.float32
            for index, sample in enumerate(samples):
                assert torch.equal(latents[index], sample.all_latents[step])
                assert torch.equal(next_latents[index], sample.all_latents[step + 1])
        adapter.model_args.extra_kwargs = {"flowroll_log_probs": "none"}
        with pytest.raises(InvalidRequestError, match='flowroll_log_probs must be "trainer" or "engine"'):
            adapter.inference(embeds, pooled)


def test_weights_beside_the_transformers_are_refused(checkpoints: dict[str, Path]) -> None:
    adapter = plugin.on_flowroll(Loop, lambda _: SimpleNamespace())(SimpleNamespace(), RECORDED["schedulers"][0])
    adapter.target_module_map["text_encoder"] = None
    with pytest.raises(InvalidRequestError, match="target_components must be the transformer alone for flowroll"):
        adapter.inference([], [])


def test_a_server_gives_the_samples_of_an_engine_in_the_process(checkpoints: dict[str, Path]) -> None:
    row = next(one for one in RECORDED["schedulers"] if one["current_sde_steps"] == [1, 4])
    with Engine(checkpoints["sd3"], device="cpu", dtype="float32") as engine:
        facts = engine.facts
        width, tokens, pooled = (facts.spec.widths[name] for name in ("text", "text_tokens", "pooled"))
        generator = torch.Generator().manual_seed(2)
        requests = [
            SamplingParams(
                height=64,
                width=64,
                sigmas=tuple(row["sigmas"]),
                **dynamics_fields(scheduler_of(row)),
                rollout_return_dit_trajectory=True,
                prompt_embeds=torch.randn(tokens, width, generator=generator),
                pooled_prompt_embeds=torch.randn(pooled, generator=generator),
                guidance_scale=0.0,
                latents=torch.randn(16, 8, 8, generator=generator),
                seed=seed,
            )
            for seed in (1, 2)
        ]
        with EngineService(engine, max_queue=4) as service, serving(service) as http, Client(str(http.base_url)) as client:
            over_http = plugin.ClientBackend(client)
            for one, other in zip(over_http.rollouts(requests), plugin.EngineBackend(engine).rollouts(requests), strict=True):
                assert one.seed == other.seed and torch.equal(one.image, other.image)
                assert torch.equal(one.dit_trajectory.latents, other.dit_trajectory.latents)
            before = engine.weight_version
            over_http.update_weights(iter(engine._model.transformer.state_dict().items()))
            assert engine.weight_version != before
            over_http.copy_policy("flow-factory-old")
            assert [one.name for one in engine.policies()] == ["flow-factory-old"]
