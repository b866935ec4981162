"""A store of rollouts: what is written comes back, whatever is killed, lost or added meanwhile."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.factories import assert_same_answer, make_evaluation, make_rollout

from flowroll import Rollout, load_rollouts, save_rollouts
from flowroll.errors import InvalidRequestError, RolloutFileError
from flowroll.families import FAMILIES
from flowroll.store import RolloutStore, files, index, rollout_store, shards
from flowroll.store.index import Ranges
from flowroll.types import StepImages
from flowroll.wire import files as wire_files

SMALL: dict[str, Any] = {"height": 16, "width": 16, "steps": 2, "text_tokens": 2}


def small(seed: int = 0, **overrides: Any) -> Rollout:
    return make_rollout(**{**SMALL, "family": "z_image", "dtype": torch.float32, "seed": seed, **overrides})


def group(first: int, prompt: str = "a red fox", version: str = "0", count: int = 2) -> list[Rollout]:
    return [
        small(first + place, prompt=prompt, weight_version=version, request_id=f"{prompt} {first}") for place in range(count)
    ]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[RolloutStore]:
    with RolloutStore(tmp_path / "store") as store:
        yield store


def test_every_kind_of_rollout_comes_back_with_its_bits(store: RolloutStore) -> None:
    images = StepImages(step_indices=(1,), images=(make_evaluation(**SMALL, image_format="png").image,))  # type: ignore[arg-type]
    kinds = [
        *(make_rollout(**SMALL, family=family) for family in FAMILIES),
        make_rollout(**SMALL, guided=False, dtype=torch.float16, image_format="png", step_images=images),
        *(make_evaluation(**SMALL, image_format=image_format) for image_format in ("tensor", "uint8", "png", "none")),
        small(prompt=None),
        small()[1:],
    ]
    ids = store.append(kinds)
    assert len(set(ids)) == len(kinds) == len(store)
    for name, rollout, read in zip(ids, kinds, store.select(), strict=True):
        assert_same_answer(read, rollout)
        assert_same_answer(store.load(name), rollout)


def test_the_index_says_what_a_sample_is_and_no_shard_is_opened_for_it(
    store: RolloutStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = store.append(group(3), rewards={"aesthetic": [0.5, None], "reward": [1, 2]}, notes=[None, "blurred"])
    chosen = RolloutStore(store.path, read_only=True).select()
    monkeypatch.setattr(rollout_store, "Shard", None)
    first, second = chosen.samples()
    assert (first.id, first.request_id, first.prompt, first.seed) == (ids[0], "a red fox 3", "a red fox", 3)
    record, log_probs = small(3).sampling, small(3).log_probs
    assert (first.family, first.sde_type, first.noise_level) == ("z_image", "sde", 0.7)
    assert (first.height, first.width, first.num_inference_steps) == (record.height, record.width, 2)
    assert log_probs is not None and first.mean_log_prob == pytest.approx(log_probs.double().mean().item())
    assert first.num_bytes > 0 and abs(first.written_at - time.time()) < 60
    assert first.rewards == {"aesthetic": 0.5, "reward": 1.0} and second.rewards == {"reward": 2.0}
    assert (first.reward, first.notes, second.notes) == (1.0, (), ("blurred",))


def test_samples_are_selected_by_prompt_version_and_reward(store: RolloutStore) -> None:
    store.append(group(0, "a red fox", "1"), rewards=[0.1, 0.9])
    store.append(group(10, "a blue cow", "1"), rewards=[0.5, None])
    store.append(group(20, "a red fox", "2"))

    def seeds(**wanted: Any) -> list[int]:
        return [rollout.seed for rollout in store.select(**wanted)]

    assert seeds() == [0, 1, 10, 11, 20, 21]
    assert seeds(prompt="a red fox") == [0, 1, 20, 21] and seeds(prompt="a red") == []
    assert seeds(prompt=["a blue cow", "none"]) == [10, 11] and seeds(prompt_contains="RED") == [0, 1, 20, 21]
    assert seeds(weight_version="1") == [0, 1, 10, 11] and seeds(weight_version="1", prompt="a red fox") == [0, 1]
    assert seeds(min_reward=0.5) == [1, 10] and seeds(max_reward=0.5) == [0, 10] and seeds(min_reward=0.5, seed=(1, 20)) == [1]
    assert seeds(min_reward=0, reward="aesthetic") == [] and seeds(request_id="a red fox 20") == [20, 21]
    assert [len(part) for part in store.select().groups()] == [2, 2, 2]
    chosen = store.select()
    assert [rollout.seed for rollout in chosen[1:5:2]] == [1, 11] and chosen[-1].seed == 21
    assert chosen.rewards() == [0.1, 0.9, 0.5, None, None, None]
    table = chosen.to_arrow()
    assert table.column("id").to_pylist() == chosen.ids and table.column("reward").to_pylist() == chosen.rewards()
    with pytest.raises(InvalidRequestError, match="seed must be int64 or several, got 1180591620717411303424; "):
        store.select(seed=2**70)
    with pytest.raises(IndexError):
        chosen[6]


def test_rewards_and_notes_that_come_later_count_and_no_shard_is_written_again(store: RolloutStore) -> None:
    ids = [*store.append(group(0), rewards=[0.1, 0.2]), *store.append(group(10))]
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in (store.path / "shards").iterdir()}
    store.add_rewards({ids[0]: 5.0, ids[2]: 6.0})
    store.add_rewards({ids[0]: 7.0, ids[3]: 1.0})
    store.add_rewards({ids[1]: 3.0}, name="aesthetic")
    store.add_notes({ids[1]: "first"})
    store.add_notes({ids[1]: "second", ids[0]: "third"})
    store.add_rewards({})
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in (store.path / "shards").iterdir()} == before
    again = RolloutStore(store.path, read_only=True)
    assert again.select().rewards() == [7.0, 0.2, 6.0, 1.0]
    samples = list(again.select().samples())
    assert [dict(sample.rewards) for sample in samples] == [
        {"reward": 7.0},
        {"reward": 0.2, "aesthetic": 3.0},
        {"reward": 6.0},
        {"reward": 1.0},
    ]
    assert [sample.notes for sample in samples] == [("third",), ("first", "second"), (), ()]
    assert again.select(min_reward=6).ids == [ids[0], ids[2]]
    assert again.select(max_reward=3, reward="aesthetic").ids == [ids[1]]


def test_what_does_not_fit_is_refused_before_anything_is_written(store: RolloutStore) -> None:
    with pytest.raises(InvalidRequestError, match=r"rollouts must hold 1 to 4096 rollouts, got 0"):
        store.append([])
    with pytest.raises(InvalidRequestError, match=r"reward must have a value for each of the 2 rollouts, got 1"):
        store.append(group(0), rewards=[1.0])
    with pytest.raises(InvalidRequestError, match=r"rewards must be finite, got nan"):
        store.append(group(0), rewards=[1.0, float("nan")])
    for name in ("000000-000", "x", "000000", "1-9999"):
        for use in (store.load, lambda name: store.add_rewards({name: 1.0}), lambda name: store.add_notes({name: ""})):
            with pytest.raises(InvalidRequestError, match="id must be that of a sample in the store, got "):
                use(name)
    assert len(store) == 0 and not list((store.path / "shards").iterdir())
    with pytest.raises(RolloutFileError, match=r"path must be open for writing, got .* read only"):
        RolloutStore(store.path, read_only=True).append(group(0))


def table_of(store: RolloutStore) -> list[dict[str, Any]]:
    return store.select().to_arrow().to_pylist()


def test_the_files_of_the_index_are_joined_and_a_lost_index_is_made_again(
    store: RolloutStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "_FAN_IN", 3)
    for first in range(0, 22, 2):
        ids = store.append(group(first), rewards=[first, None])
        store.add_rewards({ids[1]: first + 1})
    names = [path.name for path in sorted((store.path / "index").iterdir())]
    assert names == ["00000000-00000008.parquet", "00000009-00000009.parquet", "00000010-00000010.parquet"]
    assert len(list((store.path / "notes").iterdir())) == 3
    whole = table_of(store)
    assert [row["seed"] for row in whole] == [*range(22)] and store.select().rewards() == [*map(float, range(22))]
    # A joined file beside one of its parts, as a kill leaves them.
    (store.path / "index" / "00000003-00000003.parquet").write_bytes((store.path / "index" / names[1]).read_bytes())
    assert table_of(store) == whole
    for name in ("00000003-00000003.parquet", names[0], names[2]):
        (store.path / "index" / name).unlink()
    reader = RolloutStore(store.path, read_only=True)
    assert table_of(reader) == whole and len(list((store.path / "index").iterdir())) == 1
    assert table_of(RolloutStore(store.path)) == whole and table_of(reader) == whole
    assert len(list((store.path / "index").iterdir())) == 3


def test_a_reader_whose_files_are_joined_meanwhile_looks_again(store: RolloutStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "_FAN_IN", 2)
    store.append(group(0))
    listed = Ranges._whole

    def and_then_joined(ranges: Ranges) -> Any:
        found = listed(ranges)
        monkeypatch.setattr(Ranges, "_whole", listed)
        store.append(group(2))
        return found

    monkeypatch.setattr(Ranges, "_whole", and_then_joined)
    # The shards were listed before the second one came; a joined file that has both is read as it is.
    assert [rollout.seed for rollout in store.select()][:2] == [0, 1]


def in_a_child(act: Callable[[], None]) -> int:
    """Runs this in a forked process; its id. It must not return to pytest."""
    child = os.fork()
    if child == 0:
        try:
            act()
        finally:
            os._exit(1)
    return child


def kill_when(child: int, is_time: Callable[[], bool]) -> None:
    end_s = time.monotonic() + 30
    while not is_time():
        assert time.monotonic() < end_s
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL


def test_a_kill_while_a_shard_is_written_costs_that_group_alone(store: RolloutStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.append(group(0))
    tensor_bytes = wire_files.tensor_bytes

    def slowly(tensor: torch.Tensor) -> memoryview:
        time.sleep(0.05)
        return tensor_bytes(tensor)

    def write() -> None:
        again = RolloutStore(store.path)
        again.append(group(10))
        wire_files.tensor_bytes = slowly  # type: ignore[assignment]
        again.append(group(20))

    child = in_a_child(write)
    shard_folder = store.path / "shards"

    def is_half_written() -> bool:
        parts = [path for path in shard_folder.glob(".*.part") if path.name.startswith(".00000002")]
        return any(path.stat().st_size > 0 or time.sleep(0.1) is None for path in parts)

    kill_when(child, is_half_written)
    assert len(list(shard_folder.glob(".*.part"))) == 1
    assert [rollout.seed for rollout in RolloutStore(store.path, read_only=True).select()] == [0, 1, 10, 11]
    with RolloutStore(store.path) as again:
        assert not list(shard_folder.glob(".*.part"))
        again.append(group(30))
        assert [rollout.seed for rollout in again.select()] == [0, 1, 10, 11, 30, 31]
    # The store that was open all the time sees it too, and its next append takes the next place.
    assert store.append(group(40)) == ["000003-000", "000003-001"]


@pytest.mark.parametrize("moment", ["before the index", "while the index is joined"])
def test_a_kill_after_a_shard_is_written_costs_nothing(
    store: RolloutStore, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "_FAN_IN", 2)
    store.append(group(0))

    def die(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(30)

    def write() -> None:
        again = RolloutStore(store.path)
        if moment == "before the index":
            Ranges.add = die  # type: ignore[method-assign]
        else:
            Path.unlink = lambda path, missing_ok=False: die() if path.suffix == ".parquet" else None  # type: ignore[method-assign]
        again.append(group(10), rewards=[0.5, 0.6])

    assert os.waitpid(in_a_child(write), 0)[1] == signal.SIGKILL
    reader = RolloutStore(store.path, read_only=True)
    with RolloutStore(store.path) as again:
        for one in (reader, again):
            assert [rollout.seed for rollout in one.select()] == [0, 1, 10, 11]
            assert one.select().rewards() == [None, None, 0.5, 0.6]
        again.append(group(20))
        again.append(group(30))
        assert [path.name for path in (store.path / "index").iterdir()] == ["00000000-00000003.parquet"]
        assert again.select().rewards() == [None, None, 0.5, 0.6, None, None, None, None]


def test_processes_that_write_at_the_same_time_lose_nothing(store: RolloutStore) -> None:
    def write(first: int) -> Callable[[], None]:
        def act() -> None:
            with RolloutStore(store.path) as again:
                for place in range(8):
                    ids = again.append(group(first + 2 * place))
                    again.add_rewards({ids[0]: float(first + 2 * place)})
            os._exit(0)

        return act

    children = [in_a_child(write(first)) for first in (100, 200)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    chosen = store.select()
    assert sorted(rollout.seed for rollout in chosen) == [*range(100, 116), *range(200, 216)]
    assert [reward for reward in chosen.rewards() if reward is not None] == [r.seed for r in chosen if r.seed % 2 == 0]


def test_a_full_disk_leaves_the_store_as_it_was(store: RolloutStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.append(group(0))

    def full(tensor: Any) -> memoryview:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(wire_files, "tensor_bytes", full)
        with pytest.raises(RolloutFileError, match=r"path must be writable, got .* \(No space left on device\)"):
            store.append(group(10))
    assert len(store) == 2 and len(list((store.path / "shards").iterdir())) == 1
    store.append(group(20))
    assert [rollout.seed for rollout in store.select()] == [0, 1, 20, 21]


def test_an_index_that_cannot_be_written_costs_nothing(store: RolloutStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise RolloutFileError("path must be writable")

    with monkeypatch.context() as patched:
        patched.setattr(Ranges, "_write", full)
        store.append(group(0))
    assert [rollout.seed for rollout in store.select()] == [0, 1]


def test_a_damaged_shard_or_index_is_a_clear_error(store: RolloutStore) -> None:
    store.append(group(0))
    (table,) = (store.path / "index").iterdir()
    whole = table.read_bytes()
    table.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RolloutFileError, match="remove it, the index is then made again"):
        store.select()
    table.unlink()
    assert len(store.select()) == 2
    (shard,) = (store.path / "shards").iterdir()
    shard.write_bytes(shard.read_bytes()[:1000])
    store.close()
    with pytest.raises(RolloutFileError, match="path must be a whole shard, got "):
        RolloutStore(store.path, read_only=True).load("000000-000")


def test_a_folder_that_is_no_store_or_one_of_a_later_version_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(RolloutFileError, match=r"path must be a store, got .* without flowroll-store.json; check the path"):
            RolloutStore(path, read_only=True)
    (tmp_path / "file").touch()
    with pytest.raises(RolloutFileError, match="path must be a folder or free, got "):
        RolloutStore(tmp_path / "file")
    RolloutStore(tmp_path / "later")
    (tmp_path / "later" / rollout_store.MARKER).write_text('{"schema_version": 2}')
    for read_only in (True, False):
        with pytest.raises(
            RolloutFileError, match=r"schema_version must be at most 1, got 2 in .*; read it with a later flowroll"
        ):
            RolloutStore(tmp_path / "later", read_only=read_only)


def test_save_and_load_take_a_store_a_folder_of_files_or_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_AT_ONCE", 2)
    rollouts = group(0, count=5)
    ids = save_rollouts(tmp_path / "store", rollouts, rewards=[1, 2, 3, None, 5])
    assert ids[2:4] == ["000001-000", "000001-001"]
    found = load_rollouts(tmp_path / "store")
    for read, rollout in zip(found, rollouts, strict=True):
        assert_same_answer(read, rollout)
    (tmp_path / "files").mkdir()
    for number, rollout in enumerate(rollouts):
        rollout.save(tmp_path / "files" / f"{number}.safetensors")
    assert [rollout.seed for rollout in load_rollouts(tmp_path / "files")] == [0, 1, 2, 3, 4]
    assert [rollout.seed for rollout in load_rollouts(tmp_path / "files" / "3.safetensors")] == [3]
    with pytest.raises(RolloutFileError, match="path must be a store or hold rollout files, got the folder "):
        load_rollouts(tmp_path)


def test_few_shards_are_open_at_a_time(store: RolloutStore, monkeypatch: pytest.MonkeyPatch) -> None:
    for first in range(12):
        store.append(group(first, count=1))
    opened = []

    class Counted(shards.Shard):
        def __init__(self, path: Path) -> None:
            opened.append(path.name)
            super().__init__(path)

    monkeypatch.setattr(rollout_store, "Shard", Counted)
    assert sum(1 for _ in store.select()) == 12
    # The suite's type checks look at some more.
    assert set(opened) == {path.name for path in (store.path / "shards").iterdir()}
    assert len(store._open) == 4
