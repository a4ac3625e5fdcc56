"""Measures the enricher: CPU us per raw event, pure and as a whole worker process against a real broker.

Run as `python -m bench.enricher`; `--small` makes one short run, so that CI sees it work. Prints a table and one
JSON line. CPU time is user plus system of the process, from /proc; the machine is named, since figures from
different machines do not compare.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from confluent_kafka import Consumer, Producer, TopicPartition

from bench.machine import show
from enricher import raw
from enricher.flow import FlowBuilder, Moment
from enricher.history import History
from enricher.networks import Networks
from enricher.pair import PairCounts, Pairing
from enricher.resolve import Resolver
from podwire import topics
from podwire.demo.broker import Broker, free_port
from schemas import catalog, codec
from schemas.registry import CatalogIds
from tests import halves

ROOT = Path(__file__).parents[1]
PODS = 500
PARTITIONS = 4
TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
SECONDS_MAX = 120


def pods() -> list[dict[str, Any]]:
    """Return the pods that own the connections."""
    return [halves.pod_record(n, f"10.0.{n // 250}.{n % 250 + 1}") for n in range(1, PODS + 1)]


def side(number: int, type_: str, role: str, partition: int, now_us: int) -> dict[str, Any]:
    """Return one half of connection `number`, between two of the pods."""
    client = number % PODS + 1
    server = (number * 7 + 3) % PODS + 1
    own = client if role == "CLIENT" else server
    changes = {
        "pod_uid": halves.uid(own).bytes,
        "container_id": halves.container_id(own),
        "local_address": halves.ip(f"10.0.{own // 250}.{own % 250 + 1}"),
        "event_unix_us": now_us + number,
    }
    port = 20_000 + number % 40_000
    changes |= {"port": port} if role == "CLIENT" else {"remote_port": port}
    if role == "SERVER":
        changes["remote_address"] = halves.ip(f"10.0.{client // 250}.{client % 250 + 1}")
    return halves.event(type_, role, halves.key(number, partition, PARTITIONS), **changes)


def batches(size: int, events: int, start: int = 0) -> list[tuple[int, bytes]]:
    """Return (partition, raw message): OPEN and CLOSE halves, clients' and servers' in messages of their own.

    Connections are numbered from `start`: one that was paired within the window would be dropped as a repeat.
    """
    out = []
    now_us = time.time_ns() // 1000
    per_message = size // 2
    for first in range(start, start + events // 4, per_message):
        partition = (first - start) // per_message % PARTITIONS
        numbers = range(first, first + per_message)
        for role, opening in (("CLIENT", "CONNECT"), ("SERVER", "ACCEPT")):
            records = [
                side(n, type_, role, partition, now_us) for n in numbers for type_ in (opening, "CLOSE")
            ]
            out.append((partition, halves.batch(records, partition, first)))
    return out


def pure(size: int, events: int) -> float:
    """Return us of CPU per raw event for cutting, pairing, resolving and splicing, without Kafka."""
    known = History()
    for pod in pods():
        known.put_pod(pod["uid"], pod)
    known.put_service("service-1", halves.service_record())
    known.complete_until("pods", 1 << 60)
    networks = Networks({})
    builder = FlowBuilder(halves.CLUSTER, catalog.FLOWS.schema_id, known, networks, Resolver(known, networks))
    pairing = [Pairing(5000, PairCounts()) for _ in range(PARTITIONS)]
    messages, ids, flows = batches(size, events), CatalogIds(), 0
    began = time.process_time()
    for number, (partition, value) in enumerate(messages):
        moment = Moment.at(1_790_000_000_000 + number, 1_790_000_000_000_000)
        cut = raw.cut(value, partition, ids, catalog.RAW.schema_id)
        assert isinstance(cut, list)
        for pair in pairing[partition].add(number, cut):
            assert builder.build(pair, moment, final=False) is not None
            flows += 1
    spent = time.process_time() - began
    assert flows * 2 == len(messages) * size
    return spent * 1e6 / (flows * 2)


def cpu_seconds(pid: int) -> float:
    """Return user plus system time of a process, all threads."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_SECOND


class Lab:
    """A broker with metadata in it and an enricher process."""

    def __init__(self, folder: Path) -> None:
        self._broker = Broker(folder / "kafka", heap_mbytes=1024)
        self._broker.start()
        topics.create(self._broker.bootstrap, PARTITIONS)
        self.producer = Producer({"bootstrap.servers": self._broker.bootstrap, "linger.ms": 5})
        for pod in pods():
            value = codec.encode("Pod", pod, catalog.PODS.schema_id)
            self.producer.produce(catalog.PODS.name, value, key=pod["uid"])
        value = codec.encode("Service", halves.service_record(), catalog.SERVICES.schema_id)
        self.producer.produce(catalog.SERVICES.name, value, key="service-1")
        assert self.producer.flush(20) == 0
        self._consumer = Consumer({"bootstrap.servers": self._broker.bootstrap, "group.id": "bench"})
        self._connections = 0
        self._port = free_port()
        environment = {
            **os.environ,
            "PODWIRE_CLUSTER": halves.CLUSTER,
            "PODWIRE_BOOTSTRAP": self._broker.bootstrap,
            "PODWIRE_HTTP_PORT": str(self._port),
        }
        self._log = (folder / "enricher.log").open("wb")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "enricher"], cwd=ROOT, env=environment, stderr=self._log
        )
        self.await_(lambda: self.metric("assigned_partitions") == PARTITIONS)

    def metric(self, name: str) -> float:
        """Return a metric of the enricher, -1 when it does not answer or has none."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._port}/metrics", timeout=5) as answer:
                text = answer.read().decode()
        except OSError:
            return -1
        found = [
            line.split()[1] for line in text.splitlines() if line.startswith(f"podwire_enricher_{name} ")
        ]
        return float(found[0]) if found else -1

    def await_(self, condition: Any) -> None:
        """Return once a condition holds; AssertionError after the deadline."""
        deadline = time.monotonic() + SECONDS_MAX
        while not condition():
            assert time.monotonic() < deadline, "the enricher did not get there"
            # What is awaited is a gauge or a topic's size, of which nobody is told; more looks would cost the enricher.
            time.sleep(0.05)

    def flows(self) -> int:
        """Return how many flows the topic holds."""
        ends = [
            self._consumer.get_watermark_offsets(TopicPartition(catalog.FLOWS.name, n), timeout=10)
            for n in range(PARTITIONS)
        ]
        return sum(high - low for low, high in ends)

    def run(self, size: int, events: int) -> tuple[float, float]:
        """Return (CPU us per raw event, raw events per second of wall clock) of one run."""
        messages = batches(size, events, self._connections)
        self._connections += events
        expected = self.flows() + len(messages) * size // 2
        before, began = cpu_seconds(self.process.pid), time.monotonic()
        for partition, value in messages:
            self.producer.produce(catalog.RAW.name, value, partition=partition)
            self.producer.poll(0)
        assert self.producer.flush(60) == 0
        self.await_(lambda: self.flows() >= expected)
        took = time.monotonic() - began
        spent = cpu_seconds(self.process.pid) - before
        return spent * 1e6 / (len(messages) * size), len(messages) * size / took

    def close(self) -> None:
        """Stop everything."""
        self._consumer.close()
        self.process.terminate()
        self.process.wait(30)
        self._log.close()
        self._broker.stop()


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description="measure the enricher")
    parser.add_argument("--runs", type=int, default=5, help="runs per figure; the median counts")
    parser.add_argument("--small", action="store_true", help="one short run of each")
    arguments = parser.parse_args()
    runs = 1 if arguments.small else arguments.runs
    figures: dict[str, list[float]] = {}
    for size in (50, 500):
        figures[f"pure_{size}_us_per_event"] = [
            pure(size, 4_000 if arguments.small else 100_000) for _ in range(runs)
        ]
    with tempfile.TemporaryDirectory(prefix="podwire-bench-") as folder:
        lab = Lab(Path(folder))
        try:
            for size in (50, 500):
                events = 8_000 if arguments.small else size * 400 if size == 50 else 200_000
                lab.run(size, 4_000)  # warm
                results = [lab.run(size, events) for _ in range(runs)]
                figures[f"worker_{size}_cpu_us_per_event"] = [cpu for cpu, _ in results]
                figures[f"worker_{size}_events_per_s_per_core"] = [1e6 / cpu for cpu, _ in results]
                figures[f"worker_{size}_events_per_s_wall"] = [rate for _, rate in results]
        finally:
            lab.close()
    show("enricher", runs, figures)


if __name__ == "__main__":
    main()
