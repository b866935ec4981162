"""GET /docs: the OpenAPI document as a page to read and to try requests on. Nothing that it loads comes from another host."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files

from fastapi import APIRouter, Response

from flowroll.extras import check_installed, extra_for
from flowroll.serving.state import AppState

DOCS_ROUTE = "/docs"
# The files of Swagger UI that the page loads, from the package fastapi-offline.
ASSETS: Mapping[str, str] = {"swagger-ui-bundle.js": "text/javascript", "swagger-ui.css": "text/css"}
# The browser is told to load nothing from elsewhere, and to show the page inside no other.
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}
_ASSET_HEADERS = {"Cache-Control": "max-age=3600", "X-Content-Type-Options": "nosniff"}


def build_router(state: AppState) -> APIRouter:
    """Returns the page and its assets, which are not in the document themselves."""
    with extra_for("flowroll.serving", "server"):
        check_installed("fastapi_offline")
    router = APIRouter(include_in_schema=False)
    page = files("flowroll.serving").joinpath("docs.html").read_text(encoding="utf-8")

    @router.get(DOCS_ROUTE)
    async def docs() -> Response:
        return Response(page, media_type="text/html", headers=_HEADERS)

    def add(name: str, media_type: str) -> None:
        def asset() -> Response:
            content = files("fastapi_offline").joinpath("static", name).read_bytes()
            return Response(content, media_type=media_type, headers=_ASSET_HEADERS)

        router.add_api_route(f"{DOCS_ROUTE}/{name}", asset)

    for name, media_type in ASSETS.items():
        add(name, media_type)
    return router
