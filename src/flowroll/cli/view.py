"""`flowroll view` shows rollouts: pages in a browser, or a picture or a page as a file."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flowroll.checkpoints import SHAPES, find_checkpoint
from flowroll.cli.options import ApiKey, Compile, Device, quiet_model_libraries
from flowroll.cli.serve import check_address
from flowroll.errors import InvalidRequestError

if TYPE_CHECKING:
    from fastapi import FastAPI

    from flowroll.viewer import Pages, Source


def view(
    rollouts: Annotated[
        list[Path], typer.Argument(metavar="STORE|FILE...", help="A store, or folders of safetensors files, or files.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            dir_okay=False,
            help="Write a page (.html), a contact sheet (.png) or a moving strip (.gif), and end.",
            show_default="open pages",
        ),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(
            metavar="MODEL",
            help="A checkpoint that decodes steps of which there is no picture, and replays: a folder, or one that flowroll "
            f"ships: {' or '.join(SHAPES)}.",
            callback=lambda value: None if value is None else find_checkpoint(value),
            show_default=False,
        ),
    ] = None,
    device: Device = "auto",
    compile: Compile = False,
    host: Annotated[str, typer.Option(help="Address to listen on; others than this machine's need --api-key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0: one that is free.")] = 30080,
    api_key: ApiKey = None,
) -> None:
    """Show rollouts: groups at a glance, a sample through its steps, samples side by side.

    The pages are at the address that is printed, until Ctrl-C. The password that they ask for is the API key.
    """
    source, title = _open(rollouts), ", ".join(path.name or str(path) for path in rollouts)
    if out is None and api_key is None and not _is_loopback(host):
        raise InvalidRequestError(
            f"api_key must be given where others can reach the pages, got none for {host}; give --api-key KEY.", field="api_key"
        )
    if out is None:
        check_address(host, port)
    with ExitStack() as stack:
        engine = None
        if model is not None:
            quiet_model_libraries()
            from flowroll.engine import Engine

            engine = stack.enter_context(Engine(model, device=device, compile=compile))
        if out is not None:
            from flowroll.viewer.exports import write_view

            write_view(source, out, title=title, model=engine)
            typer.echo(f"wrote {out}")
            return
        from flowroll.viewer import Pages

        _serve(Pages(source, model=engine, title=title), host=host, port=port, api_key=api_key)


def viewer_app(pages: Pages, *, host: str, api_key: str | None) -> FastAPI:
    """Returns an app that has the viewer alone. It can be called by its address or as localhost, by no other name."""
    from fastapi import FastAPI
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from flowroll.viewer import viewer_router

    app = FastAPI(openapi_url=None)
    app.include_router(viewer_router(pages, api_key=api_key))
    if _is_loopback(host):
        # A name whose address somebody changes must not open the pages to another site.
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", "[::1]", host])
    return app


def _serve(pages: Pages, *, host: str, port: int, api_key: str | None) -> None:
    import uvicorn

    listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    shown = f"[{host}]" if ":" in host else host
    typer.echo(f"look at http://{shown}:{listener.getsockname()[1]}/ (Ctrl-C ends it)")
    config = uvicorn.Config(viewer_app(pages, host=host, api_key=api_key), log_level="warning")
    uvicorn.Server(config).run(sockets=[listener])


def _open(paths: Sequence[Path]) -> Source:
    from flowroll.store import RolloutFiles, open_rollouts
    from flowroll.store.files import rollout_files
    from flowroll.store.rollout_store import is_store

    if len(paths) == 1:
        return open_rollouts(paths[0])
    if stores := [path for path in paths if is_store(path)]:
        raise InvalidRequestError(
            f"a store must be looked at alone, got {stores[0]} among {len(paths)} paths; give it alone.", field="rollouts"
        )
    return RolloutFiles(file for path in paths for file in rollout_files(path))


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
