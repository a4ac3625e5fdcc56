"""Turns columns into Avro: many TcpEvent records at once, and the RawBatch message around them.

Owns the node collector's Avro encoder; field order and types come from `schemas/RawBatch.avsc`. The result is standard
Avro binary, byte for byte what fastavro writes. Never reads a clock, a kernel struct or Kafka. Called by
`node.batches`.

How it works: every field becomes one or two columns of pieces, each a fixed number of bytes wide of which the first
`sizes` count. The sizes give every piece its place; then the pieces of all records are stored column by column, left to
right, so that what one piece stores beyond its size is overwritten by the next one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from schemas import codec

Bytes2D = npt.NDArray[np.uint8]
Integers = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]

NARROW_LIMIT = 1 << 56  # a zigzag value below it takes at most 8 bytes
VARINT_BYTES_MAX = 10
TEXT_BYTES_MAX = 15  # of a byte string; its length then takes one byte, and see _plan
ENUM_SYMBOLS_MAX = 64  # so that an enum takes one byte

_U = np.uint64
_SPREAD = (  # (keep, move, shift): 56 bits into two lanes of 28, four of 14, eight of 7
    (_U(0x000000000FFFFFFF), _U(0x00FFFFFFF0000000), _U(4)),
    (_U(0x00003FFF00003FFF), _U(0x0FFFC0000FFFC000), _U(2)),
    (_U(0x007F007F007F007F), _U(0x3F803F803F803F80), _U(1)),
)
_SEVENS = _U(0x7F7F7F7F7F7F7F7F)
_ONES = _U(0x0101010101010101)
_TOP_BITS = _U(0x8080808080808080)


class Nullable(NamedTuple):
    """A column of a union of null and an integer: `values` count where `valid`, the rest is null."""

    values: Integers
    valid: npt.NDArray[np.bool_]


class Text(NamedTuple):
    """A column of byte strings: the first `lengths[i]` bytes of row i."""

    rows: Bytes2D
    lengths: Integers


Column = npt.NDArray[Any] | Nullable | Text
Columns = Mapping[str, Column]


def zigzag(values: Integers) -> Words:
    """Return Avro's zigzag form: 0, -1, 1, -2 become 0, 1, 2, 3."""
    folded: Words = ((values << 1) ^ (values >> 63)).view(np.uint64)
    return folded


def spread_varints(values: Words) -> tuple[Words, Words]:
    """Return (bytes, mask): each value's varint in the bytes of a word, and 1 in every byte of it that is used.

    Values must be below 2^56. Avro 1.12, "Binary encoding": 7 bits per byte, lowest first, top bit says "more".
    """
    word = values
    for keep, move, shift in _SPREAD:
        word = (word & keep) | ((word & move) << shift)
    used = word | (word >> _U(8))
    used |= used >> _U(16)
    used |= used >> _U(32)
    used += _SEVENS
    used >>= _U(7)
    used &= _ONES
    used |= _U(1)
    word |= (used >> _U(8)) << _U(7)
    return word, used


class Piece(NamedTuple):
    """Bytes to store in every record: element i of `values`, of which the first `sizes[i]` bytes count."""

    values: npt.NDArray[Any]
    sizes: Integers | int


class _Run(Protocol):
    def pieces(self, columns: Columns, rows: int) -> list[Piece]:
        """Return what the run's fields store, left to right."""


@dataclass(frozen=True)
class _FixedRun:
    """Consecutive fields of fixed width: `fixed`, and enums of at most 64 symbols."""

    names: tuple[str, ...]
    widths: tuple[int, ...]
    enums: tuple[bool, ...]

    def pieces(self, columns: Columns, rows: int) -> list[Piece]:
        width = sum(self.widths)
        out = np.empty((rows, width), np.uint8)
        at = 0
        for name, field_width, is_enum in zip(self.names, self.widths, self.enums, strict=True):
            column = columns[name]
            assert isinstance(column, np.ndarray)
            out[:, at : at + field_width] = (column << 1)[:, None] if is_enum else column
            at += field_width
        return [Piece(out.view(f"V{width}")[:, 0], width)]


@dataclass(frozen=True)
class _TextRun:
    """One field of type bytes."""

    name: str

    def pieces(self, columns: Columns, rows: int) -> list[Piece]:
        column = columns[self.name]
        assert isinstance(column, Text)
        assert column.rows.shape[1] <= TEXT_BYTES_MAX
        width = 1 + column.rows.shape[1]
        out = np.empty((rows, width), np.uint8)
        out[:, 0] = column.lengths << 1
        out[:, 1:] = column.rows
        return [Piece(out.view(f"V{width}")[:, 0], column.lengths + 1)]


@dataclass(frozen=True)
class _IntegerRun:
    """Consecutive int and long, nullable (branch 0 is null) or not."""

    names: tuple[str, ...]
    nullables: tuple[bool, ...]

    def pieces(self, columns: Columns, rows: int) -> list[Piece]:
        values = np.empty((len(self.names), rows), np.int64)
        valid = np.ones((len(self.names), rows), np.bool_)
        for i, name in enumerate(self.names):
            column = columns[name]
            assert isinstance(column, Nullable) == self.nullables[i]
            if isinstance(column, Nullable):
                values[i], valid[i] = column.values, column.valid
            else:
                values[i] = column
        folded = zigzag(values)
        high = folded >> _U(56)
        wide = high.max(axis=1, initial=0)
        if wide.any():
            folded = folded & _U(NARROW_LIMIT - 1)
        words, used = spread_varints(folded)
        if wide.any():
            used[high != 0] = _ONES
            words |= np.where(high != 0, _TOP_BITS, _U(0))
        sizes = (((used * _ONES) >> _U(56)) * valid).view(np.int64)
        branches = valid.view(np.uint8) << 1
        out = []
        for i, nullable in enumerate(self.nullables):
            if nullable:
                out.append(Piece(branches[i], 1))
            out.append(Piece(words[i], sizes[i]))
            if wide[i]:
                out.append(_upper_groups(high[i], valid[i]))
        return out


def _upper_groups(high: Words, valid: npt.NDArray[np.bool_]) -> Piece:
    """Return the ninth and tenth byte of varints from bits 56 to 63 of the zigzag values; none where they are 0."""
    ninth = (high & _U(0x7F)) | ((high >> _U(7)) << _U(7))
    sizes = ((high != 0) & valid).astype(np.int64) + ((high > _U(0x7F)) & valid)
    return Piece((ninth | ((high >> _U(7)) << _U(8))).astype("<u2"), sizes)


def _kind(field: dict[str, Any], named: dict[str, Any]) -> tuple[str, int, bool]:
    """Return (run kind, width in bytes, flag) of a field; the flag says enum or nullable."""
    avro = named.get(field["type"], field["type"]) if isinstance(field["type"], str) else field["type"]
    match avro:
        case {"type": "fixed", "size": int(size)}:
            return "fixed", size, False
        case {"type": "enum", "symbols": list(symbols)} if len(symbols) <= ENUM_SYMBOLS_MAX:
            return "fixed", 1, True
        case "int" | "long":
            return "integer", 0, False
        case ["null", "int" | "long"]:
            return "integer", 0, True
        case "bytes":
            return "text", 0, False
    raise NotImplementedError(f"no encoder for the field {field['name']} of type {avro}")


def _plan(fields: list[dict[str, Any]]) -> tuple[_Run, ...]:
    named = {
        f"{field['type']['namespace']}.{field['type']['name']}": field["type"]
        for field in fields
        if isinstance(field["type"], dict)
    }
    kinds = [(field["name"], *_kind(field, named)) for field in fields]
    runs: list[_Run] = []
    for kind, group in groupby(kinds, key=lambda entry: entry[1]):
        names, _, widths, flags = zip(*group, strict=True)
        if kind == "fixed":
            runs.append(_FixedRun(names, widths, flags))
        elif kind == "integer":
            runs.append(_IntegerRun(names, flags))
        else:
            runs += [_TextRun(name) for name in names]
    # What encode_events relies on: the first piece covers what the last ones of the record before store in excess, and
    # at least TEXT_BYTES_MAX bytes (fields have one or more) follow a byte string.
    assert isinstance(runs[0], _FixedRun)
    assert sum(runs[0].widths) >= VARINT_BYTES_MAX
    assert "text" not in [kind for _, kind, _, _ in kinds[-TEXT_BYTES_MAX:]]
    return tuple(runs)


@cache
def _event_plan() -> tuple[_Run, ...]:
    fields = {field["name"]: field for field in json.loads(codec.text("RawBatch"))["fields"]}
    return _plan(fields["events"]["type"]["items"]["fields"])


def encode_events(columns: Columns, order: Integers) -> tuple[memoryview, Integers]:
    """Return (encodings of TcpEvents one after the other, size of each in bytes), in the given order of rows.

    `columns` holds one column per field of TcpEvent, by name: uint8 rows for `fixed`, indexes for enums, int64 for
    int and long, Nullable, Text; `order` holds each row's number once. About 0.6 us per event from 1,000 rows on,
    numpy's call costs below that.
    """
    rows = len(order)
    pieces = [piece for run in _event_plan() for piece in run.pieces(columns, rows)]
    sizes: Integers = np.zeros(rows, np.int64)
    for piece in pieces:
        sizes += piece.sizes
    ordered_sizes = sizes[order]
    ends = np.cumsum(ordered_sizes)
    starts: Integers = np.empty(rows, np.int64)
    starts[order] = ends - ordered_sizes
    total = int(ends[-1]) if rows else 0
    out = np.empty(total + TEXT_BYTES_MAX + 1, np.uint8)
    at = starts.copy()
    for piece in pieces:
        _at_any_byte(out, piece.values.dtype)[at] = piece.values
        at += piece.sizes
    # The last pieces of a record run over into the next one's first piece: store that again.
    _at_any_byte(out, pieces[0].values.dtype)[starts] = pieces[0].values
    return out[:total].data, ordered_sizes


def _at_any_byte(out: Bytes2D, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Return `out` seen as one element of `dtype` from every byte on: assigning to [i] stores at byte i."""
    return np.ndarray((out.size - dtype.itemsize + 1,), dtype, out, strides=(1,))


def varints(values: Integers) -> bytes:
    """Return the encodings of non-negative ints below 2^55, one after the other."""
    word, used = spread_varints(zigzag(values))
    encoded: bytes = word.view(np.uint8)[used.view(np.bool_)].tobytes()
    return encoded


def _long(value: int) -> bytes:
    rest = (value << 1) ^ (value >> 63)
    out = bytearray()
    while rest > 0x7F:  # noqa: PLR2004 (seven bits)
        out.append(rest & 0x7F | 0x80)
        rest >>= 7
    out.append(rest)
    return bytes(out)


def _string(text: str) -> bytes:
    encoded = text.encode()
    return _long(len(encoded)) + encoded


@dataclass(frozen=True)
class Header:
    """What precedes the events in a RawBatch, in the schema's order; see there for units and meaning."""

    cluster: str
    node: str
    boot_id: str
    producer_epoch: int
    partition: int
    sequence: int
    key_id: int
    clock_offset_us: int
    clock_error_us: int

    def encode(self) -> bytes:
        """Return the Avro binary of these fields."""
        values = (getattr(self, name) for name in self.__dataclass_fields__)
        return b"".join(_string(value) if isinstance(value, str) else _long(value) for value in values)


def raw_batch(schema_id: int, header: Header, sizes: Integers, bodies: Iterable[memoryview]) -> bytes:
    """Return the framed RawBatch of at least one event: prefix, header, `sizes`, `bodies` and checksum.

    Both arrays are one block of a positive count: one library can't read sized blocks of a negative count.
    """
    assert len(sizes) > 0
    count = _long(len(sizes))
    return _sealed(
        codec.prefix(schema_id), header.encode(), count, varints(sizes), b"\0", count, *bodies, b"\0"
    )


def empty_batch(schema_id: int, header: Header) -> bytes:
    """Return the framed RawBatch without events."""
    return _sealed(codec.prefix(schema_id), header.encode(), b"\0\0")


def _sealed(*parts: bytes | memoryview) -> bytes:
    """Return the parts and their checksum; the copy that joining costs is made once."""
    return b"".join((*parts, codec.checksum(*parts)))
