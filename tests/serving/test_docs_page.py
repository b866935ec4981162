"""The page at /docs: it loads nothing from another host, shows the whole interface, and shows nothing without the key."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.serving.servers import SMALL, serving
from tests.serving.test_openapi import ROUTES

from flowroll.engine.service import EngineService
from flowroll.logs import POLLED
from flowroll.serving.routers.docs import ASSETS

KEY = "s3cret"
CHROMIUM = shutil.which("chromium")


@pytest.fixture(scope="module")
def guarded(service: EngineService) -> Iterator[httpx.Client]:
    with serving(service, api_key=KEY) as client:
        yield client


def test_the_page_and_its_assets_come_from_the_server(server: httpx.Client) -> None:
    page = server.get("/docs")
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    assert "default-src 'self'" in page.headers["content-security-policy"]
    assert not re.search(r"https?://|//cdn|@import", page.text)
    loaded = re.findall(r'(?:src|href)="(docs/[^"]+)"', page.text)
    assert {name.removeprefix("docs/") for name in loaded} == ASSETS.keys()
    for name in loaded:
        asset = server.get(f"/{name}")
        assert asset.status_code == 200 and len(asset.content) > 100_000
        assert asset.headers["content-type"].startswith(ASSETS[name.removeprefix("docs/")])


def test_without_the_key_the_page_has_nothing_to_show(guarded: httpx.Client) -> None:
    assert guarded.get("/docs").status_code == 200
    assert guarded.get("/openapi.json").status_code == 401
    assert guarded.get("/docs/../openapi.json").status_code == 401
    assert guarded.get("/docs/").status_code == 401


def test_every_route_has_a_tag_that_is_described(server: httpx.Client) -> None:
    document = server.get("/openapi.json").json()
    described = {tag["name"]: tag["description"] for tag in document["tags"]}
    used = {tag for operations in document["paths"].values() for one in operations.values() for tag in one["tags"]}
    assert used == described.keys() and all(described.values())


def test_the_document_shows_every_header_of_ours_that_an_answer_has(server: httpx.Client) -> None:
    document = server.get("/openapi.json").json()
    answers = {
        ("/rollout/generate", "post"): server.post("/rollout/generate", json=SMALL),
        ("/generate", "post"): server.post("/generate", json=SMALL, headers={"accept": "image/png"}),
        ("/health", "get"): server.get("/health"),
        ("/get_weights_checksum", "post"): server.post("/get_weights_checksum", json={"module_names": ["no"]}),
    }
    for (path, method), answer in answers.items():
        shown = document["paths"][path][method]["responses"][str(answer.status_code)]["headers"]
        ours = {name for name in answer.headers if name.startswith("x-")}
        assert "x-request-id" in ours and ours <= shown.keys(), (path, ours - shown.keys())
    assert "x-flowroll-seed" in answers["/generate", "post"].headers
    assert "x-flowroll-timing" in answers["/rollout/generate", "post"].headers
    work = document["paths"]["/rollout/generate"]["post"]["responses"]
    assert "Retry-After" in work["429"]["headers"] and "WWW-Authenticate" in work["401"]["headers"]


def test_the_document_shows_every_header_of_ours_that_a_request_may_have(server: httpx.Client) -> None:
    document = server.get("/openapi.json").json()

    def taken(path: str) -> set[str]:
        (operation,) = document["paths"][path].values()
        references = [parameter["$ref"] for parameter in operation["parameters"] if "$ref" in parameter]
        components: dict[str, Any] = document["components"]["parameters"]
        return {components[reference.rpartition("/")[2]]["name"] for reference in references}

    work = {"/rollout/score", "/generate", "/v1/images/generations", "/v1/images/edits"}
    assert taken("/rollout/generate") == {"x-flowroll-dialect", "x-flowroll-deadline-s", "traceparent"}
    assert all(taken(path) == {"x-flowroll-deadline-s", "traceparent"} for path in work)
    assert all(
        taken(path) == (set() if path in POLLED else {"traceparent"}) for path in ROUTES.keys() - work - {"/rollout/generate"}
    )
    # As the routes read them.
    wrong = server.post("/rollout/generate", json=SMALL, headers={"x-flowroll-dialect": "no"})
    assert wrong.status_code == 422 and wrong.json()["error"]["field"] == "x-flowroll-dialect"


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_a_browser_shows_every_route(server: httpx.Client, tmp_path: Path) -> None:
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--dump-dom"]
    url = str(server.base_url.join("/docs"))
    shown = subprocess.run([*command, "--virtual-time-budget=20000", url], capture_output=True, text=True, timeout=120).stdout
    missing = [path for path in ROUTES if path.replace("/", "\u200b/") not in shown and path not in shown]
    assert not missing
