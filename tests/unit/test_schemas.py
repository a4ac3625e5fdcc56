"""The data contract: documents itself, keeps its mirror images equal, and decodes with a stock Avro library."""

from __future__ import annotations

import io
import json
from typing import Any

import avro.io
import avro.schema
import fastavro
import fastavro.utils
import pytest

from schemas import catalog, codec
from schemas.registry import CatalogIds, UnknownSchemaError

SCHEMAS = sorted({topic.schema for topic in catalog.TOPICS})
HEAD = {
    "tcp_key": 0,
    "type": 8,
    "role": 9,
    "outcome": 10,
    "closed_by": 11,
    "owner_source": 12,
    "event_unix_us": 13,
    "pod_uid": 21,
    "container_id": 37,
    "local_address": 69,
    "remote_address": 85,
    "comm": 101,
}


def fields_of(record: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return (path, field) of a record and of the records inside it."""
    found = []
    for field in record["fields"]:
        path = f"{record['name']}.{field['name']}"
        found.append((path, field))
        inner = field["type"]
        while isinstance(inner, dict) and inner.get("type") == "array":
            inner = inner["items"]
        if isinstance(inner, dict) and inner.get("type") == "record":
            found += fields_of(inner)
    return found


def raw(schema: str) -> dict[str, Any]:
    """Return a schema as its file has it."""
    return json.loads(codec.text(schema))


def tcp_event() -> list[dict[str, Any]]:
    """Return the fields of TcpEvent."""
    (events,) = (field for field in raw("RawBatch")["fields"] if field["name"] == "events")
    return events["type"]["items"]["fields"]


@pytest.mark.parametrize("schema", SCHEMAS)
def test_every_field_has_a_doc(schema: str) -> None:
    """A reader finds the meaning of each field in the schema itself."""
    for path, field in fields_of(raw(schema)):
        assert len(field.get("doc", "")) > 3, path


@pytest.mark.parametrize("schema", SCHEMAS)
def test_every_time_and_span_names_its_unit(schema: str) -> None:
    """A name that ends in a unit repeats it in its doc, and a nullable field says what null means."""
    for path, field in fields_of(raw(schema)):
        if path.endswith(("_us", "_ms")):
            unit = path.rsplit("_", 1)[1]
            assert f" {unit}" in f" {field['doc']}", path
        if isinstance(field["type"], list):
            assert "null" in field["doc"], path
            assert field["type"][0] == "null", path
            assert len(field["type"]) == 2, path


def test_schema_ids_are_distinct_and_known() -> None:
    """Each fixed id leads back to the schema it was given to."""
    ids = CatalogIds()
    assert len({topic.schema_id for topic in catalog.TOPICS}) == len(catalog.TOPICS)
    for topic in catalog.TOPICS:
        assert ids.writer_schema(ids.id_of(topic)) is codec.parsed(topic.schema)
    with pytest.raises(UnknownSchemaError):
        ids.writer_schema(999)
    assert not {topic.schema_id for topic in catalog.TOPICS} & catalog.EARLIER.keys()


@pytest.mark.parametrize("schema_id", catalog.EARLIER)
def test_message_of_an_earlier_version_reads_with_defaults(schema_id: int) -> None:
    """A reader of today reads what an earlier version wrote under its own id, and the reverse."""
    topic, absent = catalog.EARLIER[schema_id]
    earlier, now = CatalogIds().writer_schema(schema_id), codec.parsed(topic.schema)
    record = fastavro.utils.generate_one(earlier)
    out = io.BytesIO()
    fastavro.schemaless_writer(out, earlier, record)
    read = codec.decode(topic.schema, codec.prefix(schema_id) + out.getvalue(), earlier)
    assert {name: read[name] for name in record} == record
    fields = raw(topic.schema)["fields"]
    defaults = {field["name"]: field["default"] for field in fields if field["name"] in absent}
    assert {name: read[name] for name in absent} == defaults
    out = io.BytesIO()
    fastavro.schemaless_writer(out, now, read | ({"checksum": b"abcd"} if "checksum" in absent else {}))
    out.seek(0)
    assert fastavro.schemaless_reader(out, now, earlier) == record


def test_client_and_server_groups_of_flow_mirror_each_other() -> None:
    """The two sides of a Flow differ by their prefix alone."""
    groups: dict[str, list[tuple[str, Any]]] = {"client": [], "server": []}
    for field in raw("Flow")["fields"]:
        side, _, name = field["name"].partition("_")
        if side in groups:
            groups[side].append((name, field["type"]))
    assert groups["client"] == groups["server"]
    assert len(groups["client"]) > 30


def test_side_run_and_flow_run_have_the_same_types_in_raw_and_flow() -> None:
    """The enricher may splice these bytes from a raw event into a flow."""
    event, flow = tcp_event(), raw("Flow")["fields"]

    def run(fields: list[dict[str, Any]], first: str, last: str) -> list[Any]:
        names = [field["name"] for field in fields]
        return [field["type"] for field in fields[names.index(first) : names.index(last) + 1]]

    assert run(event, "errno", "duration_us") == run(flow, "errno", "duration_us")
    for side in ("client", "server"):
        assert run(event, "port", "rtt_min_us") == run(flow, f"{side}_port", f"{side}_rtt_min_us")


def test_head_of_an_event_has_fixed_offsets() -> None:
    """Every field up to comm starts where the contract says, whatever the values."""
    values = {"tcp_key": b"\x11" * 8, "event_unix_us": 1_700_000_000_000_000, "comm": b"x"}
    sizes = {"TcpKey": 8, "PodUid": 16, "ContainerId": 32, "Ip": 16}
    schema = codec.parsed("RawBatch")
    at = 0
    for field in tcp_event():
        assert HEAD[field["name"]] == at
        if field["name"] == "comm":
            break
        kind = field["type"]
        name = kind["name"] if isinstance(kind, dict) else kind.rpartition(".")[2]
        if name in sizes:
            at += sizes[name]
        elif field["name"] == "event_unix_us":
            out = io.BytesIO()
            fastavro.schemaless_writer(out, "long", values["event_unix_us"])
            at += len(out.getvalue())
        else:
            assert len(kind["symbols"]) < 64
            at += 1
    assert schema["name"] == "podwire.v1.RawBatch"


def test_record_decodes_with_a_stock_avro_library() -> None:
    """The .avsc and the bytes after the prefix are all that a foreign reader needs."""
    record = {
        "cluster": "c",
        "kind": "pods",
        "complete_until_us": 1_700_000_000_000_000,
        "topic": catalog.PODS.name,
        "end_offset": 7,
        "source": "manifests",
        "status_lag_us": 10_000_000,
    }
    value = codec.encode("Watermark", record, catalog.WATERMARKS.schema_id)
    schema_id, payload = codec.split(value)
    assert schema_id == catalog.WATERMARKS.schema_id
    reader = avro.io.DatumReader(avro.schema.parse(codec.text("Watermark")))
    assert reader.read(avro.io.BinaryDecoder(io.BytesIO(payload))) == record
    assert codec.decode("Watermark", value) == record


@pytest.mark.parametrize("value", [b"", b"\x00\x00", b"\x01\x00\x00\x00\x06abc", b"{}"], ids=repr)
def test_value_without_prefix_is_refused(value: bytes) -> None:
    """Bytes without Confluent's prefix raise and are never guessed at."""
    with pytest.raises(codec.FramingError):
        codec.split(value)


def test_bytes_after_the_record_are_refused() -> None:
    """A longer value than its schema explains is not accepted in part."""
    record = {
        "cluster": "c",
        "kind": "pods",
        "complete_until_us": 1,
        "topic": "t",
        "end_offset": 0,
        "source": "manifests",
    }
    with pytest.raises(ValueError, match="follow"):
        codec.decode("Watermark", codec.encode("Watermark", record, 6) + b"\x00")


def test_partitions_and_policies_suit_the_readers() -> None:
    """Metadata is compacted in one partition, raw is stamped by the broker, raw and flows share their count."""
    for topic in (*catalog.METADATA, catalog.WATERMARKS):
        assert topic.partitions == 1
        assert topic.config()["cleanup.policy"] == "compact"
    assert catalog.RAW.config()["message.timestamp.type"] == "LogAppendTime"
    assert catalog.RAW.partitions is catalog.FLOWS.partitions is None
    assert catalog.by_name(catalog.RAW.name) is catalog.RAW
    with pytest.raises(KeyError, match="nonesuch"):
        catalog.by_name("nonesuch")
