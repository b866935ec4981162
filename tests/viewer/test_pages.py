"""What the pages say of rollouts in a store or in files; without a browser and without a model."""

import html
import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi import FastAPI
from fastapi.testclient import TestClient
from PIL import Image
from tests.factories import make_rollout
from tests.viewer.reading import text_of

from flowroll import Rollout
from flowroll.cli.view import viewer_app
from flowroll.errors import InvalidRequestError
from flowroll.sampling.transition import clean_prediction
from flowroll.store import RolloutFiles, RolloutStore, open_rollouts
from flowroll.types import StepImages, StepTensors
from flowroll.types.pictures import encode_png
from flowroll.viewer import Pages, viewer_router
from flowroll.viewer import pages as pages_module
from flowroll.viewer.exports import write_view
from flowroll.viewer.steps import clean_latents, steps_of

KEY = "a key"
HOSTILE = '<script>alert("1")</script> & co'


def small(seed: int = 0, **overrides: Any) -> Rollout:
    values = {"family": "z_image", "height": 16, "width": 16, "steps": 3, "text_tokens": 2, "guided": False}
    return make_rollout(**{**values, "seed": seed, **overrides})


def with_steps(rollout: Rollout) -> dict[str, Any]:
    """Pictures of its first two steps."""
    images = tuple(torch.full((3, 1, 16, 16), 0.25 * (step + 1)) for step in range(2))
    return {"step_images": StepImages(step_indices=(0, 1), images=images)}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[RolloutStore]:
    with RolloutStore(tmp_path / "runs") as store:
        store.append(
            [small(seed, prompt=HOSTILE, request_id="one", **with_steps(small(seed))) for seed in range(2)],
            rewards=[0.25, 0.75],
        )
        store.append(
            [small(seed, prompt="a pear", request_id="two", weight_version=str(seed)) for seed in (7, 8)],
            rewards=[0.5, 0.5],
            notes=["so", None],
        )
        yield store


def client_of(pages: Pages, **options: Any) -> TestClient:
    app = FastAPI(openapi_url=None)
    app.include_router(viewer_router(pages, **options))
    return TestClient(app)


@pytest.fixture
def client(store: RolloutStore) -> TestClient:
    return client_of(Pages(RolloutStore(store.path, read_only=True), title="runs"))


def test_the_gallery_shows_every_group_at_a_glance_the_newest_first(client: TestClient) -> None:
    page = client.get("/").text
    said = text_of(page)
    assert "4 samples" in said and said.index("a pear") < said.index("alert(")
    for words in (
        "2 samples · weights 7 · sde 0.7 · 3 steps · reward 0.5 ± 0.25",
        "seed 0 · 0.25 compare seed 1 · 0.75",
        "seed 7 · 0.5 compare seed 8 · 0.5",
        "The samples were made with weights of 2 versions: 7, 8.",
        "All 2 rewards are 0.5, so every advantage is 0.",
    ):
        assert words in said, words
    # What a caller wrote stays text.
    assert "<script>alert" not in page
    oldest = text_of(client.get("/?order=oldest").text)
    assert oldest.index("alert(") < oldest.index("a pear")


def test_a_gallery_opens_no_rollout_and_loads_pictures_as_they_come_into_view(
    store: RolloutStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.append([small(seed, request_id=f"many {seed // 16}") for seed in range(1000)])
    monkeypatch.setattr(RolloutStore, "load", lambda *_: pytest.fail("a rollout was read"))
    monkeypatch.setattr(RolloutStore, "picture", lambda *_: pytest.fail("a picture was read"))
    pages = Pages(store)
    page = pages.gallery(pages_module.Query())
    assert len(re.findall(r'<img loading="lazy"', page)) == 1000 and "1004 samples, page 1 of 2" in text_of(page)
    assert len(re.findall(r"<img", pages.gallery(pages_module.Query(page=2)))) == 4


@pytest.mark.parametrize(
    ("query", "shown"),
    [
        ("prompt=PEAR", {"7", "8"}),
        ("version=8", {"8"}),
        ("min_reward=0.5", {"1", "7", "8"}),
        ("prompt=pear&min_reward=0.6", set()),
        ("", {"0", "1", "7", "8"}),
    ],
)
def test_the_gallery_is_filtered(client: TestClient, query: str, shown: set[str]) -> None:
    page = client.get(f"/?{query}").text
    assert set(re.findall(r"seed (\d+) ·|seed (\d+)<", text_of(page))) == {(seed, "") for seed in shown}
    assert ("Nothing here matches." in page) == (not shown)


def test_a_long_gallery_has_pages_that_keep_the_filter(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages_module, "PAGE_SAMPLES", 1)
    first = client.get("/?prompt=pear").text
    (link,) = re.findall(r'rel="next" href="([^"]+)"', first)
    second = client.get(html.unescape(link)).text
    assert "seed 8 ·" in text_of(first) and "seed 7 ·" in text_of(second) and "page 2 of 2" in second
    assert client.get("/?page=99&prompt=pear").text == second
    answer = client.get("/?min_reward=much")
    assert answer.status_code == 422 and "min_reward and page must be numbers, got 'much'" in text_of(answer.text)


def test_a_sample_has_its_picture_its_steps_and_its_numbers(client: TestClient, store: RolloutStore) -> None:
    page, rollout = client.get("/sample/000000-001").text, store.load("000000-001")
    assert rollout.log_probs is not None and rollout.image is not None
    said = text_of(page)
    for step in range(3):
        assert f"{step} {rollout.sampling.sigmas[step]:.4f} " in said and f" {rollout.log_probs[step].item():.6g} -" in said
    assert f"reward {0.75:.6g}" in said and "request one" in said and "seed 1" in said
    assert client.get("/picture/000000-001.png").content == encode_png(rollout.image)
    assert rollout.step_images is not None
    for step in range(2):
        assert f'src="/picture/000000-001/{step}.png"' in page
        assert client.get(f"/picture/000000-001/{step}.png").content == encode_png(rollout.step_images.images[step])
    assert "/picture/000000-001/2.png" not in page and client.get("/picture/000000-001/2.png").status_code == 404
    # Its charts have titles and units, and no chart is there for what is not known.
    assert page.count("<svg") == 2 and "Log-probability per step" in page and "Noise per step" in page
    assert "std of the step's noise" in html.unescape(page) and "<script>alert" not in page
    # The others of its group are one click away, and nothing is replayed without an engine.
    assert 'rel="prev" href="/sample/000000-000"' in page and 'rel="next"' not in page and "Replay it" not in page


def test_the_std_of_a_step_is_that_of_its_transition() -> None:
    rollout = small(debug_tensors=None)
    steps = steps_of(rollout)
    for step in steps:
        sigma, following = rollout.sampling.sigmas[step.index : step.index + 2]
        # The paper's: n sqrt(s / (1 - s)) sqrt(s - t), with 1 - t for the division at s = 1.
        expected = 0.7 * (sigma / (1 - (following if sigma == 1 else sigma))) ** 0.5 * (sigma - following) ** 0.5
        assert step.std == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("held", ["x0", "velocity", "debug"])
def test_the_clean_prediction_of_a_step_comes_from_whatever_holds_it(held: str) -> None:
    rollout = small()
    assert rollout.debug_tensors is not None and rollout.dit_trajectory is not None
    expected = clean_prediction(
        rollout.dit_trajectory.latents[1], rollout.debug_tensors.model_output[1], rollout.sampling.sigmas[1]
    )
    if held != "debug":
        tensors = {"x0": expected[None]} if held == "x0" else {"velocity": rollout.debug_tensors.model_output[1:2]}
        rollout = small(debug_tensors=None, step_tensors=StepTensors(step_indices=(1,), tensors=tensors))
        assert clean_latents(rollout, 0) is None
    found = clean_latents(rollout, 1)
    assert found is not None and torch.equal(found, expected)
    assert clean_latents(rollout, 3) is None and clean_latents(rollout, -1) is None


def test_samples_stand_side_by_side_with_what_differs_marked(client: TestClient) -> None:
    page = client.get("/compare?sample=000000-001&sample=000001-000").text
    assert page.count("data-strip") == 2
    rows = {name: row for row, name in re.findall(r'<tr( class="differs")?><th scope="row">([^<]+)</th>', page)}
    assert rows["seed"] and rows["prompt"] and rows["weights"] == "" and rows["policy"] == ""
    for chosen in (["000000-001"], ["000000-001"] * 3, [f"00000{index % 2}-00{index // 2}" for index in range(4)] + ["1-1"]):
        answer = client.get("/compare", params={"sample": chosen})
        assert answer.status_code == 422 and "sample must be given for 2 to 4 samples" in text_of(answer.text)


@pytest.mark.parametrize(
    "path", ["/sample/000000-009", "/sample/x", "/picture/000009-000.png", "/compare?sample=1-9&sample=0-0"]
)
def test_a_sample_that_is_not_there_is_a_clear_error(client: TestClient, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code == 422 and "id must be that of a sample in the store" in text_of(answer.text)


def test_files_are_looked_at_as_a_store_is(store: RolloutStore, tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    for index, rollout in enumerate(store.select()):
        rollout.save(folder / f"{index}.safetensors")
    files = open_rollouts(folder)
    assert isinstance(files, RolloutFiles) and isinstance(open_rollouts(store.path), RolloutStore)
    assert [rollout.seed for rollout in files.select(prompt_contains="pear")] == [7, 8]
    client = client_of(Pages(files))
    assert "4 samples" in client.get("/").text
    of_file, of_store = client.get("/sample/000000-003").text, client_of(Pages(store)).get("/sample/000001-001").text
    assert "notes 3.safetensors" in text_of(of_file)
    assert re.findall(r"<svg.*?</svg>", of_file, re.DOTALL) == re.findall(r"<svg.*?</svg>", of_store, re.DOTALL)
    assert client.get("/picture/000000-003.png").content == encode_png(store.load("000001-001").image)
    with pytest.raises(InvalidRequestError, match="id must be that of one of the 4 files"):
        files.load("000000-004")


def test_who_has_no_key_sees_nothing(store: RolloutStore) -> None:
    client = client_of(Pages(store), api_key=KEY, prefix="/viewer")
    paths = ["", "/", "/sample/000000-000", "/picture/000000-000.png", "/picture/000000-000/0.png", "/compare", "/viewer.js"]
    for path in paths:
        for auth in (None, ("me", "another"), (KEY, "")):
            answer = client.get(f"/viewer{path}", auth=auth)
            assert answer.status_code == 401 and answer.headers["www-authenticate"].startswith("Basic "), path
        assert client.get(f"/viewer{path}", headers={"authorization": f"Basic {KEY}"}).status_code == 401
        known = client.get(f"/viewer{path}", auth=("anyone", KEY))
        assert known.status_code == (422 if path == "/compare" else 200), path
        assert client.get(f"/viewer{path}", headers={"authorization": f"bearer {KEY}"}).status_code == known.status_code


def test_a_page_of_another_site_cannot_have_the_browser_do_work(client: TestClient) -> None:
    for headers in ({"sec-fetch-site": "cross-site"}, {"origin": "http://evil.example"}, {"origin": "null"}):
        answer = client.post("/sample/000000-000", headers=headers)
        assert answer.status_code == 403 and "origin must be a page of this server" in text_of(answer.text)
    framed = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}
    assert client.get("/picture/000000-000/0.png", headers=framed).status_code == 403
    # A link from elsewhere may be followed.
    assert client.get("/", headers={"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}).status_code == 200
    answer = client.get("/")
    assert "default-src 'none'" in answer.headers["content-security-policy"]


def test_on_loopback_the_pages_are_called_by_no_strange_name(store: RolloutStore) -> None:
    client = TestClient(viewer_app(Pages(store), host="127.0.0.1", api_key=None), base_url="http://localhost:30080")
    assert client.get("/").status_code == 200
    assert client.get("/", headers={"host": "evil.example"}).status_code == 400


def test_a_page_in_one_file_needs_nothing_else(store: RolloutStore, tmp_path: Path) -> None:
    write_view(store, tmp_path / "all.html", title="runs")
    page = (tmp_path / "all.html").read_text()
    assert (
        page.count('src="data:image/png;base64,') == 4
        and "<style>" in page
        and 'document.querySelector("[data-slider]")' in page
    )
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page)
    store.load("000000-001").save(tmp_path / "one.safetensors")
    write_view(RolloutFiles([tmp_path / "one.safetensors"]), tmp_path / "one.html", title="one")
    page = (tmp_path / "one.html").read_text()
    assert "Log-probability per step" in page and not re.findall(r'(?:src|href)="(?!data:|#)', page)


def test_a_sheet_and_a_strip_have_a_column_for_each_step_of_which_all_have_a_picture(
    store: RolloutStore, tmp_path: Path
) -> None:
    part = open_rollouts(store.path)

    class First:
        select: Callable[..., Any] = staticmethod(lambda: part.select(request_id="one"))
        load, picture = staticmethod(part.load), staticmethod(part.picture)

    write_view(First(), tmp_path / "sheet.png", title="runs")
    assert min(Image.open(tmp_path / "sheet.png").size) > 300
    write_view(First(), tmp_path / "strip.gif", title="runs")
    strip = Image.open(io.BytesIO((tmp_path / "strip.gif").read_bytes()))
    # Two steps and the picture of two samples side by side.
    assert (strip.n_frames, strip.size) == (3, (32, 16))
    assert strip.convert("RGB").getpixel((3, 3)) == (64, 64, 64)
    # Of all four only the pictures themselves are common.
    write_view(part, tmp_path / "strip.gif", title="runs")
    assert Image.open(tmp_path / "strip.gif").size == (64, 16)
    with pytest.raises(InvalidRequestError, match=r"out must end in \.html, \.png, \.gif, got all\.pdf"):
        write_view(part, tmp_path / "all.pdf", title="runs")
    store.append([small(image=None, latents=torch.zeros(16, 1, 2, 2), image_format="none")])
    with pytest.raises(InvalidRequestError, match="the rollouts must have pictures of the same steps, got none"):
        write_view(RolloutStore(store.path, read_only=True), tmp_path / "sheet.png", title="runs")
