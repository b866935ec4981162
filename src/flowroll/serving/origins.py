"""By which names a request may call the server, and which browser pages may send it.

A page of any site can have a browser send requests to a server on this machine, or on the network of its user, and by a name
whose address it changes later ("DNS rebinding") it can even read the answers. Other programs send neither `Sec-Fetch-Site` nor
`Origin`, and are not concerned.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers

from flowroll.errors import ForbiddenError
from flowroll.serving.config import ServerConfig

_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
# It may generate an image, which is work.
_ACTING_PATHS = frozenset({"/health_generate"})
# What a browser says of requests that a user or a page of this server began.
_OWN_SITES = frozenset({"same-origin", "none"})
_MOST_SHOWN = 100


class OriginGuard:
    """Refuses requests that call the server by an unknown name, or come from another site's page and would do something.

    Args:
        config: Its address and the hosts that it allows.
    """

    def __init__(self, config: ServerConfig) -> None:
        self._allowed = frozenset(host.lower() for host in config.allowed_hosts)
        self._own = config.host.lower()
        self._is_loopback = config.is_loopback
        self._checks_host = "*" not in self._allowed and (config.is_loopback or bool(self._allowed))

    def check(self, method: str, path: str, headers: Headers) -> None:
        """Checks one request.

        Raises:
            ForbiddenError: It is refused.
        """
        host = headers.get("host")
        # HTTP/1.1 demands a host, and a browser always sends one.
        if host is not None and self._checks_host and not self._is_known(_name(host)):
            raise ForbiddenError(
                f"host must be a name of this server, got {host[:_MOST_SHOWN]!r}; call it by its address, or start it with "
                "--allowed-host HOST.",
                field="host",
            )
        if method in _SAFE_METHODS and path not in _ACTING_PATHS:
            return
        for field, is_foreign in (
            ("origin", self._is_foreign(headers.getlist("origin"), host)),
            ("sec-fetch-site", not self._names_allowed_origin(headers) and _is_of_other_site(headers)),
        ):
            if is_foreign:
                shown = ", ".join(headers.getlist(field))
                raise ForbiddenError(
                    f"{field} must be that of a page of this server, got {shown[:_MOST_SHOWN]!r}; send the request without a "
                    "browser, or start the server with --allowed-host HOST for the page's host.",
                    field=field,
                )

    def _is_known(self, name: str) -> bool:
        if name in self._allowed or name == self._own or name == "localhost" or name.endswith(".localhost"):
            return True
        try:
            # An address, unlike a name, cannot be made to lead somewhere else.
            return ipaddress.ip_address(name).is_loopback or not self._is_loopback
        except ValueError:
            return False

    def _is_foreign(self, origins: Sequence[str], host: str | None) -> bool:
        return any(_authority(origin) != (host or "").lower() and not self._is_allowed(origin) for origin in origins)

    def _names_allowed_origin(self, headers: Headers) -> bool:
        origins = headers.getlist("origin")
        return bool(origins) and all(map(self._is_allowed, origins))

    def _is_allowed(self, origin: str) -> bool:
        return "*" in self._allowed or _name(_authority(origin)) in self._allowed


def _is_of_other_site(headers: Headers) -> bool:
    return any(site.strip().lower() not in _OWN_SITES for site in headers.getlist("sec-fetch-site"))


def _authority(origin: str) -> str:
    """Returns host and port of an origin; empty for "null" and for what is none."""
    try:
        return urlsplit(origin.strip()).netloc.lower()
    except ValueError:
        return ""


def _name(authority: str) -> str:
    """Returns the host without its port, and without the brackets of an address."""
    text = authority.strip().lower()
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.partition(":")[0].rstrip(".")
