"""Processors of vision-language models without their part for videos, which needs torchvision and which no image model uses.

transformers loads a processor of images with torchvision where that is installed, and with Pillow and numpy where it is not; it
cannot load a processor of videos without torchvision at all.
"""

from __future__ import annotations

from typing import Any, no_type_check


def without_videos(processor_class: type[Any]) -> type[Any]:
    """Returns a processor class of transformers that has a tokenizer and a processor of images, and none of videos.

    It loads and saves the same files under the same name. Nothing else about the class is changed.

    Args:
        processor_class: A class whose constructor takes a processor of images, a tokenizer and a processor of videos.
    """

    # transformers reads the names of the arguments from the code of this very function, which a type checker would wrap.
    @no_type_check
    def __init__(
        self: Any, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None, **others: Any
    ) -> None:
        processor_class.__init__(self, image_processor, tokenizer, None, chat_template=chat_template, **others)

    members = {"__init__": __init__, "__module__": processor_class.__module__, "__doc__": processor_class.__doc__}
    return type(processor_class.__name__, (processor_class,), members)
