"""Measures how far Unix time is ahead of the boot clock, with a bound of the reading error.

Owns the only conversion factor between kernel event times and Unix time. Never judges the node's clock itself. Called
by `node.run` at every flush.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

READINGS = 5


class ClockOffset(NamedTuple):
    """Unix time minus boot clock.

    Attributes:
        offset_us: add it to a boot time in us to get Unix time in us.
        error_us: the true difference at the time of reading is at most this far from offset_us.
    """

    offset_us: int
    error_us: int


def _boot_ns() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def measure(
    boot_ns: Callable[[], int] = _boot_ns, unix_ns: Callable[[], int] = time.time_ns, readings: int = READINGS
) -> ClockOffset:
    """Return the tightest of several readings of Unix time, each between two readings of the boot clock.

    A reading that was interrupted lies in a wide bracket and loses against the others.
    """
    best: tuple[int, int] | None = None
    for _ in range(readings):
        before = boot_ns()
        unix = unix_ns()
        after = boot_ns()
        if best is None or after - before < best[0]:
            best = (after - before, unix - (before + after) // 2)
    assert best is not None
    width_ns, offset_ns = best
    return ClockOffset(round(offset_ns / 1000), width_ns // 2000 + 1)
