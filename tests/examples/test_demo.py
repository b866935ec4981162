import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flowroll.checkpoints import SHAPES_FAMILIES
from flowroll.cli.demo import remark_on
from flowroll.examples.server import running_server
from flowroll.store import load_rollouts

ROOT = Path(__file__).parents[2]
FLOWROLL = str(Path(sys.executable).with_name("flowroll"))


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (torch.full((3, 1, 8, 8), 0.04), "the picture is black"),
        (torch.full((3, 1, 8, 8), 0.5), "one colour alone"),
        (torch.rand(3, 1, 8, 8), None),
        (None, "there is no picture"),
    ],
)
def test_a_picture_on_which_there_is_nothing_is_remarked_on(image, words):
    remark = remark_on(image)
    assert remark is None if words is None else words in remark


@pytest.mark.slow
def test_no_server_is_left_behind_when_the_block_fails(z_image_checkpoint, tmp_path):
    with pytest.raises(ZeroDivisionError), running_server(z_image_checkpoint, tmp_path / "log") as server:
        raise ZeroDivisionError
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1])), timeout=5)


def test_a_server_that_cannot_start_is_an_error_with_its_log(tmp_path):
    with pytest.raises(RuntimeError, match="must be a diffusers checkpoint folder"), running_server(tmp_path, tmp_path / "log"):
        raise AssertionError("the block must not run")


@pytest.mark.slow
def test_the_demo_writes_everything_that_it_promises(tmp_path):
    done = subprocess.run(
        [FLOWROLL, "demo", "--out", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("the server exited 0") == len(SHAPES_FAMILIES)
    # A step without a density has no log-prob, and what to try next is said.
    assert re.search(r" - +- +- ", done.stdout) and f"flowroll view {tmp_path}/" in done.stdout
    for family in SHAPES_FAMILIES:
        out, rollouts = tmp_path / family, load_rollouts(tmp_path / family / "rollouts")
        assert len(rollouts) == 6 and {rollout.sampling.family for rollout in rollouts} == {family}
        for rollout in rollouts:
            assert rollout.denoising_env and rollout.dit_trajectory and len(rollout.step_images.images) == 8
        images = sorted((out / "images").iterdir())
        assert len(images) == 6 and {Image.open(image).size for image in images} == {(64, 64)}
        for picture in ("contact_sheet.png", "log_probs.png"):
            assert len(np.unique(np.asarray(Image.open(out / picture).convert("L")))) > 50


@pytest.mark.slow
def test_a_demo_that_is_told_to_stop_takes_its_server_down(tmp_path):
    demo = subprocess.Popen([FLOWROLL, "demo", "--out", str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE)
    try:
        url = ""
        while not url:
            line = demo.stdout.readline().decode()
            assert line, "the demo ended early"
            url = "".join(re.findall(r"server http://127.0.0.1:(\d+)", line))
        demo.send_signal(signal.SIGTERM)
        assert demo.wait(60) == 128 + signal.SIGTERM
    finally:
        demo.kill()
        demo.wait()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", int(url)), timeout=5)
