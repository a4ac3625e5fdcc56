"""Cutting raw batches without decoding them."""

from __future__ import annotations

import io
import json
from typing import Any

import fastavro
import pytest

from enricher import raw
from schemas import catalog, codec
from schemas.registry import CatalogIds, UnknownSchemaError
from tests import halves

OURS = catalog.RAW.schema_id
SAMPLE = halves.batch([*halves.opened(halves.key(1)), halves.failed(halves.key(2))])


def rejected(value: bytes | None, partition: int = 0) -> raw.Rejected:
    """Return why a value is rejected; fails when it is not."""
    found = raw.cut(value, partition, CatalogIds(), OURS)
    assert isinstance(found, raw.Rejected)
    return found


def test_cut_returns_each_event_unchanged_with_its_header() -> None:
    """The halves are the bytes of the events, in order, with what the header says."""
    found = raw.cut(SAMPLE, 0, CatalogIds(), OURS)
    assert isinstance(found, list)
    events = [*halves.opened(halves.key(1)), halves.failed(halves.key(2))]
    assert [half.data for half in found] == [halves.encoded(one) for one in events]
    assert [half.index for half in found] == [0, 1, 2]
    assert {half.header.node for half in found} == {"node-1"}
    assert [half.event_unix_us for half in found] == [one["event_unix_us"] for one in events]


def test_cut_of_an_empty_batch_is_empty() -> None:
    """A batch without events is fine and has nothing."""
    assert raw.cut(halves.batch([]), 0, CatalogIds(), OURS) == []


@pytest.mark.parametrize(
    "value", [None, b"", b"{}", b'{"json": true}'], ids=["null", "empty", "short", "json"]
)
def test_unframed_value_is_rejected(value: bytes | None) -> None:
    """What does not begin with Confluent's prefix is named so."""
    assert rejected(value).reason == "NOT_AVRO_FRAMED"


def test_unknown_schema_id_is_rejected_with_the_id() -> None:
    """An id that no registry knows can't be read, and the dead letter carries it."""
    found = rejected(b"\x00\x00\x00\x30\x39" + SAMPLE[5:])
    assert (found.reason, found.schema_id) == ("UNKNOWN_SCHEMA_ID", 12345)


@pytest.mark.parametrize("topic", [catalog.FLOWS, catalog.PODS], ids=lambda topic: topic.schema)
def test_schema_of_another_record_is_rejected(topic: catalog.Topic) -> None:
    """An id that is known, of a record that can't be read as a batch: a value too, not the worker's end."""
    found = rejected(codec.prefix(topic.schema_id) + SAMPLE[5:])
    assert (found.reason, found.schema_id) == ("UNDECODABLE", topic.schema_id)


def test_other_partition_is_rejected() -> None:
    """A batch in another partition than its header says would never meet its other halves."""
    assert rejected(SAMPLE, partition=1).reason == "WRONG_PARTITION"


@pytest.mark.parametrize("sizes", [[1, 2, 3], [10**6] * 3, [-5, 2, 3], [200, 200]], ids=str)
def test_sizes_that_do_not_fit_are_rejected(sizes: list[int]) -> None:
    """event_sizes that contradict the events are named so, whichever way they do."""
    events = [*halves.opened(halves.key(1)), halves.failed(halves.key(2))]
    assert rejected(halves.batch(events, event_sizes=sizes)).reason == "INCONSISTENT_SIZES"


@pytest.mark.parametrize("size", range(5, len(SAMPLE), 7))
def test_truncated_batch_is_rejected(size: int) -> None:
    """A batch cut off anywhere comes back as a value, never as an exception, even where the checksum is right."""
    assert rejected(SAMPLE[:size]).reason == "CHECKSUM_MISMATCH"
    cut = halves.sealed(SAMPLE[:size] + bytes(4))
    assert rejected(cut).reason in {"UNDECODABLE", "INCONSISTENT_SIZES"}


@pytest.mark.parametrize("place", range(5, len(SAMPLE)))
def test_flipped_bit_is_rejected_wherever_it_is(place: int) -> None:
    """One bit anywhere behind the prefix, in header, events or checksum: nothing of the batch is used."""
    flipped = bytearray(SAMPLE)
    flipped[place] ^= 1 << place % 8
    assert rejected(bytes(flipped)).reason == "CHECKSUM_MISMATCH"


def test_batch_of_before_the_checksum_is_read() -> None:
    """What an earlier collector left in the topic, under its own schema id, still comes out."""
    (earlier,) = (number for number, (topic, _) in catalog.EARLIER.items() if topic is catalog.RAW)
    value = codec.prefix(earlier) + SAMPLE[5 : -codec.CHECKSUM_BYTES]
    assert raw.cut(value, 0, CatalogIds(), OURS) == raw.cut(SAMPLE, 0, CatalogIds(), OURS)


def test_checksum_of_another_version_is_checked_too() -> None:
    """A later schema that still ends with the checksum: the writer's bytes are what it covers."""
    ids = _Ids()
    event = halves.event("CLOSE", "CLIENT", halves.key(1)) | {"novelty": "x"}
    out = io.BytesIO()
    fastavro.schemaless_writer(out, ids.writer, halves.batch_record([event]))
    value = codec.prefix(77) + out.getvalue()
    found = raw.cut(value, 0, ids, OURS)
    assert isinstance(found, raw.Rejected)
    assert (found.reason, found.schema_id) == ("CHECKSUM_MISMATCH", 77)
    assert isinstance(raw.cut(halves.sealed(value), 0, ids, OURS), list)


def test_bytes_after_the_record_are_rejected() -> None:
    """A message that goes on after its record is not what it says."""
    assert rejected(halves.sealed(SAMPLE + b"\x00")).reason == "INCONSISTENT_SIZES"


def test_broken_event_of_the_right_size_is_rejected() -> None:
    """An event whose structure is not TcpEvent's never gets into a flow, even when its size is right."""
    event = bytearray(halves.encoded(halves.failed(halves.key(2))))
    for place, value in ((8, 0x0E), (9, 0x00), (13, 0x01), (13, 0x81), (101, 0x7E), (len(event) - 1, 0x04)):
        broken = bytearray(event)
        broken[place] = value
        message = halves.sealed(SAMPLE.replace(bytes(event), bytes(broken)))
        assert message != SAMPLE
        assert rejected(message).reason == "INCONSISTENT_SIZES", place


class _Ids:
    """Knows one older writer's schema: without rtt_min_us and with an additional field."""

    def __init__(self) -> None:
        schema = json.loads(codec.text("RawBatch"))
        events = next(field for field in schema["fields"] if field["name"] == "events")
        fields = events["type"]["items"]["fields"]
        fields[:] = [field for field in fields if field["name"] != "rtt_min_us"]
        fields.append({"name": "novelty", "type": "string"})
        self.writer = fastavro.parse_schema(schema)

    def id_of(self, topic: Any) -> int:
        """Return the catalog's id."""
        return int(topic.schema_id)

    def writer_schema(self, schema_id: int) -> Any:
        """Return the older schema for id 77."""
        if schema_id == 77:
            return self.writer
        raise UnknownSchemaError(str(schema_id))


def test_other_registered_schema_takes_the_slow_path() -> None:
    """A batch of another version is read with its writer's schema and comes out in ours."""
    event = halves.event("CLOSE", "CLIENT", halves.key(1))
    record = halves.batch_record([event])
    record["events"] = [event | {"novelty": "x" * 40}]
    ids = _Ids()
    out = io.BytesIO()
    fastavro.schemaless_writer(out, ids.writer, record)
    found = raw.cut(halves.sealed(codec.prefix(77) + out.getvalue()), 0, ids, OURS)
    assert isinstance(found, list)
    assert [half.data for half in found] == [halves.encoded(event | {"rtt_min_us": None})]
