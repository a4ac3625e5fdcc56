"""The collectors' only door to Kafka: makes clients with the settings that delivery depends on.

The one importer of `confluent_kafka` in this service. Never encodes and never decides what is sent.
Called by `node.publish`, `cluster.publish` and their tests.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Protocol

from confluent_kafka import Consumer, KafkaError, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AdminClient

from collector.errors import KafkaFatalError, TopicError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from schemas.catalog import Topic

__all__ = ["KafkaError", "KafkaException", "Message", "producer", "read_to_end", "wait_for_topic"]

QUEUE_BYTES_MAX = 64 << 20
RETRY_SECONDS = 1.0
TRANSACTION_MS_MAX = (
    900_000  # the most that a broker allows unless told otherwise (transaction.max.timeout.ms)
)


class Message(Protocol):
    """What we use of a Kafka message."""

    def topic(self) -> str:
        """Return the topic."""

    def partition(self) -> int:
        """Return the partition."""

    def offset(self) -> int:
        """Return the offset."""

    def key(self) -> bytes | None:
        """Return the key."""

    def value(self) -> bytes | None:
        """Return the value; None is a tombstone."""


def producer(
    bootstrap: str,
    client_id: str,
    *,
    transactional_id: str | None = None,
    queue_bytes_max: int = QUEUE_BYTES_MAX,
) -> Any:
    """Return an idempotent producer that never gives up on a message by itself.

    A message waits in memory (`queue_bytes_max` in all, then `produce` raises BufferError) for as long as the
    broker is away. With `transactional_id` the producer is fenced by any later one of the same id.
    """
    config: dict[str, Any] = {
        "bootstrap.servers": bootstrap,
        "client.id": client_id,
        "enable.idempotence": True,
        "acks": "all",
        "compression.type": "zstd",
        "linger.ms": 5,
        "message.timeout.ms": 0,
        "message.max.bytes": 1_000_000,
        "queue.buffering.max.kbytes": queue_bytes_max // 1024,
        "partitioner": "murmur2_random",
        "topic.metadata.refresh.interval.ms": 30_000,
        "reconnect.backoff.max.ms": 2_000,
        "log_level": 2,
    }
    if transactional_id is not None:
        # A broker that was away longer than the transaction's timeout would come back with us fenced.
        config |= {
            "transactional.id": transactional_id,
            "message.timeout.ms": 60_000,
            "transaction.timeout.ms": TRANSACTION_MS_MAX,
        }
    return Producer(config, error_cb=_raise_when_fatal)


def _raise_when_fatal(error: Any) -> None:
    if error.fatal():
        raise KafkaFatalError(
            f"Kafka refused the producer for good: {error.str()}.",
            "restart the process; if it persists, look for a second instance or missing ACLs",
        )


def wait_for_topic(
    bootstrap: str, topic: Topic, *, wait: Callable[[str], None], partitions: int | None = None
) -> int:
    """Wait until the topic exists and return its partition count.

    `wait` is called with what is missing before every new attempt and decides how long to sleep and what to
    say; it may raise to give up. TopicError when `partitions` is given and differs.
    """
    admin = AdminClient({"bootstrap.servers": bootstrap, "log_level": 2})
    while True:
        try:
            metadata = admin.list_topics(topic.name, timeout=5)
        except KafkaException:
            wait(f"Kafka at {bootstrap}")
            continue
        found = metadata.topics[topic.name]
        if found.error is not None or not found.partitions:
            wait(f"topic {topic.name} (create it with `podwire topics create`)")
            continue
        count = len(found.partitions)
        if partitions is not None and count != partitions:
            raise TopicError(
                f"Topic {topic.name} has {count} partitions, not {partitions}.",
                "set PODWIRE_PARTITIONS to the topic's count; a topic's count never changes during its life",
            )
        return count


def read_to_end(bootstrap: str, topic: Topic, *, timeout_seconds: float = 60) -> Iterator[Message]:
    """Yield the committed messages of a topic of one partition from its beginning to its present end.

    Librdkafka says that the end is reached only when nothing came for a while, so a topic that is written
    without pause ends at the first message behind the end that it had at the beginning. TimeoutError after
    `timeout_seconds`, KafkaException when the broker does not answer in the beginning.
    """
    consumer = Consumer(
        {
            "bootstrap.servers": bootstrap,
            "group.id": "podwire-read-to-end",
            "enable.auto.commit": False,
            "isolation.level": "read_committed",
            "enable.partition.eof": True,
            "log_level": 2,
        }
    )
    try:
        _, end = consumer.get_watermark_offsets(TopicPartition(topic.name, 0), timeout=10)
        consumer.assign([TopicPartition(topic.name, 0, 0)])
        deadline = time.monotonic() + timeout_seconds
        while time.monotonic() < deadline:
            message = consumer.poll(RETRY_SECONDS)
            if message is None:
                continue
            if message.error() is None:
                yield message
                if message.offset() >= end - 1:
                    return
            elif message.error().code() == KafkaError._PARTITION_EOF:  # noqa: SLF001 (librdkafka's name)
                return
            elif message.error().fatal():
                raise KafkaException(message.error())
        raise TimeoutError(f"{topic.name} was not read to its end within {timeout_seconds} s")
    finally:
        consumer.close()
