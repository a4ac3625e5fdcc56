"""One table of every topic: schema, key, partitions, policy and the fixed schema id.

Called by the services for names and ids, and by `podwire topics` to create topics. Never does I/O.
A topic's partition count is fixed for its life: partition = tcp_key modulo count in the raw topic.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

HOUR_MS = 3_600_000
DAY_MS = 24 * HOUR_MS


@dataclass(frozen=True)
class Topic:
    """A topic of Podwire.

    Attributes:
        name: topic name; the suffix is the major version of its schema.
        schema: record name, the stem of a file `schemas/*.avsc`.
        schema_id: id in the Confluent prefix where no registry is configured.
        key: what the message key holds, as UTF-8 text.
        partitions: partition count at creation; None takes the configured count for events.
        policy: Kafka's `cleanup.policy`.
        retention_ms: Kafka's `retention.ms`; unused under compaction.
        log_append_time: True when the broker stamps messages, so that all readers share its clock.
        churning: True when a compacted topic's records soon become tombstones, so that it must be cleaned soon.
    """

    name: str
    schema: str
    schema_id: int
    key: str
    partitions: int | None
    policy: Literal["delete", "compact"]
    retention_ms: int
    log_append_time: bool = False
    churning: bool = False

    def config(self) -> dict[str, str]:
        """Return the topic's configuration in Kafka's own terms."""
        config: dict[str, str] = {"cleanup.policy": self.policy}
        if self.policy == "delete":
            config["retention.ms"] = str(self.retention_ms)
        else:
            config["min.cleanable.dirty.ratio"] = "0.1"
            config["delete.retention.ms"] = str(DAY_MS)
        if self.churning:
            # Readers begin at the start and need what is live: a segment in use is never cleaned, so it is small.
            config["segment.bytes"] = str(16 << 20)
            config["delete.retention.ms"] = str(HOUR_MS)
        if self.log_append_time:
            config["message.timestamp.type"] = "LogAppendTime"
        return config


RAW = Topic("podwire.tcp.raw.v1", "RawBatch", 12, "none", None, "delete", DAY_MS, log_append_time=True)
COLLECTOR = Topic(
    "podwire.collector.v1", "CollectorReport", 13, "node", 1, "delete", 7 * DAY_MS, log_append_time=True
)
PODS = Topic("podwire.k8s.pods.v1", "Pod", 3, "uid", 1, "compact", -1)
SERVICES = Topic("podwire.k8s.services.v1", "Service", 4, "uid", 1, "compact", -1)
NODES = Topic("podwire.k8s.nodes.v1", "Node", 5, "uid", 1, "compact", -1)
WATERMARKS = Topic("podwire.k8s.watermarks.v1", "Watermark", 6, "cluster/kind", 1, "compact", -1)
FLOWS = Topic("podwire.flows.v1", "Flow", 7, "flow_id", None, "delete", 7 * DAY_MS)
DEADLETTER = Topic(
    "podwire.deadletter.v1", "DeadLetter", 8, "topic/partition/offset of the source", 1, "delete", 7 * DAY_MS
)
COVERAGE = Topic("podwire.coverage.v1", "Coverage", 9, "none", 1, "delete", DAY_MS, log_append_time=True)
CORRECTIONS = Topic(
    "podwire.corrections.v1", "Correction", 10, "group/record identity", None, "compact", -1, churning=True
)
COMPLETENESS = Topic(
    "podwire.completeness.v1",
    "Completeness",
    11,
    "cluster/node/boot_id/producer_epoch/report",
    1,
    "delete",
    7 * DAY_MS,
)

TOPICS = (
    RAW,
    COLLECTOR,
    PODS,
    SERVICES,
    NODES,
    WATERMARKS,
    FLOWS,
    DEADLETTER,
    COVERAGE,
    CORRECTIONS,
    COMPLETENESS,
)
EARLIER = {1: (RAW, {"checksum"}), 2: (COLLECTOR, {"inherited", "in_flight"})}
"""Fixed ids of earlier versions, which topics may still hold: of which topic, and the fields that came since."""
METADATA = (PODS, SERVICES, NODES)
PARTITIONS_DEFAULT = 4


def by_name(name: str) -> Topic:
    """Return the topic called `name`; KeyError when Podwire has none of that name."""
    for topic in TOPICS:
        if topic.name == name:
            return topic
    raise KeyError(f"no topic of Podwire is called {name}")
