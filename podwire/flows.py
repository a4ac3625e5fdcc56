"""Reads `podwire.flows.v1`, or another topic, as dicts: a span, the last N, or for ever.

The command's only reader of Kafka messages. Never commits offsets and belongs to no consumer group that
matters. Called by `observe`, `audit`, `replay.output` and the demo.
"""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING, Any

from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

from schemas import catalog, codec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from schemas.registry import SchemaIds

Flow = dict[str, Any]

POLL_SECONDS = 0.2
ANSWER_SECONDS_MAX = 10.0
BATCH_MESSAGES_MAX = 500
NO_LEADER = (KafkaError.NOT_LEADER_FOR_PARTITION, KafkaError.LEADER_NOT_AVAILABLE)


class FlowReader:
    """Reads the flows topic from offsets of one's choice; RegistryAwayError where a schema can't be asked for.

    Attributes:
        unreadable: how many messages could not be decoded so far.
    """

    def __init__(
        self,
        bootstrap: str,
        ids: SchemaIds,
        topic: str = catalog.FLOWS.name,
        schema: str = catalog.FLOWS.schema,
    ) -> None:
        self._ids = ids
        self._schema = schema
        self._topic = topic
        self.unreadable = 0
        self._consumer = Consumer(
            {
                "bootstrap.servers": bootstrap,
                "group.id": "podwire-observe",
                "enable.auto.commit": False,
                "isolation.level": "read_committed",
                "fetch.wait.max.ms": 50,
                "log_level": 2,
            }
        )

    def close(self) -> None:
        """Leave Kafka."""
        self._consumer.close()

    def bounds(self) -> dict[int, tuple[int, int]]:
        """Return the (first, end) offsets per partition; KafkaException when broker or topic can't be reached."""
        found = self._consumer.list_topics(self._topic, timeout=ANSWER_SECONDS_MAX).topics[self._topic]
        if found.error is not None:
            raise KafkaException(found.error)
        return {partition: self._bounds_of(partition) for partition in found.partitions}

    def _bounds_of(self, partition: int) -> tuple[int, int]:
        """Return a partition's (first, end); asks again while it has no leader, as just after its creation."""
        deadline = time.monotonic() + ANSWER_SECONDS_MAX
        while True:
            at = TopicPartition(self._topic, partition)
            try:
                first, end = self._consumer.get_watermark_offsets(at, timeout=ANSWER_SECONDS_MAX)
            except KafkaException as error:
                if error.args[0].code() not in NO_LEADER or time.monotonic() > deadline:
                    raise
                time.sleep(POLL_SECONDS)  # Kafka tells nobody of an election
            else:
                return first, end

    def offsets_at(self, unix_ms: int) -> dict[int, int]:
        """Return per partition the offset of the first flow whose event time is at or after `unix_ms`."""
        bounds = self.bounds()
        asked = [TopicPartition(self._topic, partition, unix_ms) for partition in bounds]
        answered = self._consumer.offsets_for_times(asked, timeout=ANSWER_SECONDS_MAX)
        return {at.partition: at.offset if at.offset >= 0 else bounds[at.partition][1] for at in answered}

    def read(self, start: dict[int, int], stopped: Callable[[], bool]) -> Iterator[Flow | None]:
        """Yield flows from the offsets in `start` until `stopped()`; None whenever nothing came for a moment."""
        self._consumer.assign([TopicPartition(self._topic, partition, at) for partition, at in start.items()])
        while not stopped():
            messages = self._consumer.consume(BATCH_MESSAGES_MAX, POLL_SECONDS)
            for message in messages:
                if message.error() is not None:
                    raise KafkaException(message.error())
                flow = self._decode(message.value())
                if flow is not None:
                    yield flow
            if not messages:
                yield None

    def span(self, start: dict[int, int], end: dict[int, int]) -> Iterator[Flow]:
        """Yield the flows from `start` up to the offsets in `end` (exclusive), then return."""
        left = {partition for partition, at in start.items() if at < end[partition]}
        if not left:
            return
        self._consumer.assign(
            [TopicPartition(self._topic, partition, start[partition]) for partition in left]
        )
        while left:
            for message in self._consumer.consume(BATCH_MESSAGES_MAX, POLL_SECONDS):
                if message.error() is not None:
                    raise KafkaException(message.error())
                if message.offset() < end[message.partition()]:
                    flow = self._decode(message.value())
                    if flow is not None:
                        yield flow
            for at in self._consumer.position([TopicPartition(self._topic, partition) for partition in left]):
                if at.offset >= end[at.partition]:
                    left.discard(at.partition)

    def last(self, count: int, wanted: Callable[[Flow], bool], end: dict[int, int]) -> list[Flow]:
        """Return the last `count` wanted flows before `end` by event time, reading as far back as needed."""
        first = {partition: low for partition, (low, _) in self.bounds().items()}
        back = max(count, 100)
        while True:
            start = {partition: max(first[partition], end[partition] - back) for partition in end}
            found = deque(
                sorted(
                    (flow for flow in self.span(start, end) if wanted(flow)), key=lambda f: f["event_unix_us"]
                ),
                maxlen=count,
            )
            if len(found) == count or start == first:
                return list(found)
            back *= 8

    def _decode(self, value: bytes | None) -> Flow | None:
        try:
            writer = self._ids.writer_schema(codec.split(value or b"")[0])
            return codec.decode(self._schema, value or b"", writer)
        except (ValueError, LookupError, EOFError):
            self.unreadable += 1
            return None
