"""Waiting for others: said once, ended by a stop, fatal where waiting can't help."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import structlog
from confluent_kafka.schema_registry import SchemaRegistryClient

from collector.errors import SchemaIdError
from collector.node.startup import SchemaIds, StoppedError, Wait, schema_ids
from podwire.demo.broker import free_port
from schemas import catalog, registry


def test_wait_says_each_thing_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However often it is asked for again, one line per missing thing."""
    stop = threading.Event()
    monkeypatch.setattr(stop, "wait", lambda _: False)
    wait = Wait(stop)
    with structlog.testing.capture_logs() as lines:
        for what in ("Kafka", "Kafka", "topic", "Kafka"):
            wait(what)
    assert [line["for"] for line in lines] == ["Kafka", "topic"]


def test_wait_ends_when_the_process_is_to_stop() -> None:
    """A stop ends the wait at once."""
    stop = threading.Event()
    stop.set()
    with pytest.raises(StoppedError):
        Wait(stop)("Kafka")


def test_schema_ids_come_from_the_catalog_without_a_registry() -> None:
    """No registry, no waiting."""
    assert schema_ids("", pytest.fail) == SchemaIds(catalog.RAW.schema_id, catalog.COLLECTOR.schema_id)


def test_schema_ids_wait_for_the_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry that does not accept connections is waited for; once it answers, it is asked for both."""
    waited = []

    def wait(what: str) -> None:
        waited.append(what)
        monkeypatch.setattr(SchemaRegistryClient, "lookup_schema", found)

    def found(_: Any, subject: str, __: Any) -> Any:
        return SimpleNamespace(schema_id={"podwire.tcp.raw.v1-value": 101}.get(subject, 102))

    url = f"http://127.0.0.1:{free_port()}"
    assert schema_ids(url, wait) == SchemaIds(101, 102)
    assert waited == [f"the schema registry at {url}"]


def test_unknown_schema_is_fatal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry that does not have our schema needs an operator, not patience."""

    class Empty:
        def id_of(self, topic: catalog.Topic) -> Any:
            raise registry.UnknownSchemaError(topic.name)

    monkeypatch.setattr(registry, "connect", lambda *_: Empty())
    with pytest.raises(SchemaIdError, match="register the schemas"):
        schema_ids("", pytest.fail)
