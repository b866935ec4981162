"""Both clients on their way to a server: proxies, clients that are closed, and failures of every kind."""

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest

from flowroll.client import AsyncClient, Client, route
from flowroll.client.route import is_this_machine
from flowroll.errors import FlowrollError, InvalidRequestError, MissingExtraError, ServerConnectionError

KINDS = ("sync", "async")
FAR = "http://rollouts.example:30000"
PROXY_VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


def ask(kind: str, url: str, method: str = "health", *args: Any, **options: Any) -> Any:
    """Calls one method of a client of this kind."""
    if kind == "sync":
        with Client(url, **options) as client:
            return getattr(client, method)(*args)

    async def run() -> Any:
        async with AsyncClient(url, **options) as client:
            return await getattr(client, method)(*args)

    return asyncio.run(run())


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Whatever proxies this machine has, these tests begin with none."""
    for name in PROXY_VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    return monkeypatch


class Answering(ThreadingHTTPServer):
    """A real HTTP server, which is a proxy where it is asked as one: it gives one answer and notes what it was asked."""

    daemon_threads = True

    def __init__(self, status: int = 200, body: bytes = b'{"status": "ok"}') -> None:
        asked: list[str] = []

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                asked.append(self.path)
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_CONNECT(self) -> None:
                asked.append(f"CONNECT {self.path}")
                self.send_error(502)

            def log_message(self, *args: Any) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        self.asked = asked
        self.url = f"http://127.0.0.1:{self.server_port}"


@pytest.fixture
def answering() -> Iterator[Callable[..., Answering]]:
    """Starts such servers."""
    servers: list[Answering] = []

    def start(*args: Any) -> Answering:
        servers.append(Answering(*args))
        threading.Thread(target=servers[-1].serve_forever, args=(0.01,), daemon=True).start()
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def nobody() -> Iterator[str]:
    """The URL of a port where nobody listens."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{unused.getsockname()[1]}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "LOCALHOST", "127.1", "0.0.0.0"])
@pytest.mark.parametrize("variables", [("http_proxy",), ("all_proxy",), ("HTTP_PROXY", "ALL_PROXY")])
def test_a_server_on_this_machine_is_reached_without_the_environments_proxy(
    kind: str, host: str, variables: tuple[str, ...], answering: Any, nobody: str, environment: pytest.MonkeyPatch
) -> None:
    for name in variables:
        environment.setenv(name, nobody.replace("http", "socks5") if name.lower() == "all_proxy" else nobody)
    server = answering()
    assert ask(kind, server.url.replace("127.0.0.1", host)) == {"status": "ok"}
    assert server.asked == ["/health"]


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.200.3.4", True),
        ("127.1", True),
        ("2130706433", True),
        ("0.0.0.0", True),
        ("::1", True),
        ("[::1]", True),
        ("::", True),
        ("::ffff:127.0.0.1", True),
        ("localhost", True),
        ("LocalHost.", True),
        ("rollouts.localhost", True),
        ("128.0.0.1", False),
        ("10.0.0.7", False),
        ("::2", False),
        ("fe80::1%eth0", False),
        ("::ffff:10.0.0.7", False),
        ("localhost.example", False),
        ("127.0.0.1.example", False),
        ("mylocalhost", False),
    ],
)
def test_which_hosts_are_this_machine(host: str, expected: bool) -> None:
    assert is_this_machine(host) is expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["http_proxy", "HTTP_PROXY", "all_proxy", "without a scheme", "argument", "argument before"])
def test_a_proxy_is_asked_for_a_server_elsewhere(
    kind: str, where: str, answering: Any, nobody: str, environment: pytest.MonkeyPatch
) -> None:
    proxy, options = answering(), {}
    if where == "without a scheme":
        environment.setenv("http_proxy", proxy.url.removeprefix("http://"))
    elif where.startswith("argument"):
        options["proxy"] = proxy.url
        if where == "argument before":
            environment.setenv("http_proxy", nobody)
    else:
        # The all_proxy of another scheme comes after the proxy of this one.
        environment.setenv("all_proxy" if where == "all_proxy" else where, proxy.url)
        environment.setenv("https_proxy", nobody)
    assert ask(kind, FAR, **options) == {"status": "ok"}
    assert proxy.asked == [f"{FAR}/health"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["rollouts.example", ".example", "rollouts.example:30000", "*", "direct"])
def test_a_proxy_is_not_asked_where_it_is_not_to_be(
    kind: str, way: str, answering: Any, environment: pytest.MonkeyPatch
) -> None:
    proxy = answering()
    environment.setenv("http_proxy", proxy.url)
    options = {"proxy": "direct"} if way == "direct" else {}
    if way != "direct":
        environment.setenv("no_proxy", way)
    # There is no such host.
    with pytest.raises(ServerConnectionError) as caught:
        ask(kind, FAR, **options)
    assert proxy.asked == [] and "proxy" not in caught.value.message


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_proxy_that_is_not_there_is_named_without_its_password(
    kind: str, scheme: str, nobody: str, environment: pytest.MonkeyPatch
) -> None:
    environment.setenv(f"{scheme}_proxy", nobody.replace("//", "//user:s3cret@"))
    with pytest.raises(ServerConnectionError) as caught:
        ask(kind, FAR.replace("http", scheme))
    message = caught.value.message
    assert f"through the proxy {nobody} (from the environment's {scheme}_proxy)" in message
    assert "check the proxy, or give proxy='direct'" in message
    assert "s3cret" not in message and "user" not in message


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_proxy_that_refuses_is_named(kind: str, scheme: str, answering: Any) -> None:
    proxy = answering(502, b"<html>Bad Gateway</html>")
    with pytest.raises(ServerConnectionError) as caught:
        ask(kind, FAR.replace("http", scheme), proxy=proxy.url)
    assert f"the proxy {proxy.url} (from proxy)" in caught.value.message and "502" in caught.value.message


@pytest.mark.parametrize("kind", [Client, AsyncClient])
@pytest.mark.parametrize("where", ["argument", "environment"])
@pytest.mark.parametrize("scheme", ["socks5", "socks5h"])
def test_a_socks_proxy_without_its_library_says_what_to_install(
    kind: Any, where: str, scheme: str, environment: pytest.MonkeyPatch
) -> None:
    environment.setattr(route, "find_spec", lambda name: None)
    url, options = f"{scheme}://user:s3cret@10.0.0.7:1080", {}
    if where == "environment":
        environment.setenv("all_proxy", url)
    else:
        options["proxy"] = url
    with pytest.raises(MissingExtraError, match=r"pip install 'httpx\[socks\]'") as caught:
        kind(FAR, **options)
    assert f"{scheme}://10.0.0.7:1080" in caught.value.message and "s3cret" not in caught.value.message


@pytest.mark.parametrize("kind", [Client, AsyncClient])
@pytest.mark.parametrize("where", ["argument", "environment"])
@pytest.mark.parametrize("url", ["ftp://user:s3cret@10.0.0.7", "http://", "http://user:s3cret@a:b", "socks4://10.0.0.7"])
def test_a_proxy_that_is_none_is_refused(kind: Any, where: str, url: str, environment: pytest.MonkeyPatch) -> None:
    options = {}
    if where == "environment":
        environment.setenv("http_proxy", url)
    else:
        options["proxy"] = url
    with pytest.raises(InvalidRequestError, match="proxy must be ") as caught:
        kind(FAR, **options)
    assert "s3cret" not in caught.value.message


@pytest.mark.parametrize(("kind", "transport"), [(Client, httpx.MockTransport), (AsyncClient, httpx.MockTransport)])
def test_a_proxy_that_would_not_be_used_is_refused(kind: Any, transport: Any, environment: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidRequestError, match="proxy must be left out for a server on this machine"):
        kind("http://localhost:30000", proxy="http://10.0.0.7:3128")
    with pytest.raises(InvalidRequestError, match="proxy must be left out beside transport"):
        kind(FAR, proxy="http://10.0.0.7:3128", transport=transport(lambda request: httpx.Response(200)))
    # A transport knows its own way.
    environment.setenv("http_proxy", "socks4://10.0.0.7")
    kind(FAR, transport=transport(lambda request: httpx.Response(200)))


METHODS = [("rollout", "x"), ("health",), ("metrics",), ("wait_ready", 30), ("update_weights", {}), ("weights_checksum",)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method[0])
def test_a_closed_client_says_so(kind: str, method: tuple[Any, ...]) -> None:
    def never(request: httpx.Request) -> httpx.Response:
        raise AssertionError("sent")

    name, *args = method

    async def run() -> None:
        client = AsyncClient(FAR, transport=httpx.MockTransport(never))
        await client.close()
        await client.close()
        await getattr(client, name)(*args)

    with pytest.raises(FlowrollError, match=r"^The client is closed; make a new one\.$"):
        if kind == "async":
            asyncio.run(run())
        else:
            client = Client(FAR, transport=httpx.MockTransport(never))
            client.close()
            client.close()
            getattr(client, name)(*args)


def test_a_client_that_is_closed_while_it_waits_says_so() -> None:
    closing = threading.Event()

    def wait(request: httpx.Request) -> httpx.Response:
        client.close()
        closing.set()
        raise httpx.ReadError("closed underneath")

    client = Client(FAR, transport=httpx.MockTransport(wait))
    with pytest.raises(FlowrollError, match="The client is closed"):
        client.health()
    assert closing.is_set()


def test_a_client_of_another_event_loop_raises_an_error_that_says_so(answering: Any) -> None:
    client = AsyncClient(answering().url)

    async def two() -> None:
        await asyncio.gather(client.health(), client.health())

    asyncio.run(two())
    with pytest.raises(ServerConnectionError, match="one event loop"):
        asyncio.run(two())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "failure", [RuntimeError("odd"), OSError("odd"), UnicodeError("odd"), httpx.InvalidURL("odd"), httpx.StreamClosed()]
)
def test_whatever_a_transport_raises_is_a_flowroll_error(kind: str, failure: Exception) -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        raise failure

    with pytest.raises(ServerConnectionError, match=type(failure).__name__):
        ask(kind, FAR, transport=httpx.MockTransport(handler))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("host", ["a" * 70 + ".example", "a..b", "xn--", "\u2028"])
def test_a_host_that_cannot_be_is_a_flowroll_error(kind: str, host: str) -> None:
    with pytest.raises(FlowrollError):
        ask(kind, f"http://{host}:30000", proxy="direct")


@pytest.mark.parametrize("kind", [Client, AsyncClient])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timeout_s": 0}, "timeout_s must be a finite number above 0, got 0; "),
        ({"timeout_s": -1}, "timeout_s must"),
        ({"timeout_s": float("nan")}, "timeout_s must"),
        ({"timeout_s": float("inf")}, "timeout_s must"),
    ],
)
def test_a_timeout_that_is_none_is_refused(kind: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        kind(FAR, **options)


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_certificates_that_are_not_there_are_named(kind: Any, environment: pytest.MonkeyPatch, tmp_path: Any) -> None:
    environment.setenv("SSL_CERT_FILE", str(tmp_path / "none.pem"))
    with pytest.raises(InvalidRequestError, match="SSL_CERT_FILE"):
        kind(FAR.replace("http", "https"))
    kind(FAR)
