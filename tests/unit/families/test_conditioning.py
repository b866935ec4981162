"""A declaration alone gives a family's forwards, its messages, its digests and its refusals.

The declared family has what no registered one has: two text embeddings, a guidance tensor, position ids that a batch shares,
reference images, and branches that go through the model as a pair with the negative one first.
"""

import dataclasses
from typing import Any, cast

import msgspec
import pytest
import torch
from tests.factories import assert_same_answer, make_rollout
from torch import Tensor, nn

from flowroll.engine.runner.messages import AddRequest, decode_message, encode_message
from flowroll.engine.runner.shapes import EnvShape
from flowroll.exact.sharing import SharedForwards
from flowroll.families.conditioning import TOKENS, Argument, Conditioning, ConditioningField, uncollate
from flowroll.types import DenoisingEnv, SamplingParams, env_digests
from flowroll.wire.codec import decode_rollouts, encode_rollouts
from flowroll.wire.dialects import env_from_wire, env_to_wire
from flowroll.wire.files import load_rollout, save_rollout

DECLARED = Conditioning(
    latents=Argument(name="hidden_states"),
    pair=("negative", "positive"),
    fields=(
        ConditioningField(name="text", shape=(TOKENS, "text")),
        ConditioningField(name="pooled", shape=("pooled",), sglang_name="pooled_projections"),
        ConditioningField(name="ids", source="size", shape=(TOKENS, 3), batch="shared"),
        ConditioningField(name="references", source="image", shape=("image_tokens", 4), is_required=False),
        ConditioningField(name="guidance", source="scale", shape=(), dtype="float32"),
    ),
)


def make_env(seed: int = 0) -> DenoisingEnv:
    generator = torch.Generator().manual_seed(seed)

    def branch() -> dict[str, Any]:
        return {
            "text": torch.randn(5, 8, generator=generator).bfloat16(),
            "pooled": torch.randn(6, generator=generator).bfloat16(),
            "ids": torch.arange(15.0).view(5, 3).bfloat16(),
        }

    images = {"references": torch.randn(7, 4, generator=generator).bfloat16(), "sizes": [[1, 2], torch.ones(2)]}
    return DenoisingEnv(image_kwargs=images, pos_cond_kwargs=branch(), neg_cond_kwargs=branch(), guidance=torch.tensor(3.5))


def positive(env: DenoisingEnv, key: str) -> Tensor:
    return cast(Tensor, env.pos_cond_kwargs[key])


def negative(env: DenoisingEnv, key: str) -> Tensor:
    assert env.neg_cond_kwargs is not None
    return cast(Tensor, env.neg_cond_kwargs[key])


def forward_input(env: DenoisingEnv, *, is_guided: bool = True) -> Any:
    fixed = DECLARED.fixed_inputs(env, is_guided=is_guided)
    (one,) = DECLARED.forward_inputs(torch.ones(9, 4), torch.tensor([0.5]), fixed, is_guided=is_guided)
    return one


def test_a_pair_is_one_batch_in_the_declared_order() -> None:
    env, one = make_env(), forward_input(make_env())
    assert torch.equal(one["text"], torch.stack([negative(env, "text"), positive(env, "text")]))
    assert torch.equal(one["pooled"], torch.stack([negative(env, "pooled"), positive(env, "pooled")]))
    assert torch.equal(one["hidden_states"], torch.ones(2, 9, 4)) and one["timestep"].tolist() == [0.5, 0.5]
    assert one["ids"].shape == (5, 3) and one["guidance"].tolist() == [3.5, 3.5]
    assert torch.equal(one["references"], torch.stack([env.image_kwargs["references"]] * 2))  # type: ignore[list-item]
    assert DECLARED.rows(one) == 2


def test_without_guidance_the_conditional_branch_is_alone() -> None:
    env = make_env()
    one = forward_input(env, is_guided=False)
    assert torch.equal(one["text"], positive(env, "text")[None]) and DECLARED.rows(one) == 1


def test_forwards_of_other_shared_values_are_not_collated() -> None:
    env = make_env()
    other = dataclasses.replace(env, pos_cond_kwargs={**env.pos_cond_kwargs, "ids": torch.zeros(5, 3).bfloat16()})
    keys = [DECLARED.key(forward_input(one, is_guided=False)) for one in (env, make_env(1), other)]
    assert keys[0] == keys[1] != keys[2]
    assert DECLARED.key(forward_input(env)) != keys[0]


def test_position_ids_on_a_device_are_known_by_their_geometry() -> None:
    """Their numbers are not read there. Without a geometry, only one and the same tensor is known to be equal."""
    one, other = ({**forward_input(env), "ids": torch.zeros(5, 3, device="meta")} for env in (make_env(), make_env(1)))
    assert DECLARED.key(one, (4, 6)) == DECLARED.key(other, (4, 6)) != DECLARED.key(other, (6, 4))
    longer = {**other, "ids": torch.zeros(6, 3, device="meta")}
    assert DECLARED.key(other, (4, 6)) != DECLARED.key(longer, (4, 6))
    assert DECLARED.key(one) == DECLARED.key(one) != DECLARED.key(other)
    # On the CPU the numbers count, wherever they come from.
    here = forward_input(make_env())
    assert DECLARED.key(here, (4, 6)) == DECLARED.key(here, (6, 4)) == DECLARED.key(here)


class Model(nn.Module):
    """Uses every argument."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, text: Tensor, ids: Tensor, *, return_dict: bool, **others: Tensor
    ) -> tuple[Tensor]:
        joint = torch.cat([hidden_states, others["references"]], dim=1)
        shift = (text + ids.sum(-1, keepdim=True)).mean((1, 2)) + others["pooled"].mean(1) + others["guidance"] + timestep
        return (self.linear(joint) + shift[:, None, None],)


def test_samples_with_a_shared_argument_share_a_forward_with_the_bits_of_each() -> None:
    class Family:
        @staticmethod
        def run_in_turn(transformer: Any, inputs: Any) -> list[Any]:
            return [transformer(**one, return_dict=False)[0] for one in inputs]

        collate_key, collate, uncollate = staticmethod(DECLARED.key), staticmethod(DECLARED.collate), staticmethod(uncollate)
        num_text_rows, pad_text = staticmethod(DECLARED.num_text_rows), staticmethod(DECLARED.pad_text)

    inputs = []
    for seed in range(3):
        env = make_env(seed)
        env = env.with_tensors(lambda tensor: tensor.float())
        inputs.append(forward_input(dataclasses.replace(env, guidance=torch.tensor(float(seed)))))
    model = Model()
    shared = SharedForwards(Family())
    for _ in range(2):
        for one, output in zip(inputs, shared.outputs(model, inputs), strict=True):
            assert torch.equal(output, model(**one, return_dict=False)[0])  # type: ignore[arg-type]
    (known,) = shared._known.values()
    assert all(analyses for analyses in known.notes.values()) and not known.reasons


def test_a_message_carries_every_part_of_an_environment() -> None:
    env = make_env()
    message = AddRequest(id=1, params=SamplingParams(prompt=""), env=EnvShape.of(env), latents=None, start_step=0, images=())
    received = decode_message(encode_message(message).encode())
    assert isinstance(received, AddRequest)
    empty = received.env.empty(torch.device("cpu"))
    assert [name for name, _ in empty.tensors()] == [name for name, _ in env.tensors()]
    for (_, room), (_, tensor) in zip(empty.tensors(), env.tensors(), strict=True):
        assert (room.shape, room.dtype) == (tensor.shape, tensor.dtype)
        room.copy_(tensor)
    assert_same_answer(empty, env)


@pytest.mark.parametrize("name", [name for name, _ in make_env().tensors()])
def test_a_digest_covers_every_tensor(name: str) -> None:
    env = make_env()
    names = iter([one for one, _ in env.tensors()])
    changed = env.with_tensors(lambda tensor: tensor + 1 if next(names) == name else tensor)
    pairs = zip(env_digests(env), env_digests(changed), strict=True)
    expected = {"pos": [True, False], "neg": [False, True]}.get(name[:3], [True, True])
    assert [before != after for before, after in pairs] == expected


def test_a_cast_changes_what_has_the_models_dtype() -> None:
    cast = DECLARED.cast(make_env(), torch.float32)
    assert {name for name, tensor in cast.tensors() if tensor.dtype != torch.float32} == set()
    back = DECLARED.cast(cast, torch.bfloat16)
    assert back.guidance is not None and back.guidance.dtype == torch.float32
    assert positive(back, "pooled").dtype == torch.bfloat16


def test_what_is_required_is_missed_in_every_branch_that_needs_it() -> None:
    env = make_env()
    lacking = dataclasses.replace(env, neg_cond_kwargs={"text": negative(env, "text")}, guidance=None)
    found = {(place, field.name) for place, field in DECLARED.missing(lacking, is_guided=True)}
    assert found == {("neg_cond_kwargs", "pooled"), ("neg_cond_kwargs", "ids"), ("guidance", "guidance")}
    assert [field.name for _, field in DECLARED.missing(lacking, is_guided=False)] == ["guidance"]
    assert not list(DECLARED.missing(env, is_guided=True))


@pytest.mark.parametrize("dialect", ["native", "sglang"])
def test_both_dialects_carry_every_part_of_an_environment(dialect: Any) -> None:
    env = make_env()
    written = env_to_wire(env, dialect, DECLARED)
    sent = written.pos_cond_kwargs
    assert ("pooled_projections" in sent, "pooled" in sent) == (dialect == "sglang", dialect == "native")
    assert_same_answer(env_from_wire(written, lambda leaf: leaf, DECLARED), env)


@pytest.mark.parametrize("wire_format", ["json", "msgpack"])
def test_answers_and_files_carry_every_part_of_an_environment(wire_format: Any, tmp_path: Any) -> None:
    rollout = make_rollout(denoising_env=make_env())
    body = encode_rollouts([rollout], wire_format=wire_format)
    data = bytearray(b"".join(body.chunks()))
    assert_same_answer(decode_rollouts(data, body.content_type)[0], rollout)
    save_rollout(tmp_path / "file", rollout)
    assert_same_answer(load_rollout(tmp_path / "file"), rollout)
    assert msgspec.json.encode(rollout.sampling)
