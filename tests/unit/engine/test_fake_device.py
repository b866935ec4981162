"""Device handling of the runner for every family: two steps of a tiny model on a fake CUDA device, see `benchmarks.rehearsal`.

Three families are rehearsed at real width in `tests/benchmarks/test_rehearsal.py`. Here text embeddings are random numbers.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.rehearsal.device import CUDA, NoFakeDeviceError, fake_cuda, stand_in_for_bits, stand_ins
from benchmarks.rehearsal.meter import STEP, DeviceFaultError, Meter
from tests.guiding import in_words_of
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

from flowroll import DenoisingEnv, SamplingParams
from flowroll.engine.checkpoint import examine_checkpoint
from flowroll.engine.config import Limits
from flowroll.engine.loading import LoadedModel, build_model, load_model
from flowroll.engine.plan import RequestPlan, plan_request
from flowroll.engine.runner.model_runner import ModelRunner
from flowroll.engine.runner.recorder import Recorder
from flowroll.engine.runner.sample import Conditioning
from flowroll.engine.runner.streams import Streams
from flowroll.exact import choose_strategy
from flowroll.exact.strategy import StrategyName
from flowroll.families import FAMILIES
from flowroll.sampling import transition
from flowroll.testing import random_images, random_text

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor is deprecated")

NAMES = list(FAMILIES)
DTYPE = torch.bfloat16
REQUEST = {"prompt": "", "height": 64, "width": 64, "seeds": (1, 2), "num_inference_steps": 2}
EVALUATION = {**REQUEST, "rollout": False}
# A step of the ODE, then a stochastic one: at the first step the host may wait.
ROLLOUT = {
    **REQUEST,
    "rollout_sde_type": "sde",
    "rollout_sde_step_indices": (1,),
    "rollout_debug_mode": True,
    "rollout_return_dit_trajectory": True,
}

StepsOf = Callable[..., "Steps"]


class Steps:
    """A runner with the two samples of one request on the fake device."""

    def __init__(self, model: LoadedModel, plan: RequestPlan, meter: Meter) -> None:
        self.compared: list[torch.device] = []
        self._meter, self._stage = meter, "first step"
        self.runner = ModelRunner(model, self._compare)
        self.conditioning = make_conditioning(model, plan)
        self.runner.use_threads(torch.get_num_threads())
        self.runner.add_request(0, self.conditioning)
        keys = [self.runner.start_sample(planned.index, 0, planned) for planned in plan.samples]
        assert len(set(keys)) == 1
        self.samples = dict(self.runner._samples)
        assert list(self.samples) == [0, 1]

    def take(self) -> None:
        """Takes one step of both samples; an error in a sample's own step is raised."""
        with self._meter.during(self._stage):
            outcome = self.runner.step(list(self.samples))
        self._stage = STEP
        for failure in outcome.failures.values():
            raise failure
        assert list(outcome.finished) == ([0, 1] if self.samples[0].num_steps_left == 0 else [])

    def _compare(self, tensor: Tensor) -> list[int]:
        self.compared.append(tensor.device)
        return []


def make_conditioning(model: LoadedModel, plan: RequestPlan) -> Conditioning:
    """The conditioning of a request with random embeddings."""
    generator = torch.Generator().manual_seed(0)
    texts = [random_text(model.family, model.spec, length, dtype=DTYPE, generator=generator) for length in (9, 5)]
    positive, negative = ({name: value.to(CUDA) for name, value in text.items()} for text in texts)
    assert plan.guidance.is_active
    drawn = random_images(model.family, model.spec, plan.geometry, dtype=DTYPE, generator=generator)
    images = {name: value.to(CUDA) for name, value in drawn.items()}
    env = model.family.env(positive, negative, plan.geometry, images=images, embedded=plan.guidance.embedded)
    return Conditioning.build(plan, model, env, plan.record)


@pytest.fixture(scope="module")
def mode() -> Iterator[FakeTensorMode]:
    try:
        with fake_cuda() as found:
            yield found
    except NoFakeDeviceError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def models(mode: FakeTensorMode, checkpoints: dict[str, Path]) -> dict[str, LoadedModel]:
    """A model of every family whose weights are on the fake device."""
    found = {}
    for name in NAMES:
        checkpoint = examine_checkpoint(checkpoints[name], variant=None)
        loaded, _ = load_model(checkpoint, device=torch.device("cpu"), dtype=DTYPE)
        transformer = loaded.transformer
        with mode:
            transformer.to(CUDA)
        assert all(isinstance(weight, FakeTensor) and weight.device == CUDA for weight in transformer.parameters())
        with stand_ins():
            found[name] = build_model(checkpoint, transformer, loaded.spec, device=CUDA, dtype=DTYPE, mesh=None)
    return found


@pytest.fixture
def steps_of(mode: FakeTensorMode, models: dict[str, LoadedModel]) -> Iterator[StepsOf]:
    """Makes the steps of a request; from then on the modes are active until the test ends."""
    with contextlib.ExitStack() as modes:
        chosen = modes.enter_context(stand_ins())

        def make(name: str, request: dict[str, Any], strategy: StrategyName = "alone", noise_on: str = "cpu") -> Steps:
            model = models[name]
            model = replace(model, strategy=choose_strategy(model.family, device=CUDA, dtype=DTYPE, name=strategy))
            asked = in_words_of(name, {"guidance_scale": 4.0, **request})
            plan = plan_request(SamplingParams(**asked, generator_device=noise_on), model, Limits())
            meter = Meter(mode)
            for one in (torch.no_grad(), mode, meter):
                modes.enter_context(one)
            if strategy == "merged":
                modes.enter_context(stand_in_for_bits())
            return Steps(model, plan, meter)

        yield make
    assert set(chosen) == {CUDA}


def devices_in(value: Any) -> set[torch.device]:
    """The devices of all tensors in a dataclass, a mapping or a list."""
    if isinstance(value, DenoisingEnv):
        value = [value.image_kwargs, value.pos_cond_kwargs, value.neg_cond_kwargs, value.guidance]
    return {leaf.device for leaf in tree_leaves(value) if isinstance(leaf, Tensor)}


def assert_on_device(steps: Steps) -> None:
    """What the steps are made of is on the GPU."""
    conditioning = steps.conditioning
    assert devices_in([conditioning.timesteps, conditioning.dts]) == {CUDA}
    assert devices_in(conditioning.env) == {CUDA}
    assert devices_in([sample.latents for sample in steps.samples.values()]) == {CUDA}


@pytest.mark.parametrize(
    ("strategy", "request_of", "noise_on"),
    [("alone", EVALUATION, "cpu"), ("alone", ROLLOUT, "cpu"), ("merged", EVALUATION, "cuda"), ("merged", ROLLOUT, "cuda")],
    ids=["alone-plain", "alone-recorded", "merged-plain", "merged-recorded"],
)
# The model of Qwen-Image-2.1 reads its mask on the host at every forward.
@pytest.mark.parametrize("name", [name for name in NAMES if name != "qwen_image_21"])
def test_two_steps_stay_on_the_device(
    steps_of: StepsOf,
    name: str,
    strategy: StrategyName,
    request_of: dict[str, Any],
    noise_on: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    steps = steps_of(name, request_of, strategy, noise_on)
    assert_on_device(steps)
    for _ in range(2):
        steps.take()
        assert_on_device(steps)
    # A warning: the samples ran one by one.
    assert not caplog.records
    assert steps.compared == [CUDA, CUDA] and not steps.runner._samples
    for sample in steps.samples.values():
        assert (sample.recorder is None) == (request_of is EVALUATION)
        if sample.recorder is not None:
            assert_recorded(sample.recorder)


def assert_recorded(recorder: Recorder) -> None:
    """The record is on the CPU, and somebody who reads it can wait for it."""
    recorder.wait()
    debug, trajectory = recorder.debug_tensors(), recorder.trajectory()
    assert debug is not None and trajectory is not None
    kept = [recorder.log_probs(), debug.variance_noise, debug.prev_sample_mean, debug.model_output, trajectory.latents]
    assert devices_in(kept) == {torch.device("cpu")}
    assert [len(tensor) for tensor in kept] == [2, 2, 2, 2, 3]
    assert recorder._arrived is not None


def leave_dts_on_the_cpu(steps: Steps, _: pytest.MonkeyPatch) -> None:
    for sample in steps.samples.values():
        sample.conditioning = replace(steps.conditioning, dts=steps.conditioning.dts.to("cpu", non_blocking=True))


def leave_latents_on_the_cpu(steps: Steps, _: pytest.MonkeyPatch) -> None:
    for sample in steps.samples.values():
        sample.latents = sample.latents.to("cpu", non_blocking=True)


def look_at_the_mean(_: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    def log_prob(this: Any, next_latents: Tensor, mean: Tensor, *, form: Any = None) -> Tensor:
        assert bool(mean.isfinite().all())
        return mean.new_zeros(len(mean))

    monkeypatch.setattr(transition, "log_prob", log_prob)


def wait_for_what_is_recorded(_: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    def copy_out(_: Streams, pairs: Any) -> None:
        for target, source in pairs:
            target.copy_(source)

    monkeypatch.setattr(Streams, "copy_out", copy_out)


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (leave_dts_on_the_cpu, DeviceFaultError),
        (leave_latents_on_the_cpu, DeviceFaultError),
        (look_at_the_mean, DeviceFaultError),
        (wait_for_what_is_recorded, DeviceFaultError),
    ],
)
def test_a_fault_of_device_handling_shows(
    steps_of: StepsOf, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Steps, pytest.MonkeyPatch], None], expected: type
) -> None:
    steps = steps_of("sd3", ROLLOUT)
    spoil(steps, monkeypatch)
    with pytest.raises(expected):
        for _ in range(2):
            steps.take()
