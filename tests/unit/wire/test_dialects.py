from typing import Any

import msgspec
import pytest
import torch
from tests.factories import assert_same_answer, make_rollout
from tests.unit.wire.test_codec import blob_of

from flowroll.errors import ServerConnectionError
from flowroll.families import FAMILIES
from flowroll.wire.codec import decode_rollouts, encode_rollouts
from flowroll.wire.dialects import LayoutError, WireEnv, env_from_wire
from flowroll.wire.safetensors import tensor_from_blob

RESPONSE_FIELDS = {
    "request_id",
    "prompt",
    "seed",
    "generated_output",
    "latents",
    "rollout_log_probs",
    "rollout_debug_tensors",
    "denoising_env",
    "dit_trajectory",
    "sde_step_indices",
    "step_tensors",
    "step_images",
    "weight_version",
    "sampling",
    "inference_time_s",
    "peak_memory_mb",
    "provenance",
    "first_step",
    "last_step",
    "left_out",
}


def sample_of(dialect: Any, **options: Any) -> dict[str, Any]:
    body = encode_rollouts([make_rollout(**options)], wire_format="msgpack", dialect=dialect)
    return msgspec.msgpack.decode(b"".join(body.chunks()))[0]


def value_of(leaf: dict[str, Any]) -> torch.Tensor:
    return tensor_from_blob(bytearray(blob_of(leaf)))


QWEN = FAMILIES["qwen_image"].conditioning


def decoded(sample: dict[str, Any]) -> Any:
    return decode_rollouts(msgspec.msgpack.encode([sample]), "application/msgpack")[0]


@pytest.mark.parametrize("dialect", ["native", "sglang"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_response_has_the_documented_fields(dialect: Any, family: str) -> None:
    sample = sample_of(dialect, family=family)
    assert set(sample) == RESPONSE_FIELDS
    assert set(sample["denoising_env"]) == {"image_kwargs", "pos_cond_kwargs", "neg_cond_kwargs", "guidance"}
    assert set(sample["dit_trajectory"]) == {"latents", "timesteps", "sigmas", "latent_step_indices"}
    conditioning = FAMILIES[family].conditioning
    images = {field.name for field in conditioning.in_place("image_kwargs")}
    assert set(sample["denoising_env"]["image_kwargs"]) == images
    assert (sample["denoising_env"]["guidance"] is None) == (not conditioning.in_place("guidance"))
    for branch, tokens in (("pos_cond_kwargs", 7), ("neg_cond_kwargs", 6)):
        assert sample["denoising_env"][branch].get("txt_seq_lens", [tokens]) == [tokens]
        has_table = dialect == "sglang" and conditioning.table is not None
        assert ("freqs_cis" in sample["denoising_env"][branch]) == has_table


def test_the_native_dialect_uses_the_families_own_names() -> None:
    qwen, z_image = sample_of("native"), sample_of("native", family="z_image")
    debug_names = {"variance_noise", "prev_sample_mean", "noise_std_dev", "model_output"}
    assert set(qwen["rollout_debug_tensors"]) == debug_names
    mask = "encoder_hidden_states_mask"
    assert set(qwen["denoising_env"]["pos_cond_kwargs"]) == {"encoder_hidden_states", mask, "img_shapes", "txt_seq_lens"}
    assert set(z_image["denoising_env"]["pos_cond_kwargs"]) == {"cap_feats", "txt_seq_lens"}
    assert z_image["denoising_env"]["pos_cond_kwargs"]["cap_feats"]["shape"] == [7, 32]
    assert qwen["dit_trajectory"]["timesteps"]["shape"] == [4]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_sglang_dialect_uses_its_names(family: str) -> None:
    native, sample = sample_of("native", family=family), sample_of("sglang", family=family)
    assert sample["rollout_debug_tensors"] == {
        "rollout_variance_noises": native["rollout_debug_tensors"]["variance_noise"],
        "rollout_prev_sample_means": native["rollout_debug_tensors"]["prev_sample_mean"],
        "rollout_noise_std_devs": native["rollout_debug_tensors"]["noise_std_dev"],
        "rollout_model_outputs": native["rollout_debug_tensors"]["model_output"],
    }
    for branch in ("pos_cond_kwargs", "neg_cond_kwargs"):
        expected = dict(native["denoising_env"][branch])
        embeds = FAMILIES[family].conditioning.embeds
        value = expected.pop(embeds.name)
        held = [value] if embeds.is_listed_by_sglang else value
        if table := FAMILIES[family].conditioning.table:
            assert expected.pop(table.text) and expected.pop(table.image)
            expected[table.name] = sample["denoising_env"][branch][table.name]
        assert sample["denoising_env"][branch] == expected | {"encoder_hidden_states": held}
    timesteps, own = (value_of(answer["dit_trajectory"]["timesteps"]) for answer in (sample, native))
    assert torch.equal(timesteps, torch.cat([own, torch.zeros(1)]))


def test_the_sglang_timesteps_are_complete_when_latents_are_filtered() -> None:
    rollout = make_rollout()
    trajectory = rollout.dit_trajectory
    assert trajectory is not None
    filtered = type(trajectory)(
        latents=trajectory.latents[[0, 4]],
        latent_step_indices=(0, 4),
        timesteps=trajectory.timesteps,
        sigmas=trajectory.sigmas,
    )
    sample = sample_of("sglang", dit_trajectory=filtered)
    assert sample["dit_trajectory"]["timesteps"]["shape"] == [5]
    # SGLang echoes a tensor here, and miles refuses anything else.
    indices = value_of(sample["dit_trajectory"]["latent_step_indices"])
    assert indices.dtype == torch.int64 and indices.tolist() == [0, 4]
    assert sample_of("native", dit_trajectory=filtered)["dit_trajectory"]["latent_step_indices"] == [0, 4]
    assert_same_answer(make_rollout(dit_trajectory=filtered), decoded(sample))


def test_an_environment_without_a_mask_has_no_mask_key() -> None:
    rollout = make_rollout()
    assert rollout.denoising_env is not None
    branch = {key: value for key, value in rollout.denoising_env.pos_cond_kwargs.items() if not key.endswith("_mask")}
    env = type(rollout.denoising_env)(pos_cond_kwargs=branch, neg_cond_kwargs=None)
    for dialect in ("native", "sglang"):
        sample = sample_of(dialect, denoising_env=env)
        assert set(sample["denoising_env"]["pos_cond_kwargs"]) == {"encoder_hidden_states", "img_shapes", "txt_seq_lens"}
        assert sample["denoising_env"]["neg_cond_kwargs"] is None
        assert_same_answer(make_rollout(denoising_env=env), decoded(sample))


def test_fields_that_a_newer_server_adds_are_ignored() -> None:
    assert_same_answer(make_rollout(), decoded(sample_of("native") | {"brand_new": 1}))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (("rollout_debug_tensors", "model_output"), "without model_output"),
        (("sampling", "family"), "missing required field `family`"),
        (("dit_trajectory", "sigmas"), "missing required field `sigmas`"),
        (("generated_output",), "missing required field `generated_output`"),
        (("denoising_env", "pos_cond_kwargs"), "missing required field `pos_cond_kwargs`"),
    ],
)
def test_a_missing_part_is_named(path: tuple[str, ...], message: str) -> None:
    sample = sample_of("native")
    owner = sample
    for key in path[:-1]:
        owner = owner[key]
    del owner[path[-1]]
    with pytest.raises(ServerConnectionError, match=message):
        decoded(sample)


@pytest.mark.parametrize(
    ("field", "source", "message"),
    [
        ("generated_output", "rollout_log_probs", "generated_output of shape"),
        ("rollout_log_probs", "generated_output", "rollout_log_probs of shape"),
    ],
)
def test_a_tensor_of_the_wrong_shape_is_named(field: str, source: str, message: str) -> None:
    sample = sample_of("native")
    sample[field] = sample[source]
    with pytest.raises(ServerConnectionError, match=message):
        decoded(sample)


def test_a_picture_in_another_layout_is_refused() -> None:
    sample = sample_of("native", family="z_image")
    sample["generated_output"] = sample["dit_trajectory"]["latents"]
    with pytest.raises(ServerConnectionError, match=r"not \[3 or 4, frames, 32, 48\]"):
        decoded(sample)


@pytest.mark.parametrize("name", ["request_id", "img_shapes"])
def test_endless_nesting_is_a_clear_error(name: str) -> None:
    body = b"".join(encode_rollouts([make_rollout()], wire_format="json").chunks())
    before, _, _ = body.partition(b'"%s":' % name.encode())
    # In an environment's value, and in a field that is skipped as unknown.
    key = b'"img_shapes":' if name == "img_shapes" else b'"nonsense":'
    with pytest.raises(ServerConnectionError, match="recursion"):
        decode_rollouts(before + key + b"[" * 100_000, "application/json")


@pytest.mark.parametrize(
    ("field", "source"), [("sigmas", "latents"), ("timesteps", "latents"), ("sigmas", "timesteps"), ("latents", "timesteps")]
)
def test_a_trajectory_whose_parts_do_not_fit_is_refused(field: str, source: str) -> None:
    sample = sample_of("native")
    sample["dit_trajectory"][field] = sample["dit_trajectory"][source]
    with pytest.raises(ServerConnectionError, match=r"sigmas|timesteps|dit_trajectory"):
        decoded(sample)


def test_embeddings_that_are_not_one_tensor_are_refused() -> None:
    sample = sample_of("sglang")
    branch = sample["denoising_env"]["pos_cond_kwargs"]
    branch["encoder_hidden_states"] = branch["encoder_hidden_states"] * 2
    with pytest.raises(ServerConnectionError, match="anything but one tensor"):
        decoded(sample)


def test_a_record_whose_grid_does_not_fit_its_steps_is_refused() -> None:
    sample = sample_of("native")
    sample["sampling"]["num_inference_steps"] = 5
    with pytest.raises(ServerConnectionError, match="must hold rollouts"):
        decoded(sample)


def test_an_env_with_lists_beyond_any_use_is_refused_before_python_runs_out_of_frames() -> None:
    nested: list[object] = []
    for _ in range(400):
        nested = [nested]
    with pytest.raises(LayoutError, match="more than 8 levels"):
        env_from_wire(WireEnv(pos_cond_kwargs={"img_shapes": nested}), lambda leaf: leaf, QWEN)
    shapes = [[[1, 4, 4]]]
    env = env_from_wire(WireEnv(pos_cond_kwargs={"img_shapes": shapes}), lambda leaf: leaf, QWEN)
    assert env.pos_cond_kwargs["img_shapes"] == shapes
