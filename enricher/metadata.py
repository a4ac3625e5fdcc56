"""Follows the metadata topics in a thread of its own and hands over what changed, decoded and in order.

Owns the thread and the positions. Never resolves anything: `engine` puts the changes into its `History`.
A watermark is handed over only once everything that it speaks of has been. Called by `run` and `app`.
"""

from __future__ import annotations

import queue
import threading
from typing import TYPE_CHECKING, Any, NamedTuple

import structlog

from enricher import kafka
from enricher.schema_ids import RETRY_SECONDS
from schemas import catalog, codec
from schemas.registry import PatientIds, UnknownSchemaError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from enricher.history import History
    from enricher.kafka import Message
    from schemas.registry import SchemaIds

TOPICS = (*catalog.METADATA, catalog.WATERMARKS)
KINDS = {catalog.PODS.name: "pods", catalog.SERVICES.name: "services", catalog.NODES.name: "nodes"}
BATCH_MESSAGES = 1000
BATCH_SECONDS = 0.2
log = structlog.get_logger()


class Change(NamedTuple):
    """A record of a kind under its UID (None: tombstone), or a watermark that holds now (`until_us` and its lag)."""

    kind: str
    uid: str
    record: dict[str, Any] | None
    until_us: int | None = None
    status_lag_us: int = 0


def apply(history: History, changes: list[Change]) -> None:
    """Put changes into a history, in order."""
    puts = {"pods": history.put_pod, "services": history.put_service, "nodes": history.put_node}
    for change in changes:
        if change.until_us is not None:
            history.complete_until(change.kind, change.until_us, change.status_lag_us)
        else:
            puts[change.kind](change.uid, change.record)


class Unpacker:
    """Turns consumed messages into changes; holds watermarks back until the reader has got there. Pure.

    Clusters may share the topics; their addresses overlap, so another cluster's records are left out.

    Attributes:
        undecodable: records that could not be read and were left out.
    """

    def __init__(self, ids: SchemaIds, cluster: str) -> None:
        self._ids = ids
        self._cluster = cluster
        self._own_ids = {topic.name: ids.id_of(topic) for topic in TOPICS}
        self._position = dict.fromkeys(self._own_ids, 0)
        self._held: dict[str, dict[str, Any]] = {}
        self._at_end: set[str] = set()
        self.undecodable = 0

    @property
    def read_to_the_end(self) -> bool:
        """Whether every topic's end was reached once."""
        return len(self._at_end) == len(TOPICS)

    def unpack(self, messages: list[Message]) -> Iterator[Change]:
        """Yield what these messages change, in order, then the watermarks that hold by now."""
        for message in messages:
            topic = message.topic()
            if kafka.is_end(message):
                self._at_end.add(topic)
                self._position[topic] = max(self._position[topic], message.offset())
                continue
            if message.error() is not None:
                log.warning("metadata_read_error", topic=topic, error=str(message.error()))
                continue
            yield from self._change(topic, message)
            self._position[topic] = message.offset() + 1
        for kind, watermark in list(self._held.items()):
            if self._position.get(watermark["topic"], 0) >= watermark["end_offset"]:
                del self._held[kind]
                lag_us = watermark["status_lag_us"] or 0
                yield Change(kind, "", None, watermark["complete_until_us"], lag_us)

    def _change(self, topic: str, message: Message) -> Iterator[Change]:
        key, value = (message.key() or b"").decode("utf-8", "replace"), message.value()
        record = None
        if value is not None:
            try:
                record = self._decode(catalog.by_name(topic), value)
            except (UnknownSchemaError, EOFError, ValueError, LookupError, TypeError) as error:
                self.undecodable += 1
                log.warning("metadata_undecodable", topic=topic, offset=message.offset(), error=str(error))
                return
            if record["cluster"] != self._cluster:
                return
        if topic in KINDS:
            yield Change(KINDS[topic], key, record)
        elif record is not None:
            self._held[record["kind"]] = record

    def _decode(self, topic: catalog.Topic, value: bytes) -> dict[str, Any]:
        schema_id, _ = codec.split(value)
        writer = None if schema_id == self._own_ids[topic.name] else self._ids.writer_schema(schema_id)
        return codec.decode(topic.schema, value, writer)


class _StoppedError(Exception):
    """The reader was asked to end while it waited for the registry."""


class MetadataReader:
    """The thread. Changes queue up until `drain`; a failure of the thread comes out of `drain` too."""

    def __init__(self, bootstrap: str, ids: SchemaIds, cluster: str) -> None:
        self.unpacker = Unpacker(PatientIds(ids, self._wait), cluster)
        self.ready = threading.Event()
        self._bootstrap = bootstrap
        self._changes: queue.SimpleQueue[list[Change]] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="metadata", daemon=True)

    def start(self) -> None:
        """Begin to read; `ready` is set once every topic was read to its end."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread and wait for it."""
        self._stop.set()
        self._thread.join()

    def drain(self) -> list[Change]:
        """Return what has changed since the last call; raises what ended the thread, if anything did."""
        if self._failure is not None:
            raise self._failure
        changes: list[Change] = []
        while not self._changes.empty():
            changes += self._changes.get()
        return changes

    def _wait(self, _what: str) -> None:
        if self._stop.wait(RETRY_SECONDS):
            raise _StoppedError

    def _run(self) -> None:
        try:
            consumer = kafka.metadata_consumer(self._bootstrap, TOPICS)
            try:
                while not self._stop.is_set():
                    changes = list(self.unpacker.unpack(consumer.consume(BATCH_MESSAGES, BATCH_SECONDS)))
                    if changes:
                        self._changes.put(changes)
                    if self.unpacker.read_to_the_end:
                        self.ready.set()
            finally:
                consumer.close()
        except _StoppedError:
            return
        except Exception as error:  # noqa: BLE001 (the thread's outermost loop: `drain` raises it again)
            self._failure = error
            self.ready.set()
