"""Forwards of small samples can be captured as CUDA graphs: on a fake device, the host waits for nothing in a capture."""

from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.rehearsal.device import NoFakeDeviceError
from benchmarks.rehearsal.models import QWEN_IMAGE, make_folder
from benchmarks.rehearsal.run import rehearsal
from benchmarks.rehearsal.waits import WAITS
from diffusers import QwenImageTransformer2DModel
from tests.processors import load_without_torchvision

from flowroll.families import FAMILIES

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor is deprecated")

REQUEST: dict[str, Any] = {
    "prompt": "a red fox in fresh snow, morning light, " * 3,
    "negative_prompt": "blurry",
    "height": 64,
    "width": 64,
    "num_inference_steps": 3,
}
# How many forms the forwards of a step have, and how many forwards a step of a sample has: branches of one length share a form.
# In the other families encoders and blocks make tensors whose shapes are numbers in tensors, which a fake device does not have:
# Qwen-Image-Edit has the transformer of Qwen-Image, and Qwen-Image-2.1 is not recorded.
FORWARDS = {"qwen_image": (2, 2), "z_image": (1, 1), "sd3": (1, 1), "flux": (1, 1), "flux2": (1, 2)}


@pytest.mark.parametrize("family", FORWARDS)
def test_the_host_does_not_wait_in_a_capture(family: str, checkpoints: dict[str, Path]) -> None:
    load_without_torchvision()
    try:
        with rehearsal(checkpoints[family], variant=None, waits=None, graphs="auto") as found:
            request = {name: value for name, value in REQUEST.items() if name != "negative_prompt" or family != "flux"}
            found.rollouts(2, **request)
            counts = found.engine.graph_counts
    except NoFakeDeviceError as error:
        pytest.skip(f"no rehearsal: {error}")
    # Three steps of two samples. The first forward of a form is eager, and the second one, with which it is recorded; the first
    # one of a timestep is no candidate where its modulations are kept for the others.
    forms, forwards = FORWARDS[family]
    keeping = 3 if FAMILIES[family].modulation else 0
    assert (counts.recordings, counts.misses, counts.hits) == (forms, 2 * forms, 6 * forwards - keeping - 2 * forms)
    assert counts.dropped == {}
    assert found.counts["capture"].kernels and not found.counts["capture"].waits


def test_a_capture_at_full_width_waits_for_nothing(tmp_path: Path) -> None:
    load_without_torchvision()
    folder = make_folder(QWEN_IMAGE, tmp_path / "checkpoint", layers=2)
    try:
        with rehearsal(folder, variant=QWEN_IMAGE.variant, graphs="auto") as found:
            found.rollouts(2, **{**REQUEST, "height": 512, "width": 512})
            counts = found.engine.graph_counts
            found.rollouts(2, **{**REQUEST, "height": 1024, "width": 1024})
            later = found.engine.graph_counts
            found.sleep()
            asleep = found.engine.graph_counts
    except NoFakeDeviceError as error:
        pytest.skip(f"no rehearsal: {error}")
    assert (counts.recordings, counts.hits, counts.dropped) == (2, 5, {})
    # A larger sample has forwards that take the device longer than the host.
    assert later == counts
    assert (asleep.recordings, asleep.num_bytes) == (0, 0)


@pytest.mark.parametrize(
    "fault",
    [lambda x: x * float(x.sum()), lambda x: x + torch.tensor([1.0], device=x.device), lambda x: x[x > 0].sum() * x],
    ids=["number", "list", "mask"],
)
def test_a_forward_that_waits_is_not_captured(
    fault: Any, checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = QwenImageTransformer2DModel.forward

    def forward(self: Any, hidden_states: Any, *args: Any, **options: Any) -> Any:
        return real(self, fault(hidden_states).to(hidden_states.dtype), *args, **options)

    load_without_torchvision()
    try:
        # The host may wait in steps here: what is looked at is the capture.
        with rehearsal(checkpoints["qwen_image"], variant=None, waits=Anywhere(WAITS), graphs="auto") as found:
            monkeypatch.setattr(QwenImageTransformer2DModel, "forward", forward)
            found.rollouts(2, **REQUEST)
            counts = found.engine.graph_counts
    except NoFakeDeviceError as error:
        pytest.skip(f"no rehearsal: {error}")
    assert (counts.recordings, counts.hits, counts.dropped) == (0, 0, {"unfit": 2})
    assert "capture" not in found.counts


class Anywhere(dict[str, Any]):
    """Lets the host wait everywhere."""

    def get(self, stage: str, default: Any = None) -> Any:
        return self

    def __contains__(self, place: object) -> bool:
        return True
