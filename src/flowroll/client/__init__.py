"""The HTTP client: the same types and the same exceptions as the engine in this process.

    with Client("http://127.0.0.1:30000") as client:
        for rollout in client.rollout(prompt="a red fox in snow", seed=42, num_outputs_per_prompt=4):
            print(rollout.seed, rollout.log_probs)

`AsyncClient` is the client for asyncio. Everything but the transport call itself is in `exchange`. Importing this needs torch
and httpx, no model library, no pydantic and no web framework.
"""

from flowroll.extras import extra_for

with extra_for("flowroll.client", "client"):
    from flowroll.client.asynchronous import AsyncClient
    from flowroll.client.synchronous import Client

__all__ = ["AsyncClient", "Client"]
