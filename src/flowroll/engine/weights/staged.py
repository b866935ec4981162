"""Finds, checks and reads all new weights of a module beside the old ones, then puts them in place together.

On a CPU they wait beside the old ones and are exchanged. A GPU need not hold both: there they wait in the host's memory, and
are copied over the old ones.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowroll.engine.checkpoint import plain_class
from flowroll.engine.weights.files import read_json, weight_files
from flowroll.engine.weights.host import PinnedMemory, synchronize
from flowroll.engine.weights.tensorfile import FileStamp, TensorFile
from flowroll.errors import CheckpointError, InvalidRequestError, RankLostError, WeightsRejectedError
from flowroll.parallel.linears import ColumnParallelLinear
from flowroll.types import ModuleName, all_finite
from flowroll.wire.safetensors import DTYPES, StoredTensor, TensorHead

# The text encoder cannot be updated: transformers translates the names in its files while it loads them.
UPDATABLE: tuple[ModuleName, ...] = ("transformer", "vae")
_FLOATS = ("F64", "F32", "F16", "BF16")
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MOST_SHOWN, _MOST_CHARS = 20, 200


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFiles:
    """The files that hold new weights of a module; nothing is read yet.

    Attributes:
        module: The name of the module that the weights are for.
        files: The safetensors files, with symbolic links resolved.
        config: The configuration that belongs to the weights; None if there is none.
        stamps: The stamps of the files, once a rank has read them: the other ranks must read the same files.
    """

    module: ModuleName
    files: tuple[Path, ...]
    config: Path | None
    stamps: tuple[FileStamp, ...] | None = None


def find_weights(source: str | Path, module: str, *, named: str | None = None) -> WeightFiles:
    """Finds the files of a module's weights.

    Args:
        source: A checkpoint folder, whose subfolder with the module's name is used; the module's own folder; or one
            .safetensors file.
        module: "transformer" or "vae".
        named: The path that the caller gave, if `source` is that path with its links resolved. In a Hugging Face cache, the
            files' names are links to files that are named by their checksums.

    Raises:
        InvalidRequestError: The module is not one of these.
        WeightsRejectedError: There are no such files, or the path is invalid.
    """
    name = check_updatable(module)
    try:
        path = Path(source).resolve()
        if path.is_file():
            if ".safetensors" not in (Path(named or source).suffix, path.suffix):
                raise CheckpointError(
                    f"{named or source} must be a .safetensors file or a folder, got another file; save it as one."
                )
            return WeightFiles(module=name, files=(path,), config=None)
        folder = path / name if (path / name).is_dir() else path
        files = tuple((folder / file).resolve() for file in weight_files(folder))
        config = folder / "config.json"
        return WeightFiles(module=name, files=files, config=config.resolve() if config.is_file() else None)
    except (CheckpointError, OSError, ValueError, RuntimeError) as error:  # the last two: an invalid path, a loop of links
        raise rejected(error) from error


def check_updatable(module: str) -> ModuleName:
    """Checks that a module takes new weights, and returns its name.

    Raises:
        InvalidRequestError: The module takes no new weights.
    """
    for name in UPDATABLE:
        if name == module:
            return name
    raise InvalidRequestError(
        f"module must be {' or '.join(UPDATABLE)}, got {module}; start an engine on other weights of anything else.",
        field="module",
    )


def rejected(error: Exception, field: str | None = "model_path") -> WeightsRejectedError:
    """Makes the error that the caller gets for an error that occurred before the old weights were changed."""
    if isinstance(error, CheckpointError):
        return WeightsRejectedError(error.message, field=field)
    reason = (str(error).strip().splitlines() or [""])[0][:200]
    return WeightsRejectedError(
        f"new weights must be read to their end, got {type(error).__name__}: {reason}; the old ones stay, ask again.",
        field=field,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """A tensor of a module in memory.

    Attributes:
        live: The tensor, or this rank's rows of it.
        dtype: The dtype that it is kept in; while a layer with float8 weights runs, it has another one.
        shape: The shape of the whole tensor.
        first_row: The index at which this rank's rows begin in the whole tensor.
    """

    live: Tensor
    dtype: torch.dtype
    shape: tuple[int, ...]
    first_row: int = 0

    @property
    def is_sharded(self) -> bool:
        """Whether other ranks hold other rows of the tensor."""
        return self.shape != tuple(self.live.shape)

    def own_rows(self, whole: Tensor) -> Tensor:
        """Returns this rank's rows of a whole tensor."""
        return whole[self.first_row : self.first_row + self.live.shape[0]] if self.is_sharded else whole

    def waiting(self, tensor: Tensor, memory: PinnedMemory, *, name: str, subject: str) -> Tensor:
        """Casts new data, on the weights' device, and returns it where it waits until it is put in place.

        Args:
            tensor: The new data of this tensor, or of the whole one.
            memory: Where it waits if it will be copied over the old.
            name: The name of the tensor.
            subject: The subject of the error message.

        Raises:
            CheckpointError: It has NaN or infinity in it, as it would be in memory: a cast may overflow.
        """
        placed = tensor.to(device=self.live.device, dtype=self.dtype)
        if not _fits(tensor, placed):
            raise CheckpointError(
                f"{subject} must hold finite weights, got NaN or infinity in {name[:_MOST_CHARS]} as {placed.dtype}; look "
                "after the training."
            )
        return memory.empty(placed.shape, placed.dtype).copy_(placed) if is_overwritten(self.live) else placed


def _fits(tensor: Tensor, placed: Tensor) -> bool:
    """Tells whether a tensor is finite as it was cast. A cast to float8 makes its largest number of infinity and all above."""
    if placed.is_floating_point() and placed.itemsize == 1:
        return bool((tensor.abs() <= torch.finfo(placed.dtype).max).all())
    return all_finite(placed)


def is_overwritten(live: Tensor) -> bool:
    """Tells whether new data is copied over a tensor's. Otherwise it takes its place, which can be undone."""
    return live.device.type == "cuda"


class StagedWeights:
    """New weights of one module, complete and checked, in memory beside the old ones.

    Args:
        module: The name of the module that the weights are for.
        source: Where the other ranks get the weights: files that each of them reads, or whole tensors by name, which have to be
            sent to them.
        pairs: The tensors of the module in memory, each with the tensor that replaces its data.
        seconds: How long reading or receiving took, in seconds.
    """

    def __init__(
        self,
        module: ModuleName,
        source: WeightFiles | Mapping[str, Tensor],
        pairs: list[tuple[Tensor, Tensor]],
        seconds: float,
    ) -> None:
        self.module, self.source, self.seconds = module, source, seconds
        self._pairs = pairs

    @property
    def num_tensors(self) -> int:
        """The number of tensors that are replaced."""
        return len(self._pairs)

    @property
    def replaced(self) -> list[Tensor]:
        """The tensors in memory that get new data."""
        return [live for live, _ in self._pairs]

    @property
    def num_bytes(self) -> int:
        """The number of bytes of the new tensors in memory."""
        return sum(new.nbytes for _, new in self._pairs)

    def check_whole(self) -> None:
        """Refuses weights that were read while the memory of the old ones was released, when their sizes could not be known.

        Raises:
            WeightsRejectedError: The new weights were read while the engine slept.
        """
        if any(live.numel() and not new.numel() for live, new in self._pairs):
            raise WeightsRejectedError("new weights must be read while the engine is awake, got a sleep meanwhile; ask again.")

    def commit(self, conclude: Callable[[], None]) -> None:
        """Puts the new weights in place of the old ones.

        The parameters stay the same objects, so hooks, shards and gradient flags stay.

        Args:
            conclude: Called afterwards, as a part of the change.

        Raises:
            RankLostError: Something failed after old weights were overwritten, so this rank's weights are of no use any more.
                Where weights are exchanged, the error is the one that was raised, and the old weights stay.
        """
        if any(is_overwritten(live) for live, _ in self._pairs):
            self._overwrite(conclude)
        else:
            self._exchange(conclude)
        # Dropped, so that a reference to this object does not keep the weights in memory.
        self._pairs, self.source = [], {}

    def _exchange(self, conclude: Callable[[], None]) -> None:
        """Exchanges the parameters' data.

        It moves no bytes, cannot stop half-way within a tensor, and can be undone as long as the old data is referenced here.
        The new data is aligned as after a fresh load, because it has its own memory from the allocator; float32 bits depend on
        that.
        """
        old = [live.data for live, _ in self._pairs]
        try:
            for live, new in self._pairs:
                live.data = new
            conclude()
        except BaseException:
            for (live, _), data in zip(self._pairs, old, strict=True):
                live.data = data
            raise

    def _overwrite(self, conclude: Callable[[], None]) -> None:
        """Copies the new data over the old, whose addresses stay."""
        try:
            for live, new in self._pairs:
                live.data.copy_(new, non_blocking=True)
            synchronize(live for live, _ in self._pairs)
            conclude()
        except BaseException as error:
            reason = (str(error).strip().splitlines() or [""])[0][:200]
            raise RankLostError(
                f"new weights must be put in place whole, got {type(error).__name__} after some were: {reason}; restart the "
                "engine."
            ) from error


def stage_weights(module: nn.Module, files: WeightFiles) -> StagedWeights:
    """Reads new weights of a module beside the old ones; of a sharded weight, only this rank's rows.

    Args:
        module: The module in memory. It is read, not changed, and may run meanwhile.
        files: The files, from `find_weights`.

    Raises:
        WeightsRejectedError: A name is missing, unknown or doubled, a shape or the configuration differs, a dtype is no float,
            a file cannot be read to its end, or another rank has read other files.
    """
    started_s = time.perf_counter()
    try:
        if files.config is not None:
            _check_config(module, files.config)
        with contextlib.ExitStack() as stack:
            opened = [stack.enter_context(TensorFile(path)) for path in files.files]
            stamps = tuple(file.stamp for file in opened)
            _check_stamps(stamps, files.stamps)
            pairs = _read(slots_of(module), opened)
    except (CheckpointError, OSError, MemoryError, RuntimeError) as error:  # torch's lack of memory is a RuntimeError
        raise rejected(error) from error
    return StagedWeights(files.module, replace(files, stamps=stamps), pairs, time.perf_counter() - started_s)


def _check_stamps(found: Sequence[FileStamp], expected: Sequence[FileStamp] | None) -> None:
    """Refuses files that differ from those that another rank has read: the ranks would hold parts of different weights."""
    if expected is not None and not all(map(FileStamp.is_same_save, found, expected)):
        raise CheckpointError("the files must be the same on every rank, got another save; ask again.")


def slots_of(module: nn.Module) -> dict[str, Slot]:
    """Returns the slots of a module's tensors, by the names that they have in the module's files."""
    slots = {}
    for name, live in module.state_dict(keep_vars=True).items():
        owner = module.get_submodule(name.rpartition(".")[0])
        if isinstance(owner, ColumnParallelLinear):
            shape = (owner.out_features, *live.shape[1:])
            slots[name] = Slot(live=live, dtype=live.dtype, shape=shape, first_row=owner.own_columns.start)
        else:
            slots[name] = Slot(live=live, dtype=_kept_dtype(owner, live), shape=tuple(live.shape))
    # A parameter with two names would need a rule for which of them counts; no module that is updated here has one.
    assert len({id(slot.live) for slot in slots.values()}) == len(slots)
    return slots


def _kept_dtype(owner: nn.Module, live: Tensor) -> torch.dtype:
    """Returns the dtype of a tensor between forwards: diffusers' layerwise casting widens the weights of a layer that runs."""
    hooks: Any = getattr(owner, "_diffusers_hook", None)
    casting = None if hooks is None else hooks.get_hook("layerwise_casting")
    return live.dtype if casting is None or not live.is_floating_point() else casting.storage_dtype


def _read(slots: Mapping[str, Slot], files: Sequence[TensorFile]) -> list[tuple[Tensor, Tensor]]:
    """Returns the tensor of every slot with its new data. All tensors are checked before the first byte is read."""
    found = [(tensor, file) for file in files for tensor in file.stored]
    counts = Counter(tensor.name for tensor, _ in found)
    _refuse_names("hold every weight once", "several of", [name for name, count in counts.items() if count > 1])
    _refuse_names("hold the module's weights alone", "others:", set(counts) - set(slots))
    _refuse_names("hold every weight of the module", "none for", set(slots) - set(counts))
    for tensor, file in found:
        check_tensor(tensor, slots[tensor.name], str(file.path))
    memory = PinnedMemory()
    pairs = [(slots[tensor.name].live, _read_tensor(tensor, slots[tensor.name], file, memory)) for tensor, file in found]
    for file in files:
        file.check_unchanged()
    return pairs


def _refuse_names(rule: str, got: str, names: Collection[str]) -> None:
    if names:
        raise CheckpointError(f"the files must {rule}, got {got} {listed(names)}; save the module again.")


def listed(names: Collection[str]) -> str:
    """Joins names for an error message: sorted, at most 20 of them, and not more than 200 characters of each."""
    rest = len(names) - _MOST_SHOWN
    return ", ".join(name[:_MOST_CHARS] for name in sorted(names)[:_MOST_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def tensor_head(name: str, dtype: torch.dtype, shape: Sequence[int]) -> TensorHead:
    """Describes a tensor without its data; the dtype may also be one that no weight has."""
    return TensorHead(name=name, dtype=_NAMES.get(dtype, str(dtype)), shape=tuple(shape))


def check_tensor(tensor: TensorHead, slot: Slot, subject: str) -> None:
    """Refuses a tensor that does not fit a slot.

    Args:
        tensor: The name, dtype and shape of the new tensor.
        slot: The slot with the same name.
        subject: The subject of the error message.

    Raises:
        CheckpointError: The shape differs, or the dtype is no float; a counter must have the dtype of the slot.
    """
    if tensor.shape != slot.shape:
        shapes = f"{list(slot.shape)}, got {list(tensor.shape)}"
        raise CheckpointError(f"{subject} must hold {tensor.name} as {shapes}; save the module that is served.")
    allowed = _FLOATS if slot.live.is_floating_point() else (_NAMES[slot.dtype],)
    if tensor.dtype not in allowed:
        raise CheckpointError(
            f"{subject} must hold {tensor.name} in one of {', '.join(allowed)}, got {tensor.dtype}; save it in one of these."
        )


def _read_tensor(tensor: StoredTensor, slot: Slot, file: TensorFile, memory: PinnedMemory) -> Tensor:
    """Reads the new data of a slot into memory of its own, cast as loading a checkpoint does it."""
    stored = torch.empty(slot.live.shape, dtype=DTYPES[tensor.dtype])
    row_bytes = (tensor.stop - tensor.start) // slot.shape[0] if slot.first_row else 0
    file.read_into(stored, tensor.start + slot.first_row * row_bytes)
    return slot.waiting(stored, memory, name=tensor.name, subject=str(file.path))


def _check_config(module: nn.Module, path: Path) -> None:
    """Refuses weights whose configuration differs: for example, the number of heads does not show in any shape."""
    given = read_json(path, f"{path} must be readable")
    live: Mapping[str, Any] = module.config  # type: ignore[assignment]
    name = type(module).__name__
    if plain_class(str(given.get("_class_name", name))) != name:
        raise CheckpointError(f"{path} must be of a {name}, got {given['_class_name']}; save the module that is served.")
    for key, parameter in inspect.signature(type(module).__init__).parameters.items():
        # A file of another library version may lack options that have a default. Options that no longer exist are ignored.
        default = "nothing" if parameter.default is parameter.empty else parameter.default
        value = _plain(given.get(key, default))
        if key in live and value != _plain(live[key]):
            raise CheckpointError(
                f"{path} must have {key} = {_plain(live[key])}, as the engine has, got {value}; save the module that is served."
            )


def _plain(value: Any) -> Any:
    """Returns the value as it is after a round trip through JSON, where tuples and lists are equal."""
    return json.loads(json.dumps(value, default=str))
