"""The loop's own decisions: how long to wait, what to count, how to end."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest
from prometheus_client import generate_latest

from collector.node.batches import Batcher
from collector.node.collect import RECORDS_MAX, STALLED_SECONDS, NodeCollector, Pace, Reporter, next_turn_s
from collector.node.metrics import Metrics
from collector.node.publish import Publisher
from collector.node.spool import Spool
from schemas import catalog, codec
from tests.node_events import ORIGIN, FakeProducer, SyntheticProbes, events

if TYPE_CHECKING:
    from pathlib import Path


class Rig:
    """A collector without kernel and Kafka; the producer acknowledges when it is polled."""

    def __init__(self, folder: Path, *, ring_bytes: int = 1 << 24, spool_bytes: int = 1 << 24) -> None:
        self.probes, self.producer = SyntheticProbes(ring_bytes), FakeProducer()
        self.spool = Spool(folder, spool_bytes, "boot", 1, 4)
        self.publisher = Publisher(self.producer, self.probes.events, self.spool, 2.0)
        self.metrics = Metrics("tracepoint", "1")
        self.collector = NodeCollector(self.probes, self.publisher, self.spool, self.metrics, Pace(0.1, 10.0))
        self.batcher = Batcher(ORIGIN, 4, 1)
        self.reporter = Reporter(self.producer, ORIGIN, "tracepoint", 2)

    def start(self) -> None:
        """Know ids and topics."""
        self.collector.start_reading(self.batcher, self.reporter)
        self.publisher.is_open = True

    def wait(self, _: float) -> None:
        """Let acknowledgements in."""
        self.producer.answer()

    def reports(self) -> list[dict[str, object]]:
        """Return the reports that were delivered."""
        return [
            codec.decode("CollectorReport", value)
            for topic, _, value in self.producer.delivered
            if topic == catalog.COLLECTOR.name
        ]


def test_ring_is_not_read_before_the_schema_ids_are_known(tmp_path: Path) -> None:
    """Without ids nothing can be encoded: events wait in the ring."""
    rig = Rig(tmp_path)
    rig.probes.feed(events(10))
    rig.collector.turn(0.0)
    assert (rig.collector.received, rig.probes.events.read_position) == (0, 0)
    rig.start()
    rig.collector.turn(0.1)
    assert rig.collector.received == 10


def test_report_accounts_for_every_event(tmp_path: Path) -> None:
    """Attempted = received + lost, and received = published + spooled + what is on its way."""
    rig = Rig(tmp_path, ring_bytes=176 * 50)
    rig.start()
    rig.probes.feed(events(80))
    rig.collector.turn(0.0)
    rig.wait(0)
    rig.collector.turn(20.0)
    rig.wait(0)
    first, second = rig.reports()
    assert (first["attempted"], first["received"], first["lost"]) == (80, 50, {"ring_full": 30})
    assert (second["published"], second["sequence"]) == (50, 1)
    assert second["from_unix_us"] == first["to_unix_us"]
    assert not second["last"]
    assert (first["spooled"], second["spooled"]) == (50, 0)
    for one in (first, second):
        kept = one["published"] + one["spooled"] + one["in_flight"] + one["unreadable"]
        assert one["received"] + one["inherited"] == kept


def test_finish_reads_publishes_and_reports_the_rest(tmp_path: Path) -> None:
    """At the end everything in the ring goes out, and the last report says it is the last."""
    rig = Rig(tmp_path)
    rig.start()
    rig.probes.feed(events(3 * RECORDS_MAX + 5))
    assert rig.collector.finish(time.monotonic() + 60, rig.wait) == 0
    last = rig.reports()[-1]
    assert (last["last"], last["published"]) == (True, 3 * RECORDS_MAX + 5)
    assert rig.probes.events.used_bytes() == 0


def test_finish_without_kafka_spools_everything(tmp_path: Path) -> None:
    """When Kafka does not answer until the deadline the rest is on disk, and nothing is left."""
    rig = Rig(tmp_path)
    rig.start()
    rig.probes.feed(events(100))
    assert rig.collector.finish(time.monotonic(), lambda _: None) == 0
    assert rig.spool.waiting_events == 100
    assert rig.probes.events.used_bytes() == 0


def test_finish_tells_what_is_lost(tmp_path: Path) -> None:
    """Without Kafka, disk and ids the rest is counted as left."""
    rig = Rig(tmp_path, spool_bytes=0)
    rig.start()
    rig.probes.feed(events(100))
    assert rig.collector.finish(time.monotonic(), lambda _: None) == 100
    early = Rig(tmp_path)
    early.probes.feed(events(7))
    assert early.collector.finish(time.monotonic(), early.wait) == 7


@pytest.mark.parametrize(
    ("read", "elapsed_s", "expected_s"),
    [(0, 0.1, 0.1), (100, 0.1, 0.1), (RECORDS_MAX, 0.1, 0.0), (3000, 0.01, 0.02), (3000, 0.1, 0.1)],
)
def test_next_turn_comes_before_the_ring_fills(read: int, elapsed_s: float, expected_s: float) -> None:
    """A quiet ring is read every interval, a fast one before a sixteenth of it has filled."""
    assert next_turn_s(0.1, read, elapsed_s, ring_records=96_000) == pytest.approx(expected_s)


def test_metrics_show_the_counts(tmp_path: Path) -> None:
    """Prometheus sees counts, loss by reason and the tier."""
    rig = Rig(tmp_path, ring_bytes=176 * 50)
    rig.start()
    rig.probes.feed(events(80))
    rig.collector.turn(0.0)
    text = generate_latest(rig.metrics.registry).decode()
    assert "podwire_node_received_events_total 50.0" in text
    assert 'podwire_node_lost_events_total{reason="ring_full"} 30.0' in text
    assert 'podwire_node_build_info{tier="tracepoint",version="1"} 1.0' in text
    assert "podwire_node_spool_waiting_events 50.0" in text


def test_stalled_loop_is_unhealthy(tmp_path: Path) -> None:
    """The health page says so when the loop has not turned for long."""
    rig = Rig(tmp_path)
    rig.collector.turn(time.monotonic())
    assert rig.collector.unhealthy() is None
    rig.collector.turn(time.monotonic() - 2 * STALLED_SECONDS)
    assert "no turn" in str(rig.collector.unhealthy())
