"""Recorded forwards: a forward of small shapes is recorded once, and then replayed without the Python code around its kernels.

A replay runs the same kernels on the same addresses, so it has the bits of the eager forward. Nothing is taken on trust: what
a forward reads is watched (`watched`), arguments of another form have another recording (`forms`), the first replay is compared
with the eager forward bit for bit, and before every later one the tensors that it reads must lie where they lay. What fails
runs eagerly from then on.

How forwards are recorded is a `Recorder`'s business: on a GPU that of `cuda_graphs`.
"""

from __future__ import annotations

import logging
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor, nn

from flowroll.exact.compiled import is_compiled
from flowroll.exact.forms import Buffers, NoFormError, filled, form_of
from flowroll.exact.layout import laid_out_like, same_bits
from flowroll.exact.watched import Anchors, ForwardWatch
from flowroll.families import ForwardInput, Geometry, Output, Transformer

# Runs one forward.
RunForward: TypeAlias = Callable[[Transformer, ForwardInput], Output]
# The most image tokens of a recorded forward, 724 x 724 pixels. Up to there the host takes longer to launch the kernels of a
# forward than the device takes to run them, for the largest model: Qwen-Image's forward of 1,024 tokens launches 5,400 kernels,
# 40 to 55 ms of work for the host and 29 ms for the device, whose share grows with the tokens. Computed, not measured.
MAX_TOKENS = 2048
# How many forms are remembered that were met once, or are not recorded.
_MOST_FORMS = 4096
_log = logging.getLogger(__name__)


@runtime_checkable
class Recording(Protocol):
    """One recorded forward.

    Attributes:
        outputs: The tensors that a replay writes its results to.
        num_bytes: The memory that the recording takes.
    """

    @property
    def outputs(self) -> Sequence[Tensor]: ...  # noqa: D102

    @property
    def num_bytes(self) -> int: ...  # noqa: D102

    def replay(self) -> None:
        """Runs what was recorded again, on what lies in the tensors that it read."""


@runtime_checkable
class Recorder(Protocol):
    """Makes recordings. Only one thread uses it."""

    def record(self, function: Callable[[], list[Tensor]]) -> Recording:
        """Records a function, which reads the same tensors at every call and draws no random numbers.

        Raises:
            Exception: It cannot be recorded.
        """

    def before_replay(self) -> None:
        """Is called before the tensors that a recording reads are written to."""

    def before_drop(self) -> None:
        """Is called before recordings are dropped: no replay may be under way after it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphCounts:
    """What became of the forwards that might be replayed.

    Attributes:
        recordings: The number of recordings.
        num_bytes: The memory that they take.
        hits: The number of forwards that were replayed.
        misses: The number of forwards that ran eagerly.
        dropped: The number of recordings that were dropped or not made, by the reason: "evicted" (no room), "moved" (what they
            read lies elsewhere), "asleep" (the memory is needed), "differed" (the replay had other bits), "unfit" (the forward
            cannot be recorded).
    """

    recordings: int = 0
    num_bytes: int = 0
    hits: int = 0
    misses: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def total(cls, counts: Sequence[GraphCounts]) -> GraphCounts:
        """Returns the sums of the counts of several engines."""
        dropped: Counter[str] = Counter()
        for one in counts:
            dropped.update(one.dropped)
        numbers = ("recordings", "num_bytes", "hits", "misses")
        return cls(**{name: sum(getattr(one, name) for one in counts) for name in numbers}, dropped=dict(dropped))


@dataclass(slots=True, kw_only=True)
class _Recorded:
    buffers: Buffers
    recording: Recording
    # The form of the forward's output.
    form: Hashable
    anchors: Anchors
    num_bytes: int

    def replay(self, tensors: list[Tensor]) -> Output:
        """Returns the output of a forward with these tensors, in memory of its own."""
        self.buffers.fill(tensors)
        self.recording.replay()
        output: Output = filled(self.form, map(laid_out_like, self.recording.outputs))
        return output


class _UnfitError(Exception):
    """A forward cannot be recorded, or its recording is not exact."""

    def __init__(self, reason: str, kind: str = "unfit") -> None:
        super().__init__(reason)
        self.kind = kind


class GraphedForwards:
    """Runs forwards, and replays those that are met more than once. Only one thread uses it.

    The first forward of a form runs eagerly. With the second one it is recorded, so what is met once is not.

    Args:
        recorder: Makes the recordings.
        max_bytes: The most memory that recordings may take together; the ones that were used longest ago are dropped first.
    """

    def __init__(self, recorder: Recorder, *, max_bytes: int) -> None:
        self._recorder, self._max_bytes = recorder, max_bytes
        self._recorded: OrderedDict[Hashable, _Recorded] = OrderedDict()
        # Forms that were met once, and those that are not recorded, with the reason.
        self._met: OrderedDict[Hashable, None] = OrderedDict()
        self._unfit: OrderedDict[Hashable, str] = OrderedDict()
        self._num_bytes = self._hits = self._misses = 0
        self._dropped: Counter[str] = Counter()

    @property
    def counts(self) -> GraphCounts:
        """What became of the forwards so far; may be read by any thread."""
        return GraphCounts(
            recordings=len(self._recorded),
            num_bytes=self._num_bytes,
            hits=self._hits,
            misses=self._misses,
            dropped=dict(self._dropped),
        )

    @staticmethod
    def takes(geometry: Geometry | None) -> bool:
        """Tells whether forwards of samples of this geometry are small enough for a recording to pay."""
        return geometry is not None and geometry.num_tokens + geometry.num_reference_tokens <= MAX_TOKENS

    def run(self, run: RunForward, transformer: Transformer, forward_input: ForwardInput) -> Output:
        """Computes the output of one forward: eagerly, or by a replay that has the same bits.

        Args:
            run: Runs the forward.
            transformer: The model.
            forward_input: Its arguments.
        """
        tensors: list[Tensor] = []
        key = _key(transformer, forward_input, tensors)
        if (found := self._recorded.get(key)) is not None:
            if found.anchors.hold():
                self._recorded.move_to_end(key)
                self._hits += 1
                self._recorder.before_replay()
                return found.replay(tensors)
            self._drop(key, "moved")
        # Its memory is free before another recording is made.
        del found
        self._misses += 1
        output = run(transformer, forward_input)
        if key is not None and key not in self._unfit:
            if key in self._met:
                self._try_to_record(key, run, transformer, forward_input, output)
            else:
                _remember(self._met, key, None)
        return output

    def forget(self) -> None:
        """Drops all recordings, so that their memory is free."""
        for key in list(self._recorded):
            self._drop(key, "asleep")
        self._met.clear()

    def _try_to_record(
        self, key: Hashable, run: RunForward, transformer: Any, forward_input: ForwardInput, output: Output
    ) -> None:
        """Records a forward whose output is known, and keeps the recording if a replay has the same bits."""
        try:
            recorded = self._record(run, transformer, forward_input, output)
        except Exception as error:
            # There may be a recording, which goes with the error.
            self._recorder.before_drop()
            kind = error.kind if isinstance(error, _UnfitError) else "unfit"
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            self._dropped[kind] += 1
            _remember(self._unfit, key, reason)
            (_log.error if kind == "differed" else _log.info)("a forward is not recorded, and runs eagerly: %s", reason)
            return
        self._recorded[key] = recorded
        self._num_bytes += recorded.num_bytes
        self._make_room()

    def _record(self, run: RunForward, transformer: Any, forward_input: ForwardInput, output: Output) -> _Recorded:
        if is_compiled(transformer):
            raise _UnfitError("what compiled blocks read cannot be watched")
        if any(module._forward_hooks or module._forward_pre_hooks for module in transformer.modules()):
            raise _UnfitError("the model has hooks, which a replay would not call")
        tensors: list[Tensor] = []
        form = form_of(forward_input, tensors)
        buffers = Buffers(tensors)

        def forward() -> Output:
            return run(transformer, filled(form, iter(buffers.tensors)))

        with ForwardWatch() as watch:
            forward()
        if watch.reason is not None:
            raise _UnfitError(watch.reason)
        anchors = Anchors(watch.outside, (*transformer.parameters(), *transformer.buffers()))
        recording = self._recorder.record(lambda: _tensors(forward()))
        expected: list[Tensor] = []
        recorded = _Recorded(
            buffers=buffers,
            recording=recording,
            form=form_of(output, expected),
            anchors=anchors,
            num_bytes=recording.num_bytes + sum(tensor.nbytes for tensor in buffers.tensors),
        )
        if recorded.num_bytes > self._max_bytes:
            raise _UnfitError(f"a recording of {recorded.num_bytes} bytes is above the bound")
        self._recorder.before_replay()
        _compare(recorded, tensors, expected)
        return recorded

    def _make_room(self) -> None:
        """Drops the recordings of models that are gone, and then those that were used longest ago."""
        for key in [key for key in self._recorded if key[0]() is None]:  # type: ignore[index]
            self._drop(key, "moved")
        while self._num_bytes > self._max_bytes:
            self._drop(next(iter(self._recorded)), "evicted")

    def _drop(self, key: Hashable, reason: str) -> None:
        self._recorder.before_drop()
        self._num_bytes -= self._recorded.pop(key).num_bytes
        self._dropped[reason] += 1


def _key(transformer: Transformer, forward_input: ForwardInput, tensors: list[Tensor]) -> Hashable:
    """Returns what decides which kernels a forward runs, and puts its tensors into the list; None: it is not recorded.

    It begins with a weak reference, which is equal to no other model's.
    """
    if not isinstance(transformer, nn.Module) or not runs_plainly():
        return None
    try:
        form = form_of(forward_input, tensors)
    except NoFormError:
        return None
    return weakref.ref(transformer), form, torch.get_num_threads()


def runs_plainly() -> bool:
    """Tells whether nothing around a forward changes what it runs: gradients, inference mode, autocast, a function mode."""
    if torch.is_grad_enabled() or torch.is_inference_mode_enabled() or torch._C._len_torch_function_stack():
        return False
    return not any(torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))


def _compare(recorded: _Recorded, tensors: list[Tensor], expected: list[Tensor]) -> None:
    """Compares a replay with the outputs of the eager forward on the same tensors.

    Raises:
        _UnfitError: They differ.
    """
    found: list[Tensor] = []
    form = form_of(recorded.replay(tensors), found)
    if form != recorded.form or not all(map(same_bits, found, expected)):
        raise _UnfitError("the replay of a recording has other bits than the eager forward", kind="differed")


def _tensors(output: Output) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else list(output)


def _remember(forms: OrderedDict[Hashable, Any], key: Hashable, value: Any) -> None:
    forms[key] = value
    while len(forms) > _MOST_FORMS:
        forms.popitem(last=False)
