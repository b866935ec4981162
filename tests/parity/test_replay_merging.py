"""Pairs of a micro-batch that share forwards: the log-probs of each alone, or of an ordinary batch with its error measured."""

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import peft
import pytest
import torch
from tests.guiding import guided, in_words_of
from tests.pairs import DTYPES, FAMILY_WITH_DTYPE, dealt
from tests.parity.test_replay import REQUEST
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper, apply_activation_checkpointing

from flowroll import Rollout, replay
from flowroll.engine import Engine
from flowroll.families import FAMILIES

EngineOf = Callable[[str, str], Engine]
PipelineOf = Callable[[str, str], Any]

SHARING = tuple(name for name, family in FAMILIES.items() if family.shares_forwards)
SHARING_WITH_DTYPE = [row for row in FAMILY_WITH_DTYPE if row[0] in SHARING]


def recorded(rollouts: list[Rollout]) -> Tensor:
    return torch.stack([rollout.log_probs for rollout in rollouts if rollout.log_probs is not None])


@contextmanager
def counted(transformer: nn.Module) -> Iterator[list[int]]:
    """How many forwards the model is given in the block."""
    calls: list[int] = []
    hook = transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        yield calls
    finally:
        hook.remove()


def gradients_of(transformer: nn.Module, rollouts: list[Rollout], **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The log-probs, and the gradient of their weighted sum over the micro-batches."""
    transformer.zero_grad()
    found = torch.zeros(len(rollouts), 3)
    for batch in replay.micro_batches(transformer, rollouts, micro_batch=4, **options):
        found[batch.samples, batch.steps] = batch.log_probs.detach().cpu()
        signs = torch.tensor([(-1.0) ** sample for sample in batch.samples], device=batch.log_probs.device)
        (batch.log_probs * signs).mean().mul(batch.weight).backward()
    grads = {name: weight.grad.clone() for name, weight in transformer.named_parameters() if weight.grad is not None}
    return found, grads


def distance(some: dict[str, Tensor], others: dict[str, Tensor]) -> float:
    """The norm of the difference of two gradients over that of the second."""
    assert some.keys() == others.keys()
    off = torch.stack([(some[name] - other).double().norm() for name, other in others.items()]).norm()
    return float(off / torch.stack([other.double().norm() for other in others.values()]).norm())


@dealt(name=tuple(FAMILIES), dtype=DTYPES, cfg=(True, False, False))
def test_pairs_that_share_forwards_have_the_recorded_log_probs(
    engine_of: EngineOf, pipeline_of: PipelineOf, name: str, dtype: str, cfg: bool
) -> None:
    engine, transformer = engine_of(name, dtype), copy.deepcopy(pipeline_of(name, dtype).transformer)
    request = guided(name, 3.0 if cfg else 0.0, **REQUEST)
    rollouts = [
        *engine.rollout(**request, num_outputs_per_prompt=2),
        # Of another size, with other dynamics; the last step needs the one before it.
        *engine.rollout(**{**request, "height": 96}, rollout_steps=({}, {"dynamics": "cps"}, {"dynamics": "dpmpp2m"})),
    ]
    with counted(transformer) as many:
        alone, near = gradients_of(transformer, rollouts)
    # Once to find out how forwards are shared, and once as ever after.
    for _ in range(2):
        with counted(transformer) as calls:
            exact, gradient = gradients_of(transformer, rollouts, merge="exact")
        assert torch.equal(exact, recorded(rollouts)) and torch.equal(exact, alone)
    # Measured: 3e-7 in float32 and 3e-3 in bfloat16.
    assert distance(gradient, near) < (1e-5 if dtype == "float32" else 2e-2)
    assert len(calls) < len(many) if name in SHARING else len(calls) == len(many)
    with torch.no_grad():
        scores = replay.score(transformer, rollouts, steps=[2, 0], micro_batch=6, merge="exact")
        others = replay.score(transformer, rollouts, steps=[2, 0])
    for one, other in zip(scores.means + scores.velocities, others.means + others.velocities, strict=True):
        assert torch.equal(one, other)


def test_pairs_with_prompts_of_several_lengths_share_forwards(engine_of: EngineOf, pipeline_of: PipelineOf) -> None:
    """Both branches of all four samples, one forward a step."""
    engine, transformer = engine_of("qwen_image", "float32"), copy.deepcopy(pipeline_of("qwen_image", "float32").transformer)
    prompts = ("a fox", "a red fox", "a red fox in deep snow", "a red fox in deep snow at the end of a long day")
    rollouts = [
        rollout
        for prompt in prompts
        for rollout in engine.rollout(**{**guided("qwen_image", 3.0, **REQUEST), "prompt": prompt})
    ]
    assert len({len(rollout.denoising_env.pos_cond_kwargs["encoder_hidden_states"]) for rollout in rollouts}) > 2
    alone, near = gradients_of(transformer, rollouts)
    gradients_of(transformer, rollouts, merge="exact")
    with counted(transformer) as calls:
        exact, gradient = gradients_of(transformer, rollouts, merge="exact")
    assert torch.equal(exact, recorded(rollouts)) and torch.equal(exact, alone)
    assert distance(gradient, near) < 1e-5
    assert len(calls) == 3


@pytest.mark.parametrize(("name", "dtype"), SHARING_WITH_DTYPE)
def test_checkpointed_blocks_are_computed_again_in_the_same_way(
    engine_of: EngineOf, pipeline_of: PipelineOf, name: str, dtype: str
) -> None:
    group = engine_of(name, dtype).rollout(**in_words_of(name, REQUEST), num_outputs_per_prompt=2)
    transformer = copy.deepcopy(pipeline_of(name, dtype).transformer)
    plain, gradient = gradients_of(transformer, group, merge="exact")
    transformer.train()
    transformer.enable_gradient_checkpointing()
    with counted(transformer) as calls:
        checkpointed, again = gradients_of(transformer, group, merge="exact")
    assert torch.equal(checkpointed, recorded(group)) and torch.equal(plain, recorded(group))
    assert again.keys() == gradient.keys() and all(torch.equal(again[key], one) for key, one in gradient.items())
    with counted(transformer) as once:
        gradients_of(transformer, group, merge="exact")
    assert len(once) <= len(calls) and transformer.is_gradient_checkpointing
    with counted(transformer) as alone:
        gradients_of(transformer, group)
    assert len(once) < len(alone)


def test_blocks_that_a_stranger_checkpoints_run_alone(engine_of: EngineOf, pipeline_of: PipelineOf) -> None:
    """What is computed again in the backward, without our knowledge, would be an ordinary batch."""
    group = engine_of("sd3", "float32").rollout(**REQUEST, num_outputs_per_prompt=2)
    transformer = copy.deepcopy(pipeline_of("sd3", "float32").transformer)
    blocks = set(transformer.transformer_blocks)
    apply_activation_checkpointing(transformer, check_fn=blocks.__contains__)
    assert any(isinstance(module, CheckpointWrapper) for module in transformer.modules())
    exact, gradient = gradients_of(transformer, group, merge="exact")
    alone, expected = gradients_of(transformer, group)
    assert torch.equal(exact, recorded(group)) and torch.equal(exact, alone)
    assert all(torch.equal(gradient[key], one) for key, one in expected.items())


@dealt(name=SHARING, dtype=DTYPES)
def test_a_lora_of_pefts_is_trained_through_shared_forwards(
    engine_of: EngineOf, pipeline_of: PipelineOf, name: str, dtype: str
) -> None:
    group = engine_of(name, dtype).rollout(**REQUEST, num_outputs_per_prompt=2)
    adapter = peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights="gaussian", target_modules=["to_k", "to_q", "to_v"])
    policy = peft.get_peft_model(copy.deepcopy(pipeline_of(name, dtype).transformer), adapter)
    exact, gradient = gradients_of(policy, group, merge="exact")
    alone, expected = gradients_of(policy, group)
    assert torch.equal(exact, recorded(group)) and torch.equal(exact, alone)
    assert gradient and all("lora_" in key for key in gradient)
    assert distance(gradient, expected) < (1e-5 if dtype == "float32" else 2e-2)


@dealt(name=tuple(FAMILIES), dtype=DTYPES)
def test_ordinary_batches_say_how_far_off_they_are(
    engine_of: EngineOf, pipeline_of: PipelineOf, name: str, dtype: str, recwarn: pytest.WarningsRecorder
) -> None:
    # Two tokens: products of so few rows have other bits in a batch.
    group = engine_of(name, dtype).rollout(**{**REQUEST, "height": 32, "width": 32}, num_outputs_per_prompt=2)
    transformer = copy.deepcopy(pipeline_of(name, dtype).transformer)
    _, gradient = gradients_of(transformer, group)
    with counted(transformer) as calls:
        first, *rest = list(replay.micro_batches(transformer, group, micro_batch=4, merge="fast"))
    said = re.search(
        r'merge="fast" runs several samples in one batch.* up to (\S+) off', str([str(one.message) for one in recwarn])
    )
    if name not in SHARING:
        assert said is None and first.ratio_error == 0
        return
    assert said is not None and float(said[1]) == pytest.approx(first.ratio_error, rel=1e-2)
    assert len(calls) < 6 and len(rest) == 1
    torch.testing.assert_close(first.log_probs.detach(), first.old_log_probs, rtol=0, atol=1e-3 if dtype == "float32" else 0.05)
    # The samples' gradients have opposite signs, so that a row in the place of another, or one without its own, is far off.
    with pytest.warns(UserWarning, match="up to"):
        _, near = gradients_of(transformer, group, merge="fast")
    assert distance(near, gradient) < (1e-4 if dtype == "float32" else 0.05)


def test_ordinary_batches_have_other_bits(engine_of: EngineOf, pipeline_of: PipelineOf) -> None:
    """What "exact" is for. Should this fail one day, an ordinary batch needs no care."""
    errors = []
    for name in SHARING:
        group = engine_of(name, "float32").rollout(**{**REQUEST, "height": 32, "width": 32}, num_outputs_per_prompt=2)
        with pytest.warns(UserWarning, match="up to"), torch.no_grad():
            (batch,) = replay.micro_batches(pipeline_of(name, "float32").transformer, group, micro_batch=6, merge="fast")
        errors.append(batch.ratio_error)
    assert max(errors) > 0
