"""Flow-Factory's own adapters and schedulers, unmodified, on flowroll; skipped by name where it is not installed."""

import inspect
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flowroll.errors import InvalidRequestError
from flowroll.integrations import flow_factory as plugin

NAMES = {"qwen_image": "QwenImageAdapter", "sd3": "SD3_5Adapter", "z_image": "ZImageAdapter"}
BATCH = {"prompt": ["a red cat", "a blue dog"], "negative_prompt": ["blurry", "blurry"]}
SIZE = {"height": 64, "width": 64, "num_inference_steps": 6, "guidance_scale": 3.0}
Make = Callable[..., Any]


def skip_if_it_does_not_run(family: str) -> None:
    """Flow-Factory's Qwen-Image passes an argument that diffusers' transformer no longer has."""
    from diffusers import QwenImageTransformer2DModel

    takes = inspect.signature(QwenImageTransformer2DModel.forward).parameters
    if family == "qwen_image" and "txt_seq_lens" not in takes:
        pytest.skip("Flow-Factory's own forward of Qwen-Image does not run with this diffusers")


@pytest.fixture
def make(checkpoints: dict[str, Path]) -> Any:
    """Makes an adapter of a family, of Flow-Factory's or ours."""
    pytest.importorskip("flow_factory")
    accelerate = pytest.importorskip("accelerate")
    from flow_factory.hparams import GRPOTrainingArguments, ModelArguments, SchedulerArguments

    made = []

    def one(family: str, *, ours: bool = True, finetune: str = "full", **scheduler: Any) -> Any:
        training = GRPOTrainingArguments(
            enable_gradient_checkpointing=False,
            ema_decay=0.5,
            ema_device="cpu",
            ema_update_interval=1,
            resolution=64,
            latent_storage_dtype="fp32",
        )
        model = ModelArguments(
            model_name_or_path=str(checkpoints[family]),
            finetune_type=finetune,
            master_weight_dtype="fp32",
            lora_rank=2,
            target_modules="all" if finetune == "full" else ["to_q", "to_k"],
            # Those of the trainer's own forward are tested with its trainers.
            extra_kwargs={"flowroll_log_probs": "engine"},
        )
        config = SimpleNamespace(
            model_args=model,
            training_args=training,
            eval_args=SimpleNamespace(),
            scheduler_args=SchedulerArguments(
                **{"noise_level": 0.6, "num_sde_steps": None, "sde_steps": list(range(5)), **scheduler}
            ),
            mixed_precision="no",
        )
        kind = getattr(plugin, NAMES[family])
        adapter = (kind if ours else kind.__mro__[2])(config, accelerate.Accelerator(cpu=True))
        adapter.post_init()
        made.append(adapter)
        return adapter

    yield one
    for adapter in made:
        if adapter.__dict__.get("_backend") is not None:
            adapter._backend.engine.close()


def sampled(adapter: Any, seed: int = 3, **values: Any) -> list[Any]:
    """Samples as Flow-Factory's GRPO trainer asks for them."""
    from flow_factory.utils.trajectory_collector import compute_trajectory_indices

    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    steps = SIZE["num_inference_steps"]
    train = adapter.scheduler.train_timesteps
    indices = compute_trajectory_indices(train_timestep_indices=train, num_inference_steps=steps)
    # Copied, since Flow-Factory's Z-Image puts its template around the texts of the caller's own list.
    batch = {name: list(texts) for name, texts in BATCH.items()}
    given = {**batch, **SIZE, "generator": generator, "compute_log_prob": True, "trajectory_indices": indices, **values}
    wanted = inspect.signature(adapter.inference).parameters
    samples: list[Any] = adapter.inference(**{name: value for name, value in given.items() if name in wanted})
    return samples


def moved(adapter: Any, by: float = 0.01) -> None:
    """What an optimizer does to the weights in training."""
    adapter.train()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in adapter.get_trainable_parameters():
            weight.add_(by * torch.randn(weight.shape, generator=generator))
    adapter.rollout()


def ratios(adapter: Any, samples: list[Any]) -> torch.Tensor:
    """The ratios of each sample's stochastic steps, as Flow-Factory's GRPO trainer computes them."""
    from flow_factory.utils.base import filter_kwargs

    found = []
    for sample in samples:
        batch = type(sample).stack([sample])
        for step in adapter.scheduler.train_timesteps:
            latents_at, log_probs_at = batch["latent_index_map"], batch["log_prob_index_map"]
            count = batch["timesteps"].shape[1]
            inputs = {
                **SIZE,
                "t": batch["timesteps"][:, step],
                "t_next": batch["timesteps"][:, step + 1] if step + 1 < count else torch.tensor(0),
                "latents": batch["all_latents"][:, latents_at[step]],
                "next_latents": batch["all_latents"][:, latents_at[step + 1]],
                "compute_log_prob": True,
                "noise_level": adapter.scheduler.noise_level,
                **batch,
                "return_kwargs": ["log_prob", "dt"],
            }
            with torch.no_grad():
                output = adapter.forward(**filter_kwargs(adapter.forward, **inputs))
            found.append(torch.exp(output.log_prob - batch["log_probs"][:, log_probs_at[step]]))
    return torch.cat(found)


@pytest.mark.parametrize("family", list(NAMES))
def test_without_noise_the_samples_are_those_of_the_adapter_itself(make: Make, family: str) -> None:
    skip_if_it_does_not_run(family)
    theirs, ours = make(family, ours=False), make(family)
    for adapter in (theirs, ours):
        adapter.eval()
    values = {"compute_log_prob": False, "trajectory_indices": [0, 2, -1]}
    for one, other in zip(sampled(theirs, **values), sampled(ours, **values), strict=True):
        assert type(one) is type(other) and set(one.keys()) < set(other.keys())
        assert torch.equal(one.timesteps, other.timesteps) and torch.equal(one.latent_index_map, other.latent_index_map)
        assert torch.equal(one.all_latents[0], other.all_latents[0])
        assert torch.allclose(one.all_latents.float(), other.all_latents, atol=1e-4)
        assert one.image.shape == other.image.shape and torch.allclose(one.image, other.image, atol=1e-3)
        assert torch.equal(one.prompt_ids, other.prompt_ids) and one.log_probs is other.log_probs is None


@pytest.mark.parametrize("family", list(NAMES))
@pytest.mark.parametrize("dynamics", ["Flow-SDE", "Dance-SDE", "CPS"])
def test_the_ratio_of_the_trainers_forward_is_one(make: Make, family: str, dynamics: str) -> None:
    skip_if_it_does_not_run(family)
    adapter = make(family, dynamics_type=dynamics, num_sde_steps=2)
    adapter.scheduler.set_seed(11)
    adapter.rollout()
    samples = sampled(adapter)
    steps = sorted(adapter.scheduler.current_sde_steps.tolist())
    assert samples[0].log_probs.shape == (2,)
    assert [index for index, row in enumerate(samples[0].log_prob_index_map.tolist()) if row >= 0] == steps
    assert (ratios(adapter, samples) - 1).abs().max() < 2e-6
    assert len({sample.extra_kwargs["flowroll_noise_seed"] for sample in samples}) == 2
    moved(adapter)
    assert (ratios(adapter, samples) - 1).abs().max() > 1e-4
    again = sampled(adapter)
    assert (ratios(adapter, again) - 1).abs().max() < 2e-6
    assert again[0].extra_kwargs["flowroll_weight_version"] != samples[0].extra_kwargs["flowroll_weight_version"]


def test_the_policy_that_is_active_makes_the_samples(make: Make) -> None:
    adapter = make("qwen_image")
    adapter.add_named_parameters("old")
    adapter.rollout()
    first = sampled(adapter)
    moved(adapter)
    second = sampled(adapter)
    assert not torch.equal(first[0].image, second[0].image)
    with adapter.use_named_parameters("old"):
        old = sampled(adapter)
    assert torch.equal(old[0].image, first[0].image) and torch.equal(old[0].all_latents, first[0].all_latents)
    with adapter.use_ema_parameters():
        assert torch.equal(sampled(adapter)[0].image, first[0].image)
    assert torch.equal(sampled(adapter)[0].image, second[0].image)
    adapter.update_named_parameters("old")
    with adapter.use_named_parameters("old"):
        assert torch.equal(sampled(adapter)[0].image, second[0].image)
        version = sampled(adapter)[0].extra_kwargs["flowroll_weight_version"]
    moved(adapter)
    with adapter.use_named_parameters("old"):  # not sent again
        assert sampled(adapter)[0].extra_kwargs["flowroll_weight_version"] == version


def test_an_adapter_of_peft_runs_unmerged(make: Make) -> None:
    pytest.importorskip("peft")
    adapter = make("sd3", finetune="lora")
    adapter.rollout()
    first = sampled(adapter)
    moved(adapter, by=0.1)
    second = sampled(adapter)
    assert not torch.equal(first[0].image, second[0].image)
    assert (ratios(adapter, second) - 1).abs().max() < 2e-6
    with adapter.use_ref_parameters():
        assert torch.allclose(sampled(adapter)[0].image, first[0].image, atol=1e-5)


def test_callbacks_get_what_they_ask_for(make: Make) -> None:
    adapter = make("qwen_image")
    adapter.rollout()
    samples = sampled(adapter, extra_call_back_kwargs=["noise_pred", "next_latents_mean", "std_dev_t", "dt", "noise_level"])
    extra, steps = samples[0].extra_kwargs, 6
    assert extra["noise_pred"].shape == (steps, *samples[0].all_latents.shape[1:]) == extra["next_latents_mean"].shape
    assert torch.equal(extra["callback_index_map"][:steps], torch.arange(steps))
    sigmas = samples[0].timesteps / 1000
    level = torch.sqrt(sigmas[1:5] / (1 - sigmas[1:5])) * adapter.scheduler.noise_level
    assert torch.allclose(extra["std_dev_t"][1:5].flatten(), level, rtol=1e-5)


def test_what_flowroll_cannot_do_is_refused(make: Make) -> None:
    adapter = make("z_image")
    adapter.rollout()
    with pytest.raises(InvalidRequestError, match="cfg_normalization must be False for flowroll"):
        sampled(adapter, cfg_normalization=True)
    with pytest.raises(AttributeError, match="has no attribute 'Wan2_T2V_Adapter'"):
        _ = plugin.Wan2_T2V_Adapter
    with pytest.raises(InvalidRequestError, match="name must not be 'default'"), adapter._policy("default"):
        pass
