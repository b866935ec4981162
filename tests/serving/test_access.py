"""Who is let in: by the token, on every route that the app has."""

import asyncio
import hmac
from collections.abc import Iterable, Iterator
from typing import Any

import httpx
import pytest
from starlette.routing import Route
from tests.serving.servers import SMALL, error_of, serving
from tests.serving.test_openapi import ROUTES

from flowroll.engine.service import EngineService, InProcessEngine
from flowroll.serving import ServerConfig, create_app
from flowroll.serving.middleware import OPEN_PATHS
from flowroll.serving.routers.docs import ASSETS

KEY = "s3cret"
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "FROB")


@pytest.fixture(scope="module")
def guarded(service: EngineService) -> Iterator[httpx.Client]:
    with serving(service, api_key=KEY) as client:
        yield client


def test_every_route_of_the_app_but_liveness_and_the_empty_page_is_closed_whatever_the_method(
    service: EngineService, guarded: httpx.Client
) -> None:
    """The app itself is walked, so that a route that the document leaves out is found too."""
    app = create_app(InProcessEngine(service), ServerConfig(model="x", api_key=KEY))
    paths = {path for path, _ in routes(app.routes)}
    assert {*ROUTES, "/openapi.json", *OPEN_PATHS} == paths
    before = service.status().counts.accepted
    assert OPEN_PATHS - {"/liveness"} == {"/docs", *(f"/docs/{name}" for name in ASSETS)}
    for path in (
        *sorted(paths - OPEN_PATHS),
        "/nope",
        "/docs/",
        "/docs/nope",
        "/DOCS",
        "/liveness/",
        "/liveness/../health",
        "//liveness",
        "/LIVENESS",
        "/",
    ):
        for method in METHODS:
            answer = guarded.request(method, path, json=SMALL if method == "POST" else None)
            assert answer.status_code == 401, (method, path)
            assert answer.headers["www-authenticate"] == "Bearer"
            if method != "HEAD":
                assert error_of(answer)["code"] == "unauthorized"
    assert service.status().counts.accepted == before
    assert guarded.get("/liveness").status_code == 200


def test_a_token_opens_every_route(guarded: httpx.Client) -> None:
    for path, methods in ROUTES.items():
        for method in methods:
            answer = guarded.request(method, path, headers={"authorization": f"Bearer {KEY}"})
            assert answer.status_code < 500 and answer.status_code != 401, (path, answer.text)


def test_a_token_in_the_wrong_place_opens_nothing(guarded: httpx.Client) -> None:
    assert guarded.get("/health", params={"api_key": KEY, "token": KEY, "authorization": f"Bearer {KEY}"}).status_code == 401
    assert guarded.get("/health", cookies={"authorization": f"Bearer {KEY}"}).status_code == 401
    assert guarded.get("/health", headers={"x-api-key": KEY, "proxy-authorization": f"Bearer {KEY}"}).status_code == 401


def test_a_websocket_is_not_let_in(service: EngineService) -> None:
    sent: list[dict[str, Any]] = []
    scope = {"type": "websocket", "path": "/health", "headers": [], "query_string": b"", "subprotocols": []}

    async def receive() -> dict[str, Any]:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(create_app(InProcessEngine(service), ServerConfig(model="x", api_key=KEY))(scope, receive, send))  # type: ignore[arg-type]
    assert [message["type"] for message in sent] == ["websocket.close"]


@pytest.mark.parametrize("sent", [f"Bearer {KEY}", f"Bearer {KEY[:-1]}", "Bearer x", "Bearer", "", f"Basic {KEY}"])
def test_tokens_are_compared_in_constant_time_and_by_nothing_else(
    guarded: httpx.Client, monkeypatch: pytest.MonkeyPatch, sent: str
) -> None:
    compared: list[tuple[bytes, bytes]] = []

    def compare(left: bytes, right: bytes) -> bool:
        compared.append((left, right))
        return verdict

    monkeypatch.setattr(hmac, "compare_digest", compare)
    for verdict in (True, False):
        compared.clear()
        status = guarded.get("/health", headers={"authorization": sent}).status_code
        assert status == (200 if verdict else 401)
        ((_, right),) = compared
        assert right == f"Bearer {KEY}".encode()


def routes(found: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    """The paths of routes and of the routers among them; anything else is not known to be guarded."""
    for route in found:
        if isinstance(route, Route):
            yield route.path, route
            continue
        inner = getattr(route, "routes", None) or getattr(getattr(route, "original_router", None), "routes", None)
        assert inner, f"{type(route).__name__} is neither a route nor holds some"
        yield from routes(inner)
