"""Cuts a framed RawBatch into its header and its halves, without decoding an event into a record.

Pure: bytes in, values out; what can't be read comes back as a `Rejected` value and never as an exception.
Knows the byte layout of TcpEvent (schemas/RawBatch.avsc): one regular expression checks every event's
structure and finds the places that `flow` splices, so a broken event never reaches an output topic. Called
by `engine`.
"""

from __future__ import annotations

import io
import json
import re
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

import fastavro

from enricher import avro
from schemas import catalog, codec
from schemas.registry import UnknownSchemaError

if TYPE_CHECKING:
    from schemas.registry import SchemaIds

UNKNOWN, CONNECT, CONNECT_FAILED, ACCEPT, CLOSE, EXISTING, PROGRESS = range(0, 14, 2)
"""Event types as they stand in the bytes: zigzag of the symbol's place."""
CLIENT, SERVER = 2, 4
"""Roles as they stand in the bytes."""

TYPE_AT, ROLE_AT, OUTCOME_AT, CLOSED_BY_AT, OWNER_AT, TIME_AT = 8, 9, 10, 11, 12, 13
POD_UID = slice(21, 37)
CONTAINER_ID = slice(37, 69)
LOCAL = slice(69, 85)
REMOTE = slice(85, 101)
COMM_AT = 101
CHECKSUM_MISMATCH = "CHECKSUM_MISMATCH"
PRESENT = 2
"""The branch of a union that isn't null, as it stands in the bytes."""

_INT = rb"(?:[\x80-\xff]{0,3}[\x00-\x7f]|[\x80-\xff]{4}[\x00-\x0f])"
_LONG = rb"(?:[\x80-\xff]{0,8}[\x00-\x7f]|[\x80-\xff]{9}[\x00\x01])"
_TIME = b"[" + b"".join(b"\\x%02x" % byte for byte in range(0x80, 0x100, 2)) + rb"][\x80-\xff]{6}[\x00-\x7f]"
"""Eight bytes, not negative."""
_OPTIONAL = rb"(?:\x00|\x02" + _LONG + rb")"
_COMM = b"|".join(re.escape(bytes((2 * size,))) + b".{%d}" % size for size in range(16))
_EVENT = re.compile(
    rb".{8}[\x02\x04\x06\x08\x0a\x0c][\x02\x04][\x00\x02\x04\x06\x08\x0a\x0c\x0e\x10]"
    rb"[\x00\x02\x04\x06\x08\x0a][\x00\x02\x04\x06\x08]" + _TIME + rb".{80}"
    rb"(?:" + _COMM + rb")" + _INT + rb"(" + _INT + rb")"
    rb"(" + _INT + _OPTIONAL * 2 + rb")"
    rb"((?:\x00|\x02"
    + _INT
    + rb")"
    + _OPTIONAL * 4
    + rb"("
    + _OPTIONAL
    + rb")("
    + _OPTIONAL
    + rb")"
    + _OPTIONAL * 7
    + rb")",
    re.DOTALL,
)


@dataclass(frozen=True)
class Header:
    """What a batch says about all its events.

    The fields are those of schemas/RawBatch.avsc that a flow or the cutting needs.
    """

    cluster: str
    node: str
    boot_id: str
    producer_epoch: int
    partition: int
    sequence: int
    key_id: int
    clock_error_us: int

    @cached_property
    def run_before_index(self) -> bytes:
        """Flow's observer, boot_id, producer_epoch and sequence of a side, encoded."""
        return (
            avro.optional_text(self.node)
            + avro.optional_text(self.boot_id)
            + avro.optional_long(self.producer_epoch)
            + avro.optional_long(self.sequence)
        )

    @cached_property
    def run_after_index(self) -> bytes:
        """Flow's clock_error_us of a side, encoded."""
        return avro.optional_long(self.clock_error_us)

    @cached_property
    def encoded(self) -> bytes:
        """All fields, in order."""
        numbers = (
            self.producer_epoch,
            self.partition,
            self.sequence,
            self.key_id,
            self.clock_error_us,
        )
        texts = avro.text(self.cluster) + avro.text(self.node) + avro.text(self.boot_id)
        return texts + b"".join(map(avro.long, numbers))


@dataclass(slots=True)
class Half:
    """One event of one side, as bytes, with the places that splicing needs.

    Attributes:
        header: its batch.
        index: its place in the batch, from 0.
        data: the encoded TcpEvent.
        port_at: where remote_port begins in `data`; progress_seq lies before it, after comm.
        flow_run_at: where errno begins; side_run_at: where the local port's union begins.
        cookie_at, established_at: where the unions of socket_cookie and of established_unix_us begin in the side's run.
    """

    header: Header
    index: int
    data: bytes
    port_at: int
    flow_run_at: int
    side_run_at: int
    cookie_at: int
    established_at: int

    @property
    def event_unix_us(self) -> int:
        """When it happened, Unix time in us on the node's clock."""
        return avro.eight_byte_long(self.data, TIME_AT)

    @property
    def as_of_us(self) -> int:
        """When to ask whose the addresses were: at the handshake, at a failed connect's first SYN, else at the event.

        A CLOSE may come long after its peer has gone and another pod has taken the address.
        """
        data = self.data
        if data[self.established_at] == PRESENT:
            return avro.read_long(data, self.established_at + 1)[0]
        if data[TYPE_AT] == CONNECT_FAILED:
            _errno, position = avro.read_long(data, self.flow_run_at)
            _handshake, position = _read_optional(data, position)
            duration_us, _ = _read_optional(data, position)
            return self.event_unix_us - (duration_us or 0)
        return self.event_unix_us

    @property
    def socket(self) -> int:
        """A number that is the same for all that this socket tells, and only for that: boot, cookie, addresses."""
        data = self.data
        addresses = data[LOCAL.start : REMOTE.stop]
        return hash((self.header.boot_id, addresses, data[self.cookie_at : self.established_at]))


def _read_optional(data: bytes, position: int) -> tuple[int | None, int]:
    return avro.read_long(data, position + 1) if data[position] else (None, position + 1)


@dataclass(frozen=True)
class Rejected:
    """A message that can't be used: `reason` and `detail` as in schemas/DeadLetter.avsc."""

    reason: str
    detail: str
    schema_id: int


class _BadBatchError(ValueError):
    """The batch contradicts itself; args are reason and detail."""


def cut(value: bytes | None, partition: int, ids: SchemaIds, schema_id: int) -> list[Half] | Rejected:
    """Return the halves of one message of the raw topic, or why it was rejected.

    `schema_id` is the id of our own RawBatch; another registered id is decoded with its writer's schema. Nothing but
    the schema id is read before the checksum was found right.
    """
    try:
        found, _ = codec.split(value or b"")
    except codec.FramingError as error:
        return Rejected("NOT_AVRO_FRAMED", str(error), -1)
    assert value is not None
    try:
        writer = None if found == schema_id else ids.writer_schema(found)
        if (writer is None or _has_checksum(writer)) and not _is_intact(value):
            return Rejected(CHECKSUM_MISMATCH, f"the checksum of {len(value)} bytes is wrong", found)
        if writer is not None:
            value = _rewrite(value, writer)
        return _cut(value, partition)
    except UnknownSchemaError as error:
        return Rejected("UNKNOWN_SCHEMA_ID", str(error), found)
    except _BadBatchError as error:
        return Rejected(error.args[0], error.args[1], found)
    except (EOFError, ValueError, LookupError, TypeError, OverflowError, MemoryError) as error:
        return Rejected("UNDECODABLE", f"{type(error).__name__}: {error}", found)


def _has_checksum(writer: Any) -> bool:
    """Return whether batches of that schema end with a checksum."""
    return isinstance(writer, dict) and writer.get("fields", [{}])[-1].get("name") == "checksum"


def _is_intact(value: bytes) -> bool:
    body = memoryview(value)[: -codec.CHECKSUM_BYTES]
    return codec.checksum(body) == value[-codec.CHECKSUM_BYTES :]


def header_of(
    value: bytes | None, halves: list[Half] | Rejected, ids: SchemaIds, schema_id: int
) -> Header | None:
    """Return the header of a message of which `cut` made `halves`; None when it can't be read.

    Where the checksum is wrong the header may be too.
    """
    if isinstance(halves, list) and halves:
        return halves[0].header
    if isinstance(halves, Rejected) and halves.reason == "UNKNOWN_SCHEMA_ID":
        return None
    try:
        found, _ = codec.split(value or b"")
        assert value is not None
        return _header(value if found == schema_id else _rewrite(value, ids.writer_schema(found)))[0]
    except (EOFError, ValueError, LookupError, TypeError, OverflowError, MemoryError):
        return None


def _cut(value: bytes, partition: int) -> list[Half]:
    header, position = _header(value)
    if header.partition != partition:
        raise _BadBatchError("WRONG_PARTITION", f"the batch says {header.partition}, it was in {partition}")
    sizes, position = _sizes(value, position)
    count, position = avro.read_long(value, position) if sizes else (0, position)
    if count != len(sizes):
        raise _BadBatchError("INCONSISTENT_SIZES", f"{len(sizes)} sizes, {count} events")
    halves = []
    match = _EVENT.match
    for index, size in enumerate(sizes):
        end = position + size
        found = match(value, position, end)
        if found is None or found.end() != end:
            raise _BadBatchError("INCONSISTENT_SIZES", f"event {index} does not fill its {size} bytes")
        halves.append(_half(header, index, value[position:end], found, position))
        position = end
    left = len(value) - position - codec.CHECKSUM_BYTES
    if left != 1 or value[position] != 0:
        raise _BadBatchError("INCONSISTENT_SIZES", f"{left} bytes where the array should end")
    return halves


def _half(header: Header, index: int, data: bytes, found: re.Match[bytes], position: int) -> Half:
    start = found.start
    return Half(
        header,
        index,
        data,
        start(1) - position,
        start(2) - position,
        start(3) - position,
        start(4) - position,
        start(5) - position,
    )


def half(header: Header, index: int, data: bytes) -> Half:
    """Return the half whose encoded TcpEvent is `data`, as `cut` would; ValueError when it is none."""
    found = _EVENT.fullmatch(data)
    if found is None:
        raise ValueError(f"{len(data)} bytes are no TcpEvent")
    return _half(header, index, data, found, 0)


def _header(value: bytes) -> tuple[Header, int]:
    cluster, position = avro.read_text(value, codec.PREFIX_BYTES)
    node, position = avro.read_text(value, position)
    boot_id, position = avro.read_text(value, position)
    producer_epoch, position = avro.read_long(value, position)
    partition, position = avro.read_long(value, position)
    sequence, position = avro.read_long(value, position)
    key_id, position = avro.read_long(value, position)
    _offset, position = avro.read_long(value, position)
    clock_error_us, position = avro.read_long(value, position)
    header = Header(cluster, node, boot_id, producer_epoch, partition, sequence, key_id, clock_error_us)
    return header, position


def _sizes(value: bytes, position: int) -> tuple[list[int], int]:
    """Return event_sizes and the position after it; only one block of a plain positive count is expected."""
    count, position = avro.read_long(value, position)
    if not 0 <= count <= len(value):
        raise _BadBatchError("INCONSISTENT_SIZES", f"event_sizes has a block of {count}")
    sizes = []
    for _ in range(count):
        byte = value[position]
        if byte < 0x80:  # noqa: PLR2004 (the continuation bit)
            size, position = byte >> 1, position + 1
        elif value[position + 1] < 0x80:  # noqa: PLR2004
            size, position = (byte & 0x7F | value[position + 1] << 7) >> 1, position + 2
        else:
            size, position = avro.read_long(value, position)
        sizes.append(size)
    if count:
        end, position = avro.read_long(value, position)
        if end != 0:
            raise _BadBatchError("INCONSISTENT_SIZES", "event_sizes comes in more than one block")
    return sizes, position


def _rewrite(value: bytes, writer: object) -> bytes:
    """Return the batch in our own schema and with sizes of our own encoding; the slow path."""
    record = codec.decode(catalog.RAW.schema, value, writer)
    sizes = []
    for event in record["events"]:
        out = io.BytesIO()
        fastavro.schemaless_writer(out, _event_schema(), event)
        sizes.append(out.tell())
    record["event_sizes"] = sizes
    record["checksum"] = bytes(codec.CHECKSUM_BYTES)  # was checked, where there was one
    return codec.encode(catalog.RAW.schema, record, catalog.RAW.schema_id)


@cache
def _event_schema() -> object:
    fields = json.loads(codec.text(catalog.RAW.schema))["fields"]
    events = next(field for field in fields if field["name"] == "events")
    return fastavro.parse_schema(events["type"]["items"])
