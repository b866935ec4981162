"""Reference images: from the bytes of a file to a picture, with nothing taken on trust, and the facts of it for a record.

A picture is what `diffusers.utils.load_image` makes of the file: upright, as its EXIF data say, and in RGB.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from PIL import Image, ImageOps, UnidentifiedImageError

from flowroll.engine.config import Limits
from flowroll.types import ReferenceImage
from flowroll.types.rules import refuse

_FORMATS = ("PNG", "JPEG", "WEBP")
_RULE = "be a whole PNG, JPEG or WebP file"


def open_images(files: Sequence[bytes]) -> tuple[Image.Image, ...]:
    """Returns the pictures of image files that `check_images` has taken."""
    return tuple(_picture(file) for file in files)


def check_images(files: Sequence[bytes], limits: Limits) -> tuple[ReferenceImage, ...]:
    """Decodes image files, and returns the facts of each.

    Raises:
        InvalidRequestError: There are too many of them, or one cannot be decoded or is too large; the field names it.
    """
    if len(files) > limits.max_images:
        refuse("images", f"hold at most {limits.max_images} files", len(files), "send fewer")
    if (total := sum(map(len, files))) > limits.max_image_bytes:
        rule = f"have at most {limits.max_image_bytes} bytes together"
        refuse("images", rule, total, "send smaller pictures, or compress them as JPEG or WebP")
    return tuple(_check(f"images[{index}]", file, limits) for index, file in enumerate(files))


def blank_image() -> bytes:
    """Returns a small gray PNG file, for a request that needs an image, whichever."""
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), (128, 128, 128)).save(buffer, format="PNG")
    return buffer.getvalue()


def _check(name: str, file: bytes, limits: Limits) -> ReferenceImage:
    with _reading(name):
        # The size stands in the header; nothing is decoded yet.
        opened = Image.open(io.BytesIO(file), formats=_FORMATS)
    width, height = opened.size
    if width * height > limits.max_image_pixels:
        rule = f"have at most {limits.max_image_pixels} pixels"
        refuse(name, rule, f"{width} x {height}", "make it smaller")
    with _reading(name):
        frames = 1 if opened.format == "JPEG" else getattr(opened, "n_frames", 1)
    if frames > 1:
        refuse(name, "be one picture", f"an animation of {frames}", "send one of its frames")
    with _reading(name):
        picture = _picture(file)
    return ReferenceImage(sha256=hashlib.sha256(file).hexdigest(), height=picture.height, width=picture.width)


def _picture(file: bytes) -> Image.Image:
    opened = Image.open(io.BytesIO(file), formats=_FORMATS)
    opened.load()
    upright = ImageOps.exif_transpose(opened)
    return upright.convert("RGB")


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Turns whatever Pillow raises about the bytes of a file into one error that names the file."""
    try:
        yield
    except UnidentifiedImageError:
        refuse(name, _RULE, "another kind of file", "convert it, or send the file as it is")
    except Image.DecompressionBombError:
        # Far above any limit of ours, whatever that is.
        refuse(name, "have fewer pixels", "more than Pillow opens", "make it smaller")
    except Exception as error:
        # Its decoders raise OSError, SyntaxError, ValueError, struct.error and more.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
        refuse(name, _RULE, f"one that does not decode ({reason})", "send it again")
