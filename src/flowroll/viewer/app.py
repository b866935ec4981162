"""The routes of the viewer, for an app of its own or for a server's."""

from __future__ import annotations

import base64
import binascii
import hmac
from collections.abc import Callable
from urllib.parse import urlsplit

from fastapi import APIRouter, Request, Response
from starlette.concurrency import run_in_threadpool

from flowroll.errors import FlowrollError, ForbiddenError, InvalidRequestError
from flowroll.viewer.pages import ASSETS, Pages, Query, asset

# The browser is told to load nothing from elsewhere, and to show the page inside no other.
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src 'self' data:; style-src 'self' 'unsafe-inline'; script-src 'self'; "
    "form-action 'self'; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
# A sample never changes.
_PICTURE_HEADERS = {"X-Content-Type-Options": "nosniff", "Cache-Control": "private, max-age=3600"}
# The browser asks for a name and a password: the password is the API key.
_ASK_FOR_KEY = {"WWW-Authenticate": 'Basic realm="flowroll", charset="UTF-8"'}


def viewer_router(pages: Pages, *, prefix: str = "", api_key: str | None = None) -> APIRouter:
    """Returns the routes, which are not in the OpenAPI document.

    Args:
        pages: Makes the pages.
        prefix: In front of every path.
        api_key: What has to be the password, or the bearer token, of every request; None: nothing.
    """
    router = APIRouter(include_in_schema=False)

    def add(path: str, answer: Callable[[Request], Response], *, method: str = "GET") -> None:
        async def route(request: Request) -> Response:
            if api_key is not None and not _has_key(request, api_key):
                return Response("The password is the server's API key.", 401, _ASK_FOR_KEY, "text/plain")
            try:
                _check_site(request)
                return await run_in_threadpool(answer, request)
            except FlowrollError as error:
                return _html(pages.error(error.message), error.status)

        router.add_api_route(prefix + path, route, methods=[method], name=answer.__name__)

    def gallery(request: Request) -> Response:
        return _html(pages.gallery(_query(request)))

    def compare(request: Request) -> Response:
        return _html(pages.compare(request.query_params.getlist("sample")))

    def sample(request: Request) -> Response:
        return _html(pages.sample(request.path_params["sample"]))

    def replayed(request: Request) -> Response:
        return _html(pages.sample(request.path_params["sample"], is_replayed=True))

    def picture(request: Request) -> Response:
        return _png(pages.picture(request.path_params["sample"]))

    def step_picture(request: Request) -> Response:
        return _png(pages.picture_of_step(request.path_params["sample"], request.path_params["step"]))

    for path in ("", "/") if prefix else ("/",):
        add(path, gallery)
    add("/compare", compare)
    add("/sample/{sample}", sample)
    add("/sample/{sample}", replayed, method="POST")
    add("/picture/{sample}.png", picture)
    add("/picture/{sample}/{step:int}.png", step_picture)
    for name, media_type in ASSETS.items():
        add(f"/{name}", lambda _, name=name, media_type=media_type: Response(asset(name), 200, _PICTURE_HEADERS, media_type))  # type: ignore[misc]
    return router


def _html(text: str, status: int = 200) -> Response:
    return Response(text, status, _HEADERS, "text/html")


def _png(content: bytes | None) -> Response:
    return Response(content, 404 if content is None else 200, _PICTURE_HEADERS, "image/png")


def _query(request: Request) -> Query:
    given = request.query_params
    least, page = given.get("min_reward", ""), given.get("page", "1")
    try:
        return Query(
            prompt=given.get("prompt", ""),
            version=given.get("version", ""),
            min_reward=float(least) if least else None,
            oldest_first=given.get("order") == "oldest",
            page=int(page),
        )
    except ValueError as error:
        raise InvalidRequestError(
            f"min_reward and page must be numbers, got {least!r} and {page!r}; leave them out."
        ) from error


def _has_key(request: Request, api_key: str) -> bool:
    scheme, _, value = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "basic":
        try:
            value = base64.b64decode(value, validate=True).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            return False
    elif scheme.lower() != "bearer":
        return False
    return hmac.compare_digest(value.strip().encode(), api_key.encode())


def _check_site(request: Request) -> None:
    """Refuses what the page of another site makes a browser send, where it would be work.

    Raises:
        ForbiddenError: It is such a request.
    """
    headers = request.headers
    if request.method == "GET" and headers.get("sec-fetch-mode", "navigate") == "navigate":
        return
    site, origin = headers.get("sec-fetch-site", "none"), headers.get("origin")
    is_foreign = origin is not None and urlsplit(origin).netloc != headers.get("host")
    if site not in ("none", "same-origin") or is_foreign:
        raise ForbiddenError(
            f"origin must be a page of this server, got {(origin or site)[:100]!r}; use the button on the sample's page.",
            field="origin",
        )
