"""Writes changes and watermarks to the metadata topics, all of a change set in one transaction.

Owns the transactional producer: a later watcher of the same cluster fences this one, and readers (read_committed)
see a change set whole or not at all. What wasn't committed stays with the caller, who offers it again. Never decides
what has changed. Called by `run`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import structlog

from collector import kafka
from collector.cluster.state import TOPICS
from collector.cluster.stop import StopRequested
from collector.errors import KafkaFatalError
from schemas import catalog, codec
from schemas.registry import RegistryAwayError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from collector.cluster.metrics import Metrics
    from collector.cluster.records import Kind
    from collector.cluster.state import State
    from collector.cluster.stop import Stop
    from schemas.catalog import Topic
    from schemas.registry import SchemaIds

log = structlog.get_logger()

CALL_SECONDS_MAX = 2.0
READ_SECONDS_MAX = 600.0
KINDS_BY_TOPIC: dict[str, Kind] = {topic.name: kind for kind, topic in TOPICS.items()}


class Publisher:
    """The one writer of a cluster's metadata.

    Attributes:
        meanwhile: called every 2 s while it waits for a broker that is away.
        end_offsets: by kind, the offset after the last record that is known to be in its topic.
        complete_until_us: by kind, the watermark that is in Kafka.
    """

    def __init__(
        self,
        producer: Any,
        *,
        cluster: str,
        source: str,
        watermark_schema_id: int,
        status_lag_us: int,
        stop: Stop,
        metrics: Metrics,
    ) -> None:
        self._producer = producer
        self._cluster = cluster
        self._source = source
        self._watermark_schema_id = watermark_schema_id
        self._status_lag_us = status_lag_us
        self._stop = stop
        self._metrics = metrics
        self.meanwhile: Callable[[], None] = lambda: None
        self.end_offsets: dict[Kind, int] = dict.fromkeys(TOPICS, 0)
        self.complete_until_us: dict[Kind, int] = {}

    def take_over(self, wait: Callable[[str], None]) -> None:
        """Fence earlier watchers and end their open transactions; `wait` is called before each new attempt."""
        while True:
            try:
                self._producer.init_transactions(CALL_SECONDS_MAX)
            except kafka.KafkaException as error:
                _raise_unless_temporary(error.args[0])
                wait(f"Kafka's transaction coordinator ({error.args[0].str()})")
                continue
            return

    def publish(
        self, changes: Mapping[tuple[Kind, str], bytes | None], complete_until_us: Mapping[Kind, int]
    ) -> bool:
        """Write everything in one transaction and return whether it was committed.

        Blocks while the broker is away, up to a minute; then, or on an error that allows it, the transaction is
        aborted and False returned. KafkaFatalError when fenced; StopRequested when stopped while it waits.
        """
        try:
            self._producer.begin_transaction()
            ends = self._write_records(changes)
            self._write_watermarks(self.end_offsets | ends, complete_until_us)
            self._until_done(self._producer.commit_transaction)
        except kafka.KafkaException as error:
            _raise_if_fatal(error.args[0])
            log.warning("transaction_failed", error=error.args[0].str())
            self._metrics.transactions.labels("aborted").inc()
            self._abort()
            return False
        self.end_offsets |= ends
        self.complete_until_us.update(complete_until_us)
        self._metrics.transactions.labels("committed").inc()
        return True

    def _write_records(self, changes: Mapping[tuple[Kind, str], bytes | None]) -> dict[Kind, int]:
        """Produce the changed records and return, by kind, the offset after the last one."""
        ends: dict[str, int] = {}
        failed: list[Any] = []

        def delivered(error: Any, message: Any) -> None:
            if error is not None:
                failed.append(error)
            else:
                ends[message.topic()] = max(ends.get(message.topic(), 0), message.offset() + 1)

        for (kind, uid), value in changes.items():
            self._produce(TOPICS[kind].name, uid, value, delivered)
        self._flush()
        if failed:
            raise kafka.KafkaException(failed[0])
        return {kind: ends[topic.name] for kind, topic in TOPICS.items() if topic.name in ends}

    def _write_watermarks(self, ends: Mapping[Kind, int], complete_until_us: Mapping[Kind, int]) -> None:
        for kind, until_us in complete_until_us.items():
            if until_us <= self.complete_until_us.get(kind, 0):
                continue
            record = {
                "cluster": self._cluster,
                "kind": kind,
                "complete_until_us": until_us,
                "topic": TOPICS[kind].name,
                "end_offset": ends[kind],
                "source": self._source,
                "status_lag_us": self._status_lag_us if kind == "pods" else None,
            }
            value = codec.encode(catalog.WATERMARKS.schema, record, self._watermark_schema_id)
            self._produce(catalog.WATERMARKS.name, f"{self._cluster}/{kind}", value, None)

    def _produce(
        self, topic: str, key: str, value: bytes | None, delivered: Callable[[Any, Any], None] | None
    ) -> None:
        while True:
            try:
                self._producer.produce(topic, value, key.encode(), partition=0, on_delivery=delivered)
            except BufferError:
                self._flush()
                continue
            return

    def _flush(self) -> None:
        """Wait until the broker has everything, or has failed to take it within `message.timeout.ms`."""
        while self._producer.flush(CALL_SECONDS_MAX):
            self._go_on_waiting()

    def _abort(self) -> None:
        try:
            self._until_done(self._producer.abort_transaction)
        except kafka.KafkaException as error:
            _raise_if_fatal(error.args[0])
            log.debug("nothing_to_abort", error=error.args[0].str())

    def _until_done(self, call: Callable[[float], None]) -> None:
        """Call until it succeeds or fails in another way than for now; an unknown outcome must be asked again."""
        while True:
            try:
                call(CALL_SECONDS_MAX)
            except kafka.KafkaException as error:
                if not error.args[0].retriable() or error.args[0].txn_requires_abort():
                    raise
                self._go_on_waiting()
                continue
            return

    def _go_on_waiting(self) -> None:
        if self._stop.requested:
            raise StopRequested
        self.meanwhile()


def _raise_if_fatal(error: Any) -> None:
    if error.fatal():
        raise KafkaFatalError(
            f"Kafka refused the watcher for good: {error.str()}.",
            "if another watcher of this cluster runs, stop one of the two; else restart this one",
        )


def _raise_unless_temporary(error: Any) -> None:
    _raise_if_fatal(error)
    if not error.retriable():
        raise KafkaFatalError(
            f"Kafka refused to begin transactions: {error.str()}.",
            "grant the watcher Write and Describe on its TransactionalId and on the metadata topics",
        )


def restore(
    bootstrap: str,
    topic: Topic,
    cluster: str,
    *,
    state: State,
    publisher: Publisher,
    ids: SchemaIds,
    wait: Callable[[str], None],
) -> None:
    """Fill state and publisher with what earlier watchers wrote to a topic; `wait` comes before each new attempt."""
    while True:
        unreadable = 0
        try:
            for message in kafka.read_to_end(bootstrap, topic, timeout_seconds=READ_SECONDS_MAX):
                unreadable += not _take(message, topic, cluster, state=state, publisher=publisher, ids=ids)
        except (kafka.KafkaException, TimeoutError) as error:
            wait(f"Kafka's {topic.name} ({error})")
            continue
        except RegistryAwayError as error:  # who is away is no reason to call a record unreadable
            wait(str(error))
            continue
        if unreadable:
            log.warning("records_unreadable", topic=topic.name, count=unreadable)
        return


def _take(
    message: kafka.Message, topic: Topic, cluster: str, *, state: State, publisher: Publisher, ids: SchemaIds
) -> bool:
    """Take over one message; return False when it can't be read."""
    value, kind = message.value(), KINDS_BY_TOPIC.get(topic.name)
    if kind is not None:
        publisher.end_offsets[kind] = message.offset() + 1
    if value is None:
        if kind is not None:
            state.forget(kind, (message.key() or b"").decode("utf-8", "replace"))
        return True
    try:
        record = codec.decode(topic.schema, value, ids.writer_schema(codec.split(value)[0]))
    except (ValueError, EOFError, LookupError):
        return False
    if kind is not None:
        state.restore(kind, record)
    elif record["cluster"] == cluster:
        state.complete_until_us[record["kind"]] = record["complete_until_us"]
        publisher.complete_until_us[record["kind"]] = record["complete_until_us"]
    return True
