"""The enricher when something is slow: its output, metadata, another half. What waits is bounded, and waits alone."""

from __future__ import annotations

import urllib.request
from typing import TYPE_CHECKING

import pytest
from confluent_kafka import TopicPartition

from enricher.errors import StalledError
from podwire.demo.broker import free_port
from schemas import catalog
from tests import halves
from tests.integration.test_enricher_worker import PARTITIONS, Bench, identities
from tests.integration.test_node_delivery import Rig
from tests.quotas import slowed
from tests.waiting import until

if TYPE_CHECKING:
    import subprocess

pytestmark = pytest.mark.timeout(240)
IN_FLIGHT_MAX = 100
FLOWS_PER_MESSAGE = 110
BALLAST_PER_MESSAGE = 890
"""Halves that wait for their other half, then repeats of them: bytes of which no flow comes."""
MESSAGES = 800
"""Of 155 kB; Faust holds 256 of them."""
SLOW_BYTES_PER_SECOND = 3000
COVERAGE_IN_FLIGHT_MAX = 10


class Metrics:
    """What a worker says of itself."""

    def __init__(self) -> None:
        self.port = free_port()

    def __getitem__(self, name: str) -> float:
        """Return a metric without labels; -1 before the worker answers or has it."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=5) as answer:
                lines = answer.read().decode().splitlines()
        except OSError:
            return -1
        return next((float(line.split()[1]) for line in lines if line.startswith(f"{name} ")), -1)

    def of(self, name: str) -> float:
        """Return a metric of the enricher's own."""
        return self[f"podwire_enricher_{name}"]


class Committed:
    """How far a test's group has come since now."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._start = {number: self._offset(number) for number in range(PARTITIONS)}

    def _offset(self, partition: int) -> int:
        asked = [TopicPartition(catalog.RAW.name, partition)]
        return int(self._bench.reader.committed(asked, timeout=30)[0].offset)

    def since(self, partition: int) -> int:
        """Return how many messages of a partition were acknowledged."""
        return self._offset(partition) - self._start[partition]


def client_id(bench: Bench, worker: subprocess.Popen[bytes]) -> str:
    """Return the name under which a worker's producer of flows is known to the broker."""
    return f"{bench.group}-{worker.pid}"


def test_input_pauses_while_output_is_slow_and_memory_stays_bounded(bench: Bench) -> None:
    """A backlog many times what may be in flight: it stays in Kafka, and comes out when the output is fast again."""
    metrics = Metrics()
    failed = [halves.failed(bench.key(number, 0)) for number in range(FLOWS_PER_MESSAGE)]
    ballast = [halves.opened(bench.key(number, 0))[0] for number in range(BALLAST_PER_MESSAGE)]
    message = halves.batch(failed + ballast)
    settings = {
        "PODWIRE_HTTP_PORT": str(metrics.port),
        "PODWIRE_IN_FLIGHT_MAX": str(IN_FLIGHT_MAX),
        "PODWIRE_METADATA_WAIT_MS": "0",
        "PODWIRE_CORRECTION_MS": "0",
        "PODWIRE_WINDOW_MS": "600000",
    }
    in_flight, memory = [], []

    def look() -> float:
        in_flight.append(metrics.of("in_flight"))
        memory.append(metrics["process_resident_memory_bytes"])
        return metrics.of("raw_batches_total")

    with bench.enricher(**settings) as worker:
        bench.send_bytes(message)
        until(lambda: look() == 1, "the first message taken", said=bench.logs)
        memory = memory[-1:]
        with slowed(bench.bootstrap, client_id(bench, worker), SLOW_BYTES_PER_SECOND):
            for _ in range(MESSAGES):
                bench.send_bytes(message)
            assert bench.producer.flush(30) == 0
            until(lambda: look() >= MESSAGES // 40, "a fortieth of the backlog taken", said=bench.logs)
            assert look() < MESSAGES // 2
        assert IN_FLIGHT_MAX < max(in_flight) <= IN_FLIGHT_MAX + FLOWS_PER_MESSAGE + COVERAGE_IN_FLIGHT_MAX
        assert max(memory) - memory[0] < len(message) * MESSAGES / 2
        expected = (1 + MESSAGES) * FLOWS_PER_MESSAGE
        until(
            lambda: metrics.of("flows_total") == expected and metrics.of("unacknowledged_batches") == 0,
            "the whole backlog delivered",
            seconds_max=120,
            said=bench.logs,
        )


def test_partition_that_waits_holds_up_no_other(bench: Bench) -> None:
    """One waits for metadata, one for the other half: the third's flows go out, and its place is kept in Kafka."""
    metadata, half, free = 0, 1, 2
    committed = Committed(bench)
    with bench.enricher(PODWIRE_METADATA_WAIT_MS="600000", PODWIRE_WINDOW_MS="60000") as worker:
        bench.send(bench.opened(1, metadata), metadata)
        outside = {"pod_uid": bytes(16)}
        client, server = (event | outside for event in bench.opened(2, half))
        bench.send([client], half)
        for number in range(3, 23):
            bench.send([event | outside for event in bench.opened(number, free)], free)
        bench.read_until(lambda: len(bench.flows) == 20)
        assert {flow["tcp_key"] for flow in bench.flows} == {bench.key(n, free).hex() for n in range(3, 23)}
        until(lambda: committed.since(free) == 20, "the third's offset committed", said=bench.logs)
        assert committed.since(metadata) == 0
        bench.send([server], half)
        bench.read_until(lambda: len(bench.of(2, half)) == 1)
        assert bench.of(1, metadata) == []
        bench.publish_pods()
        bench.read_until(lambda: len(bench.of(1, metadata)) == 1)
        assert worker.poll() is None
    assert (bench.of(1, metadata)[0]["client_pod"], bench.of(2, half)[0]["observed_by"]) == ("pod-1", "BOTH")


STALL = {"PODWIRE_STALL_SECONDS": "5", "PODWIRE_METADATA_WAIT_MS": "200"}


def said(bench: Bench) -> str:
    """Return the last line of a worker's log, which tells why it ended."""
    return bench.logs().splitlines()[-1]


def test_worker_whose_output_is_not_taken_ends_itself(bench: Bench) -> None:
    """Exit code 30 and a sentence that names the partition; its successor does what was left."""
    bench.publish_pods()
    worker = bench.start(**STALL)
    try:
        bench.send(bench.opened(1, 3), 3)
        bench.read_until(lambda: len(bench.of(1, 3)) == 1)
        with slowed(bench.bootstrap, client_id(bench, worker), 1):
            for number in range(2, 12):
                bench.send(bench.opened(number, 3), 3)
                bench.producer.flush(10)
            assert worker.wait(60) == StalledError.exit_code, bench.logs()
    finally:
        worker.kill()
        worker.wait()
    assert '"cause": "StalledError"' in said(bench)
    assert f"Partition 3 of {catalog.RAW.name}" in said(bench)
    with bench.enricher(**STALL):
        bench.read_until(lambda: len(identities(bench.flows)) == 11)


def test_worker_whose_completeness_records_are_not_taken_ends_itself(bench: Bench) -> None:
    """Flows go out all the while, but nobody could prove any more that none is missing."""
    worker = bench.start(**STALL)
    node = Rig(bench.bootstrap, bench.folder / "node", cluster=halves.CLUSTER, report_interval_s=0.3)
    try:
        until(lambda: "completeness_begins" in bench.logs(), "a joiner", said=bench.logs)
        with slowed(bench.bootstrap, f"{bench.group}-completeness-{worker.pid}", 1):
            node.turn_until(lambda: worker.poll() is not None)
    finally:
        node.finish()
        worker.kill()
        worker.wait()
    assert worker.returncode == StalledError.exit_code, bench.logs()
    assert f"Partition 0 of {catalog.COLLECTOR.name}" in said(bench) or catalog.COVERAGE.name in said(bench)
