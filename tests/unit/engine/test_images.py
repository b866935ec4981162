"""Image files of a request: which are taken, what is made of them, and that bad ones are refused by their place."""

import io
import struct
import zlib

import pytest
from diffusers.utils import load_image
from PIL import Image
from tests.guiding import image_file

from flowroll.engine import Limits
from flowroll.engine.images import blank_image, check_images, open_images
from flowroll.errors import InvalidRequestError

PNG, JPEG, WEBP = (image_file(kind=kind) for kind in ("PNG", "JPEG", "WEBP"))
LIMITS = Limits()


def saved(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def turned() -> bytes:
    image = Image.open(io.BytesIO(image_file(30, 20)))
    exif = image.getexif()
    exif[0x0112] = 6
    return saved(image, "JPEG", exif=exif)


COLORS = Image.open(io.BytesIO(image_file(21, 13, mode="RGBA")))
TAKEN = {
    "PNG": PNG,
    "JPEG": JPEG,
    "WebP": WEBP,
    "with transparency": saved(COLORS),
    "of a palette": saved(COLORS.convert("RGB").convert("P")),
    "gray": saved(COLORS.convert("L")),
    "gray of 16 bits": saved(Image.new("I;16", (9, 7), 40_000)),
    "of ink": saved(COLORS.convert("CMYK"), "JPEG"),
    "turned by EXIF": turned(),
    "WebP without loss": saved(COLORS, "WEBP", lossless=True),
    "one pixel": saved(Image.new("RGB", (1, 1))),
    "blank": blank_image(),
}


@pytest.mark.parametrize("name", TAKEN)
def test_a_picture_is_what_diffusers_makes_of_the_file(name: str) -> None:
    (found,), (fact,) = open_images([TAKEN[name]]), check_images([TAKEN[name]], LIMITS)
    expected = load_image(Image.open(io.BytesIO(TAKEN[name])))
    assert (found.mode, found.size, found.tobytes()) == ("RGB", expected.size, expected.tobytes())
    assert (fact.width, fact.height) == expected.size


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header says another size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")


FRAMES = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
WHOLE = "must be a whole PNG, JPEG or WebP file, got"
REFUSED = {
    "nothing": (b"", f"{WHOLE} another kind of file"),
    "text": (b"https://example.org/cat.png", f"{WHOLE} another kind of file"),
    "another format": (saved(COLORS.convert("RGB"), "BMP"), f"{WHOLE} another kind of file"),
    "GIF": (saved(FRAMES[0], "GIF"), f"{WHOLE} another kind of file"),
    "SVG": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", f"{WHOLE} another kind of file"),
    "PNG cut short": (PNG[: len(PNG) // 2], f"{WHOLE} one that does not decode"),
    "JPEG cut short": (JPEG[: len(JPEG) // 2], f"{WHOLE} one that does not decode"),
    "WebP cut short": (WEBP[: len(WEBP) // 2], f"{WHOLE} "),
    "PNG with a wrong checksum": (PNG.replace(b"IDAT", b"IDAT\x00", 1), f"{WHOLE} one that does not decode"),
    "too large by its header": (bomb(4097, 4096), "must have at most 16777216 pixels, got 4097 x 4096"),
    "far too large by its header": (bomb(2**30, 2**30), "must have fewer pixels, got more than Pillow opens"),
    "less data than its header says": (bomb(64, 64), f"{WHOLE} one that does not decode"),
    "animated PNG": (saved(FRAMES[0], save_all=True, append_images=FRAMES[1:]), "must be one picture, got an animation of 2"),
    "animated WebP": (
        saved(FRAMES[0], "WEBP", save_all=True, append_images=FRAMES[1:]),
        "must be one picture, got an animation of 2",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_file_is_refused_by_its_place(name: str) -> None:
    file, words = REFUSED[name]
    with pytest.raises(InvalidRequestError) as caught:
        check_images([PNG, file, JPEG], LIMITS)
    assert caught.value.field == "images[1]"
    assert caught.value.message.startswith(f"images[1] {words}"), caught.value.message


@pytest.mark.parametrize("seed", range(40))
def test_damaged_files_are_taken_or_refused_and_nothing_else(seed: int) -> None:
    import random

    draw = random.Random(seed)
    file = bytearray(draw.choice([PNG, JPEG, WEBP]))
    for _ in range(draw.choice([1, 3, 30])):
        file[draw.randrange(len(file))] = draw.randrange(256)
    try:
        (fact,) = check_images([bytes(file)], LIMITS)
    except InvalidRequestError as error:
        assert error.field == "images[0]"
    else:
        (picture,) = open_images([bytes(file)])
        assert picture.size == (fact.width, fact.height)


def test_limits() -> None:
    with pytest.raises(InvalidRequestError, match="images must hold at most 2 files, got 3; send fewer"):
        check_images([PNG] * 3, Limits(max_images=2))
    with pytest.raises(InvalidRequestError, match="images must have at most 100 bytes together"):
        check_images([PNG], Limits(max_image_bytes=100))
    with pytest.raises(InvalidRequestError, match=r"images\[0\] must have at most 2303 pixels, got 48 x 48"):
        check_images([PNG], Limits(max_image_pixels=48 * 48 - 1))
    assert check_images([PNG], Limits(max_image_pixels=48 * 48))
