"""Avro binary primitives: what one field costs in bytes, and nothing about any record.

Pure. Called by `raw` to read batch headers and by `flow` to encode what differs from flow to flow. The hot
paths cache what these return; `schemas.codec` stays the reference that tests compare with.
"""

from __future__ import annotations

from functools import lru_cache

NULL = b"\x00"
PRESENT = b"\x02"
EMPTY_MAP = b"\x00"

_ONE_BYTE = 1 << 7
_TWO_BYTES = 1 << 14


def long(value: int) -> bytes:
    """Return a zigzag varint of a signed 64-bit number."""
    rest = (value << 1) ^ (value >> 63)
    if rest < _ONE_BYTE:
        return bytes((rest,))
    if rest < _TWO_BYTES:
        return bytes((rest & 0x7F | 0x80, rest >> 7))
    out = bytearray()
    while rest >= _ONE_BYTE:
        out.append(rest & 0x7F | 0x80)
        rest >>= 7
    out.append(rest)
    return bytes(out)


def text(value: str) -> bytes:
    """Return a string with its length."""
    raw = value.encode()
    return long(len(raw)) + raw


def optional_text(value: str | None) -> bytes:
    """Return a nullable string; None becomes null, an empty string stays one."""
    return NULL if value is None else PRESENT + text(value)


def optional_long(value: int | None) -> bytes:
    """Return a nullable int or long."""
    return NULL if value is None else PRESENT + long(value)


def text_map(values: dict[str, str]) -> bytes:
    """Return a map of strings as one block, in the mapping's own order."""
    if not values:
        return EMPTY_MAP
    entries = b"".join(text(key) + text(value) for key, value in values.items())
    return long(len(values)) + entries + b"\x00"


@lru_cache(maxsize=65_536)
def cached_long(value: int) -> bytes:
    """Return what `long` does, remembered: for counters and indexes that come again and again."""
    return long(value)


@lru_cache(maxsize=65_536)
def cached_optional_long(value: int | None) -> bytes:
    """Return what `optional_long` does, remembered."""
    return optional_long(value)


def read_long(buffer: bytes, position: int) -> tuple[int, int]:
    """Return (value, position after it); IndexError at the buffer's end, ValueError beyond 64 bits."""
    shift = rest = 0
    while True:
        byte = buffer[position]
        position += 1
        rest |= (byte & 0x7F) << shift
        if byte < _ONE_BYTE:
            if rest >> 64:
                break
            return (rest >> 1) ^ -(rest & 1), position
        shift += 7
        if shift >= 70:  # noqa: PLR2004 (ten groups of seven bits)
            break
    raise ValueError("a varint is longer than 64 bits")


def read_text(buffer: bytes, position: int) -> tuple[str, int]:
    """Return (string, position after it); IndexError when it would end beyond the buffer."""
    size, position = read_long(buffer, position)
    end = position + size
    if size < 0 or end > len(buffer):
        raise IndexError("a string ends beyond the message")
    return buffer[position:end].decode(), end


def eight_byte_long(buffer: bytes, position: int) -> int:
    """Return the value of a varint that is known to take exactly 8 bytes, without a loop over them."""
    rest = int.from_bytes(buffer[position : position + 8], "little") & 0x7F7F7F7F7F7F7F7F
    rest = (rest & 0x007F007F007F007F) | ((rest & 0x7F007F007F007F00) >> 1)
    rest = (rest & 0x00003FFF00003FFF) | ((rest & 0x3FFF00003FFF0000) >> 2)
    rest = (rest & 0x000000000FFFFFFF) | ((rest & 0x0FFFFFFF00000000) >> 4)
    return (rest >> 1) ^ -(rest & 1)
