"""A platform of verl for machines without a device; verl imports it where VERL_USE_EXTERNAL_MODULES names it."""

from types import SimpleNamespace
from typing import Any

from verl.plugin.platform.platform_cuda import PlatformCUDA
from verl.plugin.platform.platform_manager import PlatformRegistry


@PlatformRegistry.register("no_device")
class NoDevice(PlatformCUDA):
    """That of CUDA with nothing to wait for, and without shared memory of devices."""

    @property
    def device_module(self) -> Any:
        def nothing(*_: Any) -> None:
            pass

        return SimpleNamespace(synchronize=nothing, ipc_collect=nothing, empty_cache=nothing)

    def is_ipc_supported(self) -> bool:
        return False
