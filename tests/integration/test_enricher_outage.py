"""The enricher while its broker is away, and before the broker or the topics are there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from podwire import topics
from podwire.demo.broker import JARS, Broker, free_port
from podwire.demo.processes import Command, Process
from tests import halves
from tests.integration.test_enricher_worker import ROOT, Bench, identities
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(not any(JARS.glob("kafka_*.jar")), reason="Kafka's jars are missing: `make kafka`"),
]


@pytest.fixture
def own_broker(tmp_path: Path) -> Iterator[Broker]:
    """A broker that the test may kill; not started yet."""
    one = Broker(tmp_path / "kafka")
    yield one
    one.stop()


@contextmanager
def kept_running(bench: Bench, **settings: str) -> Iterator[Process]:
    """Run an enricher as an orchestrator does, which starts it again when it ends itself."""
    port = free_port()
    environment = bench.settings(PODWIRE_HTTP_PORT=str(port), **settings)
    argv = (sys.executable, "-m", "enricher")
    process = Process(Command("enricher", argv, environment, port, bench.folder / "one.log"))
    process.start()
    try:
        yield process
        assert process.stop() == 0, bench.logs()
    finally:
        process.stop()


def test_killed_broker_costs_no_flow(own_broker: Broker, tmp_path: Path) -> None:
    """A broker killed in mid-stream and started again: every connection is there.

    Faust's consumer now and then stays silent after its broker came back; then the worker notices and ends itself.
    """
    own_broker.start()
    bench = Bench(own_broker.bootstrap, tmp_path)
    bench.publish_pods()
    with kept_running(bench, PODWIRE_STALL_SECONDS="10"):
        for number in range(100):
            bench.send(bench.opened(number, number % 4), number % 4)
        bench.read_until(lambda: len(identities(bench.flows)) >= 50)
        bench.send(bench.opened(3999)[:1])
        assert bench.producer.flush(10) == 0
        own_broker.kill()
        for number in range(100, 200):
            bench.send(bench.opened(number, number % 4), number % 4)
        own_broker.start()
        bench.read_until(lambda: len(identities(bench.flows)) >= 201)
    bench.close()
    both = {flow["flow_id"] for flow in bench.flows if flow["observed_by"] == "BOTH"}
    assert len(both) == 200
    assert bench.of(3999)[0]["observed_by"] == "CLIENT"


def test_enricher_waits_for_broker_and_topics(own_broker: Broker, tmp_path: Path) -> None:
    """Started first, it says once what it waits for and goes on as soon as that appears."""
    environment = {
        **os.environ,
        "PODWIRE_CLUSTER": halves.CLUSTER,
        "PODWIRE_BOOTSTRAP": own_broker.bootstrap,
    }
    log = tmp_path / "waiting.log"
    with log.open("wb") as out:
        process = subprocess.Popen([sys.executable, "-m", "enricher"], cwd=ROOT, env=environment, stderr=out)

    def await_line(text: str) -> None:
        until(lambda: text in log.read_text() or process.poll() is not None, text, said=log.read_text)
        assert process.poll() is None, log.read_text()

    try:
        await_line('"for": "Kafka at')
        own_broker.start()
        await_line('"for": "topic podwire.tcp.raw.v1')
        topics.create(own_broker.bootstrap)
        await_line('"partitions_assigned"')
        process.terminate()
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
    lines = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    waits = [line["for"].split("(")[0] for line in lines if line["event"] == "waiting"]
    assert len(waits) == len(set(waits)), waits
