"""From ring to a real Kafka: every event arrives, through outages and restarts, and the report says so."""

from __future__ import annotations

import time
import uuid
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from confluent_kafka import Consumer, TopicPartition

from collector import kafka
from collector.node.batches import Batcher
from collector.node.collect import NodeCollector, Pace, Reporter
from collector.node.metrics import Metrics
from collector.node.publish import Publisher
from collector.node.spool import Spool
from podwire import topics
from podwire.demo.broker import Broker
from schemas import catalog, codec
from tests.node_events import ORIGIN, SyntheticProbes, events

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.conftest import RunningBroker

DEADLINE_S = 60.0


class Rig:
    """A node collector with everything real but the kernel."""

    def __init__(
        self,
        bootstrap: str,
        folder: Path,
        node: str = "",
        *,
        ring_bytes: int = 1 << 24,
        cluster: str = ORIGIN.cluster,
        report_interval_s: float = 3600,
    ) -> None:
        node = node or f"node-{uuid.uuid4().hex[:8]}"  # tests may share a broker that outlives them
        self.origin = replace(ORIGIN, cluster=cluster, node=node, producer_epoch=time.time_ns() // 1000)
        self.probes = SyntheticProbes(ring_bytes)
        self.producer = kafka.producer(bootstrap, node)
        self.spool = Spool(folder / "spool", 1 << 26, "boot", self.origin.producer_epoch, 4)
        self.publisher = Publisher(self.producer, self.probes.events, self.spool, 0.5)
        pace = Pace(flush_interval_s=0.05, report_interval_s=report_interval_s)
        metrics = Metrics("tracepoint", "test")
        self.collector = NodeCollector(self.probes, self.publisher, self.spool, metrics, pace)
        self.collector.start_reading(
            Batcher(self.origin, 4, catalog.RAW.schema_id),
            Reporter(self.producer, self.origin, "tracepoint", catalog.COLLECTOR.schema_id),
        )
        self.publisher.is_open = True

    def turn_until(self, done: Callable[[], bool]) -> None:
        """Turn the loop until the condition holds; fail after a minute."""
        deadline = time.monotonic() + DEADLINE_S
        while not done():
            assert time.monotonic() < deadline, self.collector.counts()
            due = time.monotonic() + self.collector.turn(time.monotonic())
            while (left := due - time.monotonic()) > 0:
                self.publisher.poll(left)

    def feed(self, first: int, count: int) -> None:
        """Feed events with the cookies first, first + 1, ..."""
        self.probes.feed(events(count, socket_cookie=np.arange(first, first + count)))

    def is_settled(self) -> bool:
        """Return whether everything fed was read, acknowledged and released."""
        return self.publisher.idle() and self.probes.events.used_bytes() == 0

    def finish(self) -> int:
        """End in an orderly way; return what is left nowhere."""
        return self.collector.finish(time.monotonic() + 10, self.publisher.poll)


def messages(bootstrap: str, topic: catalog.Topic, partitions: int) -> Iterator[bytes]:
    """Yield all values of a topic from its beginning to its present end."""
    consumer = Consumer({"bootstrap.servers": bootstrap, "group.id": "test", "enable.auto.commit": False})
    places = [TopicPartition(topic.name, partition, 0) for partition in range(partitions)]
    ends = [consumer.get_watermark_offsets(place, timeout=10)[1] for place in places]
    consumer.assign(places)
    for _ in range(sum(ends)):
        message = consumer.poll(10)
        assert message is not None
        assert message.error() is None
        yield message.value()
    consumer.close()


def batches_of(bootstrap: str, node: str) -> list[dict[str, Any]]:
    """Return the node's batches that are in Kafka."""
    values = (value for value in messages(bootstrap, catalog.RAW, 4) if node.encode() in value[:100])
    decoded = (codec.decode("RawBatch", value) for value in values)
    return [batch for batch in decoded if batch["node"] == node]


def cookies(batches: list[dict[str, Any]]) -> list[int]:
    """Return the cookies of all events, sorted."""
    return sorted(event["socket_cookie"] for batch in batches for event in batch["events"])


def assert_sequences_have_no_holes(batches: list[dict[str, Any]]) -> None:
    """Per epoch and partition the numbers are 0, 1, 2, ... without holes, repeats aside."""
    numbers: dict[tuple[int, int], set[int]] = {}
    for batch in batches:
        numbers.setdefault((batch["producer_epoch"], batch["partition"]), set()).add(batch["sequence"])
    for found in numbers.values():
        assert found == set(range(len(found)))


@pytest.fixture
def bootstrap(broker: RunningBroker) -> str:
    """The shared broker with the topics."""
    topics.create(broker.bootstrap, partitions=4)
    return broker.bootstrap


def test_events_arrive_once_and_the_last_report_accounts_for_them(bootstrap: str, tmp_path: Path) -> None:
    """20,000 events come out of Kafka exactly once, in four partitions, and the report's counts add up."""
    rig = Rig(bootstrap, tmp_path)
    for first in range(0, 20_000, 2_000):
        rig.feed(first, 2_000)
        rig.turn_until(lambda: rig.probes.events.read_position == rig.probes.events.produced)
    assert rig.finish() == 0
    found = batches_of(bootstrap, rig.origin.node)
    assert cookies(found) == list(range(20_000))
    assert {batch["partition"] for batch in found} == {0, 1, 2, 3}
    assert_sequences_have_no_holes(found)
    assert rig.probes.events.used_bytes() == 0
    reports = [codec.decode("CollectorReport", value) for value in messages(bootstrap, catalog.COLLECTOR, 1)]
    last = [report for report in reports if report["node"] == rig.origin.node][-1]
    assert last["last"]
    assert last["attempted"] == last["received"] == last["published"] == 20_000
    assert sum(last["batches"].values()) == len(found)
    assert last["spooled"] == 0


def test_key_partition_is_kafkas_partition(bootstrap: str, tmp_path: Path) -> None:
    """A batch lies in the partition that its header and its keys name."""
    rig = Rig(bootstrap, tmp_path)
    rig.feed(0, 500)
    rig.turn_until(rig.is_settled)
    rig.finish()
    consumer = Consumer({"bootstrap.servers": bootstrap, "group.id": "test", "enable.auto.commit": False})
    found = 0
    for partition in range(4):
        place = TopicPartition(catalog.RAW.name, partition, 0)
        end = consumer.get_watermark_offsets(place, timeout=10)[1]
        consumer.assign([place])
        for _ in range(end):
            message = consumer.poll(10)
            assert message is not None
            if rig.origin.node.encode() in message.value()[:100]:
                batch = codec.decode("RawBatch", message.value())
                assert batch["partition"] == partition
                keys = [int.from_bytes(event["tcp_key"], "little") for event in batch["events"]]
                assert {key % 4 for key in keys} <= {partition}
                found += bool(keys)  # the first batch of a process is an empty marker
    consumer.close()
    assert found == 4


@pytest.fixture
def own_broker(tmp_path: Path) -> Iterator[Broker]:
    """A broker that the test may stop and start."""
    own = Broker(tmp_path / "kafka")
    own.start()
    topics.create(own.bootstrap, partitions=4)
    yield own
    own.stop()


def test_outage_longer_than_the_ring_loses_nothing(own_broker: Broker, tmp_path: Path) -> None:
    """While Kafka is down far more events than the ring holds go to the spool; afterwards all are in Kafka."""
    rig = Rig(own_broker.bootstrap, tmp_path, "node-outage", ring_bytes=1 << 18)
    rig.feed(0, 500)
    rig.turn_until(rig.is_settled)
    own_broker.stop()
    for first in range(500, 10_500, 500):
        rig.feed(first, 500)
        rig.turn_until(lambda: rig.probes.events.used_bytes() < rig.probes.events.size_bytes / 2)
    rig.turn_until(lambda: rig.probes.events.used_bytes() == 0)
    assert rig.spool.waiting_events == 10_000
    assert rig.probes.lost == 0
    own_broker.start()
    rig.turn_until(rig.is_settled)
    assert rig.finish() == 0
    found = batches_of(own_broker.bootstrap, "node-outage")
    assert cookies(found) == list(range(10_500))
    assert_sequences_have_no_holes(found)
    assert list((tmp_path / "spool").iterdir()) == []


def test_restart_during_an_outage_replays_the_spool_with_its_old_numbers(
    own_broker: Broker, tmp_path: Path
) -> None:
    """A collector that ends without Kafka leaves files; the next one sends them unchanged, then its own."""
    first = Rig(own_broker.bootstrap, tmp_path, "node-replay")
    first.feed(0, 100)
    first.turn_until(first.is_settled)
    own_broker.stop()
    first.feed(100, 900)
    first.turn_until(lambda: first.probes.events.used_bytes() == 0)
    first.collector.finish(time.monotonic(), first.publisher.poll)
    own_broker.start()
    second = Rig(own_broker.bootstrap, tmp_path, "node-replay")
    assert second.spool.waiting_events == 900
    second.feed(1000, 100)
    second.turn_until(second.is_settled)
    assert second.finish() == 0
    found = batches_of(own_broker.bootstrap, "node-replay")
    assert sorted(set(cookies(found))) == list(range(1100))
    assert {batch["producer_epoch"] for batch in found} == {
        first.origin.producer_epoch,
        second.origin.producer_epoch,
    }
    assert_sequences_have_no_holes(found)
    assert second.publisher.totals.published == 1000
