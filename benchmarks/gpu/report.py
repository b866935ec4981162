"""The JSON file of one stage, written anew after every figure, so that a stage that is stopped leaves what it had."""

from __future__ import annotations

import contextlib
import json
import os
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Report:
    """What a stage found.

    Attributes:
        path: The file.
        stage: The name of the stage.
        limit_s: How many seconds the stage has.
        state: "running", "done", "failed", or "out of time".
        results: Its figures, each with a name.
        skipped: What was left out, each with the reason.
        errors: What failed, each with its last line.
        seconds: How long it took so far.
    """

    path: Path
    stage: str
    limit_s: float
    state: str = "running"
    results: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    errors: list[dict[str, str]] = field(default_factory=list)
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self._started = time.monotonic()
        self.write()

    @property
    def seconds_left(self) -> float:
        """The seconds until the stage is stopped."""
        return self.limit_s - (time.monotonic() - self._started)

    def add(self, what: str, **values: Any) -> None:
        """Adds a figure."""
        self.results.append({"what": what, **values})
        self.write()

    def skip(self, what: str, why: str) -> None:
        """Names what is left out."""
        self.skipped.append({"what": what, "why": why})
        self.write()

    @contextlib.contextmanager
    def trying(self, what: str) -> Iterator[None]:
        """Notes an error of what is tried, after which the stage goes on."""
        try:
            yield
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            where = traceback.extract_tb(error.__traceback__)[-1]
            name = f"{type(error).__name__} in {Path(where.filename).name}:{where.lineno}"
            self.errors.append({"what": what, "error": f"{name}: {lines[0][:400]}"})
            self.write()

    def end(self, state: str | None = None) -> None:
        """Closes the report: as done, unless something failed."""
        self.state = state or ("failed" if self.errors else "done")
        self.write()

    def write(self) -> None:
        """Writes the file, whole."""
        self.seconds = time.monotonic() - self._started
        values = asdict(self) | {"path": self.path.name}
        scratch = self.path.with_suffix(".part")
        scratch.write_text(json.dumps(values, indent=1))
        os.replace(scratch, self.path)
