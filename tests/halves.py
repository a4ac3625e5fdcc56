"""Sample halves, batches and metadata records, encoded by fastavro: what the enricher's tests and bench feed it.

Never uses the enricher's own encoding, so that a test compares two independent ways.
"""

from __future__ import annotations

import io
import json
import uuid
import zlib
from typing import Any

import fastavro

from schemas import catalog, codec

NOW_US = 1_790_000_000_000_000
CLUSTER = "testing"
_EVENTS = next(field for field in json.loads(codec.text("RawBatch"))["fields"] if field["name"] == "events")
_EVENT_SCHEMA = fastavro.parse_schema(_EVENTS["type"]["items"])


def ip(address: str) -> bytes:
    """Return an IPv4 address as 16 bytes."""
    return bytes(10) + b"\xff\xff" + bytes(int(part) for part in address.split("."))


def uid(number: int) -> uuid.UUID:
    """Return the UID of sample pod `number`."""
    return uuid.UUID(int=(0xA0 << 120) + number)


def container_id(number: int) -> bytes:
    """Return the container id of sample pod `number`."""
    return number.to_bytes(32, "big")


def key(number: int, partition: int = 0, partitions: int = 4) -> bytes:
    """Return a tcp_key that maps to `partition`."""
    return (number * partitions + partition).to_bytes(8, "little")


def event(type_: str, role: str, tcp_key: bytes, **changes: Any) -> dict[str, Any]:
    """Return a TcpEvent of pod 1 (client) or 2 (server) on 10.0.0.1:40000 -> 10.96.0.10:80 -> 10.0.0.2:8080."""
    client = role == "CLIENT"
    pod = 1 if client else 2
    closing = type_ == "CLOSE"
    record: dict[str, Any] = {
        "tcp_key": tcp_key,
        "type": type_,
        "role": role,
        "outcome": "CLOSED" if closing else "ESTABLISHED",
        "closed_by": ("LOCAL" if client else "REMOTE") if closing else "NONE",
        "owner_source": "PROCESS",
        "event_unix_us": NOW_US + (0 if client else 150),
        "pod_uid": uid(pod).bytes,
        "container_id": container_id(pod),
        "local_address": ip("10.0.0.1" if client else "10.0.0.2"),
        "remote_address": ip("10.96.0.10" if client else "10.0.0.1"),
        "comm": b"shop-web" if client else b"shop-api",
        "progress_seq": 0,
        "remote_port": 80 if client else 40000,
        "errno": 0,
        "handshake_us": 310 if client else None,
        "duration_us": 2_500 if closing else None,
        "port": 40000 if client else 8080,
        "pid": 1000 + pod,
        "uid": 0,
        "netns_ino": 4026532000 + pod,
        "cgroup_id": 7000 + pod,
        "socket_cookie": -5 if client else 99,
        "established_unix_us": NOW_US - 10,
        "bytes_sent": 120 if closing else None,
        "bytes_received": 4096 if closing else None,
        "segments_sent": 6 if closing else None,
        "segments_received": 5 if closing else None,
        "retransmits": 0 if closing else None,
        "rtt_us": 80 if closing else None,
        "rtt_min_us": 40 if closing else None,
    }
    return record | changes


def failed(tcp_key: bytes, **changes: Any) -> dict[str, Any]:
    """Return a CONNECT_FAILED event of pod 1."""
    return event(
        "CONNECT_FAILED",
        "CLIENT",
        tcp_key,
        outcome="REFUSED",
        errno=111,
        handshake_us=None,
        duration_us=90,
        established_unix_us=None,
        **changes,
    )


def opened(tcp_key: bytes) -> list[dict[str, Any]]:
    """Return the CONNECT and the ACCEPT of one connection."""
    return [event("CONNECT", "CLIENT", tcp_key), event("ACCEPT", "SERVER", tcp_key)]


def encoded(record: dict[str, Any]) -> bytes:
    """Return a TcpEvent in Avro binary, by fastavro."""
    out = io.BytesIO()
    fastavro.schemaless_writer(out, _EVENT_SCHEMA, record)
    return out.getvalue()


def batch_record(events: list[dict[str, Any]], partition: int = 0, sequence: int = 0) -> dict[str, Any]:
    """Return a RawBatch of node-1 as a record."""
    return {
        "cluster": CLUSTER,
        "node": "node-1",
        "boot_id": "5f2d0f6e-98f5-4ab6-8b23-7a3f5b8a1c11",
        "producer_epoch": NOW_US - 60_000_000,
        "partition": partition,
        "sequence": sequence,
        "key_id": 1,
        "clock_offset_us": 1_700_000_000_000_000,
        "clock_error_us": 2,
        "event_sizes": [len(encoded(one)) for one in events],
        "events": events,
        "checksum": bytes(codec.CHECKSUM_BYTES),
    }


def batch(events: list[dict[str, Any]], partition: int = 0, sequence: int = 0, **changes: Any) -> bytes:
    """Return a framed RawBatch of node-1."""
    record = batch_record(events, partition, sequence) | changes
    return sealed(codec.encode("RawBatch", record, catalog.RAW.schema_id))


def sealed(value: bytes) -> bytes:
    """Return the framed RawBatch with its checksum put right."""
    body = value[: -codec.CHECKSUM_BYTES]
    return body + zlib.crc32(body).to_bytes(codec.CHECKSUM_BYTES, "little")


def pod_record(number: int, address: str | None = None, **changes: Any) -> dict[str, Any]:
    """Return a Pod record of sample pod `number` on node-1 that owns `address` since long ago."""
    since = NOW_US - 3_600_000_000
    addresses = []
    if address is not None:
        addresses = [
            {
                "address": address,
                "from_earliest_us": since,
                "from_latest_us": since + 1_000_000,
                "to_earliest_us": None,
                "to_latest_us": None,
            }
        ]
    return {
        "cluster": CLUSTER,
        "uid": str(uid(number)),
        "config_hash": None,
        "namespace": "shop",
        "name": f"pod-{number}",
        "node": "node-1",
        "host_network": False,
        "addresses": addresses,
        "workload_kind": "Deployment",
        "workload": f"app-{number}",
        "service_account": "default",
        "labels": {"app": f"app-{number}"},
        "containers": [
            {
                "name": "main",
                "container_id": container_id(number).hex(),
                "image": "registry.example/app:1",
                "kind": "REGULAR",
            }
        ],
        "phase": "Running",
        "valid_from_us": since,
        "valid_to_us": None,
        "observed_unix_us": since,
        "resource_version": "1",
        "former": [],
    } | changes


def service_record(**changes: Any) -> dict[str, Any]:
    """Return the Service shop/api on 10.96.0.10:80, node port 30080."""
    return {
        "cluster": CLUSTER,
        "uid": "service-1",
        "namespace": "shop",
        "name": "api",
        "type": "NodePort",
        "cluster_ips": ["10.96.0.10"],
        "external_ips": [],
        "external_name": None,
        "ports": [{"name": "http", "protocol": "TCP", "port": 80, "target_port": "8080", "node_port": 30080}],
        "selector": {"app": "app-2"},
        "valid_from_us": NOW_US - 3_600_000_000,
        "valid_to_us": None,
        "observed_unix_us": NOW_US,
        "resource_version": "1",
    } | changes


def node_record(**changes: Any) -> dict[str, Any]:
    """Return node-1 with the address 192.168.7.1 and pods in 10.0.0.0/24."""
    return {
        "cluster": CLUSTER,
        "uid": "node-1-uid",
        "name": "node-1",
        "addresses": ["192.168.7.1"],
        "pod_cidrs": ["10.0.0.0/24"],
        "zone": None,
        "valid_from_us": NOW_US - 3_600_000_000,
        "valid_to_us": None,
        "observed_unix_us": NOW_US,
        "resource_version": "1",
    } | changes


def watermark_record(until_us: int, end_offset: int, kind: str = "pods") -> dict[str, Any]:
    """Return a Watermark of a kind."""
    return {
        "cluster": CLUSTER,
        "kind": kind,
        "complete_until_us": until_us,
        "topic": f"podwire.k8s.{kind}.v1",
        "end_offset": end_offset,
        "source": "manifests",
    }
