"""Vision-language processors where there is no torchvision, for a test's own `DiffusionPipeline.from_pretrained`."""

import functools
import importlib.util
from typing import Any


@functools.cache
def load_without_torchvision() -> None:
    """Makes transformers load these processors without their part for videos; flowroll does so by itself."""
    if importlib.util.find_spec("torchvision") is not None:
        return
    from transformers import Qwen3VLProcessor

    from flowroll.processors import without_videos

    slim, original = without_videos(Qwen3VLProcessor), Qwen3VLProcessor.from_pretrained.__func__

    def from_pretrained(cls: type, *args: Any, **options: Any) -> Any:
        return original(slim if cls is Qwen3VLProcessor else cls, *args, **options)

    Qwen3VLProcessor.from_pretrained = classmethod(from_pretrained)
