"""How a replica's server takes new weights and adapters, and knows of which training step they are."""

from __future__ import annotations

import asyncio
import itertools
import re
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from flowroll.errors import InvalidRequestError, ShuttingDownError, WeightsMismatchError, WeightsRejectedError
from flowroll.integrations.verl_omni.weights import PackedTensor, adapter_tensors, base_tensors, unpack

if TYPE_CHECKING:
    from flowroll.engine import Engine

# The trainer's adapter that is in training; any other one is a policy of its own, which the weights under it are not.
_IN_TRAINING = "default"
# The id of an update past Ray, as verl-omni makes it in verl_omni/workers/rollout/vllm_rollout/zmq_utils.py.
_UPDATE_ID = re.compile(r"step-([0-9]{1,18})-seq-[0-9]+")
# The training steps that are remembered by version of the weights.
_MOST_VERSIONS = 1024
# What a trainer sends past Ray has to arrive within so many seconds. Its ranks may end, and verl's receiver would wait on.
_MOST_WAIT_S = 600.0
# Receives the weights that a trainer sends past Ray: `receive(keyword arguments of the call)` gives the named tensors.
ReceiveWeights = Callable[..., Sequence[tuple[str, Tensor]]]


@dataclass(slots=True, kw_only=True, eq=False)
class _Update:
    """Weights that arrive.

    Attributes:
        number: The number of their update.
        global_steps: The training step whose weights they are.
        peft_config: The configuration of the adapter that comes; None: weights of the transformer come.
        keeps_adapter: Whether the adapter stays that is there, since these are the weights under it.
        factors: The factors of the adapter so far.
        receiver: What receives the weights of the transformer.
    """

    number: int
    global_steps: int | None
    peft_config: dict[str, Any] | None
    keeps_adapter: bool
    factors: dict[str, Tensor] = field(default_factory=dict)
    receiver: Any = None


class WeightUpdates:
    """The part of a server that takes new weights.

    Args:
        adapter: The name of the trainer's adapter that comes unmerged, with which all requests then run.
        receive_weights: Receives weights that come past Ray; None: there are none.
    """

    def __init__(self, adapter: str, receive_weights: ReceiveWeights | None) -> None:
        self._adapter, self._receive_weights = adapter, receive_weights
        self._engine: Engine | None = None
        self._numbers = itertools.count()
        self._updates = asyncio.Lock()
        self._update: _Update | None = None
        self._pending_peft_config: dict[str, Any] | None = None
        # The training step of each version of the weights, and that of the weights that are being exchanged.
        self._steps_of: dict[str, int | None] = {}
        self._global_steps: int | None = None
        self._arriving_steps: int | None = None
        self._has_adapter = False

    async def set_global_steps(self, global_steps: int) -> None:
        """Names the training step whose weights are in memory, for the samples that they make."""
        engine = self._running_engine()
        self._note_steps(engine.weight_version, global_steps)

    async def begin_weights(
        self,
        *,
        global_steps: int | None = None,
        peft_config: Mapping[str, Any] | None = None,
        base_sync_done: bool = True,
    ) -> int:
        """Begins an update of the weights, and gives up one that was not brought to its end.

        Args:
            global_steps: The training step whose weights these are.
            peft_config: The configuration of the adapter whose factors come, as peft's `to_dict` gives it; None: the weights of
                the transformer come.
            base_sync_done: False: the weights of the transformer come all the same.

        Returns:
            The number of the update, for the next calls.

        Raises:
            WeightsRejectedError: Weights without an adapter come to a server of samples of the old policy, which is one.
        """
        engine = self._running_engine()
        if peft_config is None and self._pending_peft_config is not None:
            peft_config, base_sync_done = self._pending_peft_config, True
        self._pending_peft_config = None
        if peft_config is None and self._adapter != _IN_TRAINING:
            raise WeightsRejectedError(
                f"the weights must be the factors of the adapter {self._adapter}, got weights without an adapter; send the "
                "adapter unmerged (model.lora.merge=False), or set rollout.rollout_adapter=default."
            )
        if self._update is not None and self._update.receiver is not None:
            self._update.receiver.drop()
        self._update = None
        adapter = dict(peft_config) if peft_config is not None and base_sync_done else None
        receiver = engine.receive_weights() if adapter is None else None
        self._update = _Update(
            number=next(self._numbers),
            global_steps=global_steps,
            peft_config=adapter,
            keeps_adapter=peft_config is not None,
            receiver=receiver,
        )
        return self._update.number

    async def put_weights(self, update: int, bucket: Sequence[PackedTensor]) -> None:
        """Takes a bucket of an update.

        Raises:
            WeightsRejectedError: A tensor does not fit the model, or another update has begun.
        """
        current = self._update_of(update)
        await asyncio.to_thread(self._put, current, bucket)

    def _put(self, update: _Update, bucket: Sequence[PackedTensor]) -> None:
        named = [(packed.name, unpack(packed)) for packed in bucket]
        if update.receiver is None:
            update.factors |= named
            self._check_room(update)
            return
        for pair in base_tensors(named):
            update.receiver.put([pair])

    def _check_room(self, update: _Update) -> None:
        engine = self._running_engine()
        most, size = engine.info.adapter_limits.max_adapter_bytes, sum(one.nbytes for one in update.factors.values())
        if size > most:
            raise WeightsRejectedError(
                f"the adapter must have at most {most} bytes, got {size} so far; train one of a lower rank."
            )

    async def commit_weights(self, update: int) -> str:
        """Exchanges the weights once no sample runs, and returns their version. If anything fails, none is replaced.

        Raises:
            WeightsRejectedError: Tensors are missing or do not fit the model.
        """
        engine = self._running_engine()
        current = self._update_of(update)
        self._update = None
        async with self._updates:
            # A sample may be ready before this coroutine goes on.
            self._arriving_steps = self._global_steps if current.global_steps is None else current.global_steps
            version = await asyncio.to_thread(self._commit, engine, current)
            self._note_steps(version, current.global_steps)
        return version

    def _commit(self, engine: Engine, update: _Update) -> str:
        if update.peft_config is not None:
            tensors = adapter_tensors(update.factors)
            version = engine.load_lora_adapter_from_tensors(tensors, update.peft_config, name=self._adapter).weight_version
            self._has_adapter = True
            return version
        staged = update.receiver.stage()

        def exchange() -> str:
            version = engine.commit_weights(staged).weight_version
            # Whole weights of a policy that has no adapter, or has it merged.
            if self._has_adapter and not update.keeps_adapter:
                version = engine.unload_lora_adapter(self._adapter).weight_version
                self._has_adapter = False
            return version

        return engine.exclusive(exchange)

    async def drop_weights(self, update: int) -> None:
        """Gives an update up; the weights stay what they are."""
        if self._update is not None and self._update.number == update:
            if self._update.receiver is not None:
                self._update.receiver.drop()
            self._update = None

    async def collective_rpc(
        self,
        method: str,
        timeout: float | None = None,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> list[Any]:
        """Does what verl-omni asks of its workers: `set_pending_lora_peft_config` and `update_weights_from_ipc`.

        Args:
            method: The name of the method.
            timeout: How many seconds it may take; None: no limit.
            args: Its positional arguments.
            kwargs: Its keyword arguments.

        Returns:
            A list with its result.

        Raises:
            InvalidRequestError: There is no such method.
        """
        values = dict(kwargs or {})
        methods: Mapping[str, Callable[..., Coroutine[Any, Any, Any]]] = {
            "set_pending_lora_peft_config": self._set_pending_lora_peft_config,
            "update_weights_from_ipc": self._update_weights_from_ipc,
        }
        if method not in methods:
            known = ", ".join(methods)
            raise InvalidRequestError(
                f"method must be one of {known}, got {method[:80]!r}; call the server's own.", field="method"
            )
        return [await asyncio.wait_for(methods[method](*args, **values), timeout)]

    async def _set_pending_lora_peft_config(self, peft_config: Mapping[str, Any] | None = None) -> None:
        self._pending_peft_config = None if peft_config is None else dict(peft_config)

    async def _update_weights_from_ipc(
        self, peft_config: Mapping[str, Any] | None = None, base_sync_done: bool = False, **place: Any
    ) -> str:
        if self._receive_weights is None:
            raise WeightsRejectedError(
                "weights must come in buckets here, got a call that announces others; use lora.merge=True."
            )
        named_steps = _UPDATE_ID.fullmatch(place.get("zmq_update_id") or "")
        update = await self.begin_weights(
            global_steps=None if named_steps is None else int(named_steps[1]),
            peft_config=peft_config,
            base_sync_done=base_sync_done,
        )
        try:
            current = self._update_of(update)
            try:
                named = await asyncio.wait_for(asyncio.to_thread(self._receive_weights, **place), _MOST_WAIT_S)
            except TimeoutError:
                raise WeightsRejectedError(
                    f"weights must arrive within {_MOST_WAIT_S:g} s, got silence; look after the trainer's ranks, all of which "
                    "send, and update again."
                ) from None
            if current.receiver is None:
                current.factors |= dict(named)
            else:
                await asyncio.to_thread(current.receiver.put, base_tensors(named))
            return await self.commit_weights(update)
        except BaseException:
            await self.drop_weights(update)
            raise

    def _update_of(self, number: int) -> _Update:
        if self._update is None or self._update.number != number:
            raise WeightsRejectedError(
                "the weights must be of the update that began last, got those of another one; begin the update again."
            )
        return self._update

    def _note_steps(self, version: str, global_steps: int | None) -> None:
        if global_steps is not None:
            self._global_steps = int(global_steps)
        self._steps_of[version] = self._global_steps
        while len(self._steps_of) > _MOST_VERSIONS:
            del self._steps_of[next(iter(self._steps_of))]

    def _lora_name(self) -> str | None:
        """Returns the adapter that samples are made with; None: the weights as they are.

        Raises:
            WeightsMismatchError: Samples are to be of the old policy, which has not arrived.
        """
        if not self._has_adapter and self._adapter != _IN_TRAINING:
            raise WeightsMismatchError(
                f"samples must be made with the adapter {self._adapter}, got none so far; have the trainer update the weights "
                "first."
            )
        return self._adapter if self._has_adapter else None

    def _running_engine(self) -> Engine:
        if self._engine is None:
            raise ShuttingDownError("the server must be launched to answer, got no engine; call launch_server first.")
        return self._engine
