"""A platform of verl for machines without a device; verl imports it where VERL_USE_EXTERNAL_MODULES names it."""

from types import SimpleNamespace
from typing import Any

from verl.plugin.platform.platform_cuda import PlatformCUDA
from verl.plugin.platform.platform_manager import PlatformRegistry


@PlatformRegistry.register("no_device")
class NoDevice(PlatformCUDA):
    """That of CUDA, whose devices are names that Ray counts: all tensors are the CPU's."""

    @property
    def device_name(self) -> str:
        return "cpu"

    @property
    def device_module(self) -> Any:
        def nothing(*_: Any, **__: Any) -> int:
            return 0

        names = ("synchronize", "ipc_collect", "empty_cache", "memory_allocated", "memory_reserved", "max_memory_allocated")
        return SimpleNamespace(**dict.fromkeys(names, nothing), is_available=lambda: False, mem_get_info=lambda *_: (0, 0))

    def current_device(self) -> Any:
        return "cpu"

    def set_device(self, device_index: int) -> None:
        pass

    def empty_cache(self) -> None:
        pass

    def set_allocator_settings(self, settings: str) -> None:
        pass

    def communication_backend_name(self) -> str:
        return "gloo"

    def is_ipc_supported(self) -> bool:
        return False
