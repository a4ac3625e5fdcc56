"""Carries flushes to Kafka and uses the ring buffer as their write-ahead log.

Owns every flush from `submit` until Kafka has acknowledged it. Ring space goes back to the kernel only when everything
up to there was acknowledged or is in the spool on disk; where both fail, the ring fills and the kernel counts what
did not fit. Never encodes and never reads the ring. Called by `node.run`, in one thread; callbacks run inside `poll`.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import structlog

from collector.errors import KafkaFatalError
from collector.kafka import KafkaError, KafkaException
from collector.node.batches import Batch
from schemas.catalog import RAW

if TYPE_CHECKING:
    from collections.abc import Callable

    from collector.node.spool import Spool, SpoolFile

RING_USE_MAX = 0.75  # at this share of the ring nothing waits for Kafka any more
POLL_SECONDS_MIN = 0.001  # librdkafka counts in whole milliseconds: less would not wait at all
_REFUSED_FOR_GOOD = frozenset(
    (
        KafkaError.MSG_SIZE_TOO_LARGE,
        KafkaError._FATAL,  # noqa: SLF001 (librdkafka's name)
        KafkaError._UNKNOWN_PARTITION,  # noqa: SLF001
        KafkaError.INVALID_RECORD,
        KafkaError.TOPIC_AUTHORIZATION_FAILED,
        KafkaError.CLUSTER_AUTHORIZATION_FAILED,
    )
)

log = structlog.get_logger()


class Producer(Protocol):
    """What we use of librdkafka's producer."""

    def produce(
        self,
        topic: str,
        *,
        value: bytes,
        partition: int,
        on_delivery: Callable[[Any, Any], None],
        key: bytes | None = None,
    ) -> None:
        """Queue a message; BufferError when the queue is full."""

    def poll(self, timeout: float) -> int:
        """Run delivery callbacks, waiting up to `timeout` seconds for the first."""

    def purge(self) -> None:
        """Drop all messages that are queued or in flight."""


class Ring(Protocol):
    """What we use of the events ring."""

    @property
    def size_bytes(self) -> int:
        """Capacity."""

    def used_bytes(self) -> int:
        """Return what is between the position given back and the kernel's."""

    def release(self, position: int) -> None:
        """Give the space up to `position` back to the kernel."""


@dataclass(slots=True, eq=False)
class _Message:
    """A batch on its way. `value` is None while only the spool file (at index `slot`) or librdkafka holds it."""

    partition: int
    events: int
    value: bytes | None
    slot: int = 0
    sent: bool = False
    delivered: bool = False


@dataclass(slots=True, eq=False)
class _Flush:
    """What one reading of the ring became. `messages` is None for a file of an earlier process until it is read."""

    messages: list[_Message] | None
    ring_end: int
    created_s: float
    file: SpoolFile | None = None
    queued: bool = True

    def delivered(self) -> bool:
        return self.messages is not None and all(message.delivered for message in self.messages)

    def safe(self) -> bool:
        return self.file is not None or self.delivered()

    def events(self) -> int:
        return sum(message.events for message in self.messages or () if not message.delivered)


@dataclass
class Totals:
    """What the publisher did, since it was made.

    Submitted and inherited events are at any time as many as in_flight, spooled, published and unreadable together.

    Attributes:
        inherited: events that earlier processes had left in the spool.
        in_flight: events submitted that neither Kafka has acknowledged nor the spool holds; now.
        spooled: events that wait in the spool; now.
        published: events that Kafka acknowledged.
        batches: batches that Kafka acknowledged, by partition.
        spool_written: events written to the spool.
        unreadable: events lost because their spool file was damaged.
        retries: batches that librdkafka gave back and that were queued again.
    """

    inherited: int = 0
    in_flight: int = 0
    spooled: int = 0
    published: int = 0
    batches: Counter[int] = field(default_factory=Counter)
    spool_written: int = 0
    unreadable: int = 0
    retries: int = 0


class Publisher:
    """Sends flushes in order, spools those that wait too long, and releases the ring behind them.

    Attributes:
        totals: counts for report and metrics.
        is_open: False until the topic is known to be there; nothing is sent before.
    """

    def __init__(self, producer: Producer, ring: Ring, spool: Spool, spool_after_s: float) -> None:
        self._producer, self._ring, self._spool = producer, ring, spool
        self._spool_after_s = spool_after_s
        # Flushes that hold ring space, in the ring's order; that librdkafka does not hold yet, in the order of
        # sending; and how many are not delivered.
        self._holding: deque[_Flush] = deque()
        self._unsent: deque[_Flush] = deque()
        self._unfinished = 0
        self._queue_full = False
        self._refusal: KafkaFatalError | None = None
        self.totals = Totals()
        self.is_open = False
        self._earlier = [_Flush(None, 0, 0.0, file) for file in spool.leftovers()]
        for flush in self._earlier:
            self._add(flush)
        self.totals.inherited = self.totals.spooled = spool.waiting_events

    def _add(self, flush: _Flush) -> None:
        self._unsent.append(flush)
        self._unfinished += 1

    def submit(self, batches: list[Batch], ring_end: int, now_s: float) -> None:
        """Take over the batches of the events up to ring position `ring_end`; `now_s` is monotonic time."""
        messages = [_Message(batch.partition, batch.events, batch.value) for batch in batches]
        flush = _Flush(messages, ring_end, now_s)
        self._add(flush)
        self._holding.append(flush)
        self.totals.in_flight += flush.events()

    def turn(self, now_s: float) -> None:
        """Send what can be sent, spool what must be, give back ring space. KafkaFatalError when Kafka refuses us."""
        self._producer.poll(0)
        if self._refusal is not None:
            raise self._refusal
        if self.is_open:
            self._send()
        self._spool_waiting(now_s)
        self._release()

    def poll(self, timeout_s: float) -> None:
        """Wait up to `timeout_s` for acknowledgements and take them in."""
        self._producer.poll(max(timeout_s, POLL_SECONDS_MIN))

    def idle(self) -> bool:
        """Return whether all that was submitted has been acknowledged."""
        return self._unfinished == 0

    def has_earlier(self) -> bool:
        """Return whether something that earlier processes left in the spool is not acknowledged yet."""
        self._earlier = [flush for flush in self._earlier if not flush.delivered()]
        return bool(self._earlier)

    def _send(self) -> None:
        self._queue_full = False
        while self._unsent:
            flush = self._unsent[0]
            for message in self._loaded(flush):
                if message.sent:
                    continue
                assert message.value is not None
                try:
                    self._producer.produce(
                        RAW.name,
                        value=message.value,
                        partition=message.partition,
                        on_delivery=partial(self._on_delivery, flush, message),
                    )
                except BufferError:
                    self._queue_full = True
                    return
                except KafkaException as error:
                    raise _refused(error.args[0]) from error
                message.sent = True
                if flush.file is not None:
                    message.value = None
            flush.queued = False
            self._unsent.popleft()

    def _loaded(self, flush: _Flush) -> list[_Message]:
        """Return the flush's messages, with the values of unsent ones read back from its file where needed."""
        messages = flush.messages
        if messages is not None and all(m.sent or m.value is not None for m in messages):
            return messages
        batches = self._spool.read(flush.file) if flush.file is not None else None
        if batches is None:
            return self._give_up(flush)
        if messages is None:
            messages = [_Message(b.partition, b.events, b.value, slot) for slot, b in enumerate(batches)]
            flush.messages = messages
        for message in messages:
            if not message.sent:
                message.value = batches[message.slot].value
        return messages

    def _give_up(self, flush: _Flush) -> list[_Message]:
        """Count what only an unreadable file held as lost; messages in flight may still arrive."""
        known = flush.messages
        if known is None:
            assert flush.file is not None
            undelivered = lost = flush.file.events
        else:
            undelivered = flush.events()
            lost = sum(message.events for message in known if not message.sent)
        if flush.file is not None:
            self.totals.spooled -= undelivered
            self.totals.in_flight += undelivered
        self.totals.in_flight -= lost
        self.totals.unreadable += lost
        flush.file = None
        flush.messages = [message for message in known or () if message.sent]
        if flush.delivered():
            self._unfinished -= 1
        return flush.messages

    def _on_delivery(self, flush: _Flush, message: _Message, error: Any, _: Any) -> None:
        if message.delivered:
            return
        if error is not None:
            self._on_failure(flush, message, error)
            return
        message.delivered, message.value = True, None
        if flush.file is None:
            self.totals.in_flight -= message.events
        else:
            self.totals.spooled -= message.events
        self.totals.published += message.events
        self.totals.batches[message.partition] += 1
        if flush.delivered():
            self._unfinished -= 1
            if flush.file is not None:
                self._spool.delete(flush.file)

    def _on_failure(self, flush: _Flush, message: _Message, error: Any) -> None:
        if error.fatal() or error.code() in _REFUSED_FOR_GOOD:
            self._refusal = _refused(error)
        log.warning("delivery_failed", reason=error.str(), partition=message.partition)
        self.totals.retries += 1
        message.sent = False
        if not flush.queued:
            flush.queued = True
            self._unsent.appendleft(flush)

    def _spool_waiting(self, now_s: float) -> None:
        """Write to the spool what waited too long: `spool_after_s` at an empty ring, the less the fuller it is."""
        use = self._ring.used_bytes() / self._ring.size_bytes
        patience_s = self._spool_after_s * max(0.0, 1 - use / RING_USE_MAX)
        for flush in self._holding:
            late = now_s - flush.created_s >= patience_s
            stuck = self._queue_full and flush.queued
            if not flush.safe() and (late or stuck) and not self._store(flush):
                return

    def _store(self, flush: _Flush) -> bool:
        """Write the flush's unacknowledged batches to the spool; False when it does not take them."""
        assert flush.messages is not None
        kept = [message for message in flush.messages if not message.delivered]
        assert all(message.value is not None for message in kept)
        file = self._spool.write([Batch(m.partition, m.events, m.value or b"") for m in kept])
        if file is None:
            return False
        flush.file, flush.messages = file, kept
        for slot, message in enumerate(kept):
            message.slot, message.value = slot, None
        self.totals.in_flight -= file.events
        self.totals.spooled += file.events
        self.totals.spool_written += file.events
        return True

    def _release(self) -> None:
        position = None
        while self._holding and self._holding[0].safe():
            position = self._holding.popleft().ring_end
        if position is not None:
            self._ring.release(position)

    def finish(self) -> int:
        """Spool what is not acknowledged, release the ring and return the events for which that failed.

        The producer's queue is purged: what it held is in the spool, or still in the ring.
        """
        left = 0
        for flush in self._holding:
            if not flush.safe() and not self._store(flush):
                left += flush.events()
        self._release()
        self._producer.purge()
        return left


def _refused(error: Any) -> KafkaFatalError:
    return KafkaFatalError(
        f"Kafka refused a batch for good: {error.str()}.",
        f"check the ACLs, max.message.bytes and partition count of {RAW.name}; unsent events wait in the spool",
    )
