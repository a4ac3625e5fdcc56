"""The books of a run, read from its topics: three sums that say where every half is.

Pure but for `TopicReader`. The sums, over the whole life of a world, each half once however often it was sent:
- attempted = received + lost: by the nodes' last reports. Received is what the kernel's rings have taken.
- received = published + spooled + rejected: published is what the raw topic holds, the others are collectors' words.
  Rejected are events of spool files that could not be read back. A batch that Kafka refuses is not rejected: the
  collector ends, and its successor sends it.
- published = emitted + dead-lettered + pending: emitted is what flows are made of (BOTH is two), dead-lettered what
  batches in the dead-letter topic held, pending what the workers say they hold; it is judged when that is nothing.

Each report must balance too, whatever is going on: received + inherited = published + spooled + in_flight + unreadable.
A half is known by its observer's node and boot, its socket's cookie, the record type that it becomes and its progress
number: that survives a repeat under another sequence number. Called by `rounds`.
"""

from __future__ import annotations

import io
import json
import zlib
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import fastavro
from confluent_kafka import Consumer, KafkaException, TopicPartition

from podwire.demo.totals import NOT_A_LOSS
from schemas import codec

if TYPE_CHECKING:
    from collections.abc import Iterable

    from podwire.flows import Flow
    from schemas import catalog

TYPES = {
    "CONNECT": "OPEN",
    "ACCEPT": "OPEN",
    "CONNECT_FAILED": "FAILED",
    "CLOSE": "CLOSE",
    "EXISTING": "EXISTING",
    "PROGRESS": "PROGRESS",
}
ANSWER_SECONDS_MAX = 30.0
NOT_OURS = b"not a collector's"
"""Key of messages that a fault put into the raw topic; a collector's have none."""
Place = tuple[int, int]
"""Partition and offset in the raw topic."""


class Message(NamedTuple):
    """A message as it is in a topic."""

    place: Place
    key: bytes | None
    value: bytes


class HalfId(NamedTuple):
    """What stays of a half however often it is sent."""

    node: str
    boot_id: str
    cookie: int
    record_type: str
    progress_seq: int


class Sum(NamedTuple):
    """What is said to be the sum of its parts."""

    name: str
    total: int
    parts: dict[str, int]

    @property
    def holds(self) -> bool:
        """Return whether it is."""
        return self.total == sum(self.parts.values())

    def __str__(self) -> str:
        """Return it in words and figures."""
        sign = "=" if self.holds else "!="
        return f"{self.name} {self.total} {sign} " + " + ".join(
            f"{n} {count}" for n, count in self.parts.items()
        )


@dataclass
class Books:
    """Sums over one world; each half counts once.

    Attributes:
        pinned: whether probes outlive their collector; where not, the kernel's totals end with it, uncounted.
        sent: halves of whole batches in the raw topic, with how often each is there.
        broken: batches of collectors in the raw topic whose checksum is wrong, with the number of their events.
        foreign: places of messages that no collector sent.
        dead: places of the messages in the dead-letter topic.
        emitted: halves that flows are made of.
        pending: what the workers hold, by their metrics.
        reports: last CollectorReport of each node and producer epoch.
    """

    pinned: bool = True
    sent: Counter[HalfId] = field(default_factory=Counter)
    broken: dict[Place, int] = field(default_factory=dict)
    foreign: set[Place] = field(default_factory=set)
    dead: set[Place] = field(default_factory=set)
    emitted: set[HalfId] = field(default_factory=set)
    pending: int = 0
    reports: dict[tuple[str, int], dict[str, Any]] = field(default_factory=dict)
    _unbalanced: list[str] = field(default_factory=list)

    @property
    def lost(self) -> dict[str, int]:
        """Events that the kernel could not hand over, by reason, by the last report of all."""
        lost: Counter[str] = Counter()
        for report in self._last():
            lost.update(report["lost"])
        return {reason: count for reason, count in lost.items() if count and reason != NOT_A_LOSS}

    @property
    def dead_lettered(self) -> int:
        """Halves of collectors' batches that were set aside."""
        return sum(count for place, count in self.broken.items() if place in self.dead)

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

    def add_raw(self, message: Message) -> None:
        """Count the halves of a message of the raw topic."""
        value = message.value
        if message.key == NOT_OURS:
            self.foreign.add(message.place)
        elif zlib.crc32(value[:-4]).to_bytes(4, "little") != value[-4:]:
            head = fastavro.schemaless_reader(io.BytesIO(value[codec.PREFIX_BYTES :]), _head(), None)
            assert isinstance(head, dict)
            self.broken[message.place] = len(head["event_sizes"])
        else:
            batch = codec.decode("RawBatch", value)
            for event in batch["events"]:
                cookie = event["socket_cookie"] or 0
                kind = TYPES[event["type"]]
                half = HalfId(batch["node"], batch["boot_id"], cookie, kind, event["progress_seq"])
                self.sent[half] += 1

    def add_dead_letter(self, record: dict[str, Any]) -> None:
        """Take a DeadLetter; a repeat says the same place."""
        self.dead.add((record["partition"], record["offset"]))

    def add_report(self, report: dict[str, Any]) -> None:
        """Take a CollectorReport; its counts are cumulative."""
        self.reports[report["node"], report["producer_epoch"]] = report
        names = ("published", "spooled", "in_flight", "unreadable")
        balance = Sum(
            f"report {report['sequence']} of {report['node']}: received and inherited",
            report["received"] + report["inherited"],
            {name: report[name] for name in names},
        )
        if not balance.holds:
            self._unbalanced.append(str(balance))

    def add_flows(self, flows: Iterable[Flow]) -> None:
        """Count the halves that flows are made of: two of BOTH, else one."""
        for flow in flows:
            self.emitted.update(halves_of(flow))

    def sums(self) -> list[Sum]:
        """Return the sums that must hold."""
        last = self._last()
        lost = sum(self.lost.values())
        attempted = sum(report["attempted"] for report in last)
        received = attempted - lost - sum(report["unaccounted"] for report in last)
        published = len(self.sent) + sum(self.broken.values())
        spooled = sum(report["spooled"] for report in last)
        rejected = sum(report["unreadable"] for report in self.reports.values())
        kernel = [
            Sum("attempted", attempted, {"received": received, "lost": lost}),
            Sum("received", received, {"published": published, "spooled": spooled, "rejected": rejected}),
        ]
        where = {"emitted": len(self.emitted), "dead-lettered": self.dead_lettered, "pending": self.pending}
        return [*(kernel if self.pinned else ()), Sum("published", published, where)]

    def complaints(self) -> list[str]:
        """Return what does not hold, in words; none is good."""
        found = self._unbalanced[:1] + [str(one) for one in self.sums() if not one.holds]
        if self.pending:
            found.append(f"the workers still hold {self.pending} halves, records or messages")
        if missing := len(self.sent.keys() - self.emitted):
            found.append(f"{missing} of {len(self.sent)} halves sent are in no flow")
        if invented := len(self.emitted - self.sent.keys()):
            found.append(f"{invented} halves of flows were never sent")
        if wrong := self.dead ^ (self.foreign | self.broken.keys()):
            found.append(f"{len(wrong)} messages are dead letters though whole, or broken and not set aside")
        return found + self._acknowledged()

    def _acknowledged(self) -> list[str]:
        """Return whether the reports' published and the events in the raw topic, repeats included, disagree.

        Of a process that was killed the last acknowledgements are in no report.
        """
        said = sum(report["published"] for report in self.reports.values())
        there = self.sent.total() + sum(self.broken.values())
        last_of_node = {id(report) for report in self._last()}
        killed = any(not one["last"] and id(one) not in last_of_node for one in self.reports.values())
        agree = said <= there if killed else said == there
        return (
            [] if agree else [f"reports say that {said} events were published, {there} are in the raw topic"]
        )


@cache
def _head() -> Any:
    """Return the schema of a RawBatch up to its events."""
    schema = json.loads(codec.text("RawBatch"))
    names = [one["name"] for one in schema["fields"]]
    schema["fields"] = schema["fields"][: names.index("events")]
    return fastavro.parse_schema(schema)


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

    def read(self) -> list[Message]:
        """Return the messages up to the topic's present end; KafkaException when it can't be read."""
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

    def _read(self, consumer: Consumer) -> list[Message]:
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
                    place = (partition, message.offset())
                    found.append(Message(place, message.key(), message.value() or b""))
            reached[partition] = at.offset
        self._next = reached
        return found
