"""server == engine: HTTP and the command line give every sample the bits that it has alone on an engine in this process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.pairs import FAMILY_WITH_DTYPE, rest_slow
from tests.proofs.cases import Case, cases
from tests.proofs.conftest import AloneOf, ServerOf
from tests.proofs.doors import assert_same_samples, num_shared_steps, served, together
from tests.unit.cli.invoking import run_cli

from flowroll import load_rollouts
from flowroll.client import Client

# Requests that can share every forward on a server of two ranks.
ON_RANKS = next(case for case in cases(layout="single", family="z_image", dtype="float32", company="alike"))


# Starting a server takes long, and says the same of every family: `make test` has one for each of the first two. What large
# samples do in a shared forward is proved without a server, where it takes minutes less.
FIRST = FAMILY_WITH_DTYPE[:2]
CASES = cases(layout="single", company="!alone")
FIRST_CASES = [case for case in CASES if (case.family, case.dtype) in FIRST and case.shape != "large"]
ROWS = FIRST_CASES + [case for case in CASES if case not in FIRST_CASES]


@pytest.mark.parametrize("case", rest_slow(ROWS, later=3))
def test_a_server_gives_every_sample_the_bits_that_it_has_alone(case: Case, server_of: ServerOf, alone_of: AloneOf) -> None:
    address = server_of(case.family, case.dtype)
    before = num_shared_steps(address)
    with Client(address) as client:
        answers = together(client, case.requests)
    for request, answer in zip(case.requests, answers, strict=True):
        assert_same_samples(answer, alone_of(case.family, case.dtype, request))
    # Samples really shared forwards.
    assert num_shared_steps(address) > before


@pytest.mark.parametrize(
    ("family", "dtype"),
    [pytest.param(*row, marks=[] if row in FIRST else [pytest.mark.slow]) for row in FAMILY_WITH_DTYPE],
)
def test_the_command_line_writes_the_same_samples_and_verifies_them(
    family: str, dtype: str, device: str, server_of: ServerOf, alone_of: AloneOf, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    case = cases(layout="single", family=family, dtype=dtype, company="!alone")[0]
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text(case.request["prompt"] + "\n")
    images = [flag for number, file in enumerate(case.request.get("images", ())) for flag in _file(tmp_path, number, file)]
    flags = [flag for name, value in case.request.items() if name not in ("prompt", "images") for flag in _flag(name, value)]
    result = run_cli("rollout", "--url", server_of(family, case.dtype), "--prompts", prompts, "--out", out, *flags, *images)
    assert result.exit_code == 0, result.output
    assert_same_samples(load_rollouts(out), alone_of(family, case.dtype, case.request))
    verified = run_cli("verify", out, "--model", checkpoints[family], "--device", device, *images)
    assert verified.exit_code == 0, verified.output


def _file(folder: Path, number: int, file: bytes) -> tuple[str, ...]:
    path = folder / f"image-{number}"
    path.write_bytes(file)
    return "--images", str(path)


def _flag(name: str, value: object) -> tuple[str, ...]:
    flag = "--" + name.replace("_", "-")
    return (flag,) if value is True else (flag, str(value))


@pytest.fixture(scope="module")
def two_ranks(checkpoints: dict[str, Path], device: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server of two ranks."""
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs 2 CUDA devices")
    log = tmp_path_factory.mktemp("two-ranks") / "log.txt"
    with served(checkpoints[ON_RANKS.family], log, "--device", device, "--dtype", ON_RANKS.dtype, "--tp", "2") as address:
        yield address


def test_a_server_of_two_ranks_gives_every_sample_the_bits_that_it_has_alone(two_ranks: str, alone_of: AloneOf) -> None:
    with Client(two_ranks) as client:
        answers = together(client, ON_RANKS.requests)
    for request, answer in zip(ON_RANKS.requests, answers, strict=True):
        assert_same_samples(answer, alone_of(ON_RANKS.family, ON_RANKS.dtype, request))


def test_samples_share_forwards_on_two_ranks(two_ranks: str) -> None:
    with Client(two_ranks) as client:
        together(client, ON_RANKS.requests)
    assert num_shared_steps(two_ranks) > 0
