"""Ends the process when input waits somewhere and nothing of it gets done.

Owns a thread that does not depend on the event loop, and asks Kafka itself, since Faust's consumer is what may
be stuck. Never restarts anything: the orchestrator does. Called by `run`.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from enricher import kafka
from enricher.errors import StalledError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from enricher.kafka import PartitionReader

CHECKS_PER_STALL = 6


class Place(NamedTuple):
    """A partition of a topic."""

    topic: str
    partition: int


@dataclass(frozen=True)
class Progress:
    """How far one part of the worker has come.

    Attributes:
        heads: offset of the first message that is not done, down to its delivered outputs; None before any is known.
        beside: a number that moves with work that brings no head forward: what is read again to begin.
        shared: whether one place may wait for another, so that progress of any is progress of all.
        excused: whether it waits for another service, for which no restart is a remedy.
    """

    heads: Mapping[Place, int | None]
    beside: int = 0
    shared: bool = False
    excused: bool = False


class StallDetector:
    """Decides when waiting has become a stall. Pure; counts checks, so a process that was stopped has not stalled."""

    def __init__(self, checks: int = CHECKS_PER_STALL) -> None:
        self._checks = checks
        self._last = Progress({})
        self._still: dict[Place, int] = {}

    def stalled(self, progress: Progress, bounds: Mapping[Place, tuple[int, int]]) -> Place | None:
        """Return a place where input waits and whose head has not moved from one check to the next, `checks` times.

        `bounds` are (first offset kept, offset after the last message); a place without any is unknown for now, its
        broker away, and begins anew.
        """
        before, self._last = self._last, progress
        still = {place for place, head in progress.heads.items() if before.heads.get(place, -1) == head}
        excused = (
            progress.excused
            or progress.beside != before.beside
            or (progress.shared and len(still) < len(progress.heads))
        )
        counts = {}
        for place, head in progress.heads.items():
            first, end = bounds.get(place, (0, 0))
            if place in still and not excused and end > max(head or 0, first):
                counts[place] = self._still.get(place, 0) + 1
        self._still = counts
        return next((place for place, count in counts.items() if count >= self._checks), None)


def watch(
    reader: PartitionReader,
    stall_seconds: float,
    parts: Sequence[Callable[[], Progress]],
    fail: Callable[[BaseException], None],
) -> None:
    """Start the thread, which calls `fail` with a StalledError at most once. An absent broker or registry is no stall.

    Each part of the worker is judged by itself.
    """
    detectors = [(part, StallDetector()) for part in parts]

    def loop() -> None:
        while True:
            # A stall is what has no event; a daemon, it ends with the process.
            time.sleep(stall_seconds / CHECKS_PER_STALL)
            for part, detector in detectors:
                bounds = _bounds(reader, part().heads)
                progress = part()  # after the bounds: Kafka may have taken its time
                place = detector.stalled(progress, bounds)
                if place is not None:
                    fail(_error(place, progress.heads[place], bounds[place], stall_seconds))
                    return

    threading.Thread(target=loop, name="watchdog", daemon=True).start()


def _bounds(reader: PartitionReader, places: Mapping[Place, int | None]) -> dict[Place, tuple[int, int]]:
    found = {}
    for place in places:
        try:
            found[place] = reader.bounds(place.partition, place.topic)
        except kafka.KafkaException:
            continue
    return found


def _error(place: Place, head: int | None, bounds: tuple[int, int], seconds: float) -> StalledError:
    return StalledError(
        f"Partition {place.partition} of {place.topic} has messages up to offset {bounds[1]}, and for {seconds:g} s "
        f"nothing of it was done from offset {head if head is not None else bounds[0]} on.",
        "let the orchestrator restart the process, which loses nothing; if it persists, look at the brokers, "
        "those of the output topics too",
    )
