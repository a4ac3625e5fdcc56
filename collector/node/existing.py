"""Walks the kernel's iterators a little at a time: sockets of before the probes, long-lived ones, forgotten ones.

Owns when a walk begins and how much of it is done at once. The events themselves come out of the ring like all others.
Never waits. Called by probes.py.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

SWEEPS_PER_INTERVAL = 4
"""A PROGRESS is late by at most a fourth of its interval."""
SWEEP_SECONDS_MIN, SWEEP_SECONDS_MAX = 0.25, 15.0
SECOND_LOOK_SECONDS = 5.0
"""After the first walk over open files: for sockets whose handshake was under way, or that waited to be accepted."""
INITIAL_PID_NAMESPACE = 0xEFFFFFFC  # include/linux/proc_ns.h, PROC_PID_INIT_INO


def sees_all_processes() -> bool:
    """Return whether this process is in the node's own pid namespace, so that iterators walk all open files."""
    return Path("/proc/self/ns/pid").stat().st_ino == INITIAL_PID_NAMESPACE


@dataclass
class Walk:
    """One iterator, walked from end to end at given times.

    Attributes:
        open: starts a walk; returns a file descriptor, of which each byte that can be read is an event made.
        due_s: monotonic time of the next walk's start.
        every_s: seconds between two starts, or the delays until further walks, after which there is none.
    """

    open: Callable[[], int]
    due_s: float
    every_s: float | list[float]
    _descriptor: int | None = field(default=None, init=False)

    def step(self, now_s: float, events_max: int) -> int:
        """Go on until about `events_max` events were made, or to the end; return how many were made.

        OSError when the kernel refuses to start a walk.
        """
        if self._descriptor is None:
            if now_s < self.due_s:
                return 0
            self._descriptor = self.open()
            self._plan(now_s)
        try:
            made = len(os.read(self._descriptor, events_max))
        except (
            BlockingIOError
        ):  # after a million objects without an event: kernel/bpf/bpf_iter.c, bpf_seq_read
            return 0
        if not made:
            self.close()
        return made

    def _plan(self, now_s: float) -> None:
        if isinstance(self.every_s, float):
            self.due_s = now_s + self.every_s
        else:
            self.due_s = now_s + self.every_s.pop(0) if self.every_s else float("inf")

    def close(self) -> None:
        """Leave off; the next walk starts from the beginning."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


class Walks:
    """The walks of one collector.

    Attributes:
        events_max: EXISTING and PROGRESS events made at one `step`, each.
    """

    def __init__(
        self,
        find_existing: Callable[[], int] | None,
        sweep: Callable[[], int],
        progress_interval_s: float,
        events_max: int,
    ) -> None:
        self.events_max = events_max
        period_s = min(max(progress_interval_s / SWEEPS_PER_INTERVAL, SWEEP_SECONDS_MIN), SWEEP_SECONDS_MAX)
        self._walks = [Walk(sweep, 0.0, period_s if progress_interval_s else SWEEP_SECONDS_MAX)]
        if find_existing:
            self._walks.insert(0, Walk(find_existing, 0.0, [SECOND_LOOK_SECONDS]))

    def step(self, now_s: float) -> int:
        """Do a little at monotonic time `now_s`; return the events that were made."""
        return sum(walk.step(now_s, self.events_max) for walk in self._walks)

    def close(self) -> None:
        """Leave off for good."""
        for walk in self._walks:
            walk.close()
        self._walks.clear()
