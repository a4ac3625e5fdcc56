"""Ends the process when input waits and none is processed, or when an orderly end does not come to its end.

Owns a thread that does not depend on the event loop, and asks Kafka itself, since Faust's consumer is what may
be stuck. Never restarts anything: the orchestrator does. Called by `run`.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from enricher import kafka
from enricher.errors import StalledError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from enricher.kafka import PartitionReader

CHECKS_PER_STALL = 6


@dataclass(frozen=True)
class Progress:
    """What the worker has done.

    Attributes:
        positions: per assigned partition, the offset expected next.
        processed: messages in all.
        excused: whether it waits for another service, for which no restart is a remedy.
    """

    positions: Mapping[int, int | None]
    processed: int
    excused: bool = False


class StallDetector:
    """Decides when waiting has become a stall. Pure: times and offsets come in."""

    def __init__(self, stall_seconds: float) -> None:
        self._stall_seconds = stall_seconds
        self._last: tuple[int, tuple[tuple[int, int | None], ...]] | None = None
        self._since = 0.0

    def stalled(self, now: float, progress: Progress, ends: Mapping[int, int]) -> bool:
        """Return whether input has waited for `stall_seconds` (monotonic `now`, in s) without any progress."""
        behind = any(
            end > (progress.positions.get(number) or 0)
            for number, end in ends.items()
            if number in progress.positions
        )
        seen = (progress.processed, tuple(sorted(progress.positions.items())))
        if not behind or progress.excused or seen != self._last:
            self._last, self._since = seen, now
            return False
        return now - self._since >= self._stall_seconds


def watch(
    reader: PartitionReader,
    stall_seconds: float,
    progress: Callable[[], Progress],
    fail: Callable[[BaseException], None],
) -> threading.Thread:
    """Start the thread; it calls `fail` with a StalledError at most once. An absent broker or registry is no stall."""
    detector = StallDetector(stall_seconds)

    def loop() -> None:
        while True:
            # A stall is what has no event; a daemon, it ends with the process.
            time.sleep(stall_seconds / CHECKS_PER_STALL)
            now = progress()
            try:
                ends = {number: reader.end(number) for number in now.positions}
            except kafka.KafkaException:
                continue
            if detector.stalled(time.monotonic(), now, ends):
                fail(
                    StalledError(
                        f"No message was processed for {stall_seconds:.0f} s although some wait.",
                        "let the orchestrator restart the process; if it persists, look at the broker",
                    )
                )
                return

    thread = threading.Thread(target=loop, name="watchdog", daemon=True)
    thread.start()
    return thread
