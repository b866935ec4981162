"""The pages in a real browser: pictures load, clicks and keys do what they say, at a desk and on a phone."""

import importlib.util
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import uvicorn
from tests.factories import make_rollout

from flowroll import RolloutStore
from flowroll.cli.view import viewer_app
from flowroll.types import StepImages
from flowroll.viewer import Pages

_MISSING = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
_MISSING += [] if importlib.util.find_spec("selenium") else ["selenium"]
pytestmark = pytest.mark.skipif(bool(_MISSING), reason=f"needs {', '.join(_MISSING)}: apt install chromium chromium-driver")
_STEPS = 4


def drawn(seed: int, step: int) -> torch.Tensor:
    """A picture by which sample and step can be told."""
    image = torch.zeros(3, 1, 32, 32)
    image[0] = (step + 1) / (_STEPS + 1)
    image[1, :, : 8 * (seed % 4 + 1)] = 0.8
    return image


def sample(seed: int, request: str) -> Any:
    images = StepImages(step_indices=tuple(range(_STEPS)), images=tuple(drawn(seed, step) for step in range(_STEPS)))
    return make_rollout(
        family="z_image",
        steps=_STEPS,
        height=32,
        width=32,
        text_tokens=2,
        seed=seed,
        prompt=f"a fox {request}",
        request_id=request,
        image=drawn(seed, _STEPS),
        image_format="uint8",
        step_images=images,
        debug_tensors=None,
    )


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    store = RolloutStore(tmp_path_factory.mktemp("browser") / "runs")
    for group in range(50):
        made = [sample(seed, f"group {group}") for seed in range(20)]
        store.append(made, rewards=[seed / 20 for seed in range(20)])
    app = viewer_app(Pages(RolloutStore(store.path, read_only=True), title="runs"), host="127.0.0.1", api_key=None)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def chrome() -> Iterator[Any]:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    for flag in ("headless", "no-sandbox", "disable-gpu", "no-first-run", "disable-background-networking", "disable-sync"):
        options.add_argument(f"--{flag}")
    service = webdriver.ChromeService(executable_path=shutil.which("chromedriver"))
    driver = webdriver.Chrome(options=options, service=service)
    driver.set_page_load_timeout(60)
    yield driver
    driver.quit()


def find(chrome: Any, css: str) -> list[Any]:
    return chrome.find_elements("css selector", css)


def one(chrome: Any, css: str) -> Any:
    (found,) = find(chrome, css)
    return found


def is_loaded(chrome: Any, image: Any) -> bool:
    return bool(chrome.execute_script("return arguments[0].complete && arguments[0].naturalWidth > 0", image))


def until(is_so: Any) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def complaints(chrome: Any) -> list[str]:
    """What the browser's console has to complain of, e.g. something that the policy forbids."""
    return [entry["message"] for entry in chrome.get_log("browser") if entry["level"] == "SEVERE"]


def test_a_thousand_samples_are_one_page_whose_pictures_come_into_view(chrome: Any, url: str, tmp_path: Path) -> None:
    chrome.set_window_size(1280, 900)
    chrome.get(url)
    cards = find(chrome, ".card img")
    assert len(cards) == 1000
    until(lambda: is_loaded(chrome, cards[0]))
    # Of what is far below nothing has been asked for.
    assert not is_loaded(chrome, cards[-1])
    chrome.execute_script("arguments[0].scrollIntoView()", cards[-1])
    until(lambda: is_loaded(chrome, cards[-1]))
    assert complaints(chrome) == []


def test_a_click_leads_to_a_sample_whose_slider_and_keys_move_through_its_steps(chrome: Any, url: str) -> None:
    chrome.get(url)
    find(chrome, ".card a")[3].click()
    until(lambda: "/sample/000049-003" in chrome.current_url)
    large, slider = one(chrome, "[data-large]"), one(chrome, "[data-slider]")
    until(lambda: is_loaded(chrome, large))
    assert large.get_attribute("src").endswith("/picture/000049-003.png")
    body = one(chrome, "body")
    body.send_keys("\ue012")  # the left arrow
    until(lambda: large.get_attribute("src").endswith("/picture/000049-003/3.png"))
    assert one(chrome, "[data-caption]").text.startswith("step 3, sigma")
    assert one(chrome, 'tr[aria-current="true"]').get_attribute("data-row") == "3"
    find(chrome, "[data-step]")[0].click()
    until(lambda: large.get_attribute("src").endswith("/picture/000049-003/0.png"))
    assert slider.get_attribute("value") == "0" and slider.get_attribute("max") == str(_STEPS)
    slider.send_keys("\ue014")  # the right arrow
    until(lambda: large.get_attribute("src").endswith("/picture/000049-003/1.png"))
    body.send_keys("n")
    until(lambda: "/sample/000049-004" in chrome.current_url)
    assert len(find(chrome, ".charts svg")) == 2 and complaints(chrome) == []


def test_ticked_samples_stand_side_by_side_and_move_together(chrome: Any, url: str) -> None:
    chrome.get(url)
    boxes = find(chrome, "input[name=sample]")
    for box in boxes[:4]:
        chrome.execute_script("arguments[0].click()", box)
    until(lambda: not boxes[4].is_enabled())
    chrome.execute_script("arguments[0].click()", boxes[3])
    until(lambda: boxes[4].is_enabled())
    one(chrome, "button.compare").click()
    until(lambda: "/compare" in chrome.current_url)
    pictures = find(chrome, "[data-large]")
    assert len(pictures) == 3
    one(chrome, "body").send_keys("\ue012")
    until(lambda: all(picture.get_attribute("src").endswith("/3.png") for picture in pictures))
    assert "seed" in [row.find_element("css selector", "th").text for row in find(chrome, "tr.differs")]
    assert complaints(chrome) == []


def test_on_a_phone_nothing_is_wider_than_the_screen(chrome: Any, url: str) -> None:
    # A window of the browser has a least width, a page's view has none.
    chrome.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    )
    try:
        for path in ("/?prompt=group 3", "/sample/000003-001", "/compare?sample=000003-001&sample=000003-002"):
            chrome.get(url + path)
            assert chrome.execute_script("return document.documentElement.scrollWidth") <= 390, path
    finally:
        chrome.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
