"""A trainer that holds the weights recomputes every log-prob of a rollout bit for bit, with gradients on."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.guiding import guided, in_words_of
from tests.pairs import DTYPES, FAMILY_WITH_DTYPE, dealt
from tests.parity.adapters import add_adapters
from torch import Tensor, nn

from flowroll import Rollout, replay
from flowroll.engine import Engine
from flowroll.errors import InvalidRequestError
from flowroll.families import FAMILIES
from flowroll.sampling.dynamics import DYNAMICS
from flowroll.wire.codec import decode_rollouts, encode_rollouts
from flowroll.wire.files import load_rollout, save_rollout

NAMES = tuple(FAMILIES)
REQUEST = {
    "prompt": "a red apple on a wooden table",
    "height": 64,
    "width": 64,
    "num_inference_steps": 3,
    "seed": 5,
    "return_denoising_env": True,
    "return_dit_trajectory": True,
}
# The dynamics themselves, windows and scales are in tests/proofs/test_replay.py.
CHOICES: dict[str, dict[str, Any]] = {
    "cps above one": {"sde_type": "cps", "noise_level": 1.3},
    "cps window": {"sde_type": "cps", "sde_step_indices": (0, 1)},
}


def recorded(rollouts: list[Rollout]) -> Tensor:
    return torch.stack([rollout.log_probs for rollout in rollouts if rollout.log_probs is not None])


def trainer_of(pipeline: Any) -> nn.Module:
    """The trainer's own copy of the weights."""
    return copy.deepcopy(pipeline.transformer)


def long_prompt(name: str) -> str:
    return " ".join(["a photo of two wine glasses"] * (4 if name == "qwen_image" else 9))


@dealt(name=NAMES, dtype=DTYPES, cfg=(True, False, False), dynamics=tuple(CHOICES))
def test_the_ratio_is_exactly_one_before_the_first_update(
    engine_of: Callable[[str, str], Engine],
    pipeline_of: Callable[[str, str], Any],
    name: str,
    dtype: str,
    cfg: bool,
    dynamics: str,
) -> None:
    options = guided(name, 3.0 if cfg else 0.0, **REQUEST, **CHOICES[dynamics])
    group = engine_of(name, dtype).rollout(**options, num_outputs_per_prompt=2)
    transformer = pipeline_of(name, dtype).transformer
    assert next(transformer.parameters()).requires_grad and torch.is_grad_enabled()
    log_probs = replay.log_prob(transformer, group, micro_batch=4)
    assert log_probs.dtype == torch.float32 and log_probs.requires_grad
    assert torch.equal(log_probs.detach().cpu(), recorded(group))
    assert torch.equal(replay.ratio(log_probs.cpu(), recorded(group)), torch.ones(2, 3))


def test_a_record_of_unknown_dynamics_is_refused(
    engine_of: Callable[[str, str], Engine], pipeline_of: Callable[[str, str], Any]
) -> None:
    # It was replayed as if its steps were ODE steps.
    group = engine_of("z_image", "float32").rollout(**REQUEST, noise_level=0)
    record = replace(group[0].sampling)
    # Not by `replace`: the suite's type checks would refuse the name first.
    object.__setattr__(record, "sde_type", "flow-sde")
    with pytest.raises(InvalidRequestError, match=f"sde_type must be one of {', '.join(DYNAMICS)}, got 'flow-sde'"):
        replay.log_prob(pipeline_of("z_image", "float32").transformer, [replace(group[0], sampling=record)])


@dealt(name=NAMES, dtype=DTYPES, carrier=("json", "msgpack", "json sglang", "msgpack sglang", "file"))
def test_the_ratio_is_exactly_one_however_the_rollout_travelled(
    engine_of: Callable[[str, str], Engine],
    pipeline_of: Callable[[str, str], Any],
    tmp_path: Path,
    name: str,
    dtype: str,
    carrier: str,
) -> None:
    group = engine_of(name, dtype).rollout(**REQUEST, num_outputs_per_prompt=2)
    if carrier == "file":
        save_rollout(tmp_path / "0", group[0])
        save_rollout(tmp_path / "1", group[1])
        received = [load_rollout(tmp_path / "0"), load_rollout(tmp_path / "1")]
    else:
        wire_format, *dialect = carrier.split()
        body = encode_rollouts(group, wire_format=wire_format, dialect=dialect[0] if dialect else "native")  # type: ignore
        received = decode_rollouts(bytearray(b"".join(body.chunks())), body.content_type)
    log_probs = replay.log_prob(pipeline_of(name, dtype).transformer, received)
    assert torch.equal(log_probs.detach().cpu(), recorded(group))


@pytest.mark.parametrize(("name", "dtype"), FAMILY_WITH_DTYPE)
def test_prompts_sizes_and_settings_may_be_mixed_in_any_micro_batch(
    engine_of: Callable[[str, str], Engine], pipeline_of: Callable[[str, str], Any], name: str, dtype: str
) -> None:
    engine = engine_of(name, dtype)
    rollouts = [
        *engine.rollout(**REQUEST, num_outputs_per_prompt=2),
        *engine.rollout(**guided(name, 4.0, **{**REQUEST, "prompt": long_prompt(name), "width": 96})),
        *engine.rollout(**guided(name, 0.0, **{**REQUEST, "prompt": "", "height": 144}), sde_type="cps"),
        *engine.rollout(
            **guided(name, 4.0, **REQUEST, negative_prompt=long_prompt(name)), noise_level=0.3, sde_step_indices=(0, 2)
        ),
    ]
    transformer = pipeline_of(name, dtype).transformer
    for micro_batch in (1, 2, 5, 100):
        with torch.no_grad():
            assert torch.equal(replay.log_prob(transformer, rollouts, micro_batch=micro_batch).cpu(), recorded(rollouts))
    backwards = list(reversed(rollouts))
    with torch.no_grad():
        assert torch.equal(replay.log_prob(transformer, backwards, steps=[2, 0]).cpu(), recorded(backwards)[:, [2, 0]])


@pytest.mark.parametrize(("name", "dtype"), FAMILY_WITH_DTYPE)
def test_gradient_checkpointing_changes_neither_log_probs_nor_gradients(
    engine_of: Callable[[str, str], Engine], pipeline_of: Callable[[str, str], Any], name: str, dtype: str
) -> None:
    group = engine_of(name, dtype).rollout(**REQUEST)
    plain, checkpointed = (trainer_of(pipeline_of(name, dtype)) for _ in range(2))
    checkpointed.train()
    checkpointed.enable_gradient_checkpointing()
    gradients = []
    for transformer in (plain, checkpointed):
        log_probs = replay.log_prob(transformer, group)
        assert torch.equal(log_probs.detach().cpu(), recorded(group))
        log_probs.sum().backward()
        gradients.append([weight.grad for weight in transformer.parameters()])
    assert any(gradient is not None and gradient.any() for gradient in gradients[0])
    for left, right in zip(*gradients, strict=True):
        assert (left is None and right is None) or torch.equal(left, right)


@pytest.mark.parametrize(("name", "dtype"), FAMILY_WITH_DTYPE)
def test_adapters_on_frozen_weights_start_at_ratio_one_and_alone_get_gradients(
    engine_of: Callable[[str, str], Engine], pipeline_of: Callable[[str, str], Any], name: str, dtype: str
) -> None:
    group = engine_of(name, dtype).rollout(**REQUEST)
    transformer = trainer_of(pipeline_of(name, dtype))
    transformer.requires_grad_(False)
    assert torch.equal(replay.log_prob(transformer, group).cpu(), recorded(group))
    adapters = add_adapters(transformer)
    log_probs = replay.log_prob(transformer, group)
    assert torch.equal(log_probs.detach().cpu(), recorded(group))
    log_probs.sum().backward()
    trained = {id(weight) for adapter in adapters for weight in (adapter.down, adapter.up)}
    for weight in transformer.parameters():
        assert (weight.grad is not None) == (id(weight) in trained)
    assert all(adapter.up.grad is not None and adapter.up.grad.any() for adapter in adapters)


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_the_ratio_is_exactly_one_at_another_thread_count(
    engine_of: Callable[[str, str], Engine], pipeline_of: Callable[[str, str], Any], name: str, threads: int
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        group = engine_of(name, "float32").rollout(**in_words_of(name, {**REQUEST, "height": 80, "num_inference_steps": 2}))
        log_probs = replay.log_prob(pipeline_of(name, "float32").transformer, group, micro_batch=2)
        assert torch.equal(log_probs.detach().cpu(), recorded(group))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", NAMES)
def test_a_filtered_trajectory_replays_the_steps_whose_states_it_has(
    engine_of: Callable[[str, str], Engine], pipeline_of: Callable[[str, str], Any], name: str
) -> None:
    group = engine_of(name, "float32").rollout(**REQUEST, return_step_indices=(1, 2))
    log_probs = replay.log_prob(pipeline_of(name, "float32").transformer, group, steps=[1])
    assert torch.equal(log_probs.detach().cpu(), recorded(group)[:, 1:2])


@pytest.mark.parametrize("name", NAMES)
def test_where_a_message_put_the_tensors_changes_nothing(
    engine_of: Callable[[str, str], Engine], pipeline_of: Callable[[str, str], Any], name: str
) -> None:
    def odd(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.numel() + 2, dtype=tensor.dtype)[2:].view(tensor.shape).copy_(tensor)

    # Two tokens: products of so few rows depend on the address of their input.
    rollout = engine_of(name, "float32").rollout(**guided(name, 0.0, **{**REQUEST, "height": 16, "width": 32}))[0]
    trajectory, env = rollout.dit_trajectory, rollout.denoising_env
    assert trajectory is not None and env is not None
    branch = {key: odd(value) if isinstance(value, Tensor) else value for key, value in env.pos_cond_kwargs.items()}
    moved = replace(
        rollout,
        dit_trajectory=replace(trajectory, latents=odd(trajectory.latents)),
        denoising_env=replace(env, pos_cond_kwargs=branch),
    )
    log_probs = replay.log_prob(pipeline_of(name, "float32").transformer, [moved])
    assert torch.equal(log_probs.detach().cpu(), recorded([rollout]))


@pytest.mark.parametrize("name", NAMES)
def test_no_forward_is_run_for_a_step_without_density(
    engine_of: Callable[[str, str], Engine], pipeline_of: Callable[[str, str], Any], name: str
) -> None:
    group = engine_of(name, "float32").rollout(**REQUEST, sde_step_indices=(1,), guidance_scale=0.0, num_outputs_per_prompt=2)
    transformer = pipeline_of(name, "float32").transformer
    calls = []
    handle = transformer.register_forward_hook(lambda *_: calls.append(1))
    try:
        assert torch.equal(replay.log_prob(transformer, group).detach().cpu(), recorded(group))
        # A step of Qwen-Image-2.1 after the first takes a forward that fills its cache.
        assert len(calls) == (4 if name == "qwen_image_21" else 2)
        assert len(list(replay.micro_batches(transformer, group))) == 2
    finally:
        handle.remove()


@pytest.mark.parametrize("name", NAMES)
def test_micro_batches_give_the_gradient_of_the_whole(
    engine_of: Callable[[str, str], Engine], pipeline_of: Callable[[str, str], Any], name: str
) -> None:
    group = engine_of(name, "float32").rollout(**REQUEST, num_outputs_per_prompt=2)
    advantages = torch.tensor([1.0, -1.0])
    whole, parts = (trainer_of(pipeline_of(name, "float32")) for _ in range(2))
    (replay.log_prob(whole, group).cpu() * advantages[:, None]).mean().backward()
    seen = []
    for batch in replay.micro_batches(parts, group, micro_batch=4):
        assert torch.equal(batch.log_probs.detach(), batch.old_log_probs)
        assert len(batch.scores) == len(batch.stds) <= 4
        seen += list(zip(batch.samples, batch.steps, strict=True))
        loss = (batch.log_probs.cpu() * advantages[list(batch.samples)]).mean()
        (loss * batch.weight).backward()
    assert seen == [(sample, step) for sample in (0, 1) for step in (0, 1, 2)]
    for left, right in zip(whole.parameters(), parts.parameters(), strict=True):
        if left.grad is not None:
            torch.testing.assert_close(left.grad, right.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_a_trainer_in_another_dtype_is_refused_unless_it_says_so(
    engine_of: Callable[[str, str], Engine], pipeline_of: Callable[[str, str], Any], name: str
) -> None:
    group = engine_of(name, "bfloat16").rollout(**REQUEST)
    transformer = pipeline_of(name, "float32").transformer
    with pytest.raises(InvalidRequestError, match=r"dtype must be that of the rollouts, torch.bfloat16") as caught:
        replay.log_prob(transformer, group)
    assert caught.value.field == "dtype"
    log_probs = replay.log_prob(transformer, group, dtype=torch.float32)
    assert not torch.equal(log_probs.detach().cpu(), recorded(group))
    # FLUX.1 multiplies the timestep and its scale by 1000 in its own dtype, where bfloat16 is up to 4 off.
    off = 0.5 if name == "flux" else 0.05
    torch.testing.assert_close(log_probs.detach().cpu(), recorded(group), rtol=0, atol=off)
