"""Work goes on only for as long as its client is there."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from fastapi import Request

T = TypeVar("T")


async def while_connected(request: Request, accepted: Future[T], cancel: Callable[[Any], object]) -> T:
    """Returns the answer of an accepted request, which is cancelled if its client goes away first.

    Args:
        request: Its body has been read.
        accepted: What is waited for.
        cancel: Ends it early.

    Raises:
        CancelledRequestError: The client went away.
        FlowrollError: What the request ended in.
    """
    answer = asyncio.wrap_future(accepted)
    gone = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait((answer, gone), return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            cancel(accepted)
        return await answer
    except asyncio.CancelledError:
        cancel(accepted)
        raise
    finally:
        gone.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
