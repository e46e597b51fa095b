"""Small files that cost their decoder much: of time, and not of pixels."""

from __future__ import annotations

import io
import struct

from PIL import Image


def progressive_bomb(width: int, height: int, scans: int) -> bytes:
    """A valid progressive JPEG of one gray, of which each further scan says: nothing changes.

    Sides are multiples of 8. A scan has some 95 bytes, and its decoder visits every block.
    """
    blocks = width // 8 * (height // 8)
    segments = [
        b"\xff\xd8",
        _segment(0xDB, b"\0" + bytes([1] * 64)),
        _segment(0xC2, struct.pack(">BHHB", 8, height, width, 1) + b"\1\x11\0"),
        _table(0x00, 0x00),  # of differences: none
        _table(0x10, 0xE0),  # of the others: a run of blocks, its length in 14 bits
        _scan(0, 0, "0" * blocks),
    ]
    most = 2**15 - 1
    runs = ("0" + "1" * 14) * -(-blocks // most)  # of `most` blocks each, the last one of fewer
    return b"".join([*segments, *[_scan(1, 63, runs)] * (scans - 1), b"\xff\xd9"])


def gif_of_comments(blocks: int) -> bytes:
    """A GIF of one pixel, with a comment in so many pieces of a byte."""
    buffer = io.BytesIO()
    Image.new("P", (1, 1)).save(buffer, "GIF")
    data = buffer.getvalue()
    begin = 13 + 3 * 2 ** ((data[10] & 7) + 1)
    return data[:begin] + b"\x21\xfe" + b"\1A" * blocks + b"\0" + data[begin:]


def _segment(kind: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, kind, len(body) + 2) + body


def _table(place: int, symbol: int) -> bytes:
    """A Huffman table of one symbol, whose code is 0."""
    return _segment(0xC4, bytes([place, 1, *[0] * 15, symbol]))


def _scan(first: int, last: int, bits: str) -> bytes:
    bits += "1" * (-len(bits) % 8)
    data = int(bits, 2).to_bytes(len(bits) // 8) if bits else b""
    head = _segment(0xDA, bytes([1, 1, 0x00, first, last, 0]))
    return head + data.replace(b"\xff", b"\xff\0")
