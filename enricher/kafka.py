"""The enricher's door to Kafka beside Faust: the producer, the plain consumers, and the raw topic's re-reader.

The one importer of `confluent_kafka` in this service. Never encodes, and never commits an offset of the raw topic:
that is Faust's. Called by `run`, `output`, `metadata`, `joiner`, `app` and `replay_run`.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from confluent_kafka import (
    OFFSET_BEGINNING,
    OFFSET_END,
    Consumer,
    KafkaError,
    KafkaException,
    Producer,
    TopicPartition,
)
from confluent_kafka.admin import AdminClient, ConfigResource

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from schemas.catalog import Topic

__all__ = [
    "KafkaException",
    "Message",
    "PartitionReader",
    "RawRecord",
    "ReportReader",
    "is_end",
    "metadata_consumer",
    "producer",
    "wait_for_topics",
]

POLL_SECONDS = 0.5
BATCH_MESSAGES = 50
QUEUED_KBYTES = 8192
"""A raw message may have 1 MB: what is read ahead counts in bytes, what is taken at once is little."""
AHEAD_MS_MAX = 60_000
QUEUE_MESSAGES_MAX = 1_000_000
QUEUE_KBYTES_MAX = 262_144


class Message(Protocol):
    """What we use of a consumed message."""

    def topic(self) -> str:
        """Return the topic."""

    def offset(self) -> int:
        """Return the offset."""

    def timestamp(self) -> tuple[int, int]:
        """Return (kind of timestamp, Unix time in ms)."""

    def key(self) -> bytes | None:
        """Return the key."""

    def value(self) -> bytes | None:
        """Return the value; None is a tombstone."""

    def error(self) -> Any:
        """Return None, or what went wrong in this message's stead."""


def producer(bootstrap: str, client_id: str) -> Any:
    """Return an idempotent producer that never gives up on a message by itself.

    The caller bounds what is in flight; the queue's own bounds lie above that.
    """
    return Producer(
        {
            "bootstrap.servers": bootstrap,
            "client.id": client_id,
            "enable.idempotence": True,
            "acks": "all",
            "compression.type": "zstd",
            "linger.ms": 5,
            "batch.size": 1_000_000,
            "message.timeout.ms": 0,
            "queue.buffering.max.messages": QUEUE_MESSAGES_MAX,
            "queue.buffering.max.kbytes": QUEUE_KBYTES_MAX,
            "message.max.bytes": 4_000_000,
            "partitioner": "murmur2_random",
            "reconnect.backoff.max.ms": 2_000,
            "log_level": 2,
        }
    )


def _reading(bootstrap: str, group: str) -> dict[str, Any]:
    """Return the settings of a consumer that belongs to no group, and is told where a partition ends."""
    return {
        "bootstrap.servers": bootstrap,
        "group.id": group,
        "enable.auto.commit": False,
        "enable.partition.eof": True,
        "isolation.level": "read_committed",
        "auto.offset.reset": "earliest",
        "fetch.wait.max.ms": 100,
        "reconnect.backoff.max.ms": 2_000,
        "log_level": 2,
    }


def metadata_consumer(bootstrap: str, topics: Sequence[Topic]) -> Any:
    """Return a consumer without a group at the beginning of these topics of one partition, committed records only.

    It tells the end of each partition by a message for which `is_end` holds.
    """
    consumer = Consumer(_reading(bootstrap, "podwire-enricher-metadata"))
    consumer.assign([TopicPartition(topic.name, 0, OFFSET_BEGINNING) for topic in topics])
    return consumer


def is_end(message: Message) -> bool:
    """Return whether a message stands for the end of its partition, at its offset."""
    error = message.error()
    return error is not None and error.code() == KafkaError._PARTITION_EOF  # noqa: SLF001 (librdkafka's name)


def wait_for_topics(bootstrap: str, topics: Sequence[Topic], wait: Callable[[str], None]) -> dict[str, int]:
    """Wait until the topics exist and return their partition counts by name.

    `wait` is called with what is missing before every new attempt and decides how long to sleep and what to
    say; it may raise to give up.
    """
    admin = AdminClient({"bootstrap.servers": bootstrap, "log_level": 2})
    while True:
        try:
            present = admin.list_topics(timeout=5).topics
        except KafkaException as error:
            wait(f"Kafka at {bootstrap} ({error.args[0].str()})")
            continue
        missing = [topic.name for topic in topics if topic.name not in present]
        if not missing:
            return {topic.name: len(present[topic.name].partitions) for topic in topics}
        wait(f"topic {', '.join(missing)} (create them with `podwire topics create`)")


class RawRecord(NamedTuple):
    """A message of the raw topic, with the broker's clock when it was appended, Unix time in ms."""

    offset: int
    append_ms: int
    value: bytes | None


class ReportReader:
    """Reads topics of one partition on from a point in time that it keeps in Kafka. For one thread.

    The point is an offset of the first topic and a time, committed for a group that has no members. No topic is read
    far ahead of the other in time, however much there is to read: what belongs together comes together.

    Attributes:
        positions: offset expected next per topic, but for the one read from its beginning; None before the first.
        reached_ms: append time up to which all topics were read, Unix time in ms; infinite at their ends, 0 before
            one that is read from its beginning was read to its end.
    """

    def __init__(self, bootstrap: str, group: str, timeout_seconds: float = 10.0) -> None:
        self._timeout_seconds = timeout_seconds
        self._reached_ms: dict[str, float] = {}
        self.positions: dict[str, int | None] = {}
        self._paused: set[str] = set()
        self._consumer = Consumer(_reading(bootstrap, group))

    def begin(self, first: Topic, second: Topic, whole: Topic, unix_ms: int, margin_ms: int) -> None:
        """Start the first topic where `keep` said, else at `unix_ms`, the second at that time less a margin.

        `whole` is read from its beginning. KafkaException while the broker does not answer.
        """
        (kept,) = self._consumer.committed([TopicPartition(first.name, 0)], timeout=self._timeout_seconds)
        if kept.error:
            raise KafkaException(kept.error)
        if kept.offset >= 0 and kept.metadata:
            start, unix_ms = kept.offset, int(kept.metadata)
        else:
            start = self._at(first, unix_ms)
        self._reached_ms = {first.name: unix_ms, second.name: unix_ms, whole.name: 0}
        self.positions = {first.name: None, second.name: None}
        self._consumer.assign(
            [
                TopicPartition(first.name, 0, start),
                TopicPartition(second.name, 0, self._at(second, unix_ms - margin_ms)),
                TopicPartition(whole.name, 0, OFFSET_BEGINNING),
            ]
        )

    def _at(self, topic: Topic, unix_ms: int) -> int:
        asked = [TopicPartition(topic.name, 0, max(0, unix_ms))]
        (found,) = self._consumer.offsets_for_times(asked, timeout=self._timeout_seconds)
        if found.error:
            raise KafkaException(found.error)
        return int(found.offset) if found.offset >= 0 else OFFSET_END

    def read(self) -> list[Message]:
        """Return the next messages, as soon as there are any; errors among them."""
        found: list[Message] = self._consumer.consume(BATCH_MESSAGES, POLL_SECONDS / 2)
        for message in found:
            topic, ended = message.topic(), is_end(message)
            if ended:
                self._reached_ms[topic] = math.inf
            if topic in self.positions and (ended or message.error() is None):
                self.positions[topic] = message.offset() + (not ended)
                self._reached_ms[topic] = math.inf if ended else message.timestamp()[1]
        self._pause()
        return [message for message in found if not is_end(message)]

    @property
    def reached_ms(self) -> float:
        """Append time up to which all topics were read."""
        return min(self._reached_ms.values(), default=0)

    def _pause(self) -> None:
        """Let a topic that is far ahead wait until the slowest has overtaken it."""
        slowest_ms = self.reached_ms
        for topic, reached_ms in self._reached_ms.items():
            place = [TopicPartition(topic, 0)]
            if topic not in self._paused and slowest_ms + AHEAD_MS_MAX < reached_ms < math.inf:
                self._consumer.pause(place)
                self._paused.add(topic)
            elif topic in self._paused and reached_ms <= slowest_ms:
                self._consumer.resume(place)
                self._paused.discard(topic)

    def keep(self, topic: Topic, offset: int, unix_ms: int) -> None:
        """Keep where a successor begins; KafkaException."""
        point = TopicPartition(topic.name, 0, offset, metadata=str(unix_ms))
        self._consumer.commit(offsets=[point], asynchronous=False)

    def close(self) -> None:
        """Close the connection."""
        self._consumer.close()


class PartitionReader:
    """Reads one topic beside Faust: offsets, what came before the committed one, what is live. Thread-safe."""

    def __init__(self, bootstrap: str, group: str, topic: str, timeout_seconds: float = 10.0) -> None:
        self._bootstrap = bootstrap
        self._topic = topic
        self._timeout_seconds = timeout_seconds
        self._lock = threading.Lock()
        self._consumer = Consumer(
            {
                "bootstrap.servers": bootstrap,
                "group.id": group,
                "enable.auto.commit": False,
                "enable.partition.eof": True,
                "auto.offset.reset": "earliest",
                "queued.max.messages.kbytes": QUEUED_KBYTES,
                "reconnect.backoff.max.ms": 2_000,
                "log_level": 2,
            }
        )

    def committed(self, partitions: Sequence[int]) -> dict[int, int | None]:
        """Return the group's committed offset per partition, None where there is none; KafkaException."""
        asked = [TopicPartition(self._topic, partition) for partition in partitions]
        with self._lock:
            found = self._consumer.committed(asked, timeout=self._timeout_seconds)
        for entry in found:
            if entry.error:
                raise KafkaException(entry.error)
        return {entry.partition: entry.offset if entry.offset >= 0 else None for entry in found}

    def bounds(self, partition: int, topic: str | None = None) -> tuple[int, int]:
        """Return the offsets of the first message kept and after the last one, by default here; KafkaException."""
        with self._lock:
            low, high = self._consumer.get_watermark_offsets(
                TopicPartition(topic or self._topic, partition), timeout=self._timeout_seconds
            )
        return int(low), int(high)

    def before(
        self, partition: int, offset: int, span_ms: int, given_up: Callable[[], bool]
    ) -> Generator[tuple[int, bytes | None], None, None]:
        """Yield (append time in ms, value) of what was appended within `span_ms` before the message `offset - 1`.

        Everything up to and including that message; nothing when it is gone by retention. Waits for an absent
        broker until `given_up` holds. KafkaException on what time does not heal.
        """
        low, _ = self.bounds(partition)
        if offset <= low:
            return
        last = list(self._read(partition, offset - 1, offset, given_up))
        if not last:
            return
        last_ms = last[0].timestamp()[1]
        with self._lock:
            (start,) = self._consumer.offsets_for_times(
                [TopicPartition(self._topic, partition, max(0, last_ms - span_ms))],
                timeout=self._timeout_seconds,
            )
        first = start.offset if low <= start.offset < offset else low
        with contextlib.closing(self._read(partition, first, offset, given_up)) as messages:
            for message in messages:
                yield message.timestamp()[1], message.value()

    def live(self, partition: int, given_up: Callable[[], bool]) -> dict[bytes, bytes]:
        """Return the last value of each key of a compacted topic's partition, as far as it reaches now.

        Keys whose last value is a tombstone are left out. KafkaException on what time does not heal.
        """
        low, high = self.bounds(partition)
        found: dict[bytes, bytes] = {}
        for message in self._read(partition, low, high, given_up) if low < high else ():
            key, value = message.key() or b"", message.value()
            if value is None:
                found.pop(key, None)
            else:
                found[key] = value
        return found

    def span(self, partition: int, first_ms: int, last_ms: int) -> tuple[int, int]:
        """Return the (first, end) offsets of what was appended in [first_ms, last_ms] so far; KafkaException."""
        low, high = self.bounds(partition)
        asked = [TopicPartition(self._topic, partition, max(0, at)) for at in (first_ms, last_ms + 1)]
        with self._lock:
            found = [
                self._consumer.offsets_for_times([one], timeout=self._timeout_seconds)[0] for one in asked
            ]
        first, end = (one.offset if one.offset >= 0 else high for one in found)
        return max(low, first), max(low, first, end)

    def kept_since_ms(self, partition: int) -> int | None:
        """Return the append time since when all messages are there; None when none was ever deleted; KafkaException."""
        low, high = self.bounds(partition)
        if low == 0:
            return None
        if low == high:
            return time.time_ns() // 1_000_000 - self._retention_ms()
        left_seconds = self._timeout_seconds
        for record in self.read(partition, low, high):
            if record is not None:
                return record.append_ms
            left_seconds -= POLL_SECONDS
            if left_seconds <= 0:
                break
        raise KafkaException(KafkaError(KafkaError._TIMED_OUT))  # noqa: SLF001 (librdkafka's name)

    def _retention_ms(self) -> int:
        """Return for how long the topic keeps messages; a negative one stands for no time, since they are gone."""
        admin = AdminClient({"bootstrap.servers": self._bootstrap, "log_level": 2})
        resource = ConfigResource(ConfigResource.Type.TOPIC, self._topic)
        configs = admin.describe_configs([resource], request_timeout=self._timeout_seconds)
        return max(0, int(configs[resource].result(self._timeout_seconds)["retention.ms"].value))

    def read(self, partition: int, first: int, end: int) -> Generator[RawRecord | None, None, None]:
        """Yield the messages from offset `first` to `end` (exclusive); None whenever none came for a moment."""
        with contextlib.closing(self._consumed(partition, first)) as batches:
            while first < end:
                came = False
                for message in next(batches):
                    if message.error() is None and message.offset() < end:
                        first, came = message.offset() + 1, True
                        yield RawRecord(message.offset(), message.timestamp()[1], message.value())
                if not came:
                    yield None

    def _read(
        self, partition: int, first: int, end: int, given_up: Callable[[], bool]
    ) -> Generator[Message, None, None]:
        with contextlib.closing(self._consumed(partition, first)) as batches:
            while not given_up():
                for message in next(batches):
                    if message.error() is not None:
                        if is_end(message) or message.error().fatal():
                            return
                        continue
                    if message.offset() >= end:
                        return
                    yield message
                    if message.offset() == end - 1:
                        return

    def _consumed(self, partition: int, first: int) -> Generator[list[Message], None, None]:
        """Yield for ever what comes from offset `first` on, errors among it; nothing where none came for a moment."""
        with self._lock:
            self._consumer.assign([TopicPartition(self._topic, partition, first)])
            try:
                while True:
                    yield self._consumer.consume(BATCH_MESSAGES, POLL_SECONDS)
            finally:
                self._consumer.unassign()

    def close(self) -> None:
        """Close the connection."""
        with self._lock:
            self._consumer.close()
