"""An engine's changes of weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from flowroll.engine.core import EngineCore
from flowroll.engine.scheduler import ExclusiveMode
from flowroll.engine.weights.receiver import WeightReceiver
from flowroll.engine.weights.staged import StagedWeights, WeightFiles, find_weights
from flowroll.types import WeightUpdate
from flowroll.types.tensors import plain_tensor


class UpdatableEngine(EngineCore):
    """The part of `Engine` that takes new weights and tells which it has; weight_store.py does it."""

    def update_weights_from_disk(
        self,
        folder: str | Path,
        *,
        module: str = "transformer",
        weight_version: str | None = None,
        mode: ExclusiveMode = "drain",
    ) -> WeightUpdate:
        """Replaces the weights of a module by others of the same shapes: all of them, or, whatever goes wrong, none.

        Requests go on while the files are read and checked; then the change waits for those that run. With several ranks
        each reads its own part, from the same path, when its turn has come. Afterwards rollouts have the bits of an engine that
        was started on the new weights.

        Args:
            folder: A checkpoint folder, whose subfolder of the module's name is read; the module's own folder; or one
                .safetensors file.
            module: "transformer" or "vae".
            weight_version: Of the new weights; None: one more than the highest number that a version had so far.
            mode: What becomes of the requests that run: "drain": they finish first; "abort": they are done again, wholly, with
                the new weights.

        Raises:
            InvalidRequestError: Another module, or a version that is no short text.
            WeightsRejectedError: Files that cannot be read to their end, or are not the module's. Everything is as it was.
            ShuttingDownError: The engine was interrupted or closed.
        """
        staged = self.stage_weights(find_weights(folder, module))
        return self.commit_weights(staged, weight_version=weight_version, mode=mode)

    def stage_weights(self, files: WeightFiles) -> StagedWeights:
        """The first half of an update: reads and checks; may be called from any thread, while requests run.

        Raises:
            WeightsRejectedError: Files that cannot be read to their end, or are not the module's.
            ShuttingDownError: The engine was interrupted or closed.
        """
        self._check_interrupt()
        return self._weights.stage(files)

    def update_weights_from_tensors(
        self,
        named_tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
        *,
        module: str = "transformer",
        weight_version: str | None = None,
        mode: ExclusiveMode = "drain",
        partial: bool = False,
    ) -> WeightUpdate:
        """Replaces the weights of a module by copies of a trainer's tensors in this process: all of them, or none.

        Args:
            named_tensors: By the names of the module's state_dict, e.g. `trainer.state_dict()`; taken one at a time. DTensors,
                as FSDP2 has them, are gathered: every rank of the trainer has to make this call, on an engine of its own.
            module: "transformer" or "vae".
            weight_version: Of the new weights; None: one more than the highest number that a version had so far.
            mode: What becomes of the requests that run; see `update_weights_from_disk`.
            partial: Whether what is not given stays as it is; otherwise it is an error.

        Raises:
            InvalidRequestError: Another module, or a version that is no short text.
            WeightsRejectedError: Tensors that are not the module's. Everything is as it was.
            ShuttingDownError: The engine was interrupted or closed.
        """
        incoming = self.receive_weights(module, partial=partial)
        for name, tensor in named_tensors.items() if isinstance(named_tensors, Mapping) else named_tensors:
            incoming.put([(name, plain_tensor(tensor, name, device=None))])
        return self.commit_weights(incoming.stage(), weight_version=weight_version, mode=mode)

    def receive_weights(self, module: str = "transformer", *, partial: bool = False) -> WeightReceiver:
        """Makes room for new weights that arrive in buckets, while requests run; what `stage` then gives can be committed.

        Args:
            module: "transformer" or "vae".
            partial: Whether tensors that do not arrive stay as they are; otherwise it is an error.

        Raises:
            InvalidRequestError: Another module.
            ShuttingDownError: The engine was interrupted or closed.
        """
        self._check_interrupt()
        return self._weights.receive(module, partial=partial)

    def commit_weights(
        self, staged: StagedWeights, *, weight_version: str | None = None, mode: ExclusiveMode = "drain"
    ) -> WeightUpdate:
        """The second half: exchanges the weights once no request runs.

        Args:
            staged: From `stage_weights`, or of `receive_weights`.
            weight_version: Of the new weights; None: one more than the highest number that a version had so far.
            mode: What becomes of the requests that run; see `Scheduler.exclusive`.

        Raises:
            InvalidRequestError: A version that is no short text.
            WeightsRejectedError: Another rank cannot read its part. Everything is as it was.
            ShuttingDownError: The engine was interrupted or closed.
        """
        return self._alone(lambda: self._weights.commit(staged, weight_version), mode)

    def weights_checksum(self, module: str = "transformer") -> str:
        """sha256 over the module's tensors in the order of their names, of each its name and then its bytes, of all ranks.

        Waits for the requests that run. `flowroll.replay.weights_checksum` is the same for a trainer's module.

        Args:
            module: "transformer", "text_encoder" or "vae".

        Raises:
            InvalidRequestError: Another module.
            ShuttingDownError: The engine was interrupted or closed.
        """
        return self._alone(lambda: self._weights.checksum(module))

    def verify_weights(self, expected: Iterable[tuple[str, str]], *, module: str = "transformer") -> int:
        """Compares every tensor of a module with what the caller expects. Waits for the requests that run.

        Args:
            expected: Name and sha256 of the raw bytes, of every tensor.
            module: "transformer", "text_encoder" or "vae".

        Returns:
            How many tensors there are.

        Raises:
            WeightsMismatchError: Names that are unknown, missing or doubled, or tensors that differ; lists them.
            InvalidRequestError: Another module.
            ShuttingDownError: The engine was interrupted or closed.
        """
        return self._alone(lambda: self._weights.verify(expected, module))

    def differing_weights(self, expected: Mapping[str, str], *, module: str = "transformer") -> tuple[list[str], list[str]]:
        """Compares tensors of a module with what the caller expects. Waits for the requests that run.

        Args:
            expected: `typed_tensor_checksum` by name; tensors that are not named are not looked at.
            module: "transformer", "text_encoder" or "vae".

        Returns:
            The names that the module does not have, and those whose tensors differ.

        Raises:
            InvalidRequestError: Another module.
            ShuttingDownError: The engine was interrupted or closed.
        """
        return self._alone(lambda: self._weights.differing(expected, module))
