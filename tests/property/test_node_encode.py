"""The node collector's encoder against fastavro and the avro library, over random columns."""

from __future__ import annotations

import io
import json
import zlib
from typing import Any

import avro.io
import avro.schema
import fastavro
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from collector.node.encode import Header, Nullable, Text, encode_events, raw_batch
from schemas import codec

SCHEMA = json.loads(codec.text("RawBatch"))
FIELDS: list[dict[str, Any]] = SCHEMA["fields"][-2]["type"]["items"]["fields"]
FIXED_BYTES = {"tcp_key": 8, "pod_uid": 16, "container_id": 32, "local_address": 16, "remote_address": 16}
INT = st.integers(-(2**31), 2**31 - 1)
EDGES = [0, 1, -1, 63, 64, -64, -65, 2**55 - 1, 2**55, -(2**55), -(2**55) - 1, 2**62, 2**63 - 1, -(2**63)]
LONG = st.one_of(st.integers(-(2**63), 2**63 - 1), st.sampled_from(EDGES), st.integers(0, 2**48))


def value_of(field: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Return a strategy of one field's values, as fastavro takes them."""
    name, kind = field["name"], field["type"]
    if name in FIXED_BYTES:
        return st.binary(min_size=FIXED_BYTES[name], max_size=FIXED_BYTES[name])
    if isinstance(kind, dict):
        return st.sampled_from(kind["symbols"])
    if kind == "bytes":
        return st.binary(max_size=15)
    number = INT if "int" in kind else LONG
    return st.none() | number if isinstance(kind, list) else number


EVENT = st.fixed_dictionaries({field["name"]: value_of(field) for field in FIELDS})


def column_of(field: dict[str, Any], values: list[Any]) -> Any:
    """Return the values of one field as the encoder's column."""
    name, kind = field["name"], field["type"]
    if name in FIXED_BYTES:
        return np.frombuffer(b"".join(values), np.uint8).reshape(-1, FIXED_BYTES[name])
    if isinstance(kind, dict):
        return np.array([kind["symbols"].index(value) for value in values])
    if kind == "bytes":
        padded = b"".join(value.ljust(15, b"\xff") for value in values)
        return Text(
            np.frombuffer(padded, np.uint8).reshape(-1, 15), np.array([len(value) for value in values])
        )
    if isinstance(kind, list):
        numbers = np.array([-77 if value is None else value for value in values], np.int64)
        return Nullable(numbers, np.array([value is not None for value in values]))
    return np.array(values, np.int64)


def encode(events: list[dict[str, Any]], order: np.ndarray | None = None) -> tuple[memoryview, np.ndarray]:
    """Return what our encoder makes of records."""
    columns = {
        field["name"]: column_of(field, [event[field["name"]] for event in events]) for field in FIELDS
    }
    return encode_events(columns, np.arange(len(events)) if order is None else order)


@settings(deadline=None, max_examples=150)
@given(st.lists(EVENT, min_size=1, max_size=6))
def test_encoding_is_fastavros_byte_for_byte(events: list[dict[str, Any]]) -> None:
    """Every value of every field, nulls and ten-byte numbers included, is encoded as fastavro does."""
    bodies, sizes = encode(events)
    schema = fastavro.parse_schema(SCHEMA["fields"][-2]["type"]["items"])
    at = 0
    for event, size in zip(events, sizes, strict=True):
        expected = io.BytesIO()
        fastavro.schemaless_writer(expected, schema, event)
        assert bodies[at : at + size] == expected.getvalue()
        at += size
    assert at == len(bodies)


@settings(deadline=None, max_examples=50)
@given(
    st.lists(EVENT, min_size=1, max_size=6).flatmap(
        lambda made: st.tuples(st.just(made), st.permutations(range(len(made))))
    )
)
def test_encoding_in_another_order_is_that_of_reordered_events(
    case: tuple[list[dict[str, Any]], list[int]],
) -> None:
    """Giving an order is the same as giving the rows in that order."""
    made, order = case
    bodies, sizes = encode(made, np.array(order))
    expected, expected_sizes = encode([made[row] for row in order])
    assert bodies == expected
    assert sizes.tolist() == expected_sizes.tolist()


@settings(deadline=None, max_examples=30)
@given(st.lists(EVENT, min_size=1, max_size=3), st.integers(0, 2**54), st.text(max_size=5), st.integers(0, 3))
def test_raw_batch_is_decoded_by_the_avro_library(
    events: list[dict[str, Any]], number: int, text: str, partition: int
) -> None:
    """The reference implementation reads a whole message with the `.avsc` alone."""
    bodies, sizes = encode(events)
    header = Header(text, "n", "b", number, partition, number, 1, number, 3)
    value = raw_batch(1, header, sizes, [bodies])
    decoder = avro.io.BinaryDecoder(io.BytesIO(codec.split(value)[1]))
    batch: Any = avro.io.DatumReader(avro.schema.parse(codec.text("RawBatch"))).read(decoder)
    assert batch["events"] == events
    assert batch["event_sizes"] == sizes.tolist()
    assert {name: batch[name] for name in Header.__dataclass_fields__} == vars(header)
    assert codec.encode("RawBatch", batch, 1) == value
    assert batch["checksum"] == zlib.crc32(value[:-4]).to_bytes(4, "little")
