"""The real engine, with something to do before each request, for tests that hold requests up or make them fail."""

import threading
from collections.abc import Callable
from typing import Any

from flowroll.engine import Engine, RequestPlan

WAIT_S = 60.0


class HookedEngine(Engine):
    """Calls `hook` with each request before it is encoded, on the encoding thread."""

    hook: Callable[[RequestPlan], None] = staticmethod(lambda plan: None)

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        encode = self._work.encode

        def encode_after_hook(plan: RequestPlan) -> Any:
            self.hook(plan)
            return encode(plan)

        self._work.encode = encode_after_hook  # type: ignore[method-assign]


class Gate:
    """A hook that holds every request until the test opens it."""

    def __init__(self) -> None:
        self.entered, self.opened = threading.Event(), threading.Event()

    def __call__(self, plan: RequestPlan) -> None:
        self.entered.set()
        assert self.opened.wait(WAIT_S)
