"""Makes packages importable whose own `__init__` needs vLLM, or vLLM-Omni, beside modules that do not.

verl imports it in Ray's processes, where VERL_USE_EXTERNAL_MODULES names it.
"""

import importlib.machinery
import importlib.util
import sys
from pathlib import Path

_NEED_VLLM = ("verl.workers.rollout.vllm_rollout",)
_NEED_VLLM_OMNI = (
    "verl_omni",
    "verl_omni.agent_loop",
    "verl_omni.pipelines",
    "verl_omni.pipelines.qwen_image_diffusion_nft",
    "verl_omni.pipelines.qwen_image_flow_grpo",
    "verl_omni.pipelines.sd3_flow_grpo",
    "verl_omni.trainer",
    "verl_omni.trainer.omni",
)


def root_of(package: str) -> Path | None:
    """The folder of a package, whether or not it can be imported."""
    found = importlib.util.find_spec(package)
    return None if found is None or not found.submodule_search_locations else Path(found.submodule_search_locations[0])


def make_importable() -> None:
    for needed, packages in (("vllm", _NEED_VLLM), ("vllm_omni", _NEED_VLLM_OMNI)):
        root = root_of(packages[0].partition(".")[0])
        if root is None or importlib.util.find_spec(needed) is not None:
            continue
        for name in packages:
            if name not in sys.modules:
                spec = importlib.machinery.ModuleSpec(name, None, is_package=True)
                spec.submodule_search_locations = [str(root.parent / name.replace(".", "/"))]
                sys.modules[name] = importlib.util.module_from_spec(spec)


make_importable()
