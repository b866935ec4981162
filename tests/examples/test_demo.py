import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from examples.demo import predicted_clean_latents
from examples.server import running_server
from PIL import Image
from tests.factories import make_rollout

from flowroll.checkpoints import SHAPES_FAMILIES
from flowroll.wire.files import load_rollout

ROOT = Path(__file__).parents[2]


def test_the_predicted_clean_latents_are_x_minus_sigma_v():
    rollout = make_rollout(steps=3, family="z_image")
    predicted = predicted_clean_latents(rollout)
    trajectory = rollout.dit_trajectory
    for step in range(3):
        velocity = rollout.debug_tensors.model_output[step]
        expected = trajectory.latents[step] - trajectory.sigmas[step] * velocity
        assert torch.equal(predicted[step], expected)


@pytest.mark.slow
def test_no_server_is_left_behind_when_the_block_fails(z_image_checkpoint, tmp_path):
    with pytest.raises(ZeroDivisionError), running_server(z_image_checkpoint, tmp_path / "log") as server:
        raise ZeroDivisionError
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1])), timeout=5)


def test_a_server_that_cannot_start_is_an_error_with_its_log(tmp_path):
    with pytest.raises(RuntimeError, match="must be a diffusers checkpoint folder"), running_server(tmp_path, tmp_path / "log"):
        raise AssertionError("the block must not run")


def test_the_demo_writes_everything_that_it_promises(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "examples.demo", "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("the server exited 0") == len(SHAPES_FAMILIES)
    for family in SHAPES_FAMILIES:
        out = tmp_path / family
        names = [file.stem for file in sorted((out / "rollouts").iterdir())]
        assert len(names) == 6
        assert [file.stem for file in sorted((out / "images").iterdir())] == names
        for name in names:
            rollout = load_rollout(out / "rollouts" / f"{name}.safetensors")
            assert rollout.sampling.family == family
            assert rollout.denoising_env and rollout.dit_trajectory and rollout.debug_tensors
            assert Image.open(out / "images" / f"{name}.png").size == (64, 64)
        for picture in ("contact_sheet.png", "log_probs.png"):
            assert len(np.unique(np.asarray(Image.open(out / picture).convert("L")))) > 50


@pytest.mark.slow
def test_a_demo_that_is_told_to_stop_takes_its_server_down(tmp_path):
    demo = subprocess.Popen([sys.executable, "-m", "examples.demo", "--out", str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE)
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
