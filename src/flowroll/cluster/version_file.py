"""The file in which a fleet keeps the versions of its weights, so that their sequence goes on after all of it was restarted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec

from flowroll.engine.weights.versions import VersionState
from flowroll.errors import InvalidRequestError
from flowroll.wire.files import write_whole

_NAME = "versions.json"


class VersionFile:
    """Reads and writes the versions of a fleet.

    Args:
        folder: The folder of the file, which is made if there is none. Only one fleet may use it at a time.

    Raises:
        InvalidRequestError: The folder cannot be used, or the file in it is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / _NAME
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._found = msgspec.json.decode(self._path.read_bytes(), type=VersionState) if self._path.exists() else None
        except (OSError, msgspec.DecodeError) as error:
            raise InvalidRequestError(
                f"state_dir must be a folder for {_NAME}, got {folder}: {error}; use another one, or remove the file.",
                field="state_dir",
            ) from None

    def restarted(self) -> VersionState | None:
        """Returns the versions of a fleet that starts: the weights are those of the checkpoint again, older than all others.

        None: no fleet has used the folder before.
        """
        if self._found is None:
            return None
        first = VersionState.first()
        numbers = {**self._found.numbers, first.current: first.number}
        return replace(self._found, current=first.current, number=first.number, numbers=numbers)

    def write(self, state: VersionState) -> None:
        """Writes the versions, whole or not at all.

        Raises:
            RolloutFileError: They cannot be written.
        """
        write_whole(self._path, [msgspec.json.encode(state)])
