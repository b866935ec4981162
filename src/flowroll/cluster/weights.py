"""What changes all replicas or none: weights, adapters, policies and memory; and what compares their weights.

The methods have the names and arguments of those of `EngineService`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeAlias

import ray

from flowroll.cluster.changes import AtOnce, Bucket, Change, Upload
from flowroll.cluster.parcel import pack
from flowroll.cluster.replicas import MixedError, ReplicaSet
from flowroll.cluster.updates import Change as Changed
from flowroll.cluster.updates import ChangeKind, ReplicaLostError, change_all
from flowroll.engine.service import OpenedUpdate, UpdateProgress
from flowroll.engine.weights.offload import SleepMode
from flowroll.errors import (
    EngineError,
    FlowrollError,
    ForbiddenError,
    InvalidRequestError,
    NotFoundError,
    RankLostError,
)

UpdateOrder: TypeAlias = Literal["rolling", "barrier"]
_UNSHARED = (
    "the weights of a fleet must come over HTTP, from disk, through a process group or as an adapter, got handles of one "
    "machine's memory; use /weights/begin or /update_weights_from_disk, of which each replica gets its own copy."
)


class FleetWeights:
    """The changes of a fleet, one at a time.

    Args:
        replicas: The replicas that are changed.
        order: "rolling": each replica exchanges weights between its own requests, while the others go on. "barrier": no replica
            starts a sample before all have exchanged.
    """

    def __init__(self, replicas: ReplicaSet, order: UpdateOrder) -> None:
        self._replicas, self._order = replicas, order

    async def update_from_disk(self, files: Any, weight_version: str | None, mode: Any) -> Any:
        """Has every replica read new weights from its disk."""
        return await self._change(Change(mode, "stage_from_disk", files), "weights", files.module, weight_version)

    async def load_adapter(self, files: Any, name: str, *, merged: bool, weight_version: str | None, mode: Any) -> Any:
        """Has every replica load an adapter, from its disk or as it came in a body."""
        change = Change(mode, "stage_adapter", await self.stored(files), name, merged=merged)
        return await self._change(change, "adapter", name, weight_version)

    async def unload_adapter(self, name: str, *, weight_version: str | None, mode: Any) -> Any:
        """Has every replica unload an adapter."""
        return await self._change(AtOnce(mode, "unload_adapter", name, is_versioned=True), "unload", name, weight_version)

    async def copy_policy(self, name: str, *, mode: Any = "drain", **options: Any) -> Any:
        """Has every replica copy a policy."""
        return await self._change_policy("policy", AtOnce(mode, "copy_policy", name, **options), name)

    async def average_policy(self, name: str, *, mode: Any = "drain", **options: Any) -> Any:
        """Has every replica move a policy towards another one."""
        return await self._change_policy("policy", AtOnce(mode, "average_policy", name, **options), name)

    async def drop_policy(self, name: str, *, mode: Any = "drain") -> Any:
        """Has every replica forget a policy."""
        return await self._change_policy("drop_policy", AtOnce(mode, "drop_policy", name), name)

    async def _change(
        self,
        change: Change,
        kind: ChangeKind,
        name: str,
        weight_version: str | None,
        *,
        is_whole: bool = True,
        update_id: str | None = None,
    ) -> Any:
        """Makes a change on all replicas or on none, and gives all of them the same next version.

        Args:
            change: What is staged and exchanged.
            kind: What is changed.
            name: The module or the adapter.
            weight_version: The name of the next version; None: it is counted.
            is_whole: Of weights, whether they are all of the module's.
            update_id: The update that ends with the change; None: it is none.
        """
        async with self._replicas.changing:
            replicas, versions = self._replicas, self._replicas.versions
            state = versions.state.after(versions.state.following(weight_version))
            await asyncio.to_thread(replicas.keep, state)
            change.version = state.current
            steps = _Versioned(change, lambda replica: replicas.router.set_version(replica, state.current, state.number))
            async with self._barrier():
                applied = await change_all(steps, self._replicas.ready())
            versions.adopt(state)
            self._replicas.log.add(Changed(kind=kind, name=name, is_whole=is_whole, steps=change))
            # Before a replica joins, which would open it again.
            if update_id is not None:
                self._replicas.uploads.pop(update_id, None)
            self._replicas.replace(applied.unfit)
        return next(iter(applied.results.values()))

    async def _change_policy(self, kind: ChangeKind, change: AtOnce, name: str) -> Any:
        async with self._replicas.changing:
            applied = await change_all(change, self._replicas.ready())
            self._replicas.log.add(Changed(kind=kind, name=name, steps=change))
            self._replicas.replace(applied.unfit)
        return next(iter(applied.results.values()))

    @contextlib.asynccontextmanager
    async def _barrier(self) -> Any:
        if self._order == "rolling":
            yield
            return
        await self._replicas.on_running("hold_starts", True)
        try:
            yield
        finally:
            await self._replicas.on_running("hold_starts", self._replicas.is_holding)

    async def sleep(self, mode: SleepMode) -> Any:
        """Has every replica release the memory of its weights; if one cannot, all wake.

        Raises:
            InvalidRequestError: The mode is "discard": a replica that joins later is given the weights that the others have.
        """
        if mode == "discard":
            raise InvalidRequestError(
                "mode must be offload or disk for a fleet, whose replicas compare their weights with each other, got discard; "
                "use offload.",
                field="mode",
            )
        async with self._replicas.changing:
            try:
                found = await self._replicas.on_running("sleep", mode)
            except FlowrollError:
                await self._replicas.on_running("wake")
                raise
            self._replicas.memory_mode = mode
            return _summed(list(found.values()))

    async def wake(self) -> Any:
        """Has every replica restore its weights."""
        async with self._replicas.changing:
            found = await self._replicas.on_running("wake")
            self._replicas.memory_mode = None
            return _summed(list(found.values()))

    async def checksums(self, modules: Sequence[str]) -> Any:
        """Returns the checksums of these modules, which all replicas must have alike."""
        return await self._of_all("checksums", modules)

    async def verify_weights(self, expected: Any, module: str) -> Any:
        """Compares the weights of all replicas with the expected checksums."""
        return await self._of_all("verify_weights", list(expected), module)

    async def differing_weights(self, expected: Mapping[str, str], module: str) -> Any:
        """Finds the tensors whose checksums are others than expected, on all replicas."""
        return await self._of_all("differing_weights", dict(expected), module)

    async def _of_all(self, method: str, *args: Any) -> Any:
        """Asks all replicas about their weights, between two changes."""
        async with self._replicas.changing:
            found = await self._replicas.on_all(method, *args)
        answers = list(found.values())
        if not answers:
            raise none_left(ReplicaLostError("none is ready"))
        if any(answer != answers[0] for answer in answers):
            raise EngineError(f"the weights of all replicas must be the same, got others in some of {', '.join(found)}.")
        return answers[0]

    # Weights that arrive in buckets

    async def open_update(self, module: str, *, partial: bool) -> OpenedUpdate:
        """Opens an update whose tensors arrive in buckets, on every replica."""
        async with self._replicas.changing:
            upload = Upload(module, partial=partial)
            opened = await self._replicas.each(upload.open)
            if not opened:
                raise none_left(ReplicaLostError("none is ready"))
            upload.opened = next(iter(opened.values()))
            self._replicas.uploads[upload.opened.update_id] = upload
            return upload.opened

    async def claim_bucket(self, update_id: str, heads: Any) -> None:
        """Has every replica check what a bucket will hold."""
        async with self._replicas.changing:
            upload, bucket = self.upload(update_id), Bucket(heads)
            # Whether a bucket fits depends on the module and on the buckets before it, which all replicas have alike.
            await self._replicas.each(lambda replica: upload.claim(replica, bucket))
            upload.buckets.append(bucket)

    async def put_bucket(self, update_id: str, heads: Any, memory: Any) -> UpdateProgress:
        """Stores a bucket once, and gives it to every replica."""
        async with self._replicas.changing:
            upload = self.upload(update_id)
            bucket = next(one for one in upload.buckets if one.heads == heads and one.stored is None)
            bucket.stored = await self.stored(memory)
            try:
                return await self.filled(upload, lambda replica: upload.put(replica, bucket))
            except FlowrollError:
                # If all have refused it, its tensors may come again.
                upload.buckets.remove(bucket)
                raise

    async def filled(self, upload: Upload, fill: Callable[[Any], Awaitable[UpdateProgress]]) -> UpdateProgress:
        """Has every replica take a bucket, and returns how much of the update has arrived; `changing` is held meanwhile.

        Raises:
            FlowrollError: All have refused it.
            MixedError: Some have, and the update has ended.
        """
        try:
            found = await self._replicas.each(fill)
        except MixedError:
            assert upload.opened is not None
            await self._end_upload(upload.opened.update_id)
            raise
        if not found:
            raise none_left(ReplicaLostError("none is ready"))
        progress: UpdateProgress = next(iter(found.values()))
        return replace(progress, weight_version=self._replicas.versions.current)

    async def drop_bucket(self, update_id: str, heads: Any) -> None:
        """Drops the claim of a bucket."""
        async with self._replicas.changing:
            if (upload := self._replicas.uploads.get(update_id)) is not None:
                for bucket in [one for one in upload.buckets if one.heads == heads and one.stored is None]:
                    upload.buckets.remove(bucket)
                    await self._replicas.each(functools.partial(upload.drop_bucket, bucket=bucket))

    async def commit_update(self, update_id: str, weight_version: str | None, mode: Any) -> Any:
        """Exchanges the weights of an update on all replicas, or on none."""
        upload = self.upload(update_id)
        upload.mode = mode
        try:
            return await self._change(
                upload, "weights", upload.module, weight_version, is_whole=upload.is_whole, update_id=update_id
            )
        except FlowrollError:
            async with self._replicas.changing:
                if not all(upload.is_open_on(one.id) for one in self._replicas.ready()):
                    await self._end_upload(update_id)
            raise

    async def is_open(self, update_id: str) -> bool:
        """Tells whether tensors of the update may still come."""
        return update_id in self._replicas.uploads

    async def drop_update(self, update_id: str) -> None:
        """Ends an update; the weights stay."""
        async with self._replicas.changing:
            await self._end_upload(update_id)

    async def _end_upload(self, update_id: str) -> None:
        if (upload := self._replicas.uploads.pop(update_id, None)) is not None:
            await self._replicas.each(upload.abandon)

    def upload(self, update_id: str) -> Upload:
        """Returns an update that is under way."""
        if (upload := self._replicas.uploads.get(update_id)) is None:
            raise NotFoundError(
                f"update_id must be of an update that is under way, got {update_id[:80]}; it was committed, aborted or dropped "
                "after a silence: begin another.",
                field="update_id",
            )
        return upload

    async def stored(self, value: Any) -> Any:
        """Stores a value once, for all replicas."""
        return await asyncio.to_thread(ray.put, pack(value))

    # What belongs to one engine alone

    async def open_sent(self, *_: Any, **options: Any) -> Any:
        """Refuses handles of tensors in one machine's memory."""
        raise ForbiddenError(_UNSHARED)


class _Versioned:
    """A change that tells the router of each replica that has made it."""

    def __init__(self, change: Change, note: Callable[[str], None]) -> None:
        self._change, self._note = change, note
        self.stage, self.drop = change.stage, change.drop

    async def exchange(self, member: Any) -> Any:
        result = await self._change.exchange(member)
        self._note(member.id)
        return result


def _summed(changes: Sequence[Any]) -> Any:
    """Returns the change of memory of all replicas together, which went on at the same time."""
    if not changes:
        raise none_left(ReplicaLostError("none is ready"))
    return replace(changes[0], num_bytes=sum(one.num_bytes for one in changes), seconds=max(one.seconds for one in changes))


def none_left(error: ReplicaLostError) -> RankLostError:
    """Makes the error of a call that no replica is left to answer."""
    return RankLostError(f"a replica must live to answer, got the end of those that were asked ({error}); try again.")
