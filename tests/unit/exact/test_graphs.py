"""Recorded forwards have the bits of eager ones, and what cannot be recorded runs eagerly."""

import gc
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import pytest
import torch
from tests.tape import TapeRecorder
from torch import Tensor, nn

from flowroll.exact.graphs import GraphedForwards
from flowroll.exact.layout import same_bits
from flowroll.exact.watched import Anchors, ForwardWatch

WIDTH = 16


class Model(nn.Module):
    """Two layers, with a table that is kept in a cache beside the module."""

    def __init__(self, compute: Callable[["Model", Any], Any] | None = None) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.register_buffer("scale", torch.full((WIDTH,), 0.7))
        self.tables: dict[int, Tensor] = {}
        self.num_forwards = 0
        self.compute = compute

    def forward(self, x: Any, shift: float = 0.0, **others: Any) -> Any:
        self.num_forwards += 1
        if self.compute is not None:
            return self.compute(self, x)
        rows = x[0] if isinstance(x, list) else x
        table = self.tables.setdefault(len(rows), torch.arange(len(rows))[:, None] / 7)
        return self.second(torch.nn.functional.silu(self.first(rows + table))) * self.scale + shift


def run(model: Any, given: Any) -> Any:
    return model(**given)


def rows(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


class Pair:
    """A model with recordings, and the same without."""

    def __init__(self, compute: Any = None, max_bytes: int = 2**30) -> None:
        torch.manual_seed(0)
        self.model = Model(compute)
        self.recorder = TapeRecorder()
        self.graphs = GraphedForwards(self.recorder, max_bytes=max_bytes)

    def check(self, *, model: Any = None, **given: Any) -> Any:
        """The output of a forward, which has the bits of an eager one."""
        model = model or self.model
        output = self.graphs.run(run, model, given)
        expected = run(model, given)
        for one, other in zip(*([x] if isinstance(x, Tensor) else x for x in (output, expected)), strict=True):
            assert same_bits(one, other) and one.stride() == other.stride()
        return output

    @property
    def told(self) -> tuple[int, int, int, dict[str, int]]:
        counts = self.graphs.counts
        assert not self.recorder.faults
        return counts.recordings, counts.hits, counts.misses, dict(counts.dropped)


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def pair() -> Pair:
    return Pair()


def test_the_second_forward_of_a_form_is_recorded_and_later_ones_replay_it(pair: Pair) -> None:
    for seed in range(5):
        pair.check(x=rows(4, seed))
    assert pair.told == (1, 3, 2, {})
    before = pair.model.num_forwards
    pair.graphs.run(run, pair.model, {"x": rows(4, 9)})
    assert pair.model.num_forwards == before
    assert pair.graphs.counts.num_bytes > 0


def test_a_form_that_is_met_once_is_not_recorded(pair: Pair) -> None:
    for count in range(1, 9):
        pair.check(x=rows(count))
    assert pair.told == (0, 0, 8, {}) and pair.recorder.num_recorded == 0


@pytest.mark.parametrize(
    "others",
    [
        [{"x": rows(5)}],
        [{"x": rows(4).to(torch.bfloat16).float()[:, ::1].T.contiguous().T}],
        [{"x": rows(4), "shift": 1.0}, {"x": rows(4), "shift": 1}, {"x": rows(4), "shift": True}],
        [{"x": rows(4), "shift": -0.0}],
        [{"x": [rows(4)]}, {"x": [rows(4), rows(4)]}],
        [{"x": rows(4), "name": "a"}, {"x": rows(4), "name": "b"}, {"x": rows(4), "name": None}],
        [{"x": torch.empty(4 * WIDTH + 1)[1:].view(4, WIDTH).copy_(rows(4))}],
        [{"x": rows(1).expand(4, WIDTH)}],
    ],
    ids=["rows", "strides", "number", "minus zero", "nesting", "text", "address", "expanded"],
)
def test_arguments_of_another_form_have_another_recording(pair: Pair, others: list[dict[str, Any]]) -> None:
    for given in ({"x": rows(4)}, *others) * 3:
        pair.check(**given)
    assert pair.graphs.counts.recordings == 1 + len(others)


def test_a_number_may_lie_anywhere(pair: Pair) -> None:
    timesteps = torch.arange(5) / 5
    for step in range(5):
        for shift in (timesteps[step : step + 1], timesteps[step : step + 1].expand(4)[:, None]):
            pair.check(x=rows(4), shift=shift)
    assert pair.told == (2, 6, 4, {})


def test_the_number_of_threads_is_part_of_the_form(pair: Pair) -> None:
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 1, 2):
            torch.set_num_threads(threads)
            pair.check(x=rows(4))
    finally:
        torch.set_num_threads(before)
    assert pair.graphs.counts.recordings == 2


def test_outputs_lie_in_memory_of_their_own(pair: Pair) -> None:
    outputs = [pair.check(x=rows(4, seed)) for seed in range(4)]
    kept = [output.clone() for output in outputs]
    pair.check(x=rows(4, 7))
    assert all(map(same_bits, outputs, kept))
    assert len({output.data_ptr() for output in outputs}) == len(outputs)


def test_outputs_lie_as_those_of_an_eager_forward() -> None:
    pair = Pair(lambda model, x: [model.first(x).T, model.second(x)[1:, 2:], model.scale.expand(3, WIDTH)])
    for seed in range(4):
        pair.check(x=rows(4, seed))
    assert pair.graphs.counts.hits == 2


def test_new_weights_that_are_copied_over_the_old_ones_are_replayed_with(pair: Pair) -> None:
    for seed in range(3):
        pair.check(x=rows(4, seed))
    for parameter in pair.model.parameters():
        parameter.data.copy_(parameter * 1.01)
    pair.check(x=rows(4, 3))
    assert pair.told == (1, 2, 2, {})


@pytest.mark.parametrize("name", ["second.bias", "scale"])
def test_weights_that_lie_elsewhere_end_a_recording(pair: Pair, name: str) -> None:
    for seed in range(3):
        pair.check(x=rows(4, seed))
    tensor = pair.model.state_dict(keep_vars=True)[name]
    tensor.data = tensor * 2
    for seed in range(3, 6):
        pair.check(x=rows(4, seed))
    # It is recorded again at once, since its form was met before.
    assert pair.told == (1, 3, 3, {"moved": 1})


def test_a_table_that_the_model_forgets_is_kept_for_its_recording(pair: Pair) -> None:
    pair.check(x=rows(4))
    pair.check(x=rows(4))
    table = pair.model.tables.pop(4)
    address = table.data_ptr()
    del table
    gc.collect()
    held = [reference() for recorded in pair.graphs._recorded.values() for reference, _ in recorded.anchors._addresses]
    assert address in {tensor.data_ptr() for tensor in held if tensor is not None}


def test_another_model_has_recordings_of_its_own_which_go_with_it(pair: Pair) -> None:
    other = Model()
    for model in (pair.model, other) * 3:
        pair.check(model=model, x=rows(4))
    assert pair.graphs.counts.recordings == 2
    del model, other
    gc.collect()
    for _ in range(2):
        pair.check(x=rows(5))
    assert pair.told[0] == 2 and pair.told[3] == {"moved": 1}


def test_recordings_that_were_used_longest_ago_make_room_for_new_ones() -> None:
    one = Pair()
    for _ in range(2):
        one.check(x=rows(4))
    pair = Pair(max_bytes=int(2.5 * one.graphs.counts.num_bytes))
    for count in (4, 4, 3, 3, 4, 5, 5):
        pair.check(x=rows(count))
    # That of four rows was used after that of three.
    assert pair.told == (2, 1, 6, {"evicted": 1})
    pair.check(x=rows(4))
    pair.check(x=rows(5))
    assert pair.graphs.counts.hits == 3
    assert pair.graphs.counts.num_bytes <= 2.5 * one.graphs.counts.num_bytes


def test_a_recording_above_the_bound_is_not_made_again() -> None:
    pair = Pair(max_bytes=10)
    for seed in range(5):
        pair.check(x=rows(4, seed))
    assert pair.told == (0, 0, 5, {"unfit": 1}) and pair.recorder.num_recorded == 1


def test_a_recording_with_other_bits_is_dropped_and_said(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    pair.recorder.spoil = True
    for seed in range(5):
        pair.check(x=rows(4, seed))
    assert pair.told == (0, 0, 5, {"differed": 1}) and pair.recorder.num_recorded == 1
    assert "other bits" in caplog.text


def test_a_recording_that_fails_is_not_tried_again(pair: Pair) -> None:
    pair.recorder.fails = True
    for seed in range(5):
        pair.check(x=rows(4, seed))
    assert pair.told == (0, 0, 5, {"unfit": 1})
    assert list(pair.graphs._unfit.values()) == ["operation not permitted when stream is capturing"]


@pytest.mark.parametrize(
    ("compute", "reason"),
    [
        (lambda model, x: x * x.sum().item(), "lets the host read"),
        (lambda model, x: x if (x > 0).all() else -x, "lets the host read"),
        (lambda model, x: x.nonzero().float(), "lets the host read"),
        (lambda model, x: x[x > 0], "selects by a mask"),
        (lambda model, x: x.clone().index_put((x > 0,), torch.zeros(())), "selects by a mask"),
        (lambda model, x: torch.repeat_interleave(x, torch.tensor([1, 2, 1, 1]), 0), "lets the host read"),
        (lambda model, x: torch.rand_like(x), "draws random numbers"),
        (lambda model, x: torch.nn.functional.dropout(x), "draws random numbers"),
        (lambda model, x: x.add_(1), "did not make"),
        (lambda model, x: x.to("meta").new_zeros(4, device="cpu") + x[0, 0], "on two devices"),
        (lambda model, x: model.scale.mul_(1.0) * x, "did not make"),
    ],
)
def test_a_forward_that_no_recording_can_repeat_is_refused(compute: Any, reason: str) -> None:
    pair = Pair(compute)
    for seed in range(4):
        pair.graphs.run(run, pair.model, {"x": rows(4, seed)})
    assert pair.told == (0, 0, 4, {"unfit": 1}) and pair.recorder.num_recorded == 0
    (found,) = pair.graphs._unfit.values()
    assert reason in found


def test_attention_without_dropout_draws_nothing() -> None:
    def attend(model: Any, x: Tensor) -> Tensor:
        heads = model.first(x).view(1, 1, -1, WIDTH)
        return torch.nn.functional.scaled_dot_product_attention(heads, heads, heads)

    pair = Pair(attend)
    for seed in range(4):
        pair.check(x=rows(4, seed))
    assert pair.graphs.counts.hits == 2


def test_a_model_with_hooks_is_not_recorded(pair: Pair) -> None:
    seen = []
    pair.model.second.register_forward_hook(lambda *_: seen.append(1))
    for seed in range(4):
        pair.graphs.run(run, pair.model, {"x": rows(4, seed)})
    assert len(seen) == 4 and pair.told == (0, 0, 4, {"unfit": 1})


def test_a_model_with_a_compiled_module_is_not_recorded(pair: Pair) -> None:
    pair.model.second.compile(backend="eager")
    for seed in range(4):
        pair.check(x=rows(4, seed))
    assert pair.told == (0, 0, 4, {"unfit": 1})


def test_arguments_that_are_no_plain_values_are_not_recorded(pair: Pair) -> None:
    for seed in range(4):
        pair.check(x=rows(4, seed), cache=object())
    assert pair.told == (0, 0, 4, {})


def gradients() -> Any:
    return torch.enable_grad()


def autocast() -> Any:
    return torch.autocast("cpu", dtype=torch.bfloat16)


def function_mode() -> Any:
    return torch.overrides.BaseTorchFunctionMode()


@pytest.mark.parametrize("mode", [gradients, autocast, function_mode, torch.inference_mode])
def test_under_modes_that_change_what_runs_forwards_run_eagerly(pair: Pair, mode: Callable[[], Any]) -> None:
    for seed in range(3):
        pair.check(x=rows(4, seed))
    with mode():
        pair.check(x=rows(4))
    assert pair.told == (1, 1, 3, {})


def test_what_is_forgotten_is_recorded_anew(pair: Pair) -> None:
    for seed in range(3):
        pair.check(x=rows(4, seed))
    pair.graphs.forget()
    assert pair.told == (0, 1, 2, {"asleep": 1}) and pair.graphs.counts.num_bytes == 0
    for seed in range(3):
        pair.check(x=rows(4, seed))
    assert pair.told == (1, 2, 4, {"asleep": 1})


def test_what_is_watched_reads_weights_and_tables_and_not_views_of_them(pair: Pair) -> None:
    x = rows(4)
    with ForwardWatch() as watch:
        pair.model(x)
    own = list(pair.model.parameters()) + list(pair.model.buffers())
    assert {id(one) for one in watch.outside} == {id(one) for one in (x, *own)}
    with ForwardWatch() as watch:
        pair.model(x)
    assert {id(one) for one in watch.outside} == {id(one) for one in (x, pair.model.tables[4], *own)}
    anchors = Anchors(watch.outside, own)
    assert anchors.hold()
    # A weight that is gone is not kept.
    del own, watch
    pair.model.second = nn.Linear(WIDTH, WIDTH)
    gc.collect()
    assert not anchors.hold()


def test_memory_that_the_forward_gave_back_and_another_tensor_has_is_no_longer_its_own() -> None:
    numbers, found = numpy.zeros(4, numpy.float32), []
    with ForwardWatch() as watch:
        for _ in range(1000):
            place = torch.zeros(4).untyped_storage()._cdata
            # Not made by an operation, so that nothing tells the watch.
            found.append(torch.from_numpy(numbers))
            if found[-1].untyped_storage()._cdata == place:
                break
        else:
            pytest.skip("no tensor came to lie where another one had been")
        found[-1] + 1
    assert place in [one.untyped_storage()._cdata for one in watch.outside]
