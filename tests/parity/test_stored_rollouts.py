"""What a store holds replays without an engine, and some steps of a rollout replay as they do in the whole."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.pairs import dealt
from tests.rollouts import assert_same_bits

from flowroll import load_rollouts, replay, save_rollouts
from flowroll.engine import Engine
from flowroll.errors import InvalidRequestError
from flowroll.families import FAMILIES

REQUEST: dict[str, Any] = {
    "prompt": "a red apple on a wooden table",
    "height": 64,
    "width": 64,
    "num_inference_steps": 4,
    "seed": 5,
    "num_outputs_per_prompt": 2,
    "return_denoising_env": True,
    "return_dit_trajectory": True,
}
REPLAY = """
import sys
import diffusers
import torch
from flowroll import load_rollouts, replay

transformer = diffusers.{kind}.from_pretrained(sys.argv[1])
replay.align_weights(transformer)
torch.set_num_threads(1)
rollouts = load_rollouts(sys.argv[2])
recorded = torch.stack([rollout.log_probs for rollout in rollouts])
log_probs = torch.cat([batch.log_probs for batch in replay.micro_batches(transformer, rollouts, micro_batch=3)])
assert log_probs.requires_grad and torch.equal(log_probs.detach(), recorded.flatten()), (log_probs, recorded)
assert not [name for name in sys.modules if name.startswith(("flowroll.engine", "flowroll.serving", "flowroll.client"))]
print(len(rollouts), "exact")
"""


def test_a_finished_run_replays_without_any_engine(
    engine_of: Callable[[str, str], Engine],
    pipeline_of: Callable[[str, str], Any],
    checkpoints: dict[str, Path],
    tmp_path: Path,
) -> None:
    save_rollouts(tmp_path / "store", engine_of("z_image", "float32").rollout(**REQUEST))
    program = REPLAY.format(kind=type(pipeline_of("z_image", "float32").transformer).__name__)
    command = [sys.executable, "-c", program, str(checkpoints["z_image"] / "transformer"), str(tmp_path / "store")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == "2 exact\n", done.stderr


@dealt(name=tuple(FAMILIES), sde_type=("sde", "cps", "dpmpp2m"))
def test_a_slice_of_a_rollout_replays_as_its_steps_do_in_the_whole(
    engine_of: Callable[[str, str], Engine], pipeline_of: Callable[[str, str], Any], name: str, sde_type: str, tmp_path: Path
) -> None:
    group = engine_of(name, "float32").rollout(**REQUEST, sde_type=sde_type)
    transformer = pipeline_of(name, "float32").transformer
    save_rollouts(tmp_path / "store", [rollout[1:3] for rollout in group])
    parts = load_rollouts(tmp_path / "store")
    with torch.no_grad():
        whole = replay.score(transformer, group, steps=[1, 2])
        part = replay.score(transformer, parts, steps=[1, 2])
    assert torch.equal(whole.log_probs, part.log_probs)
    assert all(map(torch.equal, whole.velocities, part.velocities))
    recorded = torch.stack([rollout.log_probs[1:3] for rollout in parts if rollout.log_probs is not None])
    assert torch.equal(part.log_probs.cpu(), recorded)
    with pytest.raises(InvalidRequestError, match=r"dit_trajectory must hold the states .*3 and 4 to replay step 3"):
        replay.score(transformer, parts, steps=[3])


def test_a_rollout_that_was_moved_there_and_back_is_the_same(engine_of: Callable[[str, str], Engine], device: str) -> None:
    (rollout, _) = engine_of("z_image", "float32").rollout(**REQUEST, debug_mode=True)
    assert_same_bits(rollout.to(device).to("cpu"), rollout)
