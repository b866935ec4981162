"""The ranks of a trainer that push sharded weights together: all of them gather, one of them sends.

FSDP2's weights are DTensors. Gathering one is a collective operation, so every rank of their mesh makes the same call; the
first rank of the mesh sends, and what the server answers to it, a value or an error, is returned or raised on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import torch
from torch import Tensor

from flowroll.client.exchange import Call
from flowroll.errors import EngineError, FlowrollError, InvalidRequestError, ServerConnectionError, error_from_wire
from flowroll.types.tensors import mesh_of, plain_tensor
from flowroll.wire.control import ErrorDetail

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")


class _Outcome(msgspec.Struct, frozen=True):
    value: Any = None
    failure: ErrorDetail | None = None


class TrainerRanks:
    """The ranks among which a trainer's tensors are sharded. A process whose tensors are not sharded is alone, and sends.

    Args:
        tensors: The first tensors that will be pushed; the first DTensor among them gives the mesh.

    Attributes:
        sends: Whether this rank is the one that sends.
    """

    def __init__(self, tensors: Iterable[object]) -> None:
        mesh = next((mesh for tensor in tensors if (mesh := mesh_of(tensor)) is not None), None)
        self._mesh: DeviceMesh | None = mesh if mesh is not None and mesh.size() > 1 else None
        self.sends = self._mesh is None or torch.distributed.get_rank() == int(self._mesh.mesh.flatten()[0])

    def gather(self, named: Mapping[str, Tensor], device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Returns whole, ordinary tensors on the rank that sends, and nothing on the others, which take part in the gathering.

        Raises:
            InvalidRequestError: A tensor has no readable data, or the first DTensor comes after the first bucket.
        """
        whole = {}
        for name, tensor in named.items():
            if self._mesh is None and (mesh := mesh_of(tensor)) is not None and mesh.size() > 1:
                raise InvalidRequestError(
                    f"{name} must come in the first bucket if no other DTensor does, got ordinary tensors before it; give "
                    "model.state_dict() itself, not a generator."
                )
            gathered = plain_tensor(tensor, name, device=device if self.sends else None)
            if self.sends:
                whole[name] = gathered
        return whole

    def once(self, make: Callable[[], Call[T]], kind: Any) -> Generator[Call[T], T, T]:
        """Yields a call on the rank that sends, and returns its answer on every rank.

        Args:
            make: A function that makes the call.
            kind: The type of the answer; None if the other ranks do not need the answer.

        Raises:
            FlowrollError: The call failed with this error on the rank that sends.
        """
        if not self.sends:
            return self._hear(kind)  # type: ignore[no-any-return]
        try:
            answer = yield make()
        except BaseException as error:
            self._tell(_Outcome(failure=_failure(error)))
            raise
        self._tell(_Outcome(value=None if kind is None else answer))
        return answer

    def run(self, work: Callable[[], T], kind: Any) -> T:
        """Runs a function on the rank that sends, and returns its result on every rank; see `once`."""
        if not self.sends:
            return self._hear(kind)  # type: ignore[no-any-return]
        try:
            result = work()
        except BaseException as error:
            self._tell(_Outcome(failure=_failure(error)))
            raise
        self._tell(_Outcome(value=None if kind is None else result))
        return result

    def _tell(self, outcome: _Outcome) -> None:
        if self._mesh is not None:
            data = msgspec.json.encode(outcome)
            self._summed(torch.tensor([len(data)]))
            self._summed(torch.frombuffer(bytearray(data), dtype=torch.uint8))

    def _hear(self, kind: Any) -> Any:
        length = int(self._summed(torch.zeros(1, dtype=torch.int64)))
        data = self._summed(torch.zeros(length, dtype=torch.uint8))
        outcome = msgspec.json.decode(bytes(data.tolist()), type=_Outcome)
        if (failure := outcome.failure) is not None:
            if failure.code == ServerConnectionError.code:
                # `error_from_wire` does not know this class, since no server sends it.
                raise ServerConnectionError(failure.message, field=failure.field)
            raise error_from_wire(failure.code, failure.message, failure.field)
        return None if kind is None else msgspec.convert(outcome.value, kind)

    def _summed(self, part: Tensor) -> Tensor:
        """Returns the sum over all ranks of the mesh, whatever its dimensions; only the rank that sends adds nonzero values."""
        from torch.distributed.tensor import DTensor, Partial

        mesh = self._mesh
        assert mesh is not None
        shares = DTensor.from_local(part.to(mesh.device_type), mesh, [Partial()] * mesh.ndim, run_check=False)
        return shares.full_tensor().cpu()


def _failure(error: BaseException) -> ErrorDetail:
    if isinstance(error, FlowrollError):
        return ErrorDetail(code=error.code, message=error.message, field=error.field)
    message = f"the rank that sends must end its push, got {type(error).__name__}: {error}; look at its log."
    return ErrorDetail(code=EngineError.code, message=message)
