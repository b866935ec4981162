"""The route to a server: its URL, the API key, and the proxy in between if there is one.

A server on this machine is always reached directly: an environment's proxies are for the network beyond it.
"""

from __future__ import annotations

import ipaddress
import math
import socket
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, TypeVar, get_args

import httpx

from flowroll.errors import FlowrollError, InvalidRequestError, MissingExtraError, ServerConnectionError
from flowroll.types import Number
from flowroll.types.plain import plain
from flowroll.wire.codec import WireFormat

H = TypeVar("H")
DIRECT = "direct"
# What httpx and what lies below it raise of a request on its way.
FAILURES = (httpx.HTTPError, httpx.InvalidURL, OSError, RuntimeError, UnicodeError)
_MAX_PORT = 65535


@dataclass(frozen=True, slots=True, kw_only=True)
class Proxy:
    """A proxy between the client and the server.

    Attributes:
        url: The proxy's URL with its credentials, which are never shown.
        origin: Where the proxy was set: the argument "proxy", or a variable of the environment.
    """

    url: httpx.URL
    origin: str

    def __str__(self) -> str:
        return f"the proxy {self.url.copy_with(userinfo=b'')} (from {self.origin})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """The route to one server.

    Attributes:
        base_url: The server's URL.
        headers: The headers of every request.
        proxy: The proxy between client and server; None if there is none.
    """

    base_url: httpx.URL
    headers: dict[str, str]
    proxy: Proxy | None

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of an httpx client on this route, except the transport.

        Raises:
            InvalidRequestError: The environment's certificates cannot be read.
        """
        options: dict[str, Any] = {"base_url": self.base_url, "headers": self.headers, "trust_env": False}
        if self.proxy is not None:
            options["proxy"] = self.proxy.url
        if self.base_url.scheme == "https":
            try:
                # The environment's certificates still count, where its proxies do not.
                options["verify"] = httpx.create_ssl_context(trust_env=True)
            except OSError as error:
                message = f"SSL_CERT_FILE and SSL_CERT_DIR must name certificates, got {error}; correct or unset them."
                raise InvalidRequestError(message) from error
        return options

    def open(self, kind: Callable[..., H], transport: object) -> H:
        """Makes an httpx client of the class `kind` on this route."""
        return kind(**self.options, transport=transport)

    def failed(self, error: Exception, *, is_closed: bool, is_unanswered: bool) -> FlowrollError:
        """Makes the error about a request that did not reach the server or got no answer, or not to its end."""
        if is_closed:
            return FlowrollError("The client is closed; make a new one.")
        remedy = "start it with `flowroll serve`, or check the URL"
        if isinstance(error, httpx.ReadTimeout | httpx.WriteTimeout):
            remedy = "ask for less at a time, or raise timeout_s"
        elif isinstance(error, httpx.PoolTimeout):
            remedy = "send fewer requests at a time"
        elif isinstance(error, httpx.ReadError | httpx.RemoteProtocolError):
            remedy = "look at the server's log, and retry"
        elif isinstance(error, RuntimeError):
            remedy = "use a client in one event loop alone, and make another one for the next"
        reason = f"{type(error).__name__} {error}".strip()
        if self.proxy is not None:
            reason += f" through {self.proxy}"
            if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.ProxyError):
                remedy = f"check the proxy, or give proxy={DIRECT!r} to reach the server without it"
        failure = ServerConnectionError(
            f"the server at {self.base_url.copy_with(userinfo=b'')} must answer, got {reason}; {remedy}."
        )
        failure.is_unanswered = is_unanswered
        return failure


def route_to(base_url: str, *, api_key: str | None = None, proxy: str | None = None, has_transport: bool = False) -> Route:
    """Makes the route to a server.

    Args:
        base_url: The server's URL.
        api_key: The server's bearer token.
        proxy: The URL of a proxy, or "direct" for none; None: the environment's proxy.
        has_transport: Whether the caller has a transport of its own, beside which no proxy is used.

    Raises:
        InvalidRequestError: The URL, the key or the proxy cannot be used in HTTP.
        MissingExtraError: The library for a SOCKS proxy is not installed.
    """
    url = _url("base_url", base_url, "http://host:port")
    if url.scheme not in ("http", "https") or not url.host or (url.port or 0) > _MAX_PORT:
        raise InvalidRequestError(
            f"base_url must be an http or https URL of a host, got {_shown(base_url)}; use http://host:port."
        )
    if api_key is not None and not (isinstance(api_key, str) and api_key.isascii() and api_key.isprintable()):
        raise InvalidRequestError("api_key must be printable ASCII, got other characters; use the server's --api-key.")
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    return Route(base_url=url, headers=headers, proxy=_proxy(url, proxy, has_transport))


def check_urls(urls: Sequence[str]) -> list[str]:
    """Returns the URLs of several servers.

    Raises:
        InvalidRequestError: There is none, or one comes twice.
    """
    found = list(urls)
    if not found or len(set(found)) < len(found):
        raise InvalidRequestError(
            f"base_url must be a URL, or a list of different ones, got {len(found)} of which {len(set(found))} differ; name "
            "each server once.",
            field="base_url",
        )
    return found


def check_timeout(timeout_s: Number) -> float:
    """Returns a timeout in seconds as a plain number.

    Raises:
        InvalidRequestError: The timeout is not a positive, finite number.
    """
    seconds = plain(timeout_s)
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds < math.inf:
        raise InvalidRequestError(
            f"timeout_s must be a finite number above 0, got {timeout_s!r}; use seconds.", field="timeout_s"
        )
    return float(seconds)


def check_wire_format(wire_format: WireFormat) -> WireFormat:
    """Returns the wire format, if it is a known one.

    Raises:
        InvalidRequestError: There is no wire format of that name.
    """
    if wire_format not in get_args(WireFormat):
        known = " or ".join(get_args(WireFormat))
        raise InvalidRequestError(f"wire_format must be {known}, got {wire_format!r}; leave it out.", field="wire_format")
    return wire_format


def is_this_machine(host: str) -> bool:
    """Tells whether a URL's host is a loopback address of this machine, or the unspecified address, which leads there too."""
    name = host.strip("[]").rstrip(".").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        # `inet_aton` also reads the short forms, e.g. 127.1.
        address: Any = ipaddress.ip_address(socket.inet_aton(name))
    except OSError:
        try:
            address = ipaddress.ip_address(name.partition("%")[0])
        except ValueError:
            return False
    address = getattr(address, "ipv4_mapped", None) or address
    return bool(address.is_loopback or address.is_unspecified)


def _proxy(url: httpx.URL, given: str | None, has_transport: bool) -> Proxy | None:
    if given is not None and has_transport:
        raise InvalidRequestError(
            "proxy must be left out beside transport, got both; give the transport its proxy.", field="proxy"
        )
    if given == DIRECT or has_transport:
        return None
    if is_this_machine(url.host):
        if given is not None:
            message = f"proxy must be left out for a server on this machine, got {_shown(given)} for {url.host}; leave it out."
            raise InvalidRequestError(message, field="proxy")
        return None
    origin = "proxy"
    if given is None:
        variables = urllib.request.getproxies()
        scheme = url.scheme if variables.get(url.scheme) else "all"
        given, origin = variables.get(scheme), f"the environment's {scheme}_proxy"
        address = url.host if ":" in url.host or url.port is None else f"{url.host}:{url.port}"
        if not given or urllib.request.proxy_bypass(address):
            return None
        given = given if "://" in given else f"http://{given}"
    return _usable(Proxy(url=_url(origin, given, "http://host:port"), origin=origin))


def _usable(proxy: Proxy) -> Proxy:
    scheme = proxy.url.scheme
    if scheme not in ("http", "https", "socks5", "socks5h") or not proxy.url.host:
        raise InvalidRequestError(
            f"{proxy.origin} must be an http, https, socks5 or socks5h URL, got {_shown(str(proxy.url))}; "
            f"correct it, or give proxy={DIRECT!r}.",
            field="proxy",
        )
    if scheme.startswith("socks") and find_spec("socksio") is None:
        raise MissingExtraError(
            f"{proxy} must have socksio, got none (it is not installed); run: pip install 'httpx[socks]', "
            f"or give proxy={DIRECT!r}.",
            field="proxy",
        )
    return proxy


def _url(name: str, value: str, remedy: str) -> httpx.URL:
    try:
        url = httpx.URL(value)
        # Decoded only when it is asked for.
        assert isinstance(url.host, str)
    except (httpx.InvalidURL, TypeError, ValueError) as error:
        raise InvalidRequestError(f"{name} must be a URL, got {_shown(value)} ({error}); use {remedy}.") from error
    return url


def _shown(url: object) -> str:
    """Returns the text of a possibly invalid URL without what may be a password."""
    text = str(url)
    scheme, separator, rest = text.rpartition("://")
    return repr(f"{scheme}{separator}{rest.rpartition('@')[2]}")
