"""`podwire replay` against a real broker: the same records as the first time, and an own status for each bad end."""

from __future__ import annotations

import random
import re
import time
import uuid
from typing import TYPE_CHECKING, Any

import pytest
from confluent_kafka import Consumer, TopicPartition
from confluent_kafka.admin import AdminClient

from podwire import topics
from podwire.cli import main
from podwire.demo.broker import Broker
from podwire.flows import FlowReader
from schemas import catalog, codec
from schemas.registry import CatalogIds
from tests import halves
from tests.integration.test_enricher_corrections import SETTINGS as CORRECTED
from tests.integration.test_enricher_corrections import live as pending
from tests.integration.test_enricher_worker import DEADLINE_SECONDS, PARTITIONS, WINDOW_MS, Bench
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.conftest import RunningBroker

pytestmark = pytest.mark.timeout(240)
SECOND_US = 1_000_000
RECORDS_OF_EACH = 6
OF_THE_MOMENT = ("emitted_at", "revision", "metadata_age_ms")
Identity = tuple[str, str, str, int]


def identity(flow: dict[str, Any]) -> Identity:
    """Return what all revisions of a record share."""
    return flow["flow_id"], flow["record_type"], flow["observed_by"], flow["progress_seq"]


def latest(flows: list[dict[str, Any]]) -> dict[Identity, dict[str, Any]]:
    """Return the highest revision of each record, without what belongs to the moment it was made."""
    out: dict[Identity, dict[str, Any]] = {}
    for flow in sorted(flows, key=lambda flow: -flow["revision"]):
        lasting = {name: value for name, value in flow.items() if name not in OF_THE_MOMENT}
        out.setdefault(identity(flow), lasting)
    return out


class Past:
    """A time of this test's own, some hours ago, its events, and the replays of it."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        hours_ago = random.SystemRandom().uniform(1, 20)
        self.base_us = (time.time_ns() // 1000 - int(hours_ago * 3600 * SECOND_US)) // SECOND_US * SECOND_US
        self.address = f"10.77.{self.bench.base % 250}.{self.bench.base // 250 % 250}"

    def opened(self, number: int, partition: int, second: float) -> list[dict[str, Any]]:
        """Return CONNECT and ACCEPT of a connection, at seconds after the base."""
        at_us = self.base_us + int(second * SECOND_US)
        halves_ = self.bench.opened(number, partition)
        return [half | {"event_unix_us": at_us + place * 150} for place, half in enumerate(halves_)]

    def publish_metadata(self, gone_us: int | None = None) -> None:
        """Publish pods 1, 2 and, by address, 3; as they are, or as the watcher says that they were, once gone."""
        for number in (1, 2, 3):
            address = self.address if number == 3 else None
            record = halves.pod_record(self.bench.pods + number, address, name=f"pod-{number}")
            since_us = self.base_us - 3_600 * SECOND_US
            for band in record["addresses"]:
                band |= {"from_earliest_us": since_us, "from_latest_us": since_us}
                if gone_us is not None:
                    band |= {"to_earliest_us": gone_us - SECOND_US, "to_latest_us": gone_us}
            record |= {"valid_from_us": since_us, "valid_to_us": gone_us}
            if gone_us is not None:
                facts = {name: record[name] for name in ("labels", "workload_kind", "workload")}
                record |= {"labels": {"app": "other"}, "former": [facts | {"until_us": gone_us}]}
            value = codec.encode("Pod", record, catalog.PODS.schema_id)
            self.bench.producer.produce(catalog.PODS.name, value, key=record["uid"])
        until_us = time.time_ns() // 1000 + 60 * SECOND_US
        watermark = codec.encode(
            "Watermark", halves.watermark_record(until_us, 0), catalog.WATERMARKS.schema_id
        )
        self.bench.producer.produce(catalog.WATERMARKS.name, watermark, key=f"{halves.CLUSTER}/pods")
        assert self.bench.producer.flush(10) == 0

    def iso(self, second: float) -> str:
        """Return a time as the command line takes it."""
        at = time.gmtime((self.base_us + int(second * SECOND_US)) // SECOND_US)
        return time.strftime("%Y-%m-%dT%H:%M:%SZ", at)

    def command(self, first: float, end: float) -> list[str]:
        """Return the command line for these seconds; the events came to Kafka hours later."""
        times = ["--from", self.iso(first), "--to", self.iso(end), "--late", "1d"]
        return ["replay", *times, "--cluster", halves.CLUSTER, "--bootstrap", self.bench.bootstrap]

    def replay(self, first: float, end: float, workers: int = 3) -> list[dict[str, Any]]:
        """Replay these seconds and return the records; no topic of the live system may have changed."""
        before = ends(self.bench.bootstrap)
        name = f"test-{uuid.uuid4()}"
        more = ["--name", name, "--window-ms", str(WINDOW_MS), "--workers", str(workers)]
        assert main([*self.command(first, end), *more]) == 0
        assert ends(self.bench.bootstrap) == before
        return records(self.bench.bootstrap, f"podwire.flows.replay.{name}.v1")


def records(bootstrap: str, topic: str) -> list[dict[str, Any]]:
    """Return all records of a topic of flows."""
    reader = FlowReader(bootstrap, CatalogIds(), topic)
    try:
        bounds = reader.bounds()
        first = {partition: low for partition, (low, _) in bounds.items()}
        return list(reader.span(first, {partition: high for partition, (_, high) in bounds.items()}))
    finally:
        reader.close()


def ends(bootstrap: str) -> dict[tuple[str, int], int]:
    """Return the end offset of each partition of the topics that collectors, watcher and workers write."""
    consumer = Consumer({"bootstrap.servers": bootstrap, "group.id": "test-ends"})
    try:
        present = consumer.list_topics(timeout=10).topics
        partitions = [
            TopicPartition(topic.name, one)
            for topic in catalog.TOPICS
            for one in present[topic.name].partitions
        ]
        return {
            (one.topic, one.partition): consumer.get_watermark_offsets(one, timeout=10)[1]
            for one in partitions
        }
    finally:
        consumer.close()


@pytest.fixture
def past(broker: RunningBroker, tmp_path: Path) -> Iterator[Past]:
    """A past of the test's own on the shared broker."""
    bench = Bench(broker.bootstrap, tmp_path)
    yield Past(bench)
    bench.close()


def send_one_of_each(past: Past, number: int, partition: int) -> None:
    """Send, at second `number`, halves for RECORDS_OF_EACH records of all kinds in `partition`."""
    bench = past.bench
    client, server = past.opened(number, partition, number)
    bench.send([client, client], partition)  # a repeat, as after a collector's crash
    close = {"type": "CLOSE", "outcome": "CLOSED", "closed_by": "LOCAL", "duration_us": 2500}
    bench.send([server, server | close], partition)
    bench.send([client | close], partition)
    alone = past.opened(1000 + number, partition, number)[number % 2]
    outside = past.opened(2000 + number, partition, number)[0]
    by_address = {"remote_address": halves.ip(past.address), "pod_uid": bytes(16), "owner_source": "UNKNOWN"}
    refused = {"type": "CONNECT_FAILED", "outcome": "REFUSED", "errno": 111, "established_unix_us": None}
    progress = [outside | {"type": "PROGRESS", "progress_seq": count} for count in (1, 2)]
    bench.send([alone, outside | by_address | refused, *progress], partition)


def test_replay_gives_the_same_records_after_the_pods_are_gone(past: Past) -> None:
    """Two workers first, one of them killed; three processes later: every record of the span is the same."""
    bench = past.bench
    past.publish_metadata()
    count = 24
    doomed = bench.start("doomed")
    try:
        with bench.enricher():
            for number in range(count // 2):
                send_one_of_each(past, number, number % PARTITIONS)
            bench.producer.flush(10)
            bench.read_until(lambda: len(latest(bench.flows)) > count)
            doomed.kill()
            for number in range(count // 2, count):
                send_one_of_each(past, number, number % PARTITIONS)
            bench.read_until(lambda: len(latest(bench.flows)) >= RECORDS_OF_EACH * count)
    finally:
        doomed.kill()
        doomed.wait()
    past.publish_metadata(gone_us=past.base_us + 3_000 * SECOND_US)

    first, end = 5, 20
    inside = range(past.base_us + first * SECOND_US, past.base_us + end * SECOND_US)
    live = latest([flow for flow in bench.flows if flow["event_unix_us"] in inside])
    for workers in (1, 3):
        again = past.replay(first, end, workers)
        assert latest(again) == live
        assert len(again) == len(live) == RECORDS_OF_EACH * (end - first)
    assert {flow["server_resolution"] for flow in again} >= {"SOCKET", "IP_AT_TIME"}
    assert {flow["observed_by"] for flow in again} == {"BOTH", "CLIENT", "SERVER"}


def test_replay_equals_what_was_corrected(past: Past) -> None:
    """Two workers sent records unresolved and corrected them; later, pods gone, the replay has the corrected ones."""
    bench = past.bench
    count = 8
    with bench.enricher("one", **CORRECTED), bench.enricher("two", **CORRECTED):
        for number in range(count):
            client, server = past.opened(number, number % PARTITIONS, number)
            alone = past.opened(1000 + number, number % PARTITIONS, number)[number % 2]
            bench.send([client, server, alone | {"type": "PROGRESS", "progress_seq": 1}], number % PARTITIONS)
        bench.read_until(lambda: len(latest(bench.flows)) == 2 * count)
        past.publish_metadata()
        bench.read_until(lambda: len(revised(bench.flows)) == 2 * count)
        until(lambda: pending(bench) == 0, said=bench.logs)
    past.publish_metadata(gone_us=past.base_us + 3_000 * SECOND_US)

    unresolved = [flow for flow in bench.flows if flow["revision"] == 0]
    assert all("UNKNOWN_POD_UID" in (flow["client_reason"], flow["server_reason"]) for flow in unresolved)
    for workers in (1, 2):
        again = past.replay(0, count, workers)
        assert latest(again) == latest(bench.flows)
        assert {flow["revision"] for flow in again} == {0}
    pairs = [flow for flow in again if flow["observed_by"] == "BOTH"]
    assert {(flow["client_pod"], flow["server_pod"]) for flow in pairs} == {("pod-1", "pod-2")}


def revised(flows: list[dict[str, Any]]) -> set[Identity]:
    """Return the records that were corrected."""
    return {identity(flow) for flow in flows if flow["revision"] == 1}


def test_spans_that_touch_share_no_record_and_leave_none_out(past: Past) -> None:
    """Replays of two halves of a time are together the replay of the whole, for halves that straddle the edge too."""
    bench = past.bench
    past.publish_metadata()
    for number in range(12):
        client, server = past.opened(number, number % PARTITIONS, number)
        bench.send([server | {"event_unix_us": server["event_unix_us"] + SECOND_US}], number % PARTITIONS)
        bench.send([client], number % PARTITIONS)
    bench.producer.flush(10)
    parts = [identity(flow) for span in ((0, 6), (6, 12)) for flow in past.replay(*span)]
    whole = [identity(flow) for flow in past.replay(0, 12)]
    assert sorted(parts) == sorted(whole)
    assert len(set(whole)) == len(whole) == 12
    assert {observed_by for _, _, observed_by, _ in whole} == {"BOTH"}


def test_half_whose_window_is_open_is_left_out_and_counted(
    past: Past, capsys: pytest.CaptureFixture[str]
) -> None:
    """At the end of the topic a half that its other half may yet join is no record; once the window is over it is."""
    bench = past.bench
    past.publish_metadata()
    bench.send([past.opened(1, 0, 5)[0]])
    bench.producer.flush(10)
    span = [*past.command(0, 10), "--name", f"test-{uuid.uuid4()}", "--window-ms"]
    assert main([*span, "600000"]) == 50
    assert "1 halves left out" in capsys.readouterr().err
    deadline = time.monotonic() + DEADLINE_SECONDS
    while main([*span, "100"]) == 50:
        assert time.monotonic() < deadline
    (flow,) = records(bench.bootstrap, f"podwire.flows.replay.{span[-2]}.v1")
    assert (flow["tcp_key"], flow["observed_by"]) == (bench.key(1, 0).hex(), "CLIENT")


def test_topic_that_holds_records_is_refused_unless_told(
    past: Past, capsys: pytest.CaptureFixture[str]
) -> None:
    """A second replay into the same topic has a status of its own; with --append its records are repeats."""
    bench = past.bench
    past.publish_metadata()
    bench.send(past.opened(1, 0, 5))
    bench.producer.flush(10)
    command = past.command(0, 10)
    assert main(command) == 0
    topic = next(word for word in capsys.readouterr().out.split() if word.startswith("podwire.flows.replay."))
    assert main(command) == 51
    assert "--append" in capsys.readouterr().err
    assert main([*command, "--append"]) == 0
    first, second = records(bench.bootstrap, topic.rstrip(","))
    assert identity(first) == identity(second)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--from", "5m", "--to", "10m"], "must be before"),
        (["--from", "5m", "--to", "2999-01-01"], "future"),
        (["--from", "yesterday", "--to", "0s"], "--from 'yesterday'"),
        (["--from", "5m", "--to", "soon"], "--to 'soon'"),
        (["--from", "5m", "--to", "0s", "--late", "long"], "--late 'long'"),
        (["--from", "5m", "--to", "0s", "--name", "a/b"], "--name 'a/b'"),
        (["--from", "5m", "--to", "0s", "--topic", catalog.FLOWS.name], "--topic is not yours"),
        (["--from", "5m", "--to", "0s", "--share=1/2"], "--share is not yours"),
    ],
    ids=["from after to", "future", "from", "to", "late", "name", "topic", "share"],
)
def test_wrong_command_line_is_refused_before_kafka_is_asked(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """One sentence says what to give instead, and the status is that of any wrong command line."""
    assert main(["replay", *arguments, "--bootstrap", "127.0.0.1:1"]) == 2
    assert said in capsys.readouterr().err


def test_enricher_refuses_an_option_with_its_own_status(
    broker: RunningBroker, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is not the command's goes to the enricher, whose answer and status come through."""
    topics.create(broker.bootstrap, partitions=PARTITIONS)
    command = ["replay", "--from", "5m", "--to", "0s", "--bootstrap", broker.bootstrap, "--name", "refused"]
    assert main([*command, "--cluster", "c", "--window-ms", "soon"]) == 20
    assert "window_ms" in capsys.readouterr().err


def test_absent_kafka_has_its_own_status(capsys: pytest.CaptureFixture[str]) -> None:
    """Nobody answers there: 32, and where the command looked."""
    assert main(["replay", "--from", "5m", "--to", "0s", "--bootstrap", "127.0.0.1:1"]) == 32
    assert "127.0.0.1:1" in capsys.readouterr().err


def test_span_that_retention_has_reached_is_refused_with_the_time_since_when_it_works(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where a partition's beginning was deleted, an older span ends with 33 and writes nothing; a later one works."""
    broker = Broker(tmp_path / "kafka")
    broker.start()
    try:
        bench = Bench(broker.bootstrap, tmp_path)
        for number in range(3):
            bench.send(bench.opened(number, 1), 1)
        assert bench.producer.flush(30) == 0
        admin = AdminClient({"bootstrap.servers": broker.bootstrap})
        (deleted,) = admin.delete_records([TopicPartition(catalog.RAW.name, 1, 1)]).values()
        deleted.result(30)
        command = ["replay", "--bootstrap", broker.bootstrap, "--cluster", halves.CLUSTER]
        command += ["--metadata-wait-ms", "0", "--early", "0s", "--window-ms", "100"]
        assert main([*command, "--from", "1h", "--to", "1s", "--name", "old"]) == 33
        since = re.search(r"reaches back far enough for a span from (\S+) only", capsys.readouterr().err)
        assert since is not None
        assert records(broker.bootstrap, "podwire.flows.replay.old.v1") == []
        deadline = time.monotonic() + DEADLINE_SECONDS
        while main([*command, "--from", since[1], "--to", "0s", "--name", "young"]) != 0:
            assert time.monotonic() < deadline
            bench.send(bench.opened(4, 1), 1)
            bench.producer.flush(10)
        assert records(broker.bootstrap, "podwire.flows.replay.young.v1") != []
        bench.close()
    finally:
        broker.stop()
