"""The services with a real schema registry and a real Kafka: its ids in every message, and what its absence does."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from confluent_kafka import Consumer, TopicPartition
from confluent_kafka.schema_registry import SchemaRegistryClient, SchemaRegistryError
from confluent_kafka.schema_registry.avro import AvroDeserializer
from confluent_kafka.serialization import MessageField, SerializationContext

from podwire.cli import main
from podwire.demo.broker import Broker, free_port
from schemas import catalog, codec, registry
from tests import halves
from tests.integration.test_enricher_worker import PARTITIONS, WINDOW_MS, Bench
from tests.registry import Registered
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
UNKNOWN_ID = 4711
pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registered]:
    """The registry of this module's tests; who kills it starts it again."""
    one = Registered(tmp_path_factory.mktemp("registry"))
    one.start()
    yield one
    one.stop()


@pytest.fixture(scope="module")
def kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """A broker of our own: on a shared one the catalog's ids would stand for other schemas."""
    broker = Broker(tmp_path_factory.mktemp("kafka"))
    broker.start()
    yield broker
    broker.stop()


class RegistryBench(Bench):
    """A bench whose messages bear the registry's ids."""

    def __init__(self, bootstrap: str, folder: Path, known: Registered) -> None:
        super().__init__(bootstrap, folder)
        self.known = known
        self.port = free_port()

    def settings(self, **more: str) -> dict[str, str]:
        """Return an enricher's environment variables."""
        registry_url = {"PODWIRE_REGISTRY_URL": self.known.url, "PODWIRE_HTTP_PORT": str(self.port)}
        return super().settings() | registry_url | more

    def send(self, events: list[dict[str, Any]], partition: int = 0, schema_id: int | None = None) -> None:
        """Append one batch to the raw topic under the registry's id, or that of a version with one more field."""
        body = halves.batch(events, partition)[codec.PREFIX_BYTES : -codec.CHECKSUM_BYTES]
        if schema_id is not None:
            body += b"\x00"  # the field: null
        prefix = codec.prefix(schema_id or self.known.ids[catalog.RAW.name])
        self.send_bytes(halves.sealed(prefix + body + bytes(codec.CHECKSUM_BYTES)), partition)

    def publish_pods(self) -> None:
        """Publish this test's pods 1 and 2."""
        for number in (1, 2):
            self.publish_pod(number)

    def publish_pod(self, number: int, schema_id: int | None = None) -> None:
        """Publish a pod of this test."""
        record = halves.pod_record(self.pods + number, name=f"pod-{number}")
        value = codec.encode("Pod", record, schema_id or self.known.ids[catalog.PODS.name])
        self.producer.produce(catalog.PODS.name, value, key=record["uid"])
        assert self.producer.flush(10) == 0

    def lines(self, name: str, event: str) -> list[dict[str, Any]]:
        """Return a worker's log lines of one event."""
        text = (self.folder / f"{name}.log").read_text()
        lines = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
        return [line for line in lines if line["event"] == event]

    def await_line(self, name: str, event: str, count: int = 1) -> dict[str, Any]:
        """Return a worker's `count`-th log line of that event once it is there."""
        until(lambda: len(self.lines(name, event)) >= count, f"{event} of {name}", said=self.logs)
        return self.lines(name, event)[count - 1]

    def gauge(self, name: str) -> float:
        """Return the present value of one of the worker's gauges."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=5) as answer:
            found = re.search(rf"^podwire_enricher_{name} (\S+)", answer.read().decode(), re.MULTILINE)
        assert found is not None
        return float(found[1])

    def await_committed(self, partition: int) -> None:
        """Return once the group has acknowledged all that is in a partition of the raw topic."""
        at = TopicPartition(catalog.RAW.name, partition)
        end = self._end(catalog.RAW.name, partition)
        until(lambda: self.reader.committed([at], timeout=10)[0].offset == end, "a commit", said=self.logs)


@pytest.fixture
def bench(kafka: Broker, known: Registered, tmp_path: Path) -> Iterator[RegistryBench]:
    """Topics and a group of the test's own; the registry answers."""
    one = RegistryBench(kafka.bootstrap, tmp_path, known)
    yield one
    one.close()


def test_ids_are_the_registrys(known: Registered) -> None:
    """Each topic's id is the registry's, which is never the catalog's here, and leads to our schema."""
    ids = registry.connect(known.url)
    for topic in catalog.TOPICS:
        assert ids.id_of(topic) == known.ids[topic.name] != topic.schema_id
        assert ids.writer_schema(known.ids[topic.name]) == codec.parsed(topic.schema)
    with pytest.raises(registry.UnknownSchemaError):
        ids.writer_schema(UNKNOWN_ID)


def test_other_version_under_our_subject_is_not_ours(known: Registered) -> None:
    """A subject that has other schemas only is as unknown as one that is missing."""
    ids = registry.connect(known.url)
    with pytest.raises(registry.UnknownSchemaError, match=r"Pod under podwire\.flows\.v1-value"):
        ids.id_of(replace(catalog.FLOWS, schema="Pod"))
    with pytest.raises(registry.UnknownSchemaError, match=r"Flow under podwire\.flows\.v9-value"):
        ids.id_of(replace(catalog.FLOWS, name="podwire.flows.v9"))


def test_unregistered_schema_ends_services_with_a_remedy(bench: RegistryBench, known: Registered) -> None:
    """A registry that answers and lacks a schema needs an operator: an exit code of its own, and what to do."""
    with SchemaRegistryClient({"url": known.url}) as client:
        for permanent in (False, True):
            client.delete_subject(f"{catalog.WATERMARKS.name}-value", permanent)
    try:
        for module in (("enricher",), ("collector", "cluster", "--manifests", "none.json")):
            done = subprocess.run(
                [sys.executable, "-m", *module],
                cwd=ROOT,
                env=os.environ | bench.settings(),
                capture_output=True,
                text=True,
                timeout=60,
            )
            assert done.returncode == 22, done.stderr
            assert "Watermark under podwire.k8s.watermarks.v1-value" in done.stderr
            assert "Operator action: register the schemas" in done.stderr
    finally:
        watermarks = catalog.WATERMARKS
        known.ids[watermarks.name] = known.register(f"{watermarks.name}-value", codec.text(watermarks.schema))


def flows_of(bootstrap: str, client: SchemaRegistryClient) -> list[tuple[int, dict[str, Any]]]:
    """Return (schema id, record) of all flows, decoded by Confluent's own deserializer."""
    decode = AvroDeserializer(client)
    context = SerializationContext(catalog.FLOWS.name, MessageField.VALUE)
    consumer = Consumer({"bootstrap.servers": bootstrap, "group.id": "stock"})
    found = []
    for partition in range(PARTITIONS):
        at = TopicPartition(catalog.FLOWS.name, partition)
        at.offset, end = consumer.get_watermark_offsets(at, timeout=30)
        consumer.assign([at])
        while at.offset < end:
            for message in consumer.consume(end - at.offset, 1.0):
                assert message.error() is None
                at.offset = message.offset() + 1
                found.append((codec.split(message.value())[0], decode(message.value(), context)))
    consumer.close()
    return found


def test_stock_consumer_decodes_a_flow(
    bench: RegistryBench, known: Registered, capsys: pytest.CaptureFixture[str]
) -> None:
    """Raw batches and pods under the registry's ids become a flow that any Avro consumer and `observe` read."""
    bench.publish_pods()
    with bench.enricher():
        bench.send(bench.opened(1))
        bench.read_until(lambda: len(bench.of(1)) == 1)
    key = bench.key(1, 0).hex()
    with SchemaRegistryClient({"url": known.url}) as client:
        found = [
            (schema_id, flow)
            for schema_id, flow in flows_of(bench.bootstrap, client)
            if flow["tcp_key"] == key
        ]
    ((schema_id, flow),) = found
    assert schema_id == known.ids[catalog.FLOWS.name]
    assert (flow["observed_by"], flow["client_pod"], flow["server_pod"]) == ("BOTH", "pod-1", "pod-2")
    assert flow == bench.of(1)[0]
    observe = ["observe", "--bootstrap", bench.bootstrap, "--last", "1000", "-o", "json", "--registry-url"]
    assert main([*observe, known.url]) == 0
    assert key in {json.loads(line)["tcp_key"] for line in capsys.readouterr().out.splitlines()}
    nobody = f"http://127.0.0.1:{free_port()}"
    assert main([*observe, nobody]) == 1
    assert f"the schema registry at {nobody} does not answer" in capsys.readouterr().err


@pytest.mark.parametrize("schema_id", catalog.EARLIER)
def test_registry_that_demands_compatibility_takes_our_new_version(known: Registered, schema_id: int) -> None:
    """After an earlier version the present one is FULL_TRANSITIVE; one with a field that has no default is not."""
    topic, absent = catalog.EARLIER[schema_id]
    schema = json.loads(codec.text(topic.schema))
    earlier = schema | {"fields": [field for field in schema["fields"] if field["name"] not in absent]}
    subject = f"after-{schema_id}"
    known.register(subject, json.dumps(earlier))
    with SchemaRegistryClient({"url": known.url}) as client:
        client.set_compatibility(subject, "FULL_TRANSITIVE")
    assert known.register(subject, json.dumps(schema)) != known.register(subject, json.dumps(earlier))
    schema["fields"].append({"name": "demanded", "type": "long", "doc": "without a default"})
    with pytest.raises(SchemaRegistryError):
        known.register(subject, json.dumps(schema))


def test_foreign_ids_are_read_or_set_aside_by_what_the_registry_says(
    bench: RegistryBench, known: Registered
) -> None:
    """A later version of RawBatch is read; an unknown id, no Avro and another record are dead letters with a reason."""
    bench.publish_pods()
    later = known.new_raw_schema("later")
    no_avro = known.register("no-avro", 'syntax = "proto3"; message M { string a = 1; }', "PROTOBUF")
    body = halves.batch(bench.opened(9))[codec.PREFIX_BYTES :]
    poison = {
        codec.prefix(UNKNOWN_ID) + body: "UNKNOWN_SCHEMA_ID",
        codec.prefix(no_avro) + body: "UNKNOWN_SCHEMA_ID",
        codec.prefix(known.ids[catalog.FLOWS.name]) + body: "UNDECODABLE",
        codec.prefix(catalog.RAW.schema_id) + body: "UNDECODABLE",
    }
    with bench.enricher():
        client, server = bench.opened(1)
        bench.send([client], schema_id=later)
        for value in poison:
            bench.send_bytes(value)
        bench.send([server])
        bench.read_until(lambda: len(bench.of(1)) == 1 and len(bench.dead) == len(poison))
    assert {record["value"]: record["reason"] for record in bench.dead} == poison
    assert bench.of(1)[0]["observed_by"] == "BOTH"


def test_registry_that_goes_away_in_mid_traffic_harms_only_what_needs_it(
    bench: RegistryBench, known: Registered
) -> None:
    """Known ids need no registry. One not seen before waits, said once, and is neither lost nor set aside."""
    bench.publish_pods()
    later = known.new_raw_schema("mid_traffic")
    with bench.enricher(PODWIRE_STALL_SECONDS="5"):
        bench.send(bench.opened(1))
        bench.read_until(lambda: len(bench.of(1)) == 1)
        known.kill()
        try:
            bench.send(bench.opened(2))
            bench.read_until(lambda: len(bench.of(2)) == 1)
            assert bench.gauge("registry_awaited") == 0
            assert bench.lines("one", "waiting") == []
            client, server = bench.opened(3)
            bench.send([client], schema_id=later)
            bench.send_bytes(codec.prefix(UNKNOWN_ID) + b"x")
            bench.send([server])
            waiting = bench.await_line("one", "waiting")
            until(lambda: bench.gauge("registry_awaited") == 1)
            assert (waiting["for"], waiting["schema_id"]) == (f"the schema registry at {known.url}", later)
        finally:
            known.start()
        bench.read_until(lambda: len(bench.of(3)) == 1 and len(bench.dead) == 1)
        bench.await_line("one", "registry_answers")
        assert bench.gauge("registry_awaited") == 0
    assert bench.of(3)[0]["observed_by"] == "BOTH"
    assert bench.dead[0]["schema_id"] == UNKNOWN_ID
    assert len(bench.lines("one", "waiting")) == 1


def test_worker_that_starts_while_the_registry_is_away_waits(bench: RegistryBench, known: Registered) -> None:
    """After kill -9 in an outage the successor says once what it waits for, and goes on where the first one was."""
    bench.publish_pods()
    first = bench.start("first")
    try:
        bench.send(bench.opened(1))
        bench.read_until(lambda: len(bench.of(1)) == 1)
        known.kill()
        try:
            first.kill()
            first.wait()
            bench.send(bench.opened(2))
            with bench.enricher("successor"):
                assert (
                    bench.await_line("successor", "waiting")["for"] == f"the schema registry at {known.url}"
                )
                known.start()
                bench.read_until(lambda: len(bench.of(2)) == 1)
                lines = [line["for"] for line in bench.lines("successor", "waiting")]
                assert len(lines) == len(set(lines))
        finally:
            known.kill()
            known.start()
    finally:
        first.kill()
        first.wait()
    assert bench.of(2)[0]["client_pod"] == "pod-1"


def test_take_over_in_an_outage_waits_and_forgets_no_half(bench: RegistryBench, known: Registered) -> None:
    """Halves that a dead worker read under a foreign id are rebuilt once the registry tells its schema again."""
    window = {"PODWIRE_WINDOW_MS": str(60 * WINDOW_MS)}
    bench.publish_pods()
    later = known.new_raw_schema("take_over")
    with bench.enricher("survivor", **window):
        bench.await_line("survivor", "partitions_assigned")
        dying = bench.start("dying", **window, PODWIRE_HTTP_PORT=str(free_port()))
        try:
            bench.await_line("dying", "partitions_assigned")
            (partition, *_) = bench.lines("dying", "partitions_assigned")[-1]["partitions"]
            client, server = bench.opened(1, partition)
            bench.send([client], partition, schema_id=later)
            bench.producer.flush(10)
            bench.await_committed(partition)  # so the successor reads it while it rebuilds, not in the stream
            known.kill()
        finally:
            dying.kill()
            dying.wait()
        try:
            bench.send([server], partition)
            bench.await_line("survivor", "waiting")
        finally:
            known.start()
        bench.read_until(lambda: len(bench.of(1, partition)) == 1)
    assert bench.of(1, partition)[0]["observed_by"] == "BOTH"
    assert len(bench.lines("survivor", "waiting")) == 1
    assert bench.dead == []
