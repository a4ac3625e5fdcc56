"""The books of a run, read from its topics: which halves the collectors sent and which of them came out in flows.

Pure but for `read_raw`. A half is known by its observer's node and boot, its socket's cookie, the record type that it
becomes and its progress number: that survives a repeat under another sequence number. Called by `rounds`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from confluent_kafka import Consumer, KafkaException, TopicPartition

from podwire.demo.totals import NOT_A_LOSS
from schemas import catalog, codec

if TYPE_CHECKING:
    from collections.abc import Iterable

    from podwire.flows import Flow

TYPES = {
    "CONNECT": "OPEN",
    "ACCEPT": "OPEN",
    "CONNECT_FAILED": "FAILED",
    "CLOSE": "CLOSE",
    "EXISTING": "EXISTING",
    "PROGRESS": "PROGRESS",
}
ANSWER_SECONDS_MAX = 30.0


class HalfId(NamedTuple):
    """What stays of a half however often it is sent."""

    node: str
    boot_id: str
    cookie: int
    record_type: str
    progress_seq: int


@dataclass
class Books:
    """Sums over one run; each half counts once.

    Attributes:
        sent: halves in the raw topic, with how often each is there.
        emitted: halves that flows are made of.
        reports: last CollectorReport of each node and producer epoch.
    """

    sent: Counter[HalfId] = field(default_factory=Counter)
    emitted: set[HalfId] = field(default_factory=set)
    reports: dict[tuple[str, int], dict[str, Any]] = field(default_factory=dict)

    @property
    def attempted(self) -> int:
        """Events that the kernel tried to hand over, by the last report of all."""
        return sum(report["attempted"] for report in self._last())

    @property
    def lost(self) -> dict[str, int]:
        """Events that the kernel could not hand over, by reason, by the last report of all."""
        lost: Counter[str] = Counter()
        for report in self._last():
            lost.update(report["lost"])
        return {reason: count for reason, count in lost.items() if count and reason != NOT_A_LOSS}

    def reported_since(self, unix_us: int) -> set[str]:
        """Return the nodes that have reported of an interval that begins after that time on their clocks."""
        return {node for (node, _), report in self.reports.items() if report["from_unix_us"] > unix_us}

    def last_of(self, node: str) -> dict[str, Any]:
        """Return a node's last report."""
        return self.reports[max(known for known in self.reports if known[0] == node)]

    def _last(self) -> list[dict[str, Any]]:
        """Return the last report of each node."""
        assert self.reports, "no collector has reported"
        return [self.last_of(node) for node in sorted({node for node, _ in self.reports})]

    def add_batch(self, batch: dict[str, Any]) -> None:
        """Count the halves of a RawBatch."""
        for event in batch["events"]:
            cookie = event["socket_cookie"] or 0
            half = HalfId(
                batch["node"], batch["boot_id"], cookie, TYPES[event["type"]], event["progress_seq"]
            )
            self.sent[half] += 1

    def add_report(self, report: dict[str, Any]) -> None:
        """Take a CollectorReport; its counts are cumulative."""
        self.reports[report["node"], report["producer_epoch"]] = report

    def add_flows(self, flows: Iterable[Flow]) -> None:
        """Count the halves that flows are made of: two of BOTH, else one."""
        for flow in flows:
            self.emitted.update(halves_of(flow))

    def complaints(self) -> list[str]:
        """Return which sums do not hold, in words; none is good."""
        found = []
        lost = sum(self.lost.values())
        if self.attempted != len(self.sent) + lost:
            found.append(f"attempted {self.attempted} != sent {len(self.sent)} + lost {lost}")
        if missing := len(self.sent.keys() - self.emitted):
            found.append(f"{missing} of {len(self.sent)} halves sent are in no flow")
        if invented := len(self.emitted - self.sent.keys()):
            found.append(f"{invented} halves of flows were never sent")
        return found


def halves_of(flow: Flow) -> list[HalfId]:
    """Return the halves that a flow is made of."""
    return [
        HalfId(
            flow[f"{side}_observer"],
            flow[f"{side}_boot_id"],
            flow[f"{side}_socket_cookie"] or 0,
            flow["record_type"],
            flow["progress_seq"],
        )
        for side in ("client", "server")
        if flow[f"{side}_observer"] is not None
    ]


class TopicReader:
    """Reads a topic's messages, each call what has come since the last one."""

    def __init__(self, bootstrap: str, topic: catalog.Topic) -> None:
        self._bootstrap = bootstrap
        self._topic = topic.name
        self._next: dict[int, int] = {}

    def read(self) -> list[bytes]:
        """Return the values up to the topic's present end; KafkaException when it can't be read."""
        consumer = Consumer(
            {
                "bootstrap.servers": self._bootstrap,
                "group.id": "books",
                "enable.auto.commit": False,
                "log_level": 0,
            }
        )
        try:
            return self._read(consumer)
        finally:
            consumer.close()

    def _read(self, consumer: Consumer) -> list[bytes]:
        listed = consumer.list_topics(self._topic, timeout=ANSWER_SECONDS_MAX)
        found, reached = [], {}
        for partition in listed.topics[self._topic].partitions:
            at = TopicPartition(self._topic, partition)
            first, end = consumer.get_watermark_offsets(at, timeout=ANSWER_SECONDS_MAX)
            at.offset = max(first, self._next.get(partition, 0))
            consumer.assign([at])
            while at.offset < end:
                for message in consumer.consume(500, 0.2):
                    if message.error() is not None:
                        raise KafkaException(message.error())
                    at.offset = message.offset() + 1
                    found.append(message.value())
            reached[partition] = at.offset
        self._next = reached
        return found


def decoded(schema: str, values: Iterable[bytes]) -> Iterable[dict[str, Any]]:
    """Yield the records of those values that can be decoded."""
    for value in values:
        try:
            yield codec.decode(schema, value)
        except (ValueError, EOFError, LookupError):
            continue
