import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from tests.factories import make_evaluation, make_rollout

from flowroll.errors import InvalidRequestError
from flowroll.plots import ContactRow, contact_sheet, plot_log_probs


def flat(red, green, blue):
    return torch.tensor([red, green, blue]).view(3, 1, 1, 1).expand(3, 1, 32, 32)


def pixels_of(path):
    return np.asarray(Image.open(path).convert("RGB"))


def share_of(pixels, colour):
    return (pixels == np.array(colour)).all(-1).mean()


def test_a_contact_sheet_shows_every_picture_in_its_place(tmp_path):
    path = tmp_path / "sheet.png"
    red, green, blue = flat(1.0, 0.0, 0.0), flat(0.0, 1.0, 0.0), flat(0.0, 0.0, 1.0)
    rows = [ContactRow(label="first", images=[red, green]), ContactRow(label="second", images=[blue, red])]
    contact_sheet(rows, ["step 0", "step 1"], path, title="sheet")
    pixels = pixels_of(path)
    centres = {}
    for name, colour in (("green", (0, 255, 0)), ("blue", (0, 0, 255))):
        ys, xs = np.nonzero((pixels == np.array(colour)).all(-1))
        centres[name] = (ys.mean(), xs.mean())
        assert share_of(pixels, colour) > 0.05
    assert share_of(pixels, (255, 0, 0)) == pytest.approx(2 * share_of(pixels, (0, 255, 0)), rel=0.05)
    # Green is above blue, and to the right of it.
    assert centres["green"][0] < centres["blue"][0]
    assert centres["green"][1] > centres["blue"][1]


def test_a_plot_shows_one_colour_per_rollout(tmp_path):
    path = tmp_path / "plot.png"
    first = make_rollout(log_probs=torch.tensor([0.0, 1.0, 2.0, 3.0]))
    second = make_rollout(log_probs=torch.tensor([3.0, 2.0, 1.0, 0.0]))
    plot_log_probs([("first", first), ("second", second)], path)
    pixels = pixels_of(path)
    for colour in ((0x33, 0x66, 0xCC), (0xD9, 0x48, 0x0F)):
        assert share_of(pixels, colour) > 1e-3


def test_deterministic_steps_are_not_plotted(tmp_path):
    # Their log-prob is 0 by convention and no value of a density.
    log_probs = torch.tensor([5.0, 5.0, 0.0, 0.0])
    plot_log_probs([("a", make_rollout(log_probs=log_probs, sde_step_indices=(0, 1)))], tmp_path / "window.png")
    short = make_rollout(steps=2, log_probs=log_probs[:2], sde_step_indices=(0, 1))
    plot_log_probs([("a", short)], tmp_path / "short.png")
    assert np.array_equal(pixels_of(tmp_path / "window.png"), pixels_of(tmp_path / "short.png"))


def test_an_evaluation_cannot_be_plotted(tmp_path):
    with pytest.raises(InvalidRequestError, match="must have log-probs"):
        plot_log_probs([("a", make_evaluation())], tmp_path / "plot.png")


def test_plotting_leaves_pyplot_alone(tmp_path):
    program = (
        "import sys, torch; from flowroll.plots import ContactRow, contact_sheet; "
        "contact_sheet([ContactRow(label='a', images=[torch.zeros(3, 1, 8, 8)])], ['b'], sys.argv[1], title='c'); "
        "assert 'matplotlib.figure' in sys.modules; assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "sheet.png")], check=True)
