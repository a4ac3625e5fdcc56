"""From a message's arrival to its acknowledgement: order, waiting for metadata, dead letters, revocation."""

from __future__ import annotations

from typing import Any

import pytest

from enricher import metadata
from enricher.engine import Engine, Limits, RawMessage
from enricher.errors import ProcessingError
from enricher.flow import FlowBuilder
from enricher.history import History
from enricher.metadata import Change
from enricher.networks import Networks
from enricher.output import Output
from enricher.resolve import Resolver
from schemas import catalog, codec
from schemas.registry import CatalogIds
from tests import halves

WINDOW_MS = 5000
NOW_MS = halves.NOW_US // 1000


class FakeProducer:
    """Keeps what it is given; `deliver` reports deliveries in any order, `full` refuses that many times.

    Coverage is kept apart, and delivered at once unless `holds_coverage`.
    """

    def __init__(self) -> None:
        self.coverage: list[dict[str, Any]] = []
        self.holds_coverage = False
        self.held: list[Any] = []
        self.sent: list[tuple[str, bytes, bytes, Any]] = []
        self.timestamps: list[int] = []
        self.full = 0

    def produce(
        self, topic: str, value: bytes, key: bytes, partition: int = -1, *, timestamp: int, on_delivery: Any
    ) -> None:
        """Keep one message."""
        if self.full:
            self.full -= 1
            raise BufferError
        if topic == catalog.COVERAGE.name:
            self.coverage.append(codec.decode("Coverage", value))
            if self.holds_coverage:
                self.held.append(on_delivery)
            else:
                on_delivery(None, None)
            return
        self.sent.append((topic, value, key, on_delivery))
        self.timestamps.append(timestamp)

    def poll(self, timeout: float) -> int:
        """Report nothing by itself."""
        return 0

    def deliver(self, number: int, error: Any = None) -> None:
        """Report message `number` as delivered, or as failed."""
        self.sent[number][3](error, None)

    def flows(self) -> list[dict[str, Any]]:
        """Return the flows sent."""
        return [
            codec.decode("Flow", value) for topic, value, _, _ in self.sent if topic == catalog.FLOWS.name
        ]


class Rig:
    """An engine with pods 1 and 2 known, and what it sent and acknowledged."""

    def __init__(self, *, pods: bool = True, cluster: str = halves.CLUSTER) -> None:
        history = History()
        networks = Networks({})
        builder = FlowBuilder(
            cluster, catalog.FLOWS.schema_id, history, networks, Resolver(history, networks)
        )
        self.producer = FakeProducer()
        self.engine = Engine(
            Limits(WINDOW_MS, 500, 1000, 3), CatalogIds(), history, builder, Output(self.producer)
        )
        self.engine.closing = True  # Coverage is told without delay
        self.partition = self.engine.assign(0, 0)
        self.acked: list[int] = []
        self.offset = 0
        if pods:
            service = Change("services", "service-1", halves.service_record())
            self.engine.tick([pod(1), pod(2), service], NOW_MS)

    def take(self, *events: dict[str, Any], append_ms: int = NOW_MS, value: bytes | None = None) -> None:
        """Take one batch of these events, or any value, as the next message."""
        offset = self.offset
        self.offset += 1
        body = halves.batch(list(events)) if value is None else value
        message = RawMessage(offset, append_ms, None, body)
        self.engine.take(self.partition, message, lambda: self.acked.append(offset), NOW_MS)

    def tick(self, *changes: Change, later_ms: int = 0) -> None:
        """Let the engine take changes and acknowledge."""
        self.engine.tick(list(changes), NOW_MS + later_ms)


def pod(number: int) -> Change:
    """Return the change that publishes pod `number`."""
    record = halves.pod_record(number)
    return Change("pods", record["uid"], record)


def test_message_is_acknowledged_after_its_last_output_is_delivered() -> None:
    """A message with two outputs stays unacknowledged until both were delivered."""
    rig = Rig()
    rig.take(*halves.opened(halves.key(1)), *halves.opened(halves.key(2)))
    rig.tick()
    rig.producer.deliver(1)
    rig.tick()
    assert rig.acked == []
    rig.producer.deliver(0)
    rig.tick()
    assert rig.acked == [0]
    assert rig.engine.output.in_flight == 0


def test_acknowledgement_is_from_the_head_only() -> None:
    """A later message that was delivered first waits for the earlier one."""
    rig = Rig()
    rig.take(*halves.opened(halves.key(1)))
    rig.take(*halves.opened(halves.key(2)))
    rig.producer.deliver(1)
    rig.tick()
    assert (rig.acked, rig.partition.position, rig.partition.head) == ([], 2, 0)
    rig.producer.deliver(0)
    rig.tick()
    assert (rig.acked, rig.partition.head) == ([0, 1], 2)


def test_half_that_waits_does_not_hold_its_message_back() -> None:
    """A message without outputs is acknowledged: after a crash its halves are read again from the topic."""
    rig = Rig()
    rig.take(halves.opened(halves.key(1))[0])
    rig.tick()
    assert rig.acked == [0]


def test_warm_up_rebuilds_waiting_halves_silently() -> None:
    """After a restart the second half meets the first one, which came before the committed offset."""
    rig = Rig()
    client, server = halves.opened(halves.key(1))
    done = halves.batch(halves.opened(halves.key(2)))
    rig.engine.warm(
        rig.partition, [(NOW_MS - 10, halves.batch([client])), (NOW_MS - 9, done), (NOW_MS, b"x")]
    )
    assert rig.producer.sent == []
    rig.take(server, *halves.opened(halves.key(2)))
    (flow,) = rig.producer.flows()
    assert (flow["observed_by"], flow["tcp_key"]) == ("BOTH", halves.key(1).hex())
    assert rig.engine.counts.pairs.repeats_paired == 2


def test_halves_on_either_side_of_a_rebalance_pair_once() -> None:
    """The first half went to a worker that lost the partition since; it tells nothing, its successor the pair."""
    client, server = halves.opened(halves.key(1))
    before, after = Rig(), Rig()
    before.take(client)
    before.tick()
    assert before.acked == [0]
    before.engine.revoke(0)
    after.engine.warm(after.partition, [(NOW_MS, halves.batch([client]))])
    after.take(client, append_ms=NOW_MS + 1)
    after.take(server, append_ms=NOW_MS + 4000)
    after.take(server, client, append_ms=NOW_MS + 4001)
    after.engine.tell_idle(after.partition, NOW_MS + 10 * WINDOW_MS)
    assert before.producer.flows() == []
    (flow,) = after.producer.flows()
    assert (flow["observed_by"], flow["client_pod"], flow["server_pod"]) == ("BOTH", "pod-1", "pod-2")


def test_another_clusters_batch_is_left_to_its_enricher() -> None:
    """Clusters may share the raw topic: the other's halves neither go out nor wait, here or after a restart."""
    rig = Rig()
    theirs = halves.batch([halves.failed(halves.key(1)), halves.opened(halves.key(2))[0]], cluster="other")
    rig.engine.warm(rig.partition, [(NOW_MS, theirs)])
    rig.take(value=theirs)
    rig.tick()
    assert (rig.producer.sent, rig.acked, rig.partition.pairing.waiting) == ([], [0], 0)
    assert rig.engine.counts.foreign_batches == 1


def test_another_clusters_broken_batch_is_left_to_its_enricher_too() -> None:
    """As long as the header says whose it is, one enricher sets it aside and tells so: that of its cluster."""
    ours, theirs = Rig(), Rig(cluster="other")
    for rig in (ours, theirs):
        rig.take(value=halves.batch(halves.opened(halves.key(1)), partition=3, cluster="other"))
        for number in range(len(rig.producer.sent)):
            rig.producer.deliver(number)
        rig.tick()
    assert (ours.producer.sent, ours.producer.coverage, ours.acked) == ([], [], [0])
    assert (ours.engine.counts.foreign_batches, ours.engine.counts.dead_letters) == (1, {})
    assert [topic for topic, *_ in theirs.producer.sent] == [catalog.DEADLETTER.name]
    assert [one["reason"] for record in theirs.producer.coverage for one in record["dead"]] == [
        "WRONG_PARTITION"
    ]
    assert (theirs.engine.counts.dead_letters, theirs.acked) == ({"WRONG_PARTITION": 1}, [0])


def test_batch_whose_clusters_name_is_damaged_is_set_aside() -> None:
    """A damaged batch that seems to be another cluster's is not left to an enricher that does not exist."""
    rig = Rig()
    ours = halves.batch([halves.failed(halves.key(1))])
    rig.take(value=ours.replace(b"testing", b"tesuing"))
    rig.tick()
    assert rig.engine.counts.dead_letters == {"CHECKSUM_MISMATCH": 1}
    assert rig.engine.counts.foreign_batches == 0


def test_idle_halves_hold_later_messages_until_delivered() -> None:
    """What a quiet partition told one-sided counts before messages that come after it."""
    rig = Rig()
    rig.take(halves.opened(halves.key(1))[0])
    rig.tick()
    assert not rig.engine.has_idle_halves(rig.partition, NOW_MS + WINDOW_MS + 500)
    late_ms = NOW_MS + WINDOW_MS + 501
    assert rig.engine.has_idle_halves(rig.partition, late_ms)
    rig.engine.tell_idle(rig.partition, late_ms)
    assert not rig.engine.has_idle_halves(rig.partition, late_ms)
    rig.take(*halves.opened(halves.key(2)), append_ms=late_ms)
    rig.producer.deliver(1)
    rig.tick()
    assert rig.acked == [0]
    rig.producer.deliver(0)
    rig.tick()
    assert rig.acked == [0, 1]
    assert [flow["observed_by"] for flow in rig.producer.flows()] == ["CLIENT", "BOTH"]


def test_record_waits_for_its_pod_and_goes_out_when_it_comes() -> None:
    """A record of an unknown pod is held, blocks its message only, and is sent once the pod is known."""
    rig = Rig(pods=False)
    rig.take(*halves.opened(halves.key(1)))
    rig.tick(later_ms=500)
    assert (rig.producer.sent, rig.acked, rig.engine.waiting_metadata) == ([], [], 1)
    rig.tick(pod(1), pod(2), later_ms=700)
    (flow,) = rig.producer.flows()
    assert (flow["client_pod"], flow["server_pod"]) == ("pod-1", "pod-2")
    rig.producer.deliver(0)
    rig.tick(later_ms=800)
    assert rig.acked == [0]
    assert rig.engine.counts.metadata_waits == {"resolved": 1}


def test_record_goes_out_unresolved_at_its_deadline() -> None:
    """After the bounded wait the record says which side it could not name, and that is counted."""
    rig = Rig(pods=False)
    rig.take(*halves.opened(halves.key(1)))
    rig.tick(pod(1), later_ms=500)
    assert rig.producer.sent == []
    rig.tick(later_ms=1000)
    (flow,) = rig.producer.flows()
    assert (flow["client_resolution"], flow["server_resolution"]) == ("SOCKET", "UNRESOLVED")
    assert rig.engine.counts.metadata_waits == {"timed_out": 1}


def test_watermark_releases_address_lookups() -> None:
    """A side known by address alone waits until the pods topic is complete up to the event."""
    rig = Rig()
    rig.take(halves.failed(halves.key(1), remote_address=halves.ip("10.0.0.200")))
    rig.tick(later_ms=500)
    assert rig.producer.sent == []
    rig.tick(Change("pods", "", None, halves.NOW_US + 1), later_ms=600)
    (flow,) = rig.producer.flows()
    assert flow["server_resolution"] == "EXTERNAL"
    assert (flow["record_type"], flow["outcome"], flow["errno"]) == ("FAILED", "REFUSED", 111)


def test_unreadable_message_becomes_a_dead_letter_and_is_acknowledged_after_it() -> None:
    """The bytes are kept with the reason, and the message counts as done once that was delivered."""
    rig = Rig()
    rig.take(value=b"\x07poison")
    rig.take(*halves.opened(halves.key(1)))
    topic, value, key, _ = rig.producer.sent[0]
    record = codec.decode("DeadLetter", value)
    assert (topic, key) == (catalog.DEADLETTER.name, b"podwire.tcp.raw.v1/0/0")
    assert (record["reason"], record["value"], record["schema_id"]) == ("NOT_AVRO_FRAMED", b"\x07poison", -1)
    rig.producer.deliver(1)
    rig.tick()
    assert rig.acked == []
    rig.producer.deliver(0)
    rig.tick()
    assert rig.acked == [0, 1]
    assert rig.engine.counts.dead_letters == {"NOT_AVRO_FRAMED": 1}


def test_revoked_partition_sends_and_acknowledges_nothing_more() -> None:
    """After a revocation neither late deliveries nor late metadata acknowledge or send anything."""
    rig = Rig()
    rig.take(*halves.opened(halves.key(1)))
    unknown = [event | {"pod_uid": halves.uid(77).bytes} for event in halves.opened(halves.key(2))]
    rig.take(*unknown)
    rig.engine.revoke(0)
    assert rig.partition.dropped
    rig.producer.deliver(0)
    rig.tick(pod(77), later_ms=5000)
    assert rig.acked == []
    assert len(rig.producer.sent) == 1


def test_full_producer_queue_is_waited_for() -> None:
    """A record that the producer has no room for is offered again, not lost."""
    rig = Rig()
    rig.producer.full = 3
    rig.take(*halves.opened(halves.key(1)))
    assert len(rig.producer.flows()) == 1
    assert rig.producer.full == 0


def test_failed_delivery_is_fatal() -> None:
    """A record that Kafka refuses for good ends the process; its message is not acknowledged."""
    rig = Rig()
    rig.take(*halves.opened(halves.key(1)))
    with pytest.raises(ProcessingError):
        rig.producer.deliver(0, error="message too large")
    assert rig.acked == []


def test_too_many_waiting_records_push_the_oldest_out() -> None:
    """The queue for metadata is bounded: the oldest goes out unresolved when a fourth would wait."""
    rig = Rig(pods=False)
    rig.take(*(event for number in range(4) for event in halves.opened(halves.key(number))))
    (flow,) = rig.producer.flows()
    assert (flow["tcp_key"], flow["client_reason"]) == (halves.key(0).hex(), "UNKNOWN_POD_UID")
    assert rig.engine.waiting_metadata == 3


def test_event_from_the_future_gets_a_timestamp_that_kafka_accepts() -> None:
    """A node whose clock runs ahead must not make the broker refuse its flows; the record keeps its claim."""
    rig = Rig()
    ahead_us = halves.NOW_US + 86_400_000_000
    rig.take(*(event | {"event_unix_us": ahead_us} for event in halves.opened(halves.key(1))))
    assert rig.producer.timestamps == [NOW_MS]
    assert rig.producer.flows()[0]["event_unix_us"] == ahead_us


def test_huge_poison_is_cut_to_what_kafka_accepts() -> None:
    """A dead letter that the broker would refuse for its size carries the beginning, and says so."""
    rig = Rig()
    rig.take(value=b"\x07" * 1_040_000)
    record = codec.decode("DeadLetter", rig.producer.sent[0][1])
    assert len(record["value"]) == 900_000
    assert "1040000 bytes" in record["detail"]


class FakeMessage:
    """A consumed metadata message."""

    def __init__(self, topic: str, offset: int, key: bytes, value: bytes | None) -> None:
        self._fields = (topic, offset, key, value)

    def topic(self) -> str:
        """Return the topic."""
        return self._fields[0]

    def offset(self) -> int:
        """Return the offset."""
        return self._fields[1]

    def timestamp(self) -> tuple[int, int]:
        """Return no time."""
        return (0, 0)

    def key(self) -> bytes:
        """Return the key."""
        return self._fields[2]

    def value(self) -> bytes | None:
        """Return the value."""
        return self._fields[3]

    def error(self) -> None:
        """Return that all is well."""


def pod_message(offset: int, value: bytes | None = None, **changes: Any) -> FakeMessage:
    """Return pod 1 at an offset, or any value in its place."""
    record = halves.pod_record(1, **changes)
    body = codec.encode("Pod", record, catalog.PODS.schema_id) if value is None else value
    return FakeMessage(catalog.PODS.name, offset, record["uid"].encode(), body)


def watermark_message(end_offset: int, **changes: Any) -> FakeMessage:
    """Return a pods watermark."""
    record = halves.watermark_record(halves.NOW_US, end_offset) | changes
    value = codec.encode("Watermark", record, catalog.WATERMARKS.schema_id)
    return FakeMessage(catalog.WATERMARKS.name, 0, b"c/pods", value)


def test_watermark_holds_only_once_the_pods_topic_was_read_that_far() -> None:
    """A watermark that overtakes the records it speaks of is kept until they came."""
    unpacker = metadata.Unpacker(CatalogIds(), halves.CLUSTER)
    assert list(unpacker.unpack([watermark_message(2), pod_message(0)])) == [
        Change("pods", str(halves.uid(1)), halves.pod_record(1))
    ]
    assert list(unpacker.unpack([pod_message(1)]))[-1] == Change("pods", "", None, halves.NOW_US)


def test_another_clusters_metadata_is_left_out() -> None:
    """Clusters that share the topics have the same addresses: neither its pods nor its watermarks are ours."""
    unpacker = metadata.Unpacker(CatalogIds(), halves.CLUSTER)
    theirs = [pod_message(0, cluster="other"), watermark_message(1, cluster="other")]
    assert list(unpacker.unpack(theirs)) == []
    found = list(unpacker.unpack([pod_message(1), watermark_message(2)]))
    assert found[-1] == Change("pods", "", None, halves.NOW_US)
    assert (len(found), unpacker.undecodable) == (2, 0)


def test_tombstone_and_unreadable_metadata_are_told_apart() -> None:
    """A null value removes; a value that can't be read is counted and removes nothing."""
    unpacker = metadata.Unpacker(CatalogIds(), halves.CLUSTER)
    tombstone = FakeMessage(catalog.PODS.name, 0, b"some-uid", None)
    changes = list(
        unpacker.unpack([tombstone, pod_message(1, b"junk"), pod_message(2, b"\x00\x00\x00\x00\x03\x02")])
    )
    assert changes == [Change("pods", "some-uid", None)]
    assert unpacker.undecodable == 2
