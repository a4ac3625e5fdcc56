"""`podwire topics` and `podwire observe` against a real Kafka."""

from __future__ import annotations

import json
import re
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient, NewTopic

from podwire import topics
from podwire.cli import main
from podwire.flows import FlowReader
from schemas import catalog, codec
from schemas.registry import CatalogIds
from tests.unit.test_observe import flow

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.conftest import RunningBroker

CLUSTER = "observe-test"
BASE_UNIX_US = (int(time.time()) - 100) * 1_000_000  # now, so that retention leaves the flows alone


def put(bootstrap: str, flows: list[dict[str, Any]], topic: str = catalog.FLOWS.name) -> None:
    """Publish flows as the enricher does: keyed, framed, with the event's time."""
    producer = Producer({"bootstrap.servers": bootstrap, "partitioner": "murmur2_random"})
    for one in flows:
        producer.produce(
            topic,
            codec.encode("Flow", one, catalog.FLOWS.schema_id),
            one["flow_id"].encode(),
            timestamp=one["event_unix_us"] // 1000,
        )
    assert producer.flush(30) == 0


@pytest.fixture(scope="module")
def bootstrap(broker: RunningBroker) -> Iterator[str]:
    """A broker with topics and 40 flows of an own cluster, one per second, in all partitions."""
    topics.create(broker.bootstrap)
    put(
        broker.bootstrap,
        [
            flow(
                cluster=CLUSTER,
                flow_id=f"observe0-{index:016x}",
                event_unix_us=BASE_UNIX_US + index * 1_000_000,
                client_namespace=CLUSTER,
                client_pod=f"pod-{index % 2}",
            )
            for index in range(40)
        ],
    )
    return broker.bootstrap


def observe(capsys: pytest.CaptureFixture[str], bootstrap: str, *arguments: str) -> list[dict[str, Any]]:
    """Run the command and return what it printed."""
    assert main(["observe", "--bootstrap", bootstrap, "--namespace", CLUSTER, "-o", "json", *arguments]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_topics_are_created_once_and_described_as_the_catalog_says(
    bootstrap: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A second creation changes nothing, and the broker's configuration equals the catalog's."""
    assert not any(topics.create(bootstrap).values())
    assert all(state.partitions and not state.differences for state in topics.describe(bootstrap))
    assert main(["topics", "describe", "--bootstrap", bootstrap]) == 0
    assert re.search(r"podwire.flows.v1 +Flow +key=flow_id", capsys.readouterr().out)


def test_observe_prints_the_last_flows_across_partitions_in_order(
    bootstrap: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last N are the latest by event time, whichever partition holds them."""
    shown = observe(capsys, bootstrap, "--last", "5")
    assert [one["flow_id"] for one in shown] == [f"observe0-{index:016x}" for index in range(35, 40)]


def test_observe_since_starts_at_that_event_time(bootstrap: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A time given as ISO 8601 cuts off what happened before it."""
    shown = observe(
        capsys, bootstrap, "--since", datetime.fromtimestamp(BASE_UNIX_US / 1e6 + 30, UTC).isoformat()
    )
    assert [one["flow_id"] for one in shown] == [f"observe0-{index:016x}" for index in range(30, 40)]


def test_observe_filters_before_it_counts(bootstrap: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The last N of a filter are N flows that match."""
    shown = observe(capsys, bootstrap, "--last", "3", "--pod", f"{CLUSTER}/pod-1")
    assert [one["flow_id"] for one in shown] == [f"observe0-{index:016x}" for index in (35, 37, 39)]


def test_reader_follows_new_flows_and_counts_what_it_cannot_decode(bootstrap: str) -> None:
    """A follower sees a flow that arrives later, and an unreadable message does not end it."""
    reader = FlowReader(bootstrap, CatalogIds())
    end = {partition: high for partition, (_, high) in reader.bounds().items()}
    producer = Producer({"bootstrap.servers": bootstrap})
    producer.produce(catalog.FLOWS.name, b"\x00\x00\x00\x00\x07nonsense", b"x", partition=0)
    assert producer.flush(30) == 0
    put(bootstrap, [flow(flow_id="observe0-new", cluster=CLUSTER, event_unix_us=BASE_UNIX_US)])
    seen: list[str] = []
    seen.extend(
        one["flow_id"]
        for one in reader.read(end, lambda: bool(seen) and reader.unreadable > 0)
        if one is not None
    )
    reader.close()
    assert seen == ["observe0-new"]
    assert reader.unreadable == 1


def test_observe_shows_the_topic_that_it_is_given(bootstrap: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A replay's topic can be looked at like the live one; one that is not there is named."""
    topic = f"podwire.flows.replay.{uuid4().hex}.v1"
    admin = AdminClient({"bootstrap.servers": bootstrap})
    assert main(["observe", "--bootstrap", bootstrap, "--topic", topic]) == 1
    assert topic in capsys.readouterr().err
    admin.create_topics([NewTopic(topic, 1)])[topic].result(30)
    put(bootstrap, [flow(flow_id="observe0-again", cluster=CLUSTER, client_namespace=CLUSTER)], topic)
    shown = observe(capsys, bootstrap, "--topic", topic)
    assert [one["flow_id"] for one in shown] == ["observe0-again"]


def test_observe_without_a_broker_says_where_it_looked(capsys: pytest.CaptureFixture[str]) -> None:
    """An unreachable Kafka ends in one sentence and status 1."""
    assert main(["observe", "--bootstrap", "127.0.0.1:1", "--last", "1"]) == 1
    assert "127.0.0.1:1" in capsys.readouterr().err
