"""The types and shapes in flowroll's signatures and dataclass fields are true: checked at every call of some tests.

The checker (jaxtyping's import hook with beartype) wraps every function of a module before it is imported, and makes the tests
twice as slow, those of `exact/` five times. So it is not in every run: what calls every annotated module runs once more, in a
process of its own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# The examples annotate for readers: their loops hold tensors under names that say more than shapes.
UNCHECKED = {"__init__", "__main__", "examples"}
UNITS = ("parallel", "sampling", "types", "test_plots.py")
# What an engine and replay do with a tree of samples calls most of the rest.
FORKS = ("what_is_recorded_and_how_much_room_there_is_change_no_leaf", "micro_batches_bring_every_pair_once_with_its_gradient")
QUICK = (*(f"tests/unit/{name}" for name in UNITS), *(f"tests/parity/test_forks.py::test_{name}" for name in FORKS))
PLUGINS = ("flow_factory_mapping", "miles", "miles_lora", "seeds", "torch")
WIDE = (
    *("tests/parity", "tests/proofs/test_doors.py", "tests/unit", "tests/viewer"),
    *(f"tests/integrations/test_{name}.py" for name in PLUGINS),
    "--deselect=tests/unit/test_annotations.py",
)


def checked_packages() -> list[str]:
    """Everything directly under flowroll that is checked."""
    here = (ROOT / "src" / "flowroll").iterdir()
    found = {path.stem for path in here if path.suffix == ".py" or (path / "__init__.py").exists()}
    return sorted(f"flowroll.{name}" for name in found - UNCHECKED)


def run_checked(*arguments: str, limit_s: float) -> subprocess.CompletedProcess[str]:
    """A pytest run under the checker."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    hook = f"--jaxtyping-packages={','.join(checked_packages())},beartype.beartype"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0", hook, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit_s)


@pytest.mark.parametrize("tests", [QUICK, pytest.param(WIDE, marks=pytest.mark.proof)], ids=["quick", "wide"])
def test_what_annotations_say_is_true(tests: tuple[str, ...]):
    done = run_checked(*tests, limit_s=3600)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


def test_a_wrong_shape_is_found(tmp_path: Path):
    call = "import torch\n\nfrom flowroll.types.pictures import in_format\n\n\ndef test_wrong():\n    in_format({}, 'tensor')\n"
    for name, image in (("right", "torch.zeros(3, 1, 8, 8)"), ("wrong", "torch.zeros(3, 8, 8)")):
        (tmp_path / f"test_{name}.py").write_text(call.format(image))
    done = run_checked(str(tmp_path), limit_s=300)
    assert "1 failed, 1 passed" in done.stdout and "TypeCheckError" in done.stdout, done.stdout + done.stderr
