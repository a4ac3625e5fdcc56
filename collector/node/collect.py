"""The node collector's loop: ring to batches to Kafka, with reports and metrics.

Owns the order of work and the counts; everything it touches is handed in, so it runs without kernel and broker.
Never waits: `run` waits between turns. Called by `node.run` and bench/collector.py.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

import structlog

from collector.node import report
from collector.node.abi import EVENT
from collector.node.clock import ClockOffset, measure
from collector.node.metrics import Snapshot
from collector.node.publish import Ring
from schemas.catalog import COLLECTOR

if TYPE_CHECKING:
    from collections.abc import Callable

    from collector.node.batches import Batcher
    from collector.node.columns import Events, Origin, Owners
    from collector.node.metrics import Metrics
    from collector.node.publish import Producer, Publisher
    from collector.node.spool import Spool

RECORDS_MAX = 8192  # per turn
RING_SHARE_PER_TURN = 1 / 16  # read before this share of the ring has filled again
RING_RECORD_BYTES = EVENT.itemsize + 8
SNAPSHOT_SECONDS = 1.0
STALLED_SECONDS = 60.0
FINISH_POLL_SECONDS = 0.05
SETTLE_US = 100_000
"""A probe may stand still for a moment between stamping an event and putting it into the ring."""
LAST_REPORT_SECONDS = 3.0

log = structlog.get_logger()


class EventRing(Ring, Protocol):
    """The ring as the publisher needs it, and how far it was read."""

    @property
    def read_position(self) -> int:
        """First byte that has not been read."""

    def producer_position(self) -> int:
        """Return the first byte that the kernel has not reserved."""


class Cgroups(Protocol):
    """What is known about cgroups and network namespaces, always ahead of the events."""

    @property
    def told_again(self) -> int:
        """Names that came although they were known."""

    def owners_of(self, events: Events) -> Owners:
        """Return who owns each event."""


class Probes(Protocol):
    """The kernel half, attached."""

    @property
    def events(self) -> EventRing:
        """The events ring."""

    @property
    def cgroups(self) -> Cgroups:
        """The owners."""

    @property
    def life(self) -> str:
        """Which ring and counters these are; empty when that can't be told."""

    def read(self, records_max: int) -> Events:
        """Return the next events, at most `records_max`."""

    def tend(self, now_s: float) -> int:
        """Make a few EXISTING and PROGRESS events that are due; return how many."""

    def counters(self) -> dict[str, int]:
        """Return attempted, untracked, skipped_runs and `lost_<reason>` since the probes were loaded."""


@dataclass(frozen=True)
class Pace:
    """How often: seconds between two readings of the ring at most, and between two reports."""

    flush_interval_s: float
    report_interval_s: float


class NodeCollector:
    """The loop of one collector after everything was opened.

    Attributes:
        received: events read from the ring.
    """

    def __init__(
        self, probes: Probes, publisher: Publisher, spool: Spool, metrics: Metrics, pace: Pace
    ) -> None:
        self._probes, self._publisher, self._spool = probes, publisher, spool
        self._metrics, self._pace = metrics, pace
        self._batcher: Batcher | None = None
        self._reporter: Reporter | None = None
        self._clock = measure()
        self._report_due_s = self._snapshot_due_s = 0.0
        self._turned_s = time.monotonic()
        self._marker: dict[int, int] = {}
        self._sequences: dict[int, int] = {}
        self._opened_boot_us = self._read_until_boot_us = boot_us()
        self.received = 0

    def start_reading(self, batcher: Batcher, reporter: Reporter) -> None:
        """Read the ring from now on; until then events wait in it."""
        self._batcher, self._reporter = batcher, reporter
        reporter.begin(self._opened_boot_us, measure())

    def turn(self, now_s: float) -> float:
        """Do one round of work at monotonic time `now_s`; return the seconds that the next one may wait.

        KafkaFatalError when Kafka refuses us for good.
        """
        read = self._read(now_s)
        self._publisher.turn(now_s)
        if now_s >= self._snapshot_due_s:
            self._snapshot_due_s = now_s + SNAPSHOT_SECONDS
            self._metrics.update(self._snapshot())
        if self._reporter is not None and self._publisher.is_open and now_s >= self._report_due_s:
            self._report_due_s = now_s + self._pace.report_interval_s
            self._reporter.send(self.counts(), self._read_until_boot_us, last=False)
        elapsed_s, self._turned_s = now_s - self._turned_s, now_s
        ring_records = self._probes.events.size_bytes / RING_RECORD_BYTES
        return next_turn_s(self._pace.flush_interval_s, read, elapsed_s, ring_records)

    def is_reading(self) -> bool:
        """Return whether `start_reading` was called."""
        return self._batcher is not None

    def _read(self, now_s: float) -> int:
        """Read a slice of the ring and submit its batches; return its number of events."""
        if self._batcher is None:
            return 0
        if not self._marker and not self._publisher.has_earlier():
            self._mark(self._batcher, now_s)
        self._probes.tend(now_s)
        began_boot_us = boot_us()
        end = self._probes.events.producer_position()
        events = self._probes.read(RECORDS_MAX)
        if len(events):
            self.received += len(events)
            self._metrics.flush_events.observe(len(events))
            self._clock = measure()
            owners = self._probes.cgroups.owners_of(events)
            batches = self._batcher.batches(events, owners, self._clock)
            self._publisher.submit(batches, self._probes.events.read_position, now_s)
        self._sequences = self._batcher.sequences()
        if self._probes.events.read_position >= end:
            self._read_until_boot_us = max(self._read_until_boot_us, began_boot_us - SETTLE_US)
        return len(events)

    def _mark(self, batcher: Batcher, now_s: float) -> None:
        """Send an empty batch to each partition: all that earlier processes have sent lies before it."""
        self._marker = batcher.sequences()
        self._publisher.submit(batcher.empty(self._clock), self._probes.events.read_position, now_s)

    def unread_bytes(self) -> int:
        """Return how much of the ring was not read."""
        events = self._probes.events
        return events.producer_position() - events.read_position

    def counts(self) -> report.Counts:
        """Return what happened so far."""
        totals, ring = self._publisher.totals, self._probes.events
        before = ring.producer_position() // RING_RECORD_BYTES
        kernel = self._probes.counters()
        return report.Counts(
            kernel=kernel,
            received=self.received,
            published=totals.published,
            spooled=totals.spooled,
            batches=dict(totals.batches),
            sequences=self._sequences,
            marker=self._marker,
            probes=self._probes.life,
            unaccounted=report.unaccounted(kernel, before, ring.producer_position() // RING_RECORD_BYTES),
            unreadable=totals.unreadable,
            unreadable_files=self._spool.unreadable_files,
            inherited=totals.inherited,
            in_flight=totals.in_flight,
        )

    def _snapshot(self) -> Snapshot:
        totals, ring = self._publisher.totals, self._probes.events
        return Snapshot(
            counts=self.counts(),
            spool_written=totals.spool_written,
            spool_unreadable=totals.unreadable,
            spool_unreadable_files=self._spool.unreadable_files,
            spool_used_bytes=self._spool.used_bytes,
            retries=totals.retries,
            names_told_again=self._probes.cgroups.told_again,
            ring_use_ratio=ring.used_bytes() / ring.size_bytes,
            clock_error_us=self._clock.error_us,
        )

    def finish(self, deadline_s: float, wait: Callable[[float], None]) -> int:
        """Read and publish what is in the ring, spool what Kafka does not take in time, send a last report.

        `wait` takes seconds and lets acknowledgements in; `deadline_s` is monotonic time. Returns the events that
        are neither in Kafka nor on disk: they are lost unless their ring is pinned.
        """
        end = self._probes.events.producer_position()
        self._read(time.monotonic())
        while self._batcher is not None and self._probes.events.read_position < end:
            before = self._probes.events.read_position
            self.turn(time.monotonic())
            if self._probes.events.read_position == before:  # a record that its CPU never finished
                break
        self._batcher = None
        while self._publisher.is_open and not self._publisher.idle() and time.monotonic() < deadline_s:
            self._publisher.turn(time.monotonic())
            wait(FINISH_POLL_SECONDS)
        if self._reporter is not None and self._publisher.is_open and self._publisher.idle():
            self._reporter.send(self.counts(), self._read_until_boot_us, last=True)
            until_s = time.monotonic() + LAST_REPORT_SECONDS
            while self._reporter.waiting() and time.monotonic() < until_s:
                wait(FINISH_POLL_SECONDS)
        left = self._publisher.finish() + self.unread_bytes() // RING_RECORD_BYTES
        log.info("finished", **asdict(self.counts()), left=left)
        return left

    def unhealthy(self) -> str | None:
        """Return None, or why this process should be restarted: the loop no longer turns. Any thread may ask."""
        silent_s = time.monotonic() - self._turned_s
        return f"no turn of the loop for {silent_s:.0f} s" if silent_s > STALLED_SECONDS else None


class Reporter:
    """Sends CollectorReports."""

    def __init__(self, producer: Producer, origin: Origin, tier: str, schema_id: int) -> None:
        self._producer, self._origin, self._tier, self._schema_id = producer, origin, tier, schema_id
        self._from_unix_us, self._from_boot_us = origin.producer_epoch, 0
        self._sent = self._answered = 0

    def begin(self, opened_boot_us: int, clock: ClockOffset) -> None:
        """Let the first report begin when the probes were open."""
        self._from_boot_us, self._from_unix_us = opened_boot_us, opened_boot_us + clock.offset_us

    def waiting(self) -> bool:
        """Return whether Kafka has not answered all reports yet."""
        return self._answered < self._sent

    def send(self, counts: report.Counts, read_until_boot_us: int, *, last: bool) -> None:
        """Queue a report of `counts`, just taken; all events of before `read_until_boot_us` were read or lost.

        Where the queue is full the next report speaks for this one too.
        """
        clock = measure()
        interval = report.Interval(
            sequence=self._sent,
            from_unix_us=self._from_unix_us,
            to_unix_us=read_until_boot_us + clock.offset_us,
            from_boot_us=self._from_boot_us,
            to_boot_us=read_until_boot_us,
            counted_unix_us=boot_us() + clock.offset_us,
            clock_error_us=clock.error_us,
            last=last,
        )
        value = report.encode(self._schema_id, self._origin, self._tier, counts, interval)
        try:
            self._producer.produce(
                COLLECTOR.name,
                key=self._origin.node.encode(),
                value=value,
                partition=0,
                on_delivery=self._on_delivery,
            )
        except BufferError:
            log.warning("report_skipped", reason="the producer's queue is full")
            return
        self._sent += 1
        self._from_unix_us, self._from_boot_us = interval.to_unix_us, interval.to_boot_us

    def _on_delivery(self, error: Any, _: Any) -> None:
        self._answered += 1
        if error is not None:
            log.warning("report_not_delivered", reason=error.str())


def boot_us() -> int:
    """Return the boot clock, which kernel events carry, in us."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1000


def next_turn_s(interval_s: float, read: int, elapsed_s: float, ring_records: float) -> float:
    """Return the seconds to wait: `interval_s`, or less where at this rate too much of the ring would fill."""
    if read >= RECORDS_MAX:
        return 0.0
    records_per_second = read / max(elapsed_s, 1e-3)
    return min(interval_s, ring_records * RING_SHARE_PER_TURN / max(records_per_second, 1.0))
