"""New weights that arrive tensor by tensor: all of them, exactly, or none."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save
from tests.guiding import PicturedEngine
from tests.rollouts import assert_same_bits
from tests.weights import REQUEST, WEIGHTS, with_other
from torch import Tensor

from flowroll import Rollout
from flowroll.engine import Engine
from flowroll.engine.service import EngineClient, EngineService, SharedMemory, UpdateProgress, bucket_tensors
from flowroll.engine.weights.receiver import WeightReceiver
from flowroll.engine.weights.staged import Slot, tensor_head
from flowroll.errors import FlowrollError, InvalidRequestError, ShuttingDownError, WeightsRejectedError
from flowroll.serving.uploads import BucketStream
from flowroll.wire.safetensors import TensorHead


@pytest.fixture(scope="module")
def other(z_image_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same checkpoint with another transformer; read only."""
    return with_other(z_image_checkpoint, tmp_path_factory.mktemp("other") / "z_image")


@pytest.fixture(scope="module")
def tensors(other: Path) -> dict[str, Tensor]:
    return load_file(other / "transformer" / WEIGHTS)


@pytest.fixture(scope="module")
def engine(z_image_checkpoint: Path) -> Iterator[Engine]:
    """Shared by the tests whose update is refused."""
    with Engine(z_image_checkpoint, device="cpu") as engine:
        yield engine


@pytest.fixture(scope="module")
def before(engine: Engine) -> tuple[Rollout, str]:
    return engine.rollout(**REQUEST)[0], engine.weights_checksum()


def assert_untouched(engine: Engine, before: tuple[Rollout, str]) -> None:
    assert engine.weights_checksum() == before[1]
    (after,) = engine.rollout(**REQUEST)
    assert_same_bits(after, before[0])
    assert after.weight_version == engine.weight_version == "0"


@pytest.mark.parametrize(("family", "dtype"), [("qwen_image", "float32"), ("z_image", "float32"), ("z_image", "bfloat16")])
def test_tensors_of_this_process_give_the_rollouts_of_an_engine_started_on_them(
    family: str, dtype: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    new = with_other(checkpoints[family], tmp_path / "other")
    sent = load_file(new / "transformer" / WEIGHTS)
    with Engine(new, device="cpu", dtype=dtype) as fresh:
        (expected,), checksum = fresh.rollout(**REQUEST), fresh.weights_checksum()
    with PicturedEngine(checkpoints[family], device="cpu", dtype=dtype) as engine:
        (old,) = engine.rollout(**REQUEST)
        update = engine.update_weights_from_tensors(sent, weight_version="7")
        assert (update.weight_version, update.num_tensors) == ("7", len(sent))
        (got,) = engine.rollout(**REQUEST)
        assert_same_bits(got, expected)
        assert not torch.equal(got.dit_trajectory.latents, old.dit_trajectory.latents)
        assert engine.weights_checksum() == checksum
        for tensor in sent.values():
            tensor.zero_()  # they are the caller's
        assert engine.weights_checksum() == checksum


class Receiving(EngineClient):
    """An engine's service with this one update."""

    def __init__(self, incoming: WeightReceiver) -> None:
        self._incoming = incoming

    failure = None

    def _call(self, method: Any, args: Any, options: Any) -> Any: ...

    def cancel(self, future: Any) -> None: ...

    def on_failure(self, listener: Any) -> None: ...

    def close(self, *, timeout_s: float = 10.0) -> bool: ...

    def call(self, method: Callable[..., Any], update_id: str, heads: Any, memory: Any = None) -> Future[Any]:
        does: dict[Any, Callable[[], Any]] = {
            EngineService.claim_bucket: lambda: self._incoming.claim(heads),
            EngineService.put_bucket: lambda: self._put(heads, memory),
            EngineService.drop_bucket: lambda: self._incoming.unclaim(heads),
        }
        done: Future[Any] = Future()
        try:
            done.set_result(does[method]())
        except FlowrollError as error:
            done.set_exception(error)
        return done

    def _put(self, heads: Any, memory: SharedMemory) -> UpdateProgress:
        incoming = self._incoming
        incoming.put_claimed(heads, bucket_tensors(memory.bytes, heads))
        return UpdateProgress(num_arrived=incoming.num_arrived, num_tensors=incoming.num_tensors, weight_version="0")


def stream_to(incoming: WeightReceiver) -> BucketStream:
    return BucketStream(Receiving(incoming), "an id")


def streamed(incoming: WeightReceiver, data: bytes, size: int) -> BucketStream:
    stream = stream_to(incoming)
    for start in range(0, len(data), size):
        stream.feed(data[start : start + size])
    return stream


@pytest.mark.parametrize("size", [997, 65536, 10**9])
def test_a_stream_is_taken_in_pieces_of_any_size_and_lies_where_memory_is_allocated(
    size: int, z_image_checkpoint: Path, other: Path, tensors: dict[str, Tensor]
) -> None:
    with Engine(z_image_checkpoint, device="cpu") as engine, Engine(other, device="cpu") as fresh:
        incoming = engine.receive_weights()
        names = sorted(tensors)
        # A header whose length puts no tensor at a multiple of 16 bytes of the file.
        for part, text in ((names[::2], {"a": "b" * 13}), (names[1::2], None)):
            data = save({name: tensors[name] for name in part}, metadata=text)
            streamed(incoming, data, size).put()
        engine.commit_weights(incoming.stage())
        assert engine.weights_checksum() == fresh.weights_checksum()
        assert_same_bits(engine.rollout(**REQUEST)[0], fresh.rollout(**REQUEST)[0])
        for name, parameter in engine._model.transformer.named_parameters():
            # Memory of the engine's own, not what the body came in.
            assert parameter.data_ptr() % 64 == 0 and parameter.untyped_storage().nbytes() == parameter.nbytes, name
            assert parameter.requires_grad


def test_a_bucket_is_refused_before_its_data_and_may_come_again(
    engine: Engine, before: tuple[Rollout, str], tensors: dict[str, Tensor]
) -> None:
    incoming = engine.receive_weights()
    name = "cap_embedder.1.bias"
    good = tensors[name]
    wrong: list[tuple[dict[str, Tensor], str]] = [
        ({name: good[:-1]}, rf"hold {name} as \[64\], got \[63\]"),
        ({name: good.to(torch.int32)}, f"hold {name} in one of F64, F32, F16, BF16, got I32"),
        ({name: good, "no.such": good.clone()}, "alone, got others: no.such"),
    ]
    for bucket, words in wrong:
        data = save(bucket)
        head = data[: 8 + int.from_bytes(data[:8], "little")]
        with pytest.raises(WeightsRejectedError, match=words):
            stream_to(incoming).feed(head)
    assert incoming.num_arrived == 0
    incoming.put([(name, good)])
    with pytest.raises(WeightsRejectedError, match=rf"come once, got {name} twice"):
        incoming.put([("x_pad_token", tensors["x_pad_token"]), (name, good)])
    with pytest.raises(WeightsRejectedError, match="come once, got x_pad_token twice"):
        incoming.put([("x_pad_token", tensors["x_pad_token"])] * 2)
    incoming.put([("x_pad_token", tensors["x_pad_token"])])
    assert incoming.num_arrived == 2
    with pytest.raises(WeightsRejectedError, match=r"all of the transformer's, got none for .* and 51 more"):
        incoming.stage()
    incoming.put([(key, tensor) for key, tensor in tensors.items() if key not in (name, "x_pad_token")])
    assert incoming.num_arrived == incoming.num_tensors
    incoming.stage()
    for late in (lambda: incoming.put([(name, good)]), incoming.stage):
        with pytest.raises(WeightsRejectedError, match="begin another"):
            late()
    assert_untouched(engine, before)


def test_a_stream_that_is_cut_or_too_long_leaves_nothing(
    engine: Engine, before: tuple[Rollout, str], tensors: dict[str, Tensor]
) -> None:
    data = save(tensors)
    incoming = engine.receive_weights()
    for end in (0, 5, 100, len(data) - 1):
        stream = streamed(incoming, data[:end], 10**6)
        with pytest.raises(WeightsRejectedError, match="must be a whole safetensors file"):
            stream.put()
        stream.drop()
        assert incoming.num_arrived == 0
    for spoilt, words in (
        (data + b"x", "more bytes"),
        (b"\xff" * 64, "broken header"),
        ((5).to_bytes(8, "little") + b"[1,2]", "broken header"),
        ((2**40).to_bytes(8, "little"), "broken header"),
    ):
        stream = stream_to(incoming)
        with pytest.raises(WeightsRejectedError, match=words):
            stream.feed(spoilt)
        stream.drop()
    streamed(incoming, data, 10**6).put()
    assert incoming.num_arrived == len(tensors)
    incoming.drop()
    assert_untouched(engine, before)


def test_an_update_that_is_dropped_takes_nothing_more(engine: Engine, tensors: dict[str, Tensor]) -> None:
    incoming = engine.receive_weights()
    heads = [tensor_head(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()]
    with pytest.raises(WeightsRejectedError, match="begin another"), incoming.bucket(heads) as targets:
        for target in targets:
            target.zero_()
        incoming.drop()
    assert incoming.num_arrived == 0


def test_a_lack_of_memory_is_told_and_leaves_nothing(
    engine: Engine, before: tuple[Rollout, str], tensors: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    incoming = engine.receive_weights()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("no memory left")))
        with pytest.raises(WeightsRejectedError, match="no memory left"):
            incoming.put(list(tensors.items()))
    incoming.put(list(tensors.items()))
    with monkeypatch.context() as patch:
        patch.setattr(
            type(incoming._slots["x_pad_token"]), "own_rows", lambda *_: (_ for _ in ()).throw(MemoryError("none left"))
        )
        with pytest.raises(WeightsRejectedError, match="none left"):
            incoming.stage()
    assert_untouched(engine, before)


def test_buckets_of_several_threads_arrive_each_once(engine: Engine, tensors: dict[str, Tensor]) -> None:
    incoming = engine.receive_weights()
    refused: list[FlowrollError] = []

    def put() -> None:
        for pair in tensors.items():
            try:
                incoming.put([pair])
            except FlowrollError as error:
                refused.append(error)

    threads = [threading.Thread(target=put) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert incoming.num_arrived == incoming.num_tensors and len(refused) == 2 * len(tensors)
    assert all(torch.equal(incoming._arrived[name], tensor) for name, tensor in tensors.items())


def test_a_partial_update_leaves_the_rest(z_image_checkpoint: Path, other: Path, tensors: dict[str, Tensor]) -> None:
    half = dict(list(tensors.items())[::2])
    with Engine(z_image_checkpoint, device="cpu") as engine:
        with pytest.raises(WeightsRejectedError, match="begin a partial update"):
            engine.update_weights_from_tensors(half)
        with pytest.raises(WeightsRejectedError):
            engine.update_weights_from_tensors({}, partial=True)
        update = engine.update_weights_from_tensors(half, partial=True)
        assert (update.num_tensors, update.weight_version) == (len(half), "1")
        rest = {name: tensor for name, tensor in tensors.items() if name not in half}
        engine.update_weights_from_tensors(rest, partial=True)
        with Engine(other, device="cpu") as fresh:
            assert engine.weights_checksum() == fresh.weights_checksum()


def test_bad_modules_versions_and_a_closed_engine_are_refused(
    engine: Engine, before: tuple[Rollout, str], z_image_checkpoint: Path, tensors: dict[str, Tensor]
) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        engine.receive_weights("text_encoder")
    assert refused.value.field == "module"
    with pytest.raises(InvalidRequestError):
        engine.update_weights_from_tensors(tensors, weight_version="a\nb")
    assert_untouched(engine, before)
    closed = Engine(z_image_checkpoint, device="cpu")
    incoming = closed.receive_weights()
    incoming.put(list(tensors.items()))
    closed.close()
    with pytest.raises(ShuttingDownError):
        closed.commit_weights(incoming.stage())
    with pytest.raises(ShuttingDownError):
        closed.receive_weights()


def test_sharded_rows_are_cut_out_of_whole_tensors() -> None:
    from flowroll.engine.weights.receiver import WeightReceiver
    from flowroll.engine.weights.staged import Slot

    live = torch.zeros(2, 3)
    incoming = WeightReceiver("transformer", {"w": Slot(live=live, dtype=live.dtype, shape=(6, 3), first_row=2)})
    whole = torch.arange(18.0).view(6, 3)
    with pytest.raises(WeightsRejectedError, match=r"as \[6, 3\]"):
        incoming.claim([TensorHead(name="w", dtype="F32", shape=(2, 3))])
    incoming.put([("w", whole)])
    staged = incoming.stage()
    assert staged.num_bytes == 24
    staged.commit(lambda: None)
    assert torch.equal(live, whole[2:4]) and live.untyped_storage().nbytes() == 24


@pytest.mark.parametrize("shape", [(), (3,), (3, 2)])
def test_what_arrived_is_not_made_ready_for_an_engine_that_sleeps(shape: tuple[int, ...]) -> None:
    live = torch.zeros(shape)
    incoming = WeightReceiver("transformer", {"w": Slot(live=live, dtype=live.dtype, shape=shape)})
    new = torch.ones(shape)
    incoming.put([("w", new)])
    data, live.data = live.data, torch.empty(0)
    with pytest.raises(WeightsRejectedError, match="while the engine is awake"):
        incoming.stage()
    live.data = data
    incoming.stage().commit(lambda: None)
    assert torch.equal(live, new)


def test_a_sleep_while_a_scalar_is_made_ready_is_no_error_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    live = torch.tensor(0.0)
    incoming = WeightReceiver("transformer", {"w": Slot(live=live, dtype=live.dtype, shape=())})
    incoming.put([("w", torch.tensor(1.0))])
    own_part = incoming._own_part

    def asleep(name: str, tensor: Tensor) -> Tensor:
        live.data = torch.empty(0)
        return own_part(name, tensor)

    monkeypatch.setattr(incoming, "_own_part", asleep)
    with pytest.raises(WeightsRejectedError, match="IndexError"):
        incoming.stage()
