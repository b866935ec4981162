"""Reference images of a request: the bytes of image files. They are decoded where a request is planned."""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass

from flowroll.types.rules import require

_FIELD = "images"
_HOW_TO_SEND = "send the bytes of each file, or base64 of them"
# Base64 text is read in the alphabet of RFC 4648, with its padding; a data URL is none.
_DATA_URL = "data:"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceImage:
    """What a record says of a reference image.

    Attributes:
        sha256: SHA-256 of the file's bytes, as hexadecimal digits.
        height: Height of the picture in pixels, upright.
        width: Width of the picture in pixels, upright.
    """

    sha256: str
    height: int
    width: int


def checked_images(images: object) -> tuple[bytes, ...] | None:
    """Returns the bytes of image files that were given as bytes or as base64; None is none.

    Raises:
        InvalidRequestError: They are not a list of at least one of these; the field names the one that is not.
    """
    if images is None:
        return None
    is_list = isinstance(images, list | tuple) and len(images) > 0
    require(is_list, _FIELD, "be a list of one or more image files", images, _HOW_TO_SEND)
    assert isinstance(images, list | tuple)
    return tuple(_file(f"{_FIELD}[{index}]", image) for index, image in enumerate(images))


def _file(name: str, image: object) -> bytes:
    rule = "be the bytes of an image file, or base64 of them"
    if isinstance(image, str):
        remedy = "send what is behind the comma" if image.startswith(_DATA_URL) else "read the file first; paths are not opened"
        try:
            return base64.b64decode(image.encode("ascii"), validate=True)
        except (UnicodeEncodeError, binascii.Error):
            require(False, name, rule, image, remedy)
    require(isinstance(image, bytes | bytearray | memoryview), name, rule, type(image).__name__, _HOW_TO_SEND)
    assert isinstance(image, bytes | bytearray | memoryview)
    return bytes(image)
