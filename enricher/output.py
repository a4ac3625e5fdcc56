"""Sends flows and dead letters, and knows per input message when everything of it was delivered.

Owns the producer and the count in flight. Never acknowledges input itself: `engine` does, from the head.
Single-threaded: delivery reports come in `poll`, called from the same thread as `send`. What is to follow a
delivery (`write`) is done after the producer's callbacks, so that it may send.
"""

from __future__ import annotations

from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from enricher.errors import ProcessingError

if TYPE_CHECKING:
    from collections.abc import Callable

    from enricher.coverage import Batch

FULL_POLL_SECONDS = 0.05
BY_KEY = -1
"""Leaves the partition to the producer's partitioner."""


class Producer(Protocol):
    """What we use of confluent-kafka's producer."""

    def produce(
        self,
        topic: str,
        value: bytes | None,
        key: bytes,
        partition: int = BY_KEY,
        *,
        timestamp: int,
        on_delivery: Callable[[Any, Any], None],
    ) -> None:
        """Queue a message; BufferError when the queue is full."""

    def poll(self, timeout: float) -> int:
        """Call delivery callbacks, waiting at most `timeout` seconds for the first."""


class Entry:
    """One input message, or one round of idle windows, and how much of its output is still to be delivered.

    Attributes:
        pending: outputs not yet delivered or still waiting for metadata, plus 1 while being processed.
        ack: acknowledges the input message; None for a round of idle windows.
        settled: batches of which everything is delivered once this and all before it are.
    """

    __slots__ = ("ack", "output", "pending", "settled")

    def __init__(self, output: Output, ack: Callable[[], None] | None) -> None:
        self.output = output
        self.ack = ack
        self.pending = 1
        self.settled: tuple[Batch, ...] = ()

    def delivered(self, error: Any, _message: Any) -> None:
        """Take one delivery report; ProcessingError when the message can't be delivered at all."""
        _refuse(error)
        self.pending -= 1
        self.output.in_flight -= 1


def _refuse(error: Any) -> None:
    if error is not None:
        raise ProcessingError(
            f"Kafka refused an output record: {error}.",
            "look at the broker's limits and ACLs for the output topics; nothing was acknowledged",
        )


class Output:
    """Where flows and dead letters go.

    Attributes:
        in_flight: records handed to the producer and not reported yet.
    """

    def __init__(self, producer: Producer) -> None:
        self._producer = producer
        self.in_flight = 0
        self._followups: deque[Callable[[], None]] = deque()

    def send(self, topic: str, key: bytes, value: bytes, timestamp_ms: int, entry: Entry) -> None:
        """Send one record for an input message; waits where the producer's queue is full."""
        entry.pending += 1
        self.in_flight += 1
        while True:
            try:
                self._producer.produce(topic, value, key, timestamp=timestamp_ms, on_delivery=entry.delivered)
            except BufferError:
                self._producer.poll(FULL_POLL_SECONDS)
            else:
                return

    def write(
        self,
        topic: str,
        key: bytes,
        value: bytes | None,
        timestamp_ms: int,
        *,
        partition: int = BY_KEY,
        then: Callable[[], None] | None = None,
    ) -> None:
        """Send one record (None: a tombstone) that belongs to no input message; waits as `send` does.

        `then` is called by the `poll` that learns of its delivery.
        """
        self.in_flight += 1
        delivered = partial(self._written, then)
        while True:
            try:
                self._producer.produce(
                    topic, value, key, partition, timestamp=timestamp_ms, on_delivery=delivered
                )
            except BufferError:
                self._producer.poll(FULL_POLL_SECONDS)
            else:
                return

    def poll(self, seconds: float = 0) -> None:
        """Take the delivery reports that are there, waiting at most this long for the first; do what was to follow."""
        self._producer.poll(seconds)
        while self._followups:
            self._followups.popleft()()

    def _written(self, then: Callable[[], None] | None, error: Any, _message: Any) -> None:
        _refuse(error)
        self.in_flight -= 1
        if then is not None:
            self._followups.append(then)
