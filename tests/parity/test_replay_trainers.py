"""What trainers do to a transformer: peft's own LoRA on it, autocast around it."""

import copy
import re
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from tests.guiding import guided
from torch import Tensor, nn

from flowroll import Rollout, replay
from flowroll.engine import Engine
from flowroll.errors import InvalidRequestError
from flowroll.families import FAMILIES

NAMES = list(FAMILIES)
REQUEST = {
    "prompt": "a red apple on a wooden table",
    "height": 64,
    "width": 64,
    "num_inference_steps": 2,
    "seed": 5,
    "return_denoising_env": True,
    "return_dit_trajectory": True,
}
# The names that diffusers' training scripts give; alpha over rank is not 1, so that the scale is part of it.
LORA = {"r": 4, "lora_alpha": 8, "init_lora_weights": "gaussian", "target_modules": ["to_k", "to_q", "to_v", "to_out.0"]}


def wrapped_by_peft(transformer: nn.Module) -> nn.Module:
    """As trainers do that keep to peft: another module around the model."""
    return peft.get_peft_model(transformer, peft.LoraConfig(**LORA))


def with_diffusers_adapter(transformer: nn.Module) -> nn.Module:
    """As diffusers' training scripts do: the model stays, its linears are replaced."""
    transformer.requires_grad_(False)
    transformer.add_adapter(peft.LoraConfig(**LORA))
    return transformer


def recorded(rollouts: list[Rollout]) -> Tensor:
    return torch.stack([rollout.log_probs for rollout in rollouts if rollout.log_probs is not None])


@pytest.mark.parametrize("adapt", [wrapped_by_peft, with_diffusers_adapter])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_a_lora_of_pefts_starts_at_ratio_one_is_alone_trained_and_leaves_ratio_one_with_its_first_step(
    engine_of: Callable[[str, str], Engine],
    pipeline_of: Callable[[str, str], Any],
    name: str,
    dtype: str,
    adapt: Callable[[nn.Module], nn.Module],
) -> None:
    group = engine_of(name, dtype).rollout(**guided(name, 3.0, **REQUEST, num_outputs_per_prompt=2))
    policy = adapt(copy.deepcopy(pipeline_of(name, dtype).transformer))
    trained = {key: weight for key, weight in policy.named_parameters() if weight.requires_grad}
    assert trained and all("lora_" in key for key in trained)
    assert all(not weight.any() for key, weight in trained.items() if "lora_B" in key)
    log_probs = replay.log_prob(policy, group)
    assert torch.equal(log_probs.detach().cpu(), recorded(group))
    optimizer = torch.optim.SGD(trained.values(), lr=10.0)
    (log_probs * torch.tensor([[1.0], [-1.0]])).sum().backward()
    assert all(weight.grad is None for key, weight in policy.named_parameters() if key not in trained)
    assert all(weight.grad is not None and weight.grad.any() for key, weight in trained.items() if "lora_B" in key)
    optimizer.step()
    with torch.no_grad():
        ratio = replay.ratio(replay.log_prob(policy, group).cpu(), recorded(group))
    assert ratio.isfinite().all() and (ratio != 1).all()


@pytest.mark.parametrize("name", NAMES)
def test_autocast_is_refused_where_it_would_run_other_kernels(
    engine_of: Callable[[str, str], Engine], pipeline_of: Callable[[str, str], Any], device: str, name: str
) -> None:
    group = engine_of(name, "float32").rollout(**REQUEST)
    transformer = pipeline_of(name, "float32").transformer
    waiting = replay.micro_batches(transformer, group)
    with torch.autocast(device, dtype=torch.bfloat16):
        for score in (replay.log_prob, replay.score, lambda *given: next(replay.micro_batches(*given))):
            with pytest.raises(
                InvalidRequestError, match=rf"to torch\.bfloat16 on {device}; put replay in .*enabled=False"
            ) as caught:
                score(transformer, group)
            assert caught.value.field == "autocast"
        with pytest.raises(InvalidRequestError, match="autocast must be off"):
            next(waiting)
        with torch.autocast(device, enabled=False):
            assert torch.equal(replay.log_prob(transformer, group).detach().cpu(), recorded(group))
        with pytest.raises(InvalidRequestError, match="autocast must be refuse or measure, got 'on'"):
            replay.log_prob(transformer, group, autocast="on")
        with pytest.warns(UserWarning, match=r"torch\.autocast to torch\.bfloat16 is on .* up to .* off") as warned:
            on_purpose = replay.log_prob(transformer, group, autocast="measure")
        (cause,) = replay.audit(transformer, group).causes
    assert not torch.equal(on_purpose.detach().cpu(), recorded(group))
    assert cause.kind == "dtype" and "torch.autocast to torch.bfloat16 is on" in cause.message
    measured = re.search(r"up to (\S+) off", " ".join(str(warning.message) for warning in warned))
    first = on_purpose[0, 0].detach().cpu() - recorded(group)[0, 0]
    assert measured is not None and float(measured[1]) == pytest.approx(abs(first.exp().item() - 1), rel=1e-2)


@pytest.mark.parametrize("name", NAMES)
def test_autocast_that_a_wrapper_turns_on_is_noticed(
    engine_of: Callable[[str, str], Engine], pipeline_of: Callable[[str, str], Any], device: str, name: str
) -> None:
    """As accelerate's `prepare` wraps a model: from outside autocast is off."""
    group = engine_of(name, "float32").rollout(**REQUEST)
    transformer = copy.deepcopy(pipeline_of(name, "float32").transformer)
    transformer.forward = torch.autocast(device, dtype=torch.bfloat16)(transformer.forward)
    assert group[0].dit_trajectory is not None
    latents = [group[0].dit_trajectory.latents[0]]
    words = r"whose forward turns on torch\.autocast to torch\.bfloat16; .*unwrap"
    with pytest.raises(InvalidRequestError, match=words):
        replay.log_prob(transformer, group)
    with pytest.raises(InvalidRequestError, match=words):
        replay.velocities(transformer, group[0], latents, steps=[0])
    with pytest.warns(UserWarning, match="up to .* off"):
        replay.log_prob(transformer, group, autocast="measure")
    replay.velocities(transformer, group[0], latents, steps=[0], autocast="measure")
    (cause,) = replay.audit(transformer, group).causes
    assert cause.kind == "dtype" and "torch.autocast to torch.bfloat16 is on" in cause.message


@pytest.mark.parametrize("name", NAMES)
def test_float32_weights_run_a_rollout_of_bfloat16_under_autocast_if_asked_to(
    engine_of: Callable[[str, str], Engine], pipeline_of: Callable[[str, str], Any], device: str, name: str
) -> None:
    group = engine_of(name, "bfloat16").rollout(**REQUEST)
    transformer = pipeline_of(name, "bfloat16").transformer
    masters = copy.deepcopy(transformer).float()
    with torch.autocast(device, dtype=torch.bfloat16), pytest.warns(UserWarning, match="up to .* off"):
        log_probs = replay.log_prob(masters, group, autocast="measure").detach().cpu()
    # Near, since the linears are the same; in FLUX.1, whose norms have no weights, even equal.
    torch.testing.assert_close(log_probs, recorded(group), rtol=0, atol=0.5 if name == "flux" else 0.05)
