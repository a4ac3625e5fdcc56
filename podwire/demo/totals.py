"""What a demo run amounted to: counts over the topics it wrote, and whether the Service's flows came out right.

`Totals` and `Verdict` are pure; `read` is the only part that talks to Kafka. Called by `podwire.demo.run` after
the collector has stopped and the enricher has caught up.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from confluent_kafka import Consumer, KafkaException, TopicPartition

from podwire.flows import FlowReader
from schemas import catalog, codec, registry

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from podwire.flows import Flow
    from schemas.catalog import Topic

NOT_A_LOSS = "name_ring_full"  # a cgroup's name is told again with its next event
HELD = ("waiting_halves", "waiting_metadata", "in_flight", "unacknowledged_batches")
ANSWER_SECONDS_MAX = 10.0
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Totals:
    """The demo's last line; flows are counted once per record in their highest revision, repeats in `duplicates`.

    Attributes:
        flows: distinct flow records.
        both_sided: of these, made of both kernels' halves.
        unresolved: of these, with a side UNRESOLVED.
        raw_events: events in the raw topic.
        lost: events that the kernel could not hand over, by the collector's last report.
        duplicates: flow records that repeat the identity of an earlier one; a correction is none.
    """

    flows: int
    both_sided: int
    unresolved: int
    raw_events: int
    lost: int
    duplicates: int

    def as_dict(self) -> dict[str, int]:
        """Return the counts by name."""
        return asdict(self)


def identity(flow: Flow) -> tuple[str, str, str, int, int]:
    """Return what a repeat of this record shares with it."""
    return (
        flow["flow_id"],
        flow["record_type"],
        flow["observed_by"],
        flow["progress_seq"],
        flow["revision"],
    )


def resolved(flow: Flow) -> bool:
    """Return whether both ends are surely known pods."""
    sure = ("SOCKET", "IP_AT_TIME")
    return flow["client_resolution"] in sure and flow["server_resolution"] in sure


class Counter:
    """Takes every flow record of the run, in any order, and says what came out."""

    def __init__(self, service: tuple[str, str]) -> None:
        """Judge the connections to `service`, (namespace, name)."""
        self._service = service
        self._seen: set[tuple[str, str, str, int, int]] = set()
        self._duplicates = 0
        self._highest: dict[tuple[str, str, str, int], tuple[int, bool, bool]] = {}
        self._through: dict[tuple[str, str], tuple[bool, bool]] = {}

    def add(self, flow: Flow) -> None:
        """Count one record."""
        key = identity(flow)
        if key in self._seen:
            self._duplicates += 1
            return
        self._seen.add(key)
        unresolved = "UNRESOLVED" in (flow["client_resolution"], flow["server_resolution"])
        counted = (flow["revision"], flow["observed_by"] == "BOTH", unresolved)
        self._highest[key[:4]] = max(counted, self._highest.get(key[:4], counted))
        if (flow["service_namespace"], flow["service_name"]) != self._service:
            return
        if flow["record_type"] in ("OPEN", "CLOSE"):
            record = (flow["flow_id"], flow["record_type"])
            if flow["observed_by"] == "BOTH" or record not in self._through:
                self._through[record] = (flow["observed_by"] == "BOTH", resolved(flow))

    def totals(self, raw_events: int, lost: int) -> Totals:
        """Return the counts of what was added."""
        both = sum(is_both for _, is_both, _ in self._highest.values())
        unresolved = sum(is_unresolved for *_, is_unresolved in self._highest.values())
        return Totals(len(self._highest), both, unresolved, raw_events, lost, self._duplicates)

    def complaint(self) -> str | None:
        """Return None when the Service's connections came out two-sided and resolved, else one sentence."""
        name = "/".join(self._service)
        of = f"of {len(self._through)} OPEN and CLOSE records of the Service {name}"
        types = {record_type for _, record_type in self._through}
        if types != {"OPEN", "CLOSE"}:
            return f"No connection through the Service {name} was seen from its OPEN to its CLOSE."
        if one_sided := sum(not both for both, _ in self._through.values()):
            return f"{one_sided} {of} came out one-sided."
        if unknown := sum(not known for _, known in self._through.values()):
            return f"{unknown} {of} do not name both pods."
        return None


def _values(bootstrap: str, topic: Topic) -> Iterator[bytes]:
    """Yield every message value that the topic holds now; KafkaException when it can't be read."""
    settings = {"bootstrap.servers": bootstrap, "group.id": "podwire-demo", "enable.auto.commit": False}
    consumer = Consumer({**settings, "log_level": 2})
    try:
        partitions = (
            consumer.list_topics(topic.name, timeout=ANSWER_SECONDS_MAX).topics[topic.name].partitions
        )
        for partition in partitions:
            at = TopicPartition(topic.name, partition, 0)
            first, end = consumer.get_watermark_offsets(at, timeout=ANSWER_SECONDS_MAX)
            at.offset = first
            consumer.assign([at])
            while first < end:
                message = consumer.poll(POLL_SECONDS)
                if message is None:
                    continue
                if message.error() is not None:
                    raise KafkaException(message.error())
                first = message.offset() + 1
                if (value := message.value()) is not None:
                    yield value
    finally:
        consumer.close()


def raw_events(batches: Iterable[dict[str, Any]]) -> int:
    """Return the number of events in these RawBatch records."""
    return sum(len(batch["event_sizes"]) for batch in batches)


def lost(reports: Iterable[dict[str, Any]]) -> int:
    """Return the events lost by the last of these CollectorReport records, whose counts are cumulative."""
    last: dict[str, int] = {}
    for report in reports:
        last = report["lost"]
    return sum(count for reason, count in last.items() if reason != NOT_A_LOSS)


def read(bootstrap: str, service: tuple[str, str]) -> tuple[Totals, str | None]:
    """Read the run's topics to their present ends; return the counts and the complaint, None when all is well."""
    counter = Counter(service)
    reader = FlowReader(bootstrap, registry.CatalogIds())
    try:
        bounds = reader.bounds()
        first = {partition: low for partition, (low, _) in bounds.items()}
        for flow in reader.span(first, {partition: high for partition, (_, high) in bounds.items()}):
            counter.add(flow)
    finally:
        reader.close()
    batches = (codec.decode("RawBatch", value) for value in _values(bootstrap, catalog.RAW))
    reports = (codec.decode("CollectorReport", value) for value in _values(bootstrap, catalog.COLLECTOR))
    return counter.totals(raw_events(batches), lost(reports)), counter.complaint()


def pending(metrics: str) -> float:
    """Return what the enricher still holds, from its /metrics: halves, records and batches on their way."""
    values = dict(line.rsplit(" ", 1) for line in metrics.splitlines() if not line.startswith("#"))
    return sum(float(values.get(f"podwire_enricher_{name}", 0)) for name in HELD)


def enriched(bootstrap: str, group: str, seconds_max: float) -> bool:
    """Return True once the enricher has acknowledged all of the raw topic, False after `seconds_max`."""
    consumer = Consumer({"bootstrap.servers": bootstrap, "group.id": group, "log_level": 2})
    deadline = time.monotonic() + seconds_max
    try:
        found = consumer.list_topics(catalog.RAW.name, timeout=ANSWER_SECONDS_MAX).topics[catalog.RAW.name]
        asked = [TopicPartition(catalog.RAW.name, partition) for partition in found.partitions]
        ends = {
            at.partition: consumer.get_watermark_offsets(at, timeout=ANSWER_SECONDS_MAX)[1] for at in asked
        }
        while True:
            committed = consumer.committed(asked, timeout=ANSWER_SECONDS_MAX)
            if all(max(at.offset, 0) >= ends[at.partition] for at in committed):
                return True
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_SECONDS)  # Kafka tells nobody of another group's commit
    finally:
        consumer.close()
