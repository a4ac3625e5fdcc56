"""The enricher as a process, against a real broker: pairs, windows, poison, sharing, crashes, late metadata."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from confluent_kafka import Consumer, KafkaException, Producer, TopicPartition

from podwire import topics
from schemas import catalog, codec
from tests import halves
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


ROOT = Path(__file__).parents[2]
PARTITIONS = 4
DEADLINE_SECONDS = 60
WINDOW_MS = 2000
pytestmark = pytest.mark.timeout(240)


class Bench:
    """Topics of one broker as a test sees them: from now on, and with keys, pods and a group of its own."""

    def __init__(self, bootstrap: str, folder: Path) -> None:
        topics.create(bootstrap, partitions=PARTITIONS)
        self.bootstrap = bootstrap
        self.folder = folder
        self.group = f"test-{uuid.uuid4()}"
        self.base = uuid.uuid4().int >> 72
        self.pods = (self.base << 8) % 2**100
        self.producer = Producer({"bootstrap.servers": bootstrap, "linger.ms": 0})
        self.reader = Consumer(
            {"bootstrap.servers": bootstrap, "group.id": self.group, "enable.auto.commit": False}
        )
        raw = [TopicPartition(catalog.RAW.name, n, self._end(catalog.RAW.name, n)) for n in range(PARTITIONS)]
        self.reader.commit(offsets=raw, asynchronous=False)
        flows = [
            TopicPartition(catalog.FLOWS.name, n, self._end(catalog.FLOWS.name, n)) for n in range(PARTITIONS)
        ]
        dead = catalog.DEADLETTER.name
        self.reader.assign([*flows, TopicPartition(dead, 0, self._end(dead, 0))])
        self.flows: list[dict[str, Any]] = []
        self.dead: list[dict[str, Any]] = []

    def _end(self, topic: str, partition: int) -> int:
        """Return the end offset, once the partition of a topic made just now has its leader."""
        deadline = time.monotonic() + DEADLINE_SECONDS
        while True:
            try:
                return int(self.reader.get_watermark_offsets(TopicPartition(topic, partition), timeout=10)[1])
            except KafkaException:
                if time.monotonic() > deadline:
                    raise

    def key(self, number: int, partition: int) -> bytes:
        """Return a tcp_key of this test's own."""
        return halves.key((self.base + number) % 2**60, partition, PARTITIONS)

    def opened(self, number: int, partition: int = 0) -> list[dict[str, Any]]:
        """Return CONNECT and ACCEPT, now, of this test's pods 1 and 2."""
        now_us = time.time_ns() // 1000
        out = []
        for event in halves.opened(self.key(number, partition)):
            pod = self.pods + (1 if event["role"] == "CLIENT" else 2)
            out.append(
                event
                | {
                    "event_unix_us": now_us,
                    "pod_uid": halves.uid(pod).bytes,
                    "container_id": halves.container_id(pod),
                }
            )
        return out

    def send(self, events: list[dict[str, Any]], partition: int = 0) -> None:
        """Append one batch to the raw topic."""
        self.send_bytes(halves.batch(events, partition), partition)

    def send_bytes(self, value: bytes, partition: int = 0) -> None:
        """Append any bytes to the raw topic."""
        self.producer.produce(catalog.RAW.name, value, partition=partition)
        self.producer.poll(0)

    def publish_pods(self) -> None:
        """Publish this test's pods 1 and 2."""
        for number in (1, 2):
            record = halves.pod_record(self.pods + number, name=f"pod-{number}")
            value = codec.encode("Pod", record, catalog.PODS.schema_id)
            self.producer.produce(catalog.PODS.name, value, key=record["uid"])
        assert self.producer.flush(10) == 0

    def read_until(self, done: Callable[[], bool]) -> None:
        """Collect this test's flows and all dead letters until `done`; fails after the deadline."""
        keys = {self.key(n, p).hex() for n in range(4000) for p in range(PARTITIONS)}
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not done():
            assert time.monotonic() < deadline, (
                f"{len(self.flows)} flows, {len(identities(self.flows))} distinct, {len(self.dead)} dead\n{self.logs()}"
            )
            for message in self.reader.consume(500, 0.2):
                if message.error() is not None:
                    continue
                if message.topic() == catalog.DEADLETTER.name:
                    self.dead.append(codec.decode("DeadLetter", message.value()))
                    continue
                flow = codec.decode("Flow", message.value())
                assert message.key().decode() == flow["flow_id"]
                if flow["tcp_key"] in keys:
                    self.flows.append(flow)

    def of(self, number: int, partition: int = 0) -> list[dict[str, Any]]:
        """Return the flows of one connection."""
        return [flow for flow in self.flows if flow["tcp_key"] == self.key(number, partition).hex()]

    def settings(self, **more: str) -> dict[str, str]:
        """Return an enricher's environment variables."""
        return {
            "PODWIRE_CLUSTER": halves.CLUSTER,
            "PODWIRE_BOOTSTRAP": self.bootstrap,
            "PODWIRE_GROUP": self.group,
            "PODWIRE_WINDOW_MS": str(WINDOW_MS),
            "PODWIRE_SESSION_TIMEOUT_MS": "6000",
            **more,
        }

    def start(self, name: str = "one", **settings: str) -> subprocess.Popen[bytes]:
        """Start an enricher process, in a folder of its own."""
        environment = os.environ | {"PYTHONPATH": str(ROOT)} | self.settings(**settings)
        folder = self.folder / f"{name}.cwd"
        folder.mkdir(exist_ok=True)
        with (self.folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "enricher"], cwd=folder, env=environment, stderr=log
            )

    @contextmanager
    def enricher(self, name: str = "one", **settings: str) -> Iterator[subprocess.Popen[bytes]]:
        """Run an enricher; it must end in an orderly way afterwards."""
        process = self.start(name, **settings)
        try:
            yield process
            process.terminate()
            assert process.wait(30) == 0, self.logs()
        finally:
            process.kill()
            process.wait()

    def logs(self) -> str:
        """Return what the processes logged."""
        return "\n".join(path.read_text()[-3000:] for path in sorted(self.folder.glob("*.log")))

    def close(self) -> None:
        """Give the connections back."""
        self.producer.flush(10)
        self.reader.close()


def test_halves_in_two_messages_become_one_named_flow(bench: Bench) -> None:
    """A CONNECT and an ACCEPT that come separately are one record that names both pods and their containers."""
    bench.publish_pods()
    with bench.enricher():
        client, server = bench.opened(1)
        bench.send([client])
        bench.send([server])
        bench.read_until(lambda: len(bench.of(1)) == 1)
    (flow,) = bench.of(1)
    assert (flow["observed_by"], flow["record_type"], flow["direction"]) == ("BOTH", "OPEN", "INTERNAL")
    assert (flow["client_resolution"], flow["client_pod"]) == ("SOCKET", "pod-1")
    assert (flow["server_resolution"], flow["server_pod"]) == ("SOCKET", "pod-2")
    assert (flow["client_container"], flow["server_process"]) == ("main", "shop-api")
    assert (flow["dialed_address"], flow["dialed_port"]) == ("10.96.0.10", 80)
    assert flow["client_address"] == "10.0.0.1"


def test_worker_leaves_its_working_directory_empty(bench: Bench) -> None:
    """A worker keeps nothing on disk, so it needs no folder to write to: not at its start, work or end."""
    with bench.enricher("tidy"):
        bench.send(bench.opened(1))
        bench.read_until(lambda: bool(bench.of(1)))
    assert list((bench.folder / "tidy.cwd").iterdir()) == []


def test_half_without_partner_comes_out_after_the_window_of_a_quiet_partition(bench: Bench) -> None:
    """No message follows, and yet the half comes out one-sided; its partner later is a record of its own."""
    bench.publish_pods()
    with bench.enricher(PODWIRE_METADATA_WAIT_MS="200"):
        client, server = bench.opened(1)
        bench.send([client])
        bench.read_until(lambda: len(bench.of(1)) == 1)
        bench.send([server])
        bench.read_until(lambda: len(bench.of(1)) == 2)
    assert [flow["observed_by"] for flow in bench.of(1)] == ["CLIENT", "SERVER"]


def test_poison_goes_to_the_dead_letters_and_its_neighbours_survive(bench: Bench) -> None:
    """What can't be read is set aside with its bytes and the reason; what stands around it is processed."""
    bench.publish_pods()
    poison = {
        b'{"no": "avro"}': "NOT_AVRO_FRAMED",
        codec.prefix(4711) + b"\x02x": "UNKNOWN_SCHEMA_ID",
        halves.batch(bench.opened(9))[:-30]: "CHECKSUM_MISMATCH",
        halves.sealed(codec.prefix(catalog.RAW.schema_id) + b"\xff" + bytes(4)): "UNDECODABLE",
        halves.batch(bench.opened(9), partition=3): "WRONG_PARTITION",
    }
    with bench.enricher():
        for number, value in enumerate(poison):
            bench.send_bytes(value)
            bench.send(bench.opened(number))
        bench.read_until(lambda: len(bench.flows) >= len(poison) and len(bench.dead) >= len(poison))
    assert {record["value"]: record["reason"] for record in bench.dead} == poison
    assert {flow["observed_by"] for flow in bench.flows} == {"BOTH"}


def test_record_waits_for_metadata_that_comes_late(bench: Bench) -> None:
    """A pod that is published after its connection still gets its name; others do not wait for it."""
    with bench.enricher(PODWIRE_METADATA_WAIT_MS="30000"):
        bench.send(bench.opened(1))
        outside = [event | {"pod_uid": bytes(16)} for event in bench.opened(2)]
        bench.send(outside)
        bench.read_until(lambda: len(bench.of(2)) == 1)
        assert bench.of(1) == []
        bench.publish_pods()
        bench.read_until(lambda: len(bench.of(1)) == 1)
    assert bench.of(1)[0]["client_pod"] == "pod-1"
    assert bench.of(2)[0]["client_resolution"] == "NODE"


def test_record_goes_out_unresolved_when_metadata_never_comes(bench: Bench) -> None:
    """After the bounded wait a record says what it could not find."""
    with bench.enricher(PODWIRE_METADATA_WAIT_MS="200"):
        bench.send(bench.opened(1))
        bench.read_until(lambda: len(bench.of(1)) == 1)
    (flow,) = bench.of(1)
    assert (flow["client_resolution"], flow["client_reason"]) == ("UNRESOLVED", "UNKNOWN_POD_UID")


def identities(flows: list[dict[str, Any]]) -> set[tuple[str, ...]]:
    """Return the record identities without repeats."""
    return {(flow["flow_id"], flow["record_type"], flow["observed_by"]) for flow in flows}


def test_killed_worker_loses_nothing_and_repeats_keep_their_identity(bench: Bench) -> None:
    """After kill -9 in mid-stream every connection is one BOTH record, also those with a half on each side."""
    bench.publish_pods()
    count = 1500
    process = bench.start("killed", PODWIRE_WINDOW_MS="60000")
    try:
        late: list[tuple[dict[str, Any], int]] = []
        for number in range(count):
            partition = number % PARTITIONS
            client, server = bench.opened(number, partition)
            bench.send([client], partition)
            late.append((server, partition))
            if len(late) > 100:
                event, where = late.pop(0)
                bench.send([event], where)
            if number == count // 2:
                bench.read_until(lambda: len(bench.flows) > count // 8)
                process.kill()
                process.wait()
                process = bench.start("successor", PODWIRE_WINDOW_MS="60000")
        for event, where in late:
            bench.send([event], where)
        bench.producer.flush(10)
        bench.read_until(lambda: len(identities(bench.flows)) >= count)
        process.terminate()
        assert process.wait(30) == 0, bench.logs()
    finally:
        process.kill()
        process.wait()
    both = {flow["flow_id"] for flow in bench.flows if flow["observed_by"] == "BOTH"}
    assert len(both) == count


def test_two_workers_share_the_partitions(bench: Bench) -> None:
    """Two processes of one group take different partitions, and one takes over when the other ends."""
    bench.publish_pods()
    with bench.enricher():
        bench.send(bench.opened(0, 0), 0)
        bench.read_until(lambda: len(bench.flows) == 1)
        with bench.enricher(name="two"):
            log = bench.folder / "two.log"
            until(lambda: '"partitions_assigned"' in log.read_text(), "partitions of two", said=bench.logs)
            for number in range(1, 41):
                bench.send(bench.opened(number, number % PARTITIONS), number % PARTITIONS)
            bench.read_until(lambda: len(identities(bench.flows)) == 41)
            two = log.read_text()
            assert '"partitions": [0, 1, 2, 3]' not in two
            assert '"partitions": []' not in two
        for number in range(41, 81):
            bench.send(bench.opened(number, number % PARTITIONS), number % PARTITIONS)
        bench.read_until(lambda: len(identities(bench.flows)) == 81)
    assert {flow["observed_by"] for flow in bench.flows} == {"BOTH"}


def test_orderly_end_leaves_nothing_to_repeat(bench: Bench) -> None:
    """What was delivered before SIGTERM was committed too: the next worker goes on behind it."""
    bench.publish_pods()
    with bench.enricher():
        for number in range(20):
            bench.send(bench.opened(number))
        bench.read_until(lambda: len(bench.flows) == 20)
    with bench.enricher():
        bench.send(bench.opened(20))
        bench.read_until(lambda: len(bench.of(20)) == 1)
    assert len(bench.flows) == 21


def test_wrong_setting_ends_with_its_own_exit_code(bench: Bench) -> None:
    """A window of nonsense is refused before Kafka is touched."""
    process = bench.start(PODWIRE_WINDOW_MS="soon")
    assert process.wait(30) == 20
    assert "window_ms" in bench.logs()
