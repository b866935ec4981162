"""Vision-language processors where there is no torchvision, for a test's own `DiffusionPipeline.from_pretrained`."""

import functools
import importlib.util
from typing import Any


@functools.cache
def load_without_torchvision() -> None:
    """Makes transformers load these processors without their part for videos; flowroll does so by itself."""
    if importlib.util.find_spec("torchvision") is not None:
        return
    from transformers import Qwen2VLProcessor, Qwen3VLProcessor

    for kind in (Qwen2VLProcessor, Qwen3VLProcessor):
        _load_slim(kind)


def _load_slim(kind: Any) -> None:
    from flowroll.processors import without_videos

    slim, original = without_videos(kind), kind.from_pretrained.__func__

    def from_pretrained(cls: type, *args: Any, **options: Any) -> Any:
        return original(slim if cls is kind else cls, *args, **options)

    kind.from_pretrained = classmethod(from_pretrained)
