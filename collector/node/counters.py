"""Reads what the probes counted, and what the kernel counted of them.

Owns the sums over CPUs, the programs' skipped runs, and the count of connect calls that an LRU map gave up. Never
resets anything. Called by probes.py and bcc.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from collector.node import core
from collector.node.abi import Counter

if TYPE_CHECKING:
    from collections.abc import Mapping

PROGRAM, STATE_COPY = "program_", "program_state_"
DIAL = np.dtype([("task", "<u8"), ("sk", "<u8"), ("address", "<u8"), ("family", "<u4"), ("begun", "<u4")])
"""struct dial in bpf/maps.h"""
NAMES = [counter.name.lower() for counter in Counter if counter is not Counter.COUNTERS]


class Counters:
    """The counters of one set of probes."""

    def __init__(self, descriptors: Mapping[str, int]) -> None:
        """Take file descriptors by name: maps `counters` and `dials`, programs `program_<name>`."""
        self._counters, self._dials = descriptors["counters"], descriptors["dials"]
        programs = {name: number for name, number in descriptors.items() if name.startswith(PROGRAM)}
        self._copies = [number for name, number in programs.items() if name.startswith(STATE_COPY)]
        self._others = [number for name, number in programs.items() if not name.startswith(STATE_COPY)]
        self._forgotten = 0

    def read(self) -> dict[str, int]:
        """Return the counters since the probes were loaded, by the names of enum podwire_counter, without dials_*, and:

        skipped_runs: runs of probes that the kernel left out because the same probe ran on that CPU, and that no copy
            of it can have made up for. An upper bound of what the probes were not shown.
        forgotten_connects: calls of connect() that `dials` gave up for others. Never too many; exact when none is
            under way.
        """
        counts = self._sums()
        forgotten = self._forgotten_connects(counts.pop("dials_entered"), counts.pop("dials_left"))
        skipped = min(map(core.skipped_runs, self._copies)) + sum(map(core.skipped_runs, self._others))
        return counts | {"skipped_runs": skipped, "forgotten_connects": forgotten}

    def _sums(self) -> dict[str, int]:
        return dict(zip(NAMES, core.sum_over_cpus(self._counters, len(NAMES)), strict=True))

    def _forgotten_connects(self, entered: int, left: int) -> int:
        """Return how many entered that neither left nor are there: counted first, looked for, then counted out."""
        if entered - left > self._forgotten:
            some = (values.view(DIAL) for _, values in core.map_entries(self._dials, DIAL.itemsize))
            there = sum(int(np.count_nonzero(dials["sk"])) for dials in some)
            self._forgotten = max(self._forgotten, entered - self._sums()["dials_left"] - there)
        return self._forgotten
