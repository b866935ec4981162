import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def verl_omni() -> Path:
    """verl-omni, unmodified: its modules can be imported, also where vLLM-Omni is not installed."""
    pytest.importorskip("verl")
    from tests.integrations.verl_omni.bare_packages import root_of

    root = root_of("verl_omni")
    if root is None:
        pytest.skip("could not import 'verl_omni'")
    return root


@pytest.fixture(scope="package")
def cluster() -> Iterator[Any]:
    """A local Ray cluster, in whose processes verl takes the CPU for its device; Ray counts devices that are not there."""
    pytest.importorskip("verl")
    ray = pytest.importorskip("ray")
    # Beside this file, since verl's wheel has a package `tests` too.
    path = os.pathsep.join([str(HERE.parents[2] / "src"), str(HERE), os.environ.get("PYTHONPATH", "")])
    variables = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    variables |= {"VERL_USE_EXTERNAL_MODULES": "cpu_platform,bare_packages", "VERL_PLATFORM": "no_device"}
    ray.init(num_cpus=64, num_gpus=64, include_dashboard=False, runtime_env={"env_vars": variables}, log_to_driver=False)
    sys.path.insert(0, str(HERE))
    importlib.import_module("bare_packages")
    platforms = importlib.import_module("verl.plugin.platform.platform_manager")
    platforms.set_platform(importlib.import_module("cpu_platform").NoDevice())
    yield ray
    sys.path.remove(str(HERE))
    ray.shutdown()
