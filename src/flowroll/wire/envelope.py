"""The object that stands for a tensor: `{"__tensor__": true, "shape": [...], "dtype": "torch.float32", "data": D}`.

D is a safetensors blob with the key "t", as base64 text in JSON and as raw bytes in msgpack.
"""

from __future__ import annotations

import binascii

import msgspec
from torch import Tensor

from flowroll.errors import EngineError

# Short enough for a msgpack string with a header of one byte.
TOKEN_CHARS = 24
_ALIGNMENT = 8
_MAX_BIN_BYTES = 2**32 - 1
_FIXMAP, _FIXSTR, _TRUE, _BIN32 = 0x80, 0xA0, b"\xc3", b"\xc6"
# msgpack's string types by the number of bytes of their length field; a short string may have any of them.
_STR_BY_LENGTH_BYTES = {1: b"\xd9", 2: b"\xda", 4: b"\xdb"}


def json_envelope(tensor: Tensor, prefix: bytes) -> tuple[bytes, bytes]:
    """Returns the text before and after the data's base64.

    Args:
        tensor: The tensor, whose shape and dtype are used.
        prefix: The part of the blob before its data, in whole groups of 3 bytes.
    """
    shape, dtype = msgspec.json.encode(tuple(tensor.shape)), str(tensor.dtype).encode()
    head = b'{"__tensor__":true,"shape":' + shape + b',"dtype":"' + dtype + b'","data":"'
    return head + binascii.b2a_base64(prefix, newline=False), b'"}'


def msgpack_envelope(tensor: Tensor, prefix: bytes, offset: int) -> tuple[bytes, bytes]:
    """Returns the bytes before and after the data, which then begins at a multiple of 8 bytes in the body.

    So a decoder can use the data in place. The keys supply the padding: msgpack also lets the length of a short string be
    written in 1, 2 or 4 bytes, which yields any number of bytes from 0 to 7.

    Args:
        tensor: The tensor, whose shape and dtype are used.
        prefix: The part of the blob before its data, a multiple of 8 bytes.
        offset: The byte of the body at which the envelope begins.

    Raises:
        EngineError: The tensor is too large for msgpack.
    """
    blob_bytes = len(prefix) + tensor.nbytes
    if blob_bytes > _MAX_BIN_BYTES:
        raise EngineError(
            f"a tensor in msgpack must stay below 4 GiB, got {blob_bytes} bytes; ask for JSON, or for fewer steps or latents."
        )
    head = _msgpack_head(tensor, blob_bytes, filling=0)
    filling = -(offset + len(head)) % _ALIGNMENT
    return _msgpack_head(tensor, blob_bytes, filling=filling) + prefix, b""


def _msgpack_head(tensor: Tensor, blob_bytes: int, *, filling: int) -> bytes:
    shape, dtype = msgspec.msgpack.encode(tuple(tensor.shape)), msgspec.msgpack.encode(str(tensor.dtype))
    return b"".join(
        (
            bytes([_FIXMAP | 4]),
            _msgpack_key(b"__tensor__", filling & 1),
            _TRUE,
            _msgpack_key(b"shape", filling & 2),
            shape,
            _msgpack_key(b"dtype", filling & 4),
            dtype,
            _msgpack_key(b"data", 0),
            _BIN32 + blob_bytes.to_bytes(4, "big"),
        )
    )


def _msgpack_key(name: bytes, length_bytes: int) -> bytes:
    if length_bytes == 0:
        return bytes([_FIXSTR | len(name)]) + name
    return _STR_BY_LENGTH_BYTES[length_bytes] + len(name).to_bytes(length_bytes, "big") + name
