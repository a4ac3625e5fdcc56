"""Walks sockets a little at a time: those of before the probes, long-lived ones, forgotten ones.

Owns when a walk begins and how much of it is done at once. The events themselves come out of the ring like all others.
Never waits. Called by probes.py.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SWEEPS_PER_INTERVAL = 4
"""A PROGRESS is late by at most a fourth of its interval."""
SWEEP_SECONDS_MIN, SWEEP_SECONDS_MAX = 0.25, 15.0
SECOND_LOOK_SECONDS = 5.0
"""After the first walk over open files: for sockets whose handshake was under way, or that waited to be accepted."""
SWEPT_PER_EVENT = 2
"""Entries that a step of a sweep looks at, per event that it may make: an entry costs half as much as an event."""
INITIAL_PID_NAMESPACE = 0xEFFFFFFC  # include/linux/proc_ns.h, PROC_PID_INIT_INO


def sees_all_processes() -> bool:
    """Return whether this process is in the node's own pid namespace, so that iterators walk all open files."""
    return Path("/proc/self/ns/pid").stat().st_ino == INITIAL_PID_NAMESPACE


class Pass(Protocol):
    """One way from the first to the last."""

    def advance(self, events_max: int) -> int | None:
        """Go on until about `events_max` events were made; return how many were, None at the end."""

    def close(self) -> None:
        """Leave off."""


class IteratorPass:
    """A kernel iterator's file, of which each byte that can be read is an event made."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def advance(self, events_max: int) -> int | None:
        """Read; see `Pass`."""
        try:
            return len(os.read(self._descriptor, events_max)) or None
        except BlockingIOError:  # after a million objects without one: kernel/bpf/bpf_iter.c, bpf_seq_read
            return 0

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)


class SweepPass:
    """Looks at the sockets of the map's keys, at most `keys_max` at once, each of which may make an event."""

    def __init__(
        self, keys: Iterator[np.ndarray], look_at: Callable[[np.ndarray], int], keys_max: int
    ) -> None:
        self._keys = keys
        self._look_at = look_at
        self._keys_max = keys_max
        self._left = np.empty(0, "<u8")

    def advance(self, events_max: int) -> int | None:
        """Look at some after the others, never making more than `events_max`; see `Pass`."""
        made = swept = 0
        while made < events_max and swept < SWEPT_PER_EVENT * events_max:
            if not len(self._left):
                keys = next(self._keys, None)
                if keys is None:
                    return made or None
                self._left = keys
            count = min(self._keys_max, events_max - made)
            now, self._left = self._left[:count], self._left[count:]
            made += self._look_at(now)
            swept += len(now)
        return made

    def close(self) -> None:
        """Nothing is held."""


@dataclass
class Walk:
    """Passes at given times.

    Attributes:
        open: starts a pass.
        due_s: monotonic time of the next walk's start.
        every_s: seconds between two starts, or the delays until further walks, after which there is none.
    """

    open: Callable[[], Pass]
    due_s: float
    every_s: float | list[float]
    _pass: Pass | None = field(default=None, init=False)

    def step(self, now_s: float, events_max: int) -> int:
        """Go on until about `events_max` events were made, or to the end; return how many were made.

        OSError when the kernel refuses to start a walk.
        """
        if self._pass is None:
            if now_s < self.due_s:
                return 0
            self._pass = self.open()
            self._plan(now_s)
        made = self._pass.advance(events_max)
        if made is None:
            self.close()
        return made or 0

    def _plan(self, now_s: float) -> None:
        if isinstance(self.every_s, float):
            self.due_s = now_s + self.every_s
        else:
            self.due_s = now_s + self.every_s.pop(0) if self.every_s else float("inf")

    def close(self) -> None:
        """Leave off; the next walk starts from the beginning."""
        if self._pass is not None:
            self._pass.close()
            self._pass = None


class Walks:
    """The walks of one collector.

    Attributes:
        events_max: EXISTING and PROGRESS events made at one `step`, each.
    """

    def __init__(
        self,
        find_existing: Callable[[], Pass] | None,
        sweep: Callable[[], Pass],
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
