"""The socket that a server listens on, and what every connection inherits from it."""

from __future__ import annotations

import socket

from flowroll.serving.config import ServerConfig


def open_listener(config: ServerConfig) -> socket.socket:
    """A bound socket, which does not listen yet.

    Raises:
        SystemExit: The address is not to be had.
    """
    try:
        return _bound_socket(config)
    except OSError as error:
        raise SystemExit(f"Error: {config.host}:{config.port} must be free to listen on, got {error}.") from None


def _bound_socket(config: ServerConfig) -> socket.socket:
    # IPPROTO_TCP is said for asyncio: it turns Nagle's delay off only then.
    family, kind, protocol, _, address = socket.getaddrinfo(
        config.host, config.port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP, flags=socket.AI_PASSIVE
    )[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # A client that does not read would hold its answer, hundreds of MiB of it, for as long as it likes. The kernel alone
        # sees that nothing leaves; it breaks the connection off, as if the client had gone.
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, max(1, round(config.send_timeout_s * 1000)))
        listener.bind(address)
    except OSError:
        listener.close()
        raise
    return listener
