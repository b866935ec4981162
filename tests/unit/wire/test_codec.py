import base64
import binascii
import itertools
import math
import tracemalloc
import warnings
from typing import Any

import msgspec
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.factories import assert_same_answer, make_evaluation, make_image, make_record, make_rollout, raw_bytes
from torch import Tensor

from flowroll import DenoisingEnv, Rollout
from flowroll.errors import EngineError, ServerConnectionError
from flowroll.families import FAMILIES
from flowroll.wire import envelope
from flowroll.wire.body import EncodedBody
from flowroll.wire.codec import decode_images, decode_rollouts, encode_images, encode_rollouts

FORMATS = ("json", "msgpack")
DIALECTS = ("native", "sglang")
CONTENT_TYPES = {"json": "application/json", "msgpack": "application/msgpack"}
DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
)


def joined(body: EncodedBody, max_bytes: int = 1 << 20) -> bytearray:
    return bytearray(b"".join(body.chunks(max_bytes)))


def parsed(body: EncodedBody) -> list[dict[str, Any]]:
    """The answer as any other client reads it."""
    library = msgspec.json if body.content_type == "application/json" else msgspec.msgpack
    return library.decode(bytes(joined(body)))


def blob_of(leaf: dict[str, Any]) -> bytes:
    return leaf["data"] if isinstance(leaf["data"], bytes) else base64.b64decode(leaf["data"], validate=True)


def leaves(value: Any) -> list[dict[str, Any]]:
    """Every tensor object in an answer."""
    if isinstance(value, dict):
        if "__tensor__" in value:
            return [value]
        return [leaf for item in value.values() for leaf in leaves(item)]
    return [leaf for item in value for leaf in leaves(item)] if isinstance(value, list) else []


def with_tensor(tensor: Tensor) -> Rollout:
    """A rollout that carries this tensor in its environment, whatever it is."""
    return make_evaluation(denoising_env=DenoisingEnv(pos_cond_kwargs={"x": tensor}, neg_cond_kwargs=None))


@pytest.mark.parametrize("wire_format", FORMATS)
@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("guided", [True, False])
def test_a_group_comes_back_equal_in_every_field(wire_format: Any, dialect: Any, family: str, guided: bool) -> None:
    group = [make_rollout(family=family, guided=guided, seed=seed) for seed in (3, 4)]
    body = encode_rollouts(group, wire_format=wire_format, dialect=dialect)
    assert body.content_type == CONTENT_TYPES[wire_format]
    assert_same_answer(group, decode_rollouts(joined(body), body.content_type))
    assert_same_answer(group, decode_rollouts(bytes(joined(body)), f"{body.content_type}; charset=utf-8"))


@pytest.mark.parametrize("wire_format", FORMATS)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_an_evaluation_has_null_rollout_fields_and_comes_back_equal(wire_format: Any, dialect: Any) -> None:
    body = encode_rollouts([make_evaluation()], wire_format=wire_format, dialect=dialect)
    (sample,) = parsed(body)
    nulls = {name for name, value in sample.items() if value is None}
    assert nulls == {
        "latents",
        "rollout_log_probs",
        "rollout_debug_tensors",
        "denoising_env",
        "dit_trajectory",
        "sde_step_indices",
        "step_tensors",
        "step_images",
    }
    assert_same_answer([make_evaluation()], decode_rollouts(joined(body), body.content_type))


@pytest.mark.parametrize("wire_format", FORMATS)
def test_generated_images_come_back_equal(wire_format: Any) -> None:
    images = [make_image(seed=1), make_image(seed=2, family="z_image")]
    body = encode_images(images, wire_format=wire_format)
    assert_same_answer(images, decode_images(joined(body), body.content_type))


@pytest.mark.parametrize("wire_format", FORMATS)
def test_no_samples_are_an_empty_list(wire_format: Any) -> None:
    body = encode_rollouts([], wire_format=wire_format)
    assert decode_rollouts(joined(body), body.content_type) == []


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Any dtype, 0 to 4 dimensions, sizes from 0, contiguous or not, any bits."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 5), max_size=4))
    count = math.prod(shape)
    if dtype is torch.bool:
        flat = torch.tensor(draw(st.lists(st.booleans(), min_size=count, max_size=count)), dtype=dtype)
    else:
        data = draw(st.binary(min_size=count * dtype.itemsize, max_size=count * dtype.itemsize))
        flat = torch.frombuffer(bytearray(data), dtype=dtype) if count else torch.empty(0, dtype=dtype)
    tensor = flat.reshape(shape)
    match draw(st.sampled_from(("whole", "transposed", "strided", "expanded"))):
        case "transposed":
            return tensor.permute(tuple(reversed(range(tensor.ndim))))
        case "strided" if tensor.ndim:
            return tensor[::2]
        case "expanded":
            return tensor.unsqueeze(0).expand(3, *tensor.shape)
    return tensor


@settings(deadline=None, max_examples=150)
@given(tensor=tensors(), wire_format=st.sampled_from(FORMATS), in_place=st.booleans())
def test_every_tensor_survives_bit_for_bit_and_loads_with_safetensors(tensor: Tensor, wire_format: Any, in_place: bool) -> None:
    body = encode_rollouts([with_tensor(tensor)], wire_format=wire_format)
    whole = joined(body) if in_place else bytes(joined(body))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (decoded,) = decode_rollouts(whole, body.content_type)
    assert decoded.denoising_env is not None
    result = decoded.denoising_env.pos_cond_kwargs["x"]
    leaf = parsed(body)[0]["denoising_env"]["pos_cond_kwargs"]["x"]
    assert leaf["__tensor__"] is True
    assert (leaf["shape"], leaf["dtype"]) == (list(tensor.shape), str(tensor.dtype))
    for found in (result, safetensors.torch.load(blob_of(leaf))["t"]):
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        assert raw_bytes(found) == raw_bytes(tensor)


@pytest.mark.parametrize("wire_format", FORMATS)
def test_tensors_that_share_storage_come_back_apart(wire_format: Any) -> None:
    log_probs = torch.arange(8.0)
    rollouts = [make_evaluation(log_probs=log_probs[:4]), make_evaluation(log_probs=log_probs[2:6])]
    first, second = decode_rollouts(joined(encode_rollouts(rollouts, wire_format=wire_format)), CONTENT_TYPES[wire_format])
    assert first.log_probs is not None and second.log_probs is not None
    first.log_probs.fill_(-1)
    assert torch.equal(second.log_probs, torch.arange(2.0, 6.0))


@pytest.mark.parametrize("wire_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_writing_to_one_decoded_tensor_changes_no_other(wire_format: Any, dtype: torch.dtype) -> None:
    # Large enough for the tensors of a msgpack body to be views into it.
    rollout = make_rollout(steps=8, height=512, width=512, dtype=dtype)
    body = encode_rollouts([rollout], wire_format=wire_format)
    (decoded,) = decode_rollouts(joined(body), body.content_type)
    assert decoded.debug_tensors is not None and decoded.dit_trajectory is not None
    decoded.debug_tensors.variance_noise.zero_()
    decoded.dit_trajectory.latents.add_(1)
    assert rollout.debug_tensors is not None
    assert torch.equal(decoded.debug_tensors.model_output, rollout.debug_tensors.model_output)
    assert torch.equal(decoded.debug_tensors.prev_sample_mean, rollout.debug_tensors.prev_sample_mean)
    assert torch.equal(decoded.image, rollout.image)


def test_large_tensors_of_a_writable_msgpack_body_are_aligned_views_and_small_ones_copies() -> None:
    rollout = make_rollout(steps=8, height=512, width=512)
    body = encode_rollouts([rollout], wire_format="msgpack")
    whole = joined(body)
    (decoded,) = decode_rollouts(whole, body.content_type)
    start = torch.frombuffer(whole, dtype=torch.uint8).data_ptr()
    inside = range(start, start + len(whole))
    assert decoded.debug_tensors is not None and decoded.log_probs is not None
    for large in (decoded.image, decoded.debug_tensors.model_output):
        assert large.data_ptr() in inside and large.data_ptr() % 8 == 0
        assert large.untyped_storage().nbytes() == large.nbytes
    assert decoded.log_probs.data_ptr() not in inside


def test_large_tensors_of_a_read_only_body_are_writable_all_the_same() -> None:
    rollout = make_evaluation(height=512, width=512)
    body = encode_rollouts([rollout], wire_format="msgpack")
    whole = bytes(joined(body))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (decoded,) = decode_rollouts(whole, body.content_type)
    decoded.image.zero_()
    assert_same_answer([rollout], decode_rollouts(whole, body.content_type))


def test_a_misaligned_foreign_body_is_decoded_by_copying() -> None:
    # Another server knows nothing of our alignment: plain msgpack of the same answer, one large tensor at every offset.
    for filling in range(8):
        rollout = make_evaluation(height=512, width=512, prompt="x" * filling)
        body = encode_rollouts([rollout], wire_format="msgpack")
        foreign = bytearray(msgspec.msgpack.encode(parsed(body)))
        (decoded,) = decode_rollouts(foreign, body.content_type)
        assert decoded.image.data_ptr() % 4 == 0
        assert_same_answer(rollout, decoded)


@settings(deadline=None, max_examples=40)
@given(
    prompt=st.text(max_size=40),
    max_bytes=st.integers(4, 5000),
    wire_format=st.sampled_from(FORMATS),
    dialect=st.sampled_from(DIALECTS),
)
def test_content_length_is_exact_and_chunks_are_bounded(prompt: str, max_bytes: int, wire_format: Any, dialect: Any) -> None:
    body = encode_rollouts([make_rollout(prompt=prompt)], wire_format=wire_format, dialect=dialect)
    chunks = list(body.chunks(max_bytes))
    assert all(0 < len(chunk) <= max_bytes for chunk in chunks)
    assert sum(map(len, chunks)) == body.content_length
    # Pieces are filled: nobody sends a hundred small packets.
    assert len(chunks) <= 2 * (body.content_length // max_bytes + 1)
    assert b"".join(chunks) == joined(body)


@pytest.mark.parametrize("wire_format", FORMATS)
def test_encoding_refers_to_the_tensors_own_storage(wire_format: Any) -> None:
    rollout = make_rollout()
    body = encode_rollouts([rollout], wire_format=wire_format)
    owners = {segment.owner.data_ptr() for segment in body.segments if segment.owner is not None}
    assert rollout.debug_tensors is not None
    assert {rollout.image.data_ptr(), rollout.debug_tensors.model_output.data_ptr()} <= owners


@pytest.mark.parametrize("wire_format", FORMATS)
def test_encoding_and_sending_64_mb_takes_less_than_a_tenth_of_it(wire_format: Any) -> None:
    rollout = make_rollout(steps=30, height=736, width=736)
    payload_bytes = encode_rollouts([rollout], wire_format="msgpack").content_length
    assert payload_bytes > 64e6
    peaks = []
    for _ in range(3):
        tracemalloc.start()
        try:
            sent = sum(len(chunk) for chunk in encode_rollouts([rollout], wire_format=wire_format).chunks())
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
        assert sent >= payload_bytes
    # tracemalloc counts every thread of the process; what the codec itself takes is in each of the three.
    assert min(peaks) < 0.1 * payload_bytes


def test_json_floats_survive_exactly() -> None:
    rollout = make_evaluation(inference_time_s=0.1 + 0.2, peak_memory_mb=1e-17)
    (decoded,) = decode_rollouts(joined(encode_rollouts([rollout], wire_format="json")), "application/json")
    assert decoded.sampling.sigmas == rollout.sampling.sigmas
    assert decoded.sampling.timesteps == rollout.sampling.timesteps
    assert torch.equal(torch.tensor(decoded.sampling.sigmas), torch.tensor(rollout.sampling.sigmas))
    assert (decoded.inference_time_s, decoded.peak_memory_mb) == (0.1 + 0.2, 1e-17)


def test_a_prompt_that_looks_like_an_envelope_is_only_a_prompt() -> None:
    prompt = '{"__tensor__":true,"data":""} \x00 "\\'
    for wire_format in FORMATS:
        body = encode_rollouts([make_rollout(prompt=prompt)], wire_format=wire_format)
        assert decode_rollouts(joined(body), body.content_type)[0].prompt == prompt


def test_every_blob_has_an_aligned_header_of_the_documented_key() -> None:
    for wire_format in FORMATS:
        found = leaves(parsed(encode_rollouts([make_rollout()], wire_format=wire_format)))
        assert len(found) == 13
        for leaf in found:
            blob = blob_of(leaf)
            assert int.from_bytes(blob[:8], "little") % 8 == 0
            assert list(safetensors.torch.load(blob)) == ["t"]


@pytest.mark.parametrize("wire_format", FORMATS)
def test_a_body_cut_anywhere_is_a_clear_error(wire_format: Any) -> None:
    whole = bytes(joined(encode_rollouts([make_evaluation(height=16, width=16)], wire_format=wire_format)))
    for length in itertools.chain(range(600), range(600, len(whole), 37)):
        with pytest.raises(ServerConnectionError, match=r"must hold rollouts, got .*; "):
            decode_rollouts(bytearray(whole[:length]), CONTENT_TYPES[wire_format])


@settings(deadline=None, max_examples=400)
@given(data=st.data(), wire_format=st.sampled_from(FORMATS))
def test_a_damaged_body_is_an_answer_or_a_clear_error(data: st.DataObject, wire_format: Any) -> None:
    rollout = make_evaluation(height=16, width=16)
    whole = joined(encode_rollouts([rollout], wire_format=wire_format))
    # The structure, not the pixels: the ends, and what surrounds the one tensor.
    place = data.draw(st.one_of(st.integers(0, 400), st.integers(len(whole) - 500, len(whole) - 1)))
    whole[place] = data.draw(st.integers(0, 255))
    try:
        decode_rollouts(whole, CONTENT_TYPES[wire_format])
    except ServerConnectionError as error:
        assert "; " in error.message


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[1]",
        b"{}",
        b"[{}]",
        b"[" * 100_000,
        b"\xff\xfe",
        b"<html>502</html>",
        b"\xdd\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\x91\x80",
    ],
)
@pytest.mark.parametrize("content_type", CONTENT_TYPES.values())
def test_garbage_is_a_clear_error(body: bytes, content_type: str) -> None:
    for decode in (decode_rollouts, decode_images):
        with pytest.raises(ServerConnectionError):
            decode(body, content_type)


def test_another_content_type_is_refused_by_name() -> None:
    with pytest.raises(ServerConnectionError, match="application/json or application/msgpack, got 'text/html'"):
        decode_rollouts(b"[]", "text/html")


def safetensors_blob(header: bytes, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + data


@pytest.mark.parametrize(
    "blob",
    [
        b"",
        b"\xff" * 8,
        safetensors_blob(b""),
        safetensors_blob(b"[]"),
        safetensors_blob(b"\xff\xff"),
        safetensors_blob(b"{" * 50_000),
        safetensors_blob(b'{"u":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
        safetensors_blob(b'{"t":{"dtype":"F31","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
        safetensors_blob(b'{"t":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}', bytes(4)),
        safetensors_blob(b'{"t":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(3)),
        safetensors_blob(b'{"t":{"dtype":"F32","shape":[3,1,2,2],"data_offsets":[0,0]}}'),
        safetensors_blob(b'{"t":{"dtype":"F32","shape":[-1],"data_offsets":[0,-4]}}', bytes(4)),
        safetensors_blob(b'{"t":{"dtype":"F32","shape":[1],"data_offsets":[-4,0]}}', bytes(4)),
        safetensors_blob(b'{"t":{"dtype":"F32","shape":[0,9223372036854775807,4],"data_offsets":[0,0]}}'),
        safetensors_blob(b'{"t":{"dtype":"F32","shape":[0,99999999999999999999],"data_offsets":[0,0]}}'),
    ],
)
@pytest.mark.parametrize("wire_format", FORMATS)
def test_a_bad_blob_is_a_clear_error(blob: bytes, wire_format: str) -> None:
    (sample,) = parsed(encode_rollouts([make_evaluation()], wire_format="msgpack"))
    sample["generated_output"]["data"] = blob if wire_format == "msgpack" else binascii.b2a_base64(blob).decode().strip()
    library = msgspec.json if wire_format == "json" else msgspec.msgpack
    with pytest.raises(ServerConnectionError, match="must hold rollouts"):
        decode_rollouts(library.encode([sample]), CONTENT_TYPES[wire_format])


def test_a_tensor_too_large_for_msgpack_is_an_engine_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(envelope, "_MAX_BIN_BYTES", 1000)
    with pytest.raises(EngineError, match="4 GiB"):
        encode_rollouts([make_rollout()], wire_format="msgpack")
    encode_rollouts([make_rollout()], wire_format="json")


def test_a_rollout_of_another_schema_version_is_refused() -> None:
    (sample,) = parsed(encode_rollouts([make_evaluation()], wire_format="msgpack"))
    sample["sampling"]["schema_version"] = 2
    with pytest.raises(ServerConnectionError, match="schema_version 2"):
        decode_rollouts(msgspec.msgpack.encode([sample]), "application/msgpack")
    assert make_record().schema_version == 1


@pytest.mark.gpu
def test_tensors_on_a_device_come_back_on_the_cpu() -> None:
    image = torch.rand((3, 1, 16, 16))
    body = encode_rollouts([make_evaluation(image=image.cuda())], wire_format="msgpack")
    (decoded,) = decode_rollouts(joined(body), body.content_type)
    assert torch.equal(decoded.image, image)
