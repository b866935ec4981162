"""The HTTP server over one engine: `serve` runs it, `create_app` is the ASGI app alone."""

from flowroll.extras import extra_for

with extra_for("flowroll.serving", "server"):
    from flowroll.serving.app import create_app
    from flowroll.serving.config import ServerConfig
    from flowroll.serving.launch import serve

__all__ = ["ServerConfig", "create_app", "serve"]
