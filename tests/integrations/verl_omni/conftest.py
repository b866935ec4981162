import importlib.machinery
import importlib.util
import sys
from pathlib import Path

import pytest

# Packages of verl-omni whose own `__init__` imports vLLM-Omni, beside modules that do not.
_BARE = (
    "verl_omni",
    "verl_omni.pipelines",
    "verl_omni.pipelines.qwen_image_flow_grpo",
    "verl_omni.pipelines.sd3_flow_grpo",
    "verl_omni.agent_loop",
)


@pytest.fixture(scope="session")
def verl_omni() -> Path:
    """verl-omni, unmodified: its modules can be imported, also where vLLM-Omni is not installed."""
    pytest.importorskip("verl")
    found = importlib.util.find_spec("verl_omni")
    if found is None or not found.submodule_search_locations:
        pytest.skip("could not import 'verl_omni'")
    root = Path(found.submodule_search_locations[0])
    if importlib.util.find_spec("vllm_omni") is None:
        for name in _BARE:
            spec = importlib.machinery.ModuleSpec(name, None, is_package=True)
            spec.submodule_search_locations = [str(root.parent / name.replace(".", "/"))]
            sys.modules[name] = importlib.util.module_from_spec(spec)
    return root
