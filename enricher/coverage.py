"""Says which batches of the raw topic a worker has delivered, down to the last half: the Coverage records.

Owns the batches of a partition whose halves are not all out yet, and what is to be told next. Pure: never sends and
never acknowledges. Called by `engine`.

A batch is settled by the first input, its own message or a later one, after which no half of its time waits for
its other half any more. When all outputs up to that input are delivered, so is everything of the batch.
"""

from __future__ import annotations

import sys
from collections import deque
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple

from enricher import raw

if TYPE_CHECKING:
    from collections.abc import Iterable

    from enricher.pair import Pairing


class Name(NamedTuple):
    """What tells a batch from all others; a header would be five times as large to keep."""

    cluster: str
    node: str
    boot_id: str
    producer_epoch: int
    partition: int
    sequence: int


def name_of(header: raw.Header) -> Name:
    """Return the name of a header's batch; texts are kept once."""
    return Name(
        sys.intern(header.cluster),
        sys.intern(header.node),
        sys.intern(header.boot_id),
        header.producer_epoch,
        header.partition,
        header.sequence,
    )


class Batch(NamedTuple):
    """A raw message that was processed, as far as its header could be read.

    Attributes:
        append_ms: its append time, never less than that of a message before it.
        name: which one; None when that could not be read.
        events: halves in it.
        repeats: those of them that were dropped.
        rejected: why it is a dead letter; None when it is not.
    """

    append_ms: int
    name: Name | None
    events: int
    repeats: int
    rejected: str | None


class Unsettled:
    """The batches of one partition of which halves may still wait for their other halves."""

    def __init__(self) -> None:
        self._batches: deque[Batch] = deque()
        self._append_ms = 0

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self._batches)

    def add(
        self, append_ms: int, header: raw.Header | None, halves: list[raw.Half] | raw.Rejected, repeats: int
    ) -> None:
        """Take a processed message: its header, what was cut from it, how many halves were dropped as repeats."""
        self._append_ms = max(self._append_ms, append_ms)
        name = None if header is None else name_of(header)
        if isinstance(halves, raw.Rejected):
            self._batches.append(Batch(self._append_ms, name, 0, 0, halves.reason))
        else:
            self._batches.append(Batch(self._append_ms, name, len(halves), repeats, None))

    def keep_last(self, span_ms: int) -> None:
        """Forget what lies more than `span_ms` before the last message: its coverage was told before."""
        while self._batches and self._batches[0].append_ms < self._append_ms - span_ms:
            self._batches.popleft()

    def settle(self, pairing: Pairing) -> tuple[Batch, ...]:
        """Return the batches of which no half waits any more, and forget them; call it after each input."""
        oldest_ms = pairing.oldest_untold_ms
        settled = []
        while self._batches and (oldest_ms is None or self._batches[0].append_ms < oldest_ms):
            settled.append(self._batches.popleft())
        return tuple(settled)


def record(batches: Iterable[Batch]) -> dict[str, Any] | None:
    """Return the Coverage record of delivered batches; None when no header of them could be read."""
    covered: dict[Name, tuple[int, int]] = {}
    dead = []
    for batch in batches:
        if batch.name is None:
            continue
        if batch.rejected is None:
            covered.setdefault(batch.name, (batch.events, batch.repeats))
        else:
            dead.append(batch.name._asdict() | {"reason": batch.rejected})
    ranges = []
    for _, names in groupby(sorted(covered), key=itemgetter(0, 1, 2, 3, 4)):
        for run in _runs(names):
            first = run[0]._asdict()
            sequence = first.pop("sequence")
            events, repeats = zip(*(covered[name] for name in run), strict=True)
            ranges.append(
                first | {"first_sequence": sequence, "events": list(events), "repeats": list(repeats)}
            )
    return {"ranges": ranges, "dead": dead} if ranges or dead else None


def _runs(names: Iterable[Name]) -> list[list[Name]]:
    """Return the stretches without holes of one process's and partition's batches, which come in order."""
    runs: list[list[Name]] = []
    for name in names:
        if runs and runs[-1][-1].sequence == name.sequence - 1:
            runs[-1].append(name)
        else:
            runs.append([name])
    return runs
