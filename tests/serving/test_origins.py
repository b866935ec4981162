"""What a browser may send: nothing that does something, for a page of another site, and nothing at all by a foreign name."""

import asyncio
from typing import Any

import httpx
import pytest
from starlette.datastructures import Headers
from tests.serving.servers import SMALL, error_of, serving
from tests.serving.test_access import routes

from flowroll.engine.service import EngineService, InProcessEngine
from flowroll.errors import ForbiddenError
from flowroll.serving import ServerConfig, create_app
from flowroll.serving.origins import OriginGuard

FOREIGN = (
    {"origin": "http://evil.example"},
    {"origin": "null"},
    {"sec-fetch-site": "cross-site"},
    {"sec-fetch-site": "same-site"},
)


def refused(
    config: dict[str, Any], headers: dict[str, str], method: str = "POST", path: str = "/pause_generation"
) -> str | None:
    """The header that a request is refused for."""
    try:
        OriginGuard(ServerConfig(model="x", **config)).check(method, path, Headers(headers))
    except ForbiddenError as error:
        return error.field
    return None


@pytest.mark.parametrize(
    ("host", "is_known"),
    [
        *((name, True) for name in ("localhost", "LOCALHOST:30000", "a.localhost", "127.0.0.1:1", "127.9.9.9", "[::1]:30000")),
        *(
            (name, False)
            for name in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "10.0.0.1", "", "[::2]")
        ),
    ],
)
def test_a_server_on_loopback_is_called_by_a_name_of_its_machine(host: str, is_known: bool) -> None:
    """Another name has been made to lead here, by whoever owns it ("DNS rebinding"); its page could read the answers."""
    for method, path in (("GET", "/metrics"), ("GET", "/liveness"), ("POST", "/rollout/generate")):
        assert refused({}, {"host": host}, method, path) == (None if is_known else "host")
    assert refused({"allowed_hosts": ("*",)}, {"host": host}) is None
    # Elsewhere only where names were given; an address leads nowhere else, whoever asks.
    assert refused({"host": "0.0.0.0"}, {"host": host}) is None
    assert refused({"host": "0.0.0.0", "allowed_hosts": ("gpu7",)}, {"host": host}) == (
        None if is_known or host in ("10.0.0.1", "[::2]") else "host"
    )


def test_allowed_hosts_may_call_and_their_pages_may_send() -> None:
    allowed = {"allowed_hosts": ("gpu7.example",)}
    assert refused(allowed, {"host": "GPU7.example:443"}) is None
    assert refused(allowed, {"host": "gpu8.example"}) == "host"
    page = {"host": "127.0.0.1:30000", "origin": "https://gpu7.example", "sec-fetch-site": "cross-site"}
    assert refused(allowed, page) is None
    assert refused({}, page) == "origin"
    assert refused(allowed, {**page, "origin": "https://gpu8.example"}) == "origin"


def test_a_page_of_the_server_itself_and_other_programs_may_send() -> None:
    for headers in ({}, {"sec-fetch-site": "none"}, {"sec-fetch-site": "same-origin", "origin": "http://127.0.0.1:30000"}):
        assert refused({}, {"host": "127.0.0.1:30000", **headers}) is None
    # Of another port is of another program.
    assert refused({}, {"host": "127.0.0.1:30000", "origin": "http://127.0.0.1:8000"}) == "origin"


@pytest.mark.parametrize("headers", FOREIGN[1:3])
def test_no_route_does_anything_for_a_page_of_another_site(service: EngineService, headers: dict[str, str]) -> None:
    """The app itself is walked, so that a new route is refused too; requests without a body need no leave of a browser."""
    app = create_app(InProcessEngine(service), ServerConfig(model="x"))
    before = service.status()

    async def walk() -> int:
        count = 0
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:30000") as client:
            for path, route in routes(app.routes):
                for method in {*route.methods, "PUT", "DELETE"} - ({"GET", "HEAD"} if path != "/health_generate" else set()):
                    answer = await client.request(method, path.replace("{update_id}", "x"), headers=headers)
                    assert answer.status_code == 403, (method, path)
                    assert error_of(answer)["code"] == "forbidden" or method == "HEAD"
                    count += 1
            assert (await client.get("/metrics", headers=headers)).status_code == 200
        return count

    assert asyncio.run(walk()) > 50
    after = service.status()
    assert (after.counts, after.is_asleep, after.load.is_paused) == (before.counts, False, False)


def test_a_server_refuses_what_its_app_refuses(service: EngineService) -> None:
    with serving(service) as client:
        for headers in (*FOREIGN, {"host": "evil.example"}):
            answer = client.post("/rollout/generate", json=SMALL, headers=headers)
            assert (answer.status_code, error_of(answer)["field"]) == (403, next(iter(headers)))
        assert client.post("/pause_generation", headers={"sec-fetch-site": "cross-site"}).status_code == 403
        assert client.get("/server_info").json()["is_paused"] is False
