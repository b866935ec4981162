"""Takes an engine through its life on the fake device: load, encode, steps, decode, finish, replay, update, sleep, wake.

It goes through the doors that callers have. In place of the scheduler, whose threads know nothing of torch's modes, stands one
that does the same work on the calling thread, a stage after the other.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.rehearsal.device import fake_cuda, fused_attention, stand_ins
from benchmarks.rehearsal.graphs import captures
from benchmarks.rehearsal.meter import STEP, Count, Meter
from benchmarks.rehearsal.models import empty_weights, one_number
from benchmarks.rehearsal.queues import Order, Queues
from benchmarks.rehearsal.ranks import FakePeers, fake_mesh
from benchmarks.rehearsal.waits import WAITS
from flowroll import Engine, Rollout, SamplingParams, replay
from flowroll.engine import Limits
from flowroll.engine import engine as engine_module
from flowroll.engine.config import Graphs
from flowroll.engine.outputs import Finished
from flowroll.engine.plan import RequestPlan
from flowroll.engine.runner.executor import Executor
from flowroll.engine.scheduler.request import Finish, RequestFuture
from flowroll.engine.weights.staged import slots_of
from flowroll.exact import Certificate
from flowroll.exact.kernels import KernelSet
from flowroll.types import Layout

# Everything that a rollout can record.
RECORDED: dict[str, Any] = {
    "rollout_sde_type": "sde",
    "rollout_debug_mode": True,
    "rollout_return_denoising_env": True,
    "rollout_return_dit_trajectory": True,
}


class HereScheduler:
    """Does what the engine's scheduler does, at once and on the calling thread.

    Args:
        executor: Runs the model.
        meter: Counts, stage by stage.
        stepping: The most samples of a request that take steps; the others are started, and wait.
    """

    stopped = None
    is_in_exclusive_task = False

    def __init__(self, executor: Executor, meter: Meter, stepping: int) -> None:
        self._executor, self._meter, self._stepping = executor, meter, stepping
        self._has_stepped = False

    def start(self) -> None:
        """Does nothing: there are no threads."""

    def stop(self, *_: object, **__: object) -> None:
        """Does nothing: there are no threads."""

    def halt(self, _: float) -> bool:
        """Says that all threads have ended."""
        return True

    def exclusive(self, action: Callable[[], Any], **_: object) -> Future[Any]:
        """Runs an action on the model."""
        future: Future[Any] = Future()
        future.set_result(action())
        return future

    def submit(self, plan: RequestPlan, finish: Finish, **_: object) -> RequestFuture[Any]:
        """Runs a request to its end."""
        future: RequestFuture[Any] = RequestFuture(plan.request_id)
        executor, during = self._executor, self._meter.during
        executor.use_threads(torch.get_num_threads())
        with torch.no_grad():
            with during("encode"):
                conditioning = executor.encode(plan)
            with during("start"):
                executor.add_request(0, conditioning)
                keys = {executor.start_sample(planned.index, 0, planned) for planned in plan.samples}
                assert len(keys) == 1
            ids, finished = [planned.index for planned in plan.samples][: self._stepping], {}
            while len(finished) < len(ids):
                with during(STEP if self._has_stepped else "first step"):
                    outcome = executor.step(ids)
                self._has_stepped = True
                for failure in outcome.failures.values():
                    raise failure
                finished.update(outcome.finished)
            answers = []
            for index in ids:
                with during("decode"):
                    image = executor.decode(finished[index])
                with during("finish"):
                    ended = Finished(sample=finished.pop(index), image=image, seconds=0.0, first_step=None, last_step=None)
                    answers.append(finish(plan, ended))
                finished[index] = None
            executor.drop_request(0)
        future.set_result(answers)
        return future


class Rehearsal:
    """An engine on the fake device.

    Args:
        engine: The engine.
        meter: Counts what it does.
        order: Watches the order of its streams, where it is watched.
    """

    def __init__(self, engine: Engine, meter: Meter, order: Order) -> None:
        self.engine, self.meter, self.order = engine, meter, order
        self.transformer = engine._model.transformer
        self.weights = meter.live

    @property
    def counts(self) -> dict[str, Count]:
        """The counts of the operations so far, by stage."""
        return self.meter.counts

    def rollouts(self, num_samples: int, **request: Any) -> list[Rollout]:
        """Runs a group of recorded rollouts."""
        plan = self.engine.plan(SamplingParams(**request, **RECORDED, num_outputs_per_prompt=num_samples, seed=1))
        return self.engine.rollout(plan)

    def generate(self, **request: Any) -> None:
        """Runs plain generation of one picture."""
        plan = self.engine.plan(SamplingParams(**request, rollout=False, seed=1))
        self.engine.generate(plan)

    def replay(self, rollouts: Sequence[Rollout]) -> None:
        """Replays the first step of rollouts, up to the log-probs, without their backward."""
        with self.meter.during("replay"), torch.no_grad():
            replay.log_prob(self.transformer, rollouts, steps=[0])

    def update(self) -> None:
        """Gives the engine new weights, tensor by tensor from the host."""
        with self.meter.during("update"):
            receiver = self.engine.receive_weights()
            for name, slot in slots_of(self.transformer).items():
                receiver.put([(name, one_number(slot.shape, slot.live.dtype))])
            self.engine.commit_weights(receiver.stage())

    def sleep(self) -> int:
        """Sends the engine to sleep; returns the bytes that stay on the device."""
        with self.meter.during("sleep"):
            self.engine.sleep()
            return self.meter.live

    def wake(self) -> None:
        """Wakes the engine."""
        with self.meter.during("wake"):
            self.engine.wake()


def uncertified(transformer: object, kernels: KernelSet, **_: object) -> Certificate:
    """Stands in for `certify`: tensors without numbers answer no question about bits."""
    return Certificate(
        name=kernels.name,
        hardware=kernels.hardware,
        versions=kernels.versions,
        settings=kernels.settings,
        num_threads=1,
        num_asked=0,
        num_merged=0,
        gradients=False,
        num_known=0,
        seconds=0.0,
    )


@contextlib.contextmanager
def rehearsal(
    folder: Path,
    *,
    variant: str | None,
    layout: Layout | None = None,
    rank: int = 0,
    waits: Mapping[str, Mapping[str, str]] | None = WAITS,
    stepping: int = sys.maxsize,
    watched: bool = False,
    graphs: Graphs = "off",
) -> Iterator[Rehearsal]:
    """Opens an engine on a checkpoint folder of `make_folder`, on the fake device.

    Args:
        folder: The folder.
        variant: The family's variant; None: the first.
        layout: The layout of the ranks; None: one rank.
        rank: Which of them this one is.
        waits: Where the host may wait; see `Meter`.
        stepping: The most samples of a request that take steps.
        graphs: Whether forwards of small samples are recorded; what a recording replays is not counted.
        watched: Whether the order of the streams is watched, which takes about as long again.

    Raises:
        NoFakeDeviceError: This build of torch cannot have such a device.
        DeviceFaultError: An operation has operands on two devices, or the host waits for the device where it must not.
        RaceError: Two streams use the same memory without an order. `Rehearsal.order` says what was freed too early.
    """
    layout = layout or Layout()
    with contextlib.ExitStack() as stack:
        fake = stack.enter_context(fake_cuda())
        meter = Meter(fake, waits)
        queues = Queues()
        order = Order(queues, meter)
        stack.enter_context(stand_ins(lambda: max(count.peak for count in meter.counts.values()), queues))
        stack.enter_context(captures(meter))
        stack.enter_context(mock.patch.object(engine_module, "certify", uncertified))
        if layout.num_ranks > 1:
            peers = FakePeers(stack.enter_context(fake_mesh(layout, rank)), meter)
            stack.enter_context(mock.patch.object(engine_module, "open_peers", lambda *_, **__: peers))
        for one in (fake, meter, *([order] if watched else ()), fused_attention(), empty_weights()):
            stack.enter_context(one)
        with meter.during("load"):
            limits = Limits(max_hashed_bytes=0)  # a fake weight has no bytes to hash
            chosen = {"variant": variant, "layout": layout, "limits": limits, "graphs": graphs}
            engine = Engine(folder, device="cuda", dtype="bfloat16", **chosen)  # type: ignore[arg-type]
        engine.scheduler = HereScheduler(engine._executor, meter, stepping)  # type: ignore[assignment]
        with engine:
            yield Rehearsal(engine, meter, order)
