"""Every tensor that a rollout returns has the same bits in every layout.

Both families, float32 and bfloat16; sde, cps, ode and a window; 16 to 1,056 image tokens, lengths that divide by nothing among
them; one sample and groups of four; debug tensors, environment and trajectory on. Equality is `torch.equal`.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.distributed.cases import CASES, DTYPES, FAMILIES
from tests.distributed.jobs import run_ranks
from tests.distributed.layout_ranks import run_cases
from tests.rollouts import assert_same_bits

from flowroll import Rollout
from flowroll.types import Layout
from flowroll.wire.files import load_rollout

LAYOUTS = ("sp2", "sp3", "sp4", "cfg2", "tp2", "sp2xcfg2", "sp2xtp2")


@pytest.fixture(scope="session")
def answers_of(checkpoints: dict[str, Path], device: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a layout's rollouts, from one job that runs them all."""
    folders: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in folders:
            layout = Layout.parse(name)
            if device == "cuda" and torch.cuda.device_count() < layout.num_ranks:
                pytest.skip(f"needs {layout.num_ranks} CUDA devices")
            out = tmp_path_factory.mktemp(name)
            run_ranks(run_cases, (name, device, out, list(checkpoints.values())), layout.num_ranks, out)
            folders[name] = out
        return folders[name]

    return get


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_tensor_has_the_bits_of_one_rank(
    answers_of: Callable[[str], Path],
    one_rank: Callable[[str, str], list[list[Rollout]]],
    layout: str,
    family: str,
    dtype: str,
) -> None:
    folder = answers_of(layout) / family / dtype
    for number, (case, expected) in enumerate(zip(CASES, one_rank(family, dtype), strict=True)):
        files = sorted(folder.glob(f"{number}-*.safetensors"))
        assert len(files) == len(expected), case
        for file, rollout in zip(files, expected, strict=True):
            answer = load_rollout(file)
            assert answer.denoising_env is not None and rollout.denoising_env is not None
            assert answer.debug_tensors is not None and answer.dit_trajectory is not None
            try:
                assert_same_bits(answer, rollout)
            except AssertionError as error:
                raise AssertionError(f"{layout}, {family}, {dtype}, {case}, {file.name}: {error}") from error
            plain = [_plain(branch) for branch in (answer.denoising_env.pos_cond_kwargs, answer.denoising_env.neg_cond_kwargs)]
            assert plain == [_plain(rollout.denoising_env.pos_cond_kwargs), _plain(rollout.denoising_env.neg_cond_kwargs)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_exchange_rows_branches_and_columns_as_the_layout_says(answers_of: Callable[[str], Path], layout: str) -> None:
    degrees = Layout.parse(layout)
    for family in FAMILIES:
        facts = json.loads((answers_of(layout) / family / "float32" / "facts.json").read_text())
        used = {axis for axis in ("cfg", "sp", "tp") if getattr(degrees, axis) > 1}
        assert set(facts["received"]) == used
        assert all(count > 0 for count in facts["received"].values())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tensor_parallel_rank_holds_its_part_of_the_weights(answers_of: Callable[[str], Path], family: str) -> None:
    whole = json.loads((answers_of("sp2") / family / "float32" / "facts.json").read_text())
    part = json.loads((answers_of("tp2") / family / "float32" / "facts.json").read_text())
    assert part["all"] == whole["all"]
    assert whole["bytes"] == 4 * whole["all"]
    # The embeddings around the blocks stay whole, and in models this small they are a large part.
    assert part["bytes"] < 0.85 * whole["bytes"]


def _plain(branch: object) -> dict[str, object] | None:
    if not isinstance(branch, dict):
        assert branch is None
        return None
    return {key: value for key, value in branch.items() if not isinstance(value, torch.Tensor)}
