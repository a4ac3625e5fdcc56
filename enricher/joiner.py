"""The thread that writes `podwire.completeness.v1`: reads reports, coverage and nodes, and publishes what follows.

One worker does it: the one that has partition 0 of the raw topic. Two that do it for a while say the same things twice.
Owns the thread, its connections and the point from which a successor reads again: the oldest report that is not
decided, kept only after what was decided is delivered. As long as it catches up, the time is that of what it reads.
Never judges: that is `completeness`. Called by `run`.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

import structlog

from enricher import kafka
from enricher.completeness import HOLD_MS, Completeness
from enricher.errors import ProcessingError
from enricher.intervals import Place
from enricher.kafka import KafkaException
from enricher.statements import key_of
from schemas import catalog, codec
from schemas.registry import PatientIds, UnknownSchemaError

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Callable

    from enricher.kafka import Message
    from schemas.registry import SchemaIds

TOPICS = (catalog.COLLECTOR, catalog.COVERAGE, catalog.NODES)
COVERAGE_MARGIN_MS = 60_000
"""How far before the first report coverage is read; between the two lie milliseconds, or a broker's change of clock."""
TICK_SECONDS = 1.0
TICK_SHARE_MAX = 0.05
"""Of the time: with very many undecided intervals they are looked at more rarely."""
KEEP_SECONDS = 10.0
RETRY_SECONDS = 1.0
REST_SECONDS = 0.5
log = structlog.get_logger()


class Joiner:
    """The thread.

    Attributes:
        undecided: intervals that are neither proven nor given up; 0 in a worker that does not join.
        heads: per topic, the offset up to which all was read, and all that was said before is delivered; none without
            joining.
    """

    def __init__(
        self,
        bootstrap: str,
        group: str,
        cluster: str,
        ids: SchemaIds,
        producer: Any,
        outcomes: Counter[str],
    ) -> None:
        self._bootstrap, self._group, self._cluster = bootstrap, group, cluster
        # The registry tells nobody that it is back.
        self._ids = PatientIds(ids, lambda _: time.sleep(RETRY_SECONDS))
        self._own_ids = {topic.name: ids.id_of(topic) for topic in TOPICS}
        self._value_id = ids.id_of(catalog.COMPLETENESS)
        self._producer = producer
        self._outcomes = outcomes
        self.undecided = 0
        self.heads: dict[str, int | None] = {}

    def start(self, mine: Callable[[], bool], fail: Callable[[BaseException], None]) -> None:
        """Join whenever `mine()`, in a thread of its own; `fail` is called with what ends it."""

        def loop() -> None:
            try:
                while True:
                    if mine():
                        self._join(mine)
                    # Partitions change hands in Faust's thread, which tells no other.
                    time.sleep(REST_SECONDS)
            except Exception as error:  # noqa: BLE001 (the thread's outermost loop)
                fail(error)

        threading.Thread(target=loop, name="completeness", daemon=True).start()

    def _join(self, mine: Callable[[], bool]) -> None:
        """Join until it is not ours any more."""
        reader = kafka.ReportReader(self._bootstrap, f"{self._group}-completeness")
        try:
            self._begin(reader, mine)
            log.info("completeness_begins")
            self._follow(reader, Completeness(self._cluster), mine)
        finally:
            reader.close()
            self.undecided = 0
            self.heads = {}

    @staticmethod
    def _begin(reader: kafka.ReportReader, mine: Callable[[], bool]) -> None:
        while mine():
            try:
                reader.begin(*TOPICS, wall_ms() - HOLD_MS, COVERAGE_MARGIN_MS)
            except KafkaException as error:
                log.warning("completeness_waits", reason=str(error))
                time.sleep(RETRY_SECONDS)  # Kafka tells nobody that it is back
            else:
                return

    def _follow(self, reader: kafka.ReportReader, state: Completeness, mine: Callable[[], bool]) -> None:
        tick_due_s, keep_due_s = 0.0, time.monotonic() + KEEP_SECONDS
        while mine():
            for message in reader.read():
                if message.error() is None:
                    self._take(state, message)
                else:
                    log.warning("completeness_read_error", error=str(message.error()))
            self._producer.poll(0)
            if len(self._producer) == 0:
                self.heads = dict(reader.positions)
            now_s = time.monotonic()
            if now_s >= tick_due_s and reader.reached_ms > 0:
                self._publish(state.tick(int(min(wall_ms(), reader.reached_ms))))
                self.undecided = state.undecided
                took_s = time.monotonic() - now_s
                tick_due_s = now_s + max(TICK_SECONDS, took_s / TICK_SHARE_MAX)
            if now_s >= keep_due_s:
                keep_due_s = now_s + KEEP_SECONDS
                self._keep(reader, state)

    def _take(self, state: Completeness, message: Message) -> None:
        topic, at_ms = message.topic(), message.timestamp()[1]
        try:
            record = self._decode(topic, message.value())
        except (UnknownSchemaError, EOFError, ValueError, LookupError, TypeError) as error:
            log.warning("completeness_undecodable", topic=topic, offset=message.offset(), error=str(error))
            return
        if topic == catalog.NODES.name:
            state.node((message.key() or b"").decode("utf-8", "replace"), record)
        elif record is not None and topic == catalog.COLLECTOR.name:
            state.report(record, Place(message.offset(), at_ms))
        elif record is not None:
            state.coverage(record, at_ms)

    def _decode(self, topic: str, value: bytes | None) -> dict[str, Any] | None:
        if value is None:
            return None
        found, _ = codec.split(value)
        writer = None if found == self._own_ids[topic] else self._ids.writer_schema(found)
        return codec.decode(catalog.by_name(topic).schema, value, writer)

    def _publish(self, records: list[dict[str, Any]]) -> None:
        for record in records:
            self._outcomes[record["outcome"]] += 1
            value = codec.encode("Completeness", record, self._value_id)
            self._produce(key_of(record).encode(), value)

    def _produce(self, key: bytes, value: bytes) -> None:
        while True:
            try:
                self._producer.produce(catalog.COMPLETENESS.name, value, key, on_delivery=_delivered)
            except BufferError:
                self._producer.poll(REST_SECONDS)
            else:
                return

    def _keep(self, reader: kafka.ReportReader, state: Completeness) -> None:
        """Keep the oldest report that is still needed, unless something that was said is not delivered yet."""
        cursor = state.cursor()
        if cursor is None or self._producer.flush(RETRY_SECONDS):
            return
        try:
            reader.keep(catalog.COLLECTOR, *cursor)
        except KafkaException as error:
            log.warning("completeness_not_kept", reason=str(error))


def _delivered(error: Any, _message: Any) -> None:
    if error is not None:
        raise ProcessingError(
            f"Kafka refused a completeness record: {error}.",
            f"look at the broker's limits and ACLs for {catalog.COMPLETENESS.name}",
        )


def wall_ms() -> int:
    """Return Unix time in ms."""
    return time.time_ns() // 1_000_000
