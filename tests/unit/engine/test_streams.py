"""The order of the streams: encoding, steps, copies and decoding of two requests, watched on a fake CUDA device.

The judge is torch's own sanitizer of streams, see `benchmarks.rehearsal.queues`. A wait that is missing shows as a race.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.rehearsal.device import NoFakeDeviceError
from benchmarks.rehearsal.models import SD35_MEDIUM, make_folder, one_number
from benchmarks.rehearsal.queues import RaceError
from benchmarks.rehearsal.run import RECORDED, Rehearsal, rehearsal
from tests.processors import load_without_torchvision
from torch import Tensor

from flowroll import SamplingParams
from flowroll.engine.outputs import Finished
from flowroll.engine.runner.recorder import Recorder
from flowroll.engine.runner.sample import Conditioning
from flowroll.engine.runner.streams import Streams
from flowroll.engine.weights.staged import slots_of
from flowroll.errors import RankLostError

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor is deprecated")

REQUEST: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 2, "guidance_scale": 4.0, "seed": 1}


@pytest.fixture
def rehearsed(tmp_path: Path) -> Iterator[Rehearsal]:
    load_without_torchvision()
    folder = make_folder(SD35_MEDIUM, tmp_path / "checkpoint", layers=1)
    try:
        with rehearsal(folder, variant=SD35_MEDIUM.variant, watched=True, graphs="auto") as found:
            yield found
    except NoFakeDeviceError as error:
        pytest.skip(str(error))


class Running:
    """One request, taken apart into what the scheduler's three threads do."""

    def __init__(self, found: Rehearsal, number: int, **fields: Any) -> None:
        self._engine, self._executor, self.number = found.engine, found.engine._executor, number
        self._during = found.meter.during
        self._plan = found.engine.plan(SamplingParams(**{**REQUEST, **fields}))

    def encode(self) -> None:
        with self._during("encode"):
            self._encoded = self._executor.encode(self._plan)

    def start(self) -> None:
        self._executor.add_request(self.number, self._encoded)
        self._executor.start_sample(self.number, self.number, self._plan.samples[0])
        del self._encoded

    def step(self) -> None:
        with self._during("first step"):
            outcome = self._executor.step([self.number])
        assert not outcome.failures
        self._finished = outcome.finished.get(self.number)

    def decode(self) -> Any:
        sample, self._finished = self._finished, None
        with self._during("decode"):
            image = self._executor.decode(sample)
        ended = Finished(sample=sample, image=image, seconds=0.0, first_step=None, last_step=None)
        with self._during("finish"):
            finish = self._engine._as_rollout if self._plan.params.rollout else self._engine._as_image
            return finish(self._plan, ended)

    def drop(self) -> None:
        self._executor.drop_request(self.number)


def life(found: Rehearsal) -> None:
    """Two requests, whose stages overlap as they do on three threads; then a request that is cancelled, and a sleep."""
    with torch.no_grad():
        found.engine._executor.use_threads(torch.get_num_threads())
        first = Running(found, 1, prompt="a red fox", **RECORDED)
        second = Running(found, 2, prompt="a cat", rollout=False)
        first.encode()
        first.start()
        first.step()
        second.encode()
        first.step()
        second.start()
        second.step()
        answer = first.decode()
        first.drop()
        second.step()
        # The host reads what was copied; a fake device has only zeros.
        assert not answer.log_probs.any()
        del answer
        second.decode()
        second.drop()
        third = Running(found, 3, prompt="a dog", **RECORDED)
        third.encode()
        third.start()
        third.step()
        third.drop()
        del first, second, third
        update(found)
        found.sleep()
        found.wake()


def update(found: Rehearsal) -> None:
    """New weights of the VAE, while the device still decodes for a request that has failed."""
    vae, streams = found.engine._pipeline.vae, found.engine._model.streams
    with found.meter.during("update"):
        receiver = found.engine.receive_weights("vae")
        receiver.put([(name, one_number(slot.shape, slot.live.dtype)) for name, slot in slots_of(vae).items()])
        staged = receiver.stage()
    with streams.decoding():
        for parameter in vae.parameters():
            parameter.sum()
    found.engine.commit_weights(staged)


def test_every_tensor_is_used_in_order(rehearsed: Rehearsal) -> None:
    life(rehearsed)
    rehearsed.order.check()
    # Steps, encoding, decoding, copies, and recording.
    assert len(rehearsed.order.streams) == 5


def steps_do_not_wait_for_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Conditioning, "handed_over", lambda self: self)


def decoding_does_not_wait_for_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    from flowroll.engine.runner.pipeline import PipelineRunner

    monkeypatch.setattr(PipelineRunner, "_after_steps", lambda _, sample: sample)


def copies_do_not_wait_for_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    copy_out = Streams.copy_out

    def too_early(self: Streams, pairs: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(Streams, "after", lambda *_: None)
            return copy_out(self, pairs)

    monkeypatch.setattr(Streams, "copy_out", too_early)


def nobody_waits_for_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Recorder, "wait", lambda _: None)


def memory_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    after = Streams.after
    monkeypatch.setattr(Streams, "after", lambda self, mark, _: after(self, mark, ()))


def the_fixed_inputs_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    handed_over = Conditioning.handed_over

    def forgetful(self: Conditioning) -> Conditioning:
        after = Streams.after
        mine = {id(tensor) for _, tensor in self.env.tensors()}
        with monkeypatch.context() as patch:

            def but_fixed(streams: Streams, mark: Any, tensors: list[Tensor]) -> None:
                after(streams, mark, [one for one in tensors if id(one) in mine])

            patch.setattr(Streams, "after", but_fixed)
            return handed_over(self)

    monkeypatch.setattr(Conditioning, "handed_over", forgetful)


def changes_do_not_wait_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Streams, "synchronize", lambda _: None)


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(steps_do_not_wait_for_encoding, marks=pytest.mark.slow),
        pytest.param(decoding_does_not_wait_for_steps, marks=pytest.mark.slow),
        copies_do_not_wait_for_steps,
        pytest.param(nobody_waits_for_copies, marks=pytest.mark.slow),
        pytest.param(memory_is_not_kept, marks=pytest.mark.slow),
        pytest.param(the_fixed_inputs_are_not_kept, marks=pytest.mark.slow),
        changes_do_not_wait_for_the_device,
    ],
)
def test_a_wait_that_is_missing_shows(
    rehearsed: Rehearsal, monkeypatch: pytest.MonkeyPatch, fault: Callable[[pytest.MonkeyPatch], None]
) -> None:
    # While weights are overwritten, every error ends the engine.
    with monkeypatch.context() as patch, pytest.raises((RaceError, RankLostError)) as caught:
        fault(patch)
        life(rehearsed)
        rehearsed.order.check()
    assert isinstance(caught.value.__cause__ or caught.value, RaceError)
