"""Commands one way, signs of life the other."""

import threading
import time

from torch.distributed import HashStore  # type: ignore[attr-defined]

from flowroll.parallel.channel import Channel, Pulse


def test_every_worker_receives_every_command_in_order_and_none_is_kept() -> None:
    store = HashStore()
    leader, *workers = (Channel(store, rank=rank, num_ranks=3) for rank in range(3))
    keys = store.num_keys()
    for command in ("one", "zwei ☃", "three"):
        leader.send(command)
    for worker in workers:
        assert [worker.receive().decode() for _ in range(3)] == ["one", "zwei ☃", "three"]
    leader.forget()
    assert store.num_keys() == keys
    leader.send("four")
    assert [worker.receive() for worker in workers] == [b"four", b"four"]


def test_stages_are_announced_with_their_words() -> None:
    store = HashStore()
    leader, first, second = (Channel(store, rank=rank, num_ranks=3) for rank in range(3))
    assert leader.announced("loaded") == {}
    second.announce("loaded", "late")
    assert leader.announced("loaded") == {2: "late"}
    first.announce("loaded")
    assert leader.announced("loaded") == {1: "", 2: "late"}
    leader.announce("here")
    first.wait_for("here")


def test_a_rank_that_stops_to_beat_is_silent_from_then_on() -> None:
    store, now_s = HashStore(), [0.0]
    pulse = Pulse(store, num_ranks=3, now_s=lambda: now_s[0])
    now_s[0] = 100.0
    # Neither has begun.
    assert pulse.silent_for_s() == {1: 0.0, 2: 0.0}
    store.set("beat/1", "1")
    assert pulse.silent_for_s() == {1: 0.0, 2: 0.0}
    now_s[0] = 107.0
    assert pulse.silent_for_s() == {1: 7.0, 2: 0.0}
    store.set("beat/1", "2")
    assert pulse.silent_for_s()[1] == 0.0


def test_a_channel_beats_until_it_is_stopped(monkeypatch) -> None:
    monkeypatch.setattr("flowroll.parallel.channel._BEAT_S", 0.05)
    store = HashStore()
    channel = Channel(store, rank=1, num_ranks=2)
    channel.beat(store, lambda: None)
    assert store.get("beat/1") == b"0"
    while store.get("beat/1") == b"0":
        time.sleep(0.01)
    channel.stop()
    time.sleep(0.1)
    last = store.get("beat/1")
    time.sleep(0.1)
    assert store.get("beat/1") == last


def test_workers_hear_that_the_engine_is_taken_down_or_its_store_lost(monkeypatch) -> None:
    monkeypatch.setattr("flowroll.parallel.channel._BEAT_S", 0.02)
    heard = threading.Event()
    store = HashStore()
    leader, worker = (Channel(store, rank=rank, num_ranks=2) for rank in range(2))
    worker.beat(store, heard.set)
    assert not heard.wait(0.1)
    leader.take_down()
    assert heard.wait(5.0)

    class Lost(HashStore):
        def check(self, keys):
            raise RuntimeError("connection reset")

    heard.clear()
    Channel(store, rank=1, num_ranks=2).beat(Lost(), heard.set)
    assert heard.wait(5.0)
