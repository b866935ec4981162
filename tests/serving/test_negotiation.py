"""Which media type and dialect answer a request."""

import httpx
import pytest
from starlette.datastructures import Headers
from tests.serving.servers import SMALL, error_of

from flowroll.errors import InvalidRequestError
from flowroll.serving.negotiation import choose_media_type

JSON, MSGPACK, PNG = "application/json", "application/msgpack", "image/png"


@pytest.mark.parametrize(
    ("accept", "chosen"),
    [
        ("", JSON),
        ("*/*", JSON),
        ("application/*", JSON),
        (MSGPACK, MSGPACK),
        ("Application/MsgPack", MSGPACK),
        ("image/*", PNG),
        (f"{JSON};q=0.5, {MSGPACK}", MSGPACK),
        (f"{JSON};q=0.5, {MSGPACK};q=0.4", JSON),
        (f"{MSGPACK}, */*", MSGPACK),
        (f"{MSGPACK};q=0.1, */*;q=0.5", JSON),
        (f"{MSGPACK}, {JSON}", JSON),
        (f"{JSON};q=0, */*", MSGPACK),
        ("text/html, image/png;q=0.2", PNG),
        (f"{MSGPACK};q=1.0;level=1", MSGPACK),
        (f"{MSGPACK};q=", None),
        (f"{MSGPACK};q=nan", None),
        (f"{MSGPACK};q=2", None),
        ("text/html", None),
        ("*/*;q=0", None),
        ("nonsense", None),
    ],
)
def test_media_type_follows_quality_then_specificity_then_the_servers_order(accept: str, chosen: str | None) -> None:
    headers = Headers({"accept": accept})
    if chosen is None:
        with pytest.raises(InvalidRequestError, match="accept must allow"):
            choose_media_type(headers, [JSON, MSGPACK, PNG])
    else:
        assert choose_media_type(headers, [JSON, MSGPACK, PNG]) == chosen


def test_several_accept_headers_count_as_one() -> None:
    headers = Headers(raw=[(b"accept", b"application/json;q=0.1"), (b"accept", b"application/msgpack")])
    assert choose_media_type(headers, [JSON, MSGPACK]) == MSGPACK


@pytest.mark.parametrize("route", ["/rollout/generate", "/generate", "/v1/images/generations"])
def test_a_type_that_no_route_has_is_a_406_before_any_work(server: httpx.Client, route: str) -> None:
    response = server.post(route, json=SMALL, headers={"accept": "text/html"})
    assert response.status_code == 406
    assert error_of(response)["field"] == "accept"
    assert response.headers["content-type"] == JSON


def test_an_unknown_dialect_is_a_422_that_names_the_known_ones(server: httpx.Client) -> None:
    response = server.post("/rollout/generate", json=SMALL, headers={"x-flowroll-dialect": "klingon"})
    assert response.status_code == 422
    error = error_of(response)
    assert error["field"] == "x-flowroll-dialect"
    assert "native or sglang" in error["message"]
