"""Rollouts as a dataset, over the real engine and the real server."""

import gc
import inspect
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ZImageTransformer2DModel
from tests.factories import make_rollout
from tests.hooked import WAIT_S, Gate, HookedEngine
from tests.serving.servers import serving, until
from torch.utils.data import DataLoader

from flowroll import Client, Rollout, replay
from flowroll.client import AsyncClient
from flowroll.engine import Engine
from flowroll.engine.service import EngineService
from flowroll.errors import CancelledRequestError, InvalidRequestError, OutdatedWeightsError, QueueFullError
from flowroll.integrations.torch import RolloutDataset, group_seed

PROMPTS = ["a red circle", "a blue square", "a green triangle", "a white circle"]
SMALL: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 2, "guidance_scale": 0}
REPLAYED: dict[str, Any] = {**SMALL, "return_denoising_env": True, "return_dit_trajectory": True}


@pytest.fixture(scope="module")
def engine(z_image_checkpoint: Path) -> Iterator[HookedEngine]:
    with HookedEngine(z_image_checkpoint, device="cpu") as engine:
        yield engine


@pytest.fixture(scope="module")
def client(engine: HookedEngine) -> Iterator[Client]:
    with EngineService(engine, max_queue=8) as service, serving(service) as http, Client(str(http.base_url)) as client:
        yield client


@pytest.fixture
def policy(z_image_checkpoint: Path, engine: HookedEngine) -> Iterator[ZImageTransformer2DModel]:
    """The trainer's copy of the weights; the engine gets them again when the test ends."""
    policy = ZImageTransformer2DModel.from_pretrained(z_image_checkpoint / "transformer")
    replay.align_weights(policy)
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    yield policy
    engine.hook = lambda plan: None
    engine.update_weights_from_tensors(before)


@pytest.fixture(params=["engine", "client"])
def source(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    if remaining():
        gc.collect()
    assert not remaining()


def remaining() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("rollouts-")]


class FakeSource:
    """Makes rollouts of nothing, under a version that a test sets."""

    scheduler: Any

    def __init__(self) -> None:
        self.scheduler, self.weight_version, self.seeds = self, "0", []
        self.before: Callable[[dict[str, Any]], None] = lambda fields: None

    def rollout(self, **fields: Any) -> list[Rollout]:
        self.seeds.append(fields.get("seed"))
        version = self.weight_version
        self.before(fields)
        return [make_rollout(weight_version=version, prompt=fields["prompt"])]

    def abort(self, request_id: str) -> None:
        pass


def test_groups_come_in_the_order_of_the_prompts_with_the_bits_of_plain_rollouts(source: Any, engine: Engine) -> None:
    dataset = RolloutDataset(source, PROMPTS, seed=3, num_outputs_per_prompt=2, **REPLAYED)
    groups = list(dataset)
    assert [group.item for group in groups] == PROMPTS and [group.index for group in groups] == [0, 1, 2, 3]
    for group in groups:
        seed = group_seed(3, epoch=0, index=group.index)
        alone = engine.rollout(group.item, seed=seed, num_outputs_per_prompt=2, **REPLAYED)
        assert group.staleness == 0 and [one.seed for one in group.rollouts] == [seed, seed + 1]
        for rollout, expected in zip(group.rollouts, alone, strict=True):
            assert torch.equal(rollout.image, expected.image) and torch.equal(rollout.log_probs, expected.log_probs)


def test_the_ratio_is_exactly_one_in_a_dataloader(source: Any, policy: ZImageTransformer2DModel) -> None:
    dataset = RolloutDataset(source, PROMPTS, num_outputs_per_prompt=2, **REPLAYED)
    batches = list(DataLoader(dataset, batch_size=2, collate_fn=list))
    assert [len(batch) for batch in batches] == [2, 2]
    rollouts = [rollout for batch in batches for group in batch for rollout in group.rollouts]
    for batch in replay.micro_batches(policy, rollouts, micro_batch=4, merge="exact"):
        assert (replay.ratio(batch.log_probs, batch.old_log_probs) == 1).all()


@pytest.mark.parametrize("most", [0, 1])
def test_no_group_is_older_than_the_bound_and_replays_with_the_weights_of_its_version(
    most: int, engine: HookedEngine, policy: ZImageTransformer2DModel
) -> None:
    first = int(engine.weight_version)
    states = {first: {name: tensor.clone() for name, tensor in policy.state_dict().items()}}
    dataset = RolloutDataset(engine, PROMPTS * 2, max_staleness=most, prefetch=2, **REPLAYED)
    lags = []
    for number, group in enumerate(dataset):
        now = first + number
        assert group.staleness == now - int(group.weight_version) <= most
        lags.append(group.staleness)
        policy.load_state_dict(states[int(group.weight_version)])
        (recomputed,) = replay.micro_batches(policy, group.rollouts, micro_batch=4)
        assert (replay.ratio(recomputed.log_probs, recomputed.old_log_probs) == 1).all()
        states[now + 1] = {name: tensor * 1.01 for name, tensor in states[now].items()}
        # What is under way is made first, so that it is certainly old.
        until(lambda: all(not slot.is_waiting and slot.rollouts for work in dataset._works for slot in work.slots))
        engine.update_weights_from_tensors(states[now + 1])
    assert max(lags) == most and dataset.num_discarded > 0


def test_other_epochs_have_other_noise_and_a_resumed_one_the_same(engine: Engine) -> None:
    dataset = RolloutDataset(engine, PROMPTS[:2], **SMALL)
    first, second = list(dataset), list(dataset)
    assert dataset.epoch == 2
    assert {one.rollouts[0].seed for one in first}.isdisjoint(one.rollouts[0].seed for one in second)
    again = list(RolloutDataset(engine, PROMPTS[:2], epoch=1, **SMALL))
    assert [one.rollouts[0].seed for one in again] == [one.rollouts[0].seed for one in second]


def test_items_may_have_fields_of_their_own(engine: Engine) -> None:
    items = [{"prompt": "a red circle", "seed": 9, "num_inference_steps": 3}, {"prompt": "a dot", "seeds": [4, 2]}]
    first, second = RolloutDataset(engine, items, **SMALL)
    assert first.item is items[0]
    assert [one.seed for one in first.rollouts] == [9] and len(first.rollouts[0].log_probs) == 3
    assert [one.seed for one in second.rollouts] == [4, 2]


def test_without_a_seed_the_source_draws_one() -> None:
    source = FakeSource()
    list(RolloutDataset(source, PROMPTS, seed=None))
    assert source.seeds == [None] * 4


def test_seeds_of_large_groups_stay_below_two_to_the_32() -> None:
    seeds = [group_seed(0, epoch=epoch, index=index) for epoch in range(20) for index in range(200)]
    assert len(set(seeds)) == len(seeds) and max(seeds) < 2**31 and max(seeds) > 2**30


def test_a_generator_is_advanced_by_the_thread_that_iterates_and_no_further_than_needed() -> None:
    threads = []

    def prompts() -> Iterator[str]:
        for number in count():
            threads.append(threading.get_ident())
            yield f"prompt {number}"

    stream = iter(RolloutDataset(FakeSource(), prompts(), prefetch=2))
    assert [next(stream).item for _ in range(4)] == [f"prompt {number}" for number in range(4)]
    assert set(threads) == {threading.get_ident()} and len(threads) == 4 + 2


def test_what_is_made_ahead_is_bounded() -> None:
    source = FakeSource()
    stream = iter(RolloutDataset(source, PROMPTS * 10, prefetch=3))
    next(stream)
    until(lambda: len(source.seeds) == 4)
    time.sleep(0.05)
    assert len(source.seeds) == 4


def test_the_prompts_after_the_present_one_are_made_meanwhile() -> None:
    """The loop need not ask for the next group for it to be made."""
    source = FakeSource()
    dataset = RolloutDataset(source, PROMPTS, prefetch=2)
    stream = iter(dataset)
    next(stream)
    until(lambda: all(slot.rollouts for work in dataset._works for slot in work.slots))
    source.before = lambda fields: pytest.fail("made too late")
    assert [next(stream).index for _ in range(2)] == [1, 2]


@pytest.mark.parametrize("end", ["break", "close", "with", "loader"])
def test_dropping_the_iteration_aborts_what_runs(end: str, source: Any, engine: HookedEngine) -> None:
    items = [PROMPTS[0], *({"prompt": prompt, "num_inference_steps": 1000} for prompt in PROMPTS[1:])]
    dataset = RolloutDataset(source, items, prefetch=2, **SMALL)
    before = engine.scheduler.load().requests

    def wait_for_the_long_ones() -> None:
        until(lambda: engine.scheduler.load().requests.running == 2)

    if end == "loader":
        for _ in DataLoader(dataset, batch_size=None):
            wait_for_the_long_ones()
            break
    else:
        stream = iter(dataset)
        next(stream)
        wait_for_the_long_ones()
        if end == "break":
            del stream
        elif end == "close":
            dataset.close()
            assert next(stream, None) is None
        else:
            with dataset:
                pass
    assert not remaining()
    until(lambda: engine.scheduler.load().requests.running == 0)
    after = engine.scheduler.load().requests
    assert (after.completed - before.completed, after.failed - before.failed) == (1, 2)


def test_a_loop_that_waits_ends_when_the_dataset_is_closed() -> None:
    source, gate = FakeSource(), threading.Event()
    source.before = lambda fields: gate.wait(WAIT_S)  # type: ignore[assignment]
    dataset = RolloutDataset(source, PROMPTS)
    stream, found = iter(dataset), []
    thread = threading.Thread(target=lambda: found.append(next(stream, "ended")))
    thread.start()
    until(lambda: len(source.seeds) == 3)
    threading.Timer(0.1, gate.set).start()
    dataset.close()
    thread.join(WAIT_S)
    assert found == ["ended"]


def test_an_error_comes_at_its_place_and_ends_the_iteration(source: Any) -> None:
    items = [PROMPTS[0], {"prompt": "x", "height": 63}, PROMPTS[1]]
    stream = iter(RolloutDataset(source, items, **SMALL))
    assert next(stream).index == 0
    with pytest.raises(InvalidRequestError, match="height must be a multiple"):
        next(stream)
    assert next(stream, None) is None


def test_an_error_of_the_prompts_comes_at_its_place() -> None:
    def prompts() -> Iterator[str]:
        yield "first"
        raise OSError("the disk")

    stream = iter(RolloutDataset(FakeSource(), prompts(), prefetch=2))
    assert next(stream).item == "first"
    with pytest.raises(OSError, match="the disk"):
        next(stream)


def test_an_abort_by_someone_else_is_an_error(engine: HookedEngine) -> None:
    gate = Gate()
    engine.hook = gate
    stream = iter(RolloutDataset(engine, PROMPTS[:1], **SMALL))
    thread = threading.Thread(target=lambda: (gate.entered.wait(WAIT_S), engine.scheduler.abort(None), gate.opened.set()))
    thread.start()
    with pytest.raises(CancelledRequestError):
        next(stream)
    thread.join(WAIT_S)
    engine.hook = lambda plan: None


def test_a_full_server_is_asked_again() -> None:
    source, refused = FakeSource(), []

    def refuse(fields: dict[str, Any]) -> None:
        if len(refused) < 3:
            refused.append(fields)
            raise QueueFullError("full", retry_after_s=0.01)

    source.before = refuse
    assert len(list(RolloutDataset(source, PROMPTS))) == 4 and len(refused) == 3


def test_a_wait_for_a_full_server_ends_with_the_iteration() -> None:
    source = FakeSource()

    def refuse(fields: dict[str, Any]) -> None:
        raise QueueFullError("full", retry_after_s=50.0)

    source.before = refuse
    dataset, started_s = RolloutDataset(source, PROMPTS, prefetch=0), time.monotonic()
    stream = iter(dataset)
    threading.Timer(0.2, dataset.close).start()
    assert next(stream, None) is None
    assert time.monotonic() - started_s < 20


def test_weights_that_run_away_are_an_error_after_a_bounded_number_of_attempts() -> None:
    source = FakeSource()

    def advance(fields: dict[str, Any]) -> None:
        source.weight_version = str(int(source.weight_version) + 1)

    source.before = advance
    with pytest.raises(OutdatedWeightsError, match="after 8 attempts"):
        next(iter(RolloutDataset(source, PROMPTS, max_staleness=0, prefetch=0)))
    assert len(source.seeds) == 9 and len(set(source.seeds)) == 1


def test_versions_that_are_no_numbers_have_no_age() -> None:
    source = FakeSource()
    source.weight_version = "tuesday"
    with pytest.raises(InvalidRequestError, match="max_staleness must be None"):
        next(iter(RolloutDataset(source, PROMPTS)))
    group = next(iter(RolloutDataset(source, PROMPTS, max_staleness=None)))
    assert group.weight_version == "tuesday" and group.staleness is None


def test_worker_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # How long a loader that failed waits for its worker, which has ended, when it is collected.
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.1)
    dataset = RolloutDataset(FakeSource(), PROMPTS)
    with pytest.raises(InvalidRequestError, match="num_workers=0"):
        next(iter(DataLoader(dataset, batch_size=None, num_workers=1, multiprocessing_context="fork")))
    gc.collect()
    with pytest.raises(InvalidRequestError, match="num_workers=0"):
        pickle.dumps(dataset)


def made_unchecked(*args: Any, **arguments: Any) -> RolloutDataset:
    """Calls the constructor itself: the checker of annotations would refuse a wrong type before its own check sees it."""
    dataset = RolloutDataset.__new__(RolloutDataset)
    inspect.unwrap(RolloutDataset.__init__)(dataset, *args, **arguments)
    return dataset


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": object()}, "source must be an Engine or a Client"),
        ({"prompts": "a fox"}, "prompts must be an iterable"),
        ({"prompts": 3}, "prompts must be an iterable"),
        ({"max_staleness": -1}, "max_staleness must be an integer >= 0 or None"),
        ({"max_staleness": True}, "max_staleness must be an integer >= 0"),
        ({"prefetch": None}, "prefetch must be an integer >= 0"),
        ({"seed": 1.5}, "seed must be an integer >= 0"),
        ({"heigth": 64}, "use height if that is meant"),
        ({"seeds": [1]}, "seeds must be given with the prompts"),
        ({"noise_level": -1}, "noise_level"),
        ({"policy": "old"}, "policy must be left out"),
    ],
)
def test_wrong_arguments_are_refused_at_once(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        made_unchecked(**{"source": FakeSource(), "prompts": PROMPTS, **change})


def test_an_asynchronous_client_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="source must be an Engine or a Client, got AsyncClient"):
        RolloutDataset(AsyncClient("http://127.0.0.1:1"), PROMPTS)


@pytest.mark.parametrize(
    ("item", "message"),
    [(7, r"prompts\[0\] must be a text"), ({"prompt": "x", "stepz": 3}, "stepz"), ({"prompt": "x", "policy": "old"}, "policy")],
)
def test_wrong_items_are_refused(item: Any, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        next(iter(made_unchecked(FakeSource(), [item])))


def test_its_length_is_that_of_the_prompts() -> None:
    assert len(RolloutDataset(FakeSource(), PROMPTS)) == 4
    with pytest.raises(TypeError, match="must have a length"):
        len(RolloutDataset(FakeSource(), iter(PROMPTS)))


def test_a_program_that_never_drops_its_iteration_ends() -> None:
    """Threads that wait would otherwise keep the interpreter alive."""
    code = (
        "from flowroll.integrations.torch import RolloutDataset\n"
        "class Source:\n"
        "    weight_version, rollout, abort = '0', lambda self, **fields: [self], lambda self, request_id: None\n"
        "    scheduler = property(lambda self: self)\n"
        "stream = iter(RolloutDataset(Source(), ['a', 'b'])); next(stream); print('done')"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=WAIT_S)
    assert ended.returncode == 0 and ended.stdout == "done\n" and not ended.stderr, ended.stderr
