"""Says which batches of the raw topic a worker has delivered, down to the last half: the Coverage records.

Owns the batches of a partition whose halves are not all out yet, and what is to be told next. Pure: never sends and
never acknowledges. Called by `engine`.

A batch is settled by the first input, its own message or a later one, after which no half of its time waits for
its other half any more. When all outputs up to that input are delivered, so is everything of the batch.
"""

from __future__ import annotations

from collections import deque
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple

from enricher import raw

if TYPE_CHECKING:
    from collections.abc import Iterable

    from enricher.pair import Pairing


class Batch(NamedTuple):
    """A raw message that was processed, as far as its header could be read.

    Attributes:
        append_ms: its append time, never less than that of a message before it.
        header: its header; None when that could not be read.
        events: halves in it.
        repeats: those of them that were dropped.
        rejected: why it is a dead letter; None when it is not.
    """

    append_ms: int
    header: raw.Header | None
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
        if isinstance(halves, raw.Rejected):
            self._batches.append(Batch(self._append_ms, header, 0, 0, halves.reason))
        else:
            self._batches.append(Batch(self._append_ms, header, len(halves), repeats, None))

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
    covered: dict[tuple[str, str, str, int, int, int], tuple[int, int]] = {}
    dead = []
    for batch in batches:
        header = batch.header
        if header is None:
            continue
        who = (header.cluster, header.node, header.boot_id, header.producer_epoch, header.partition)
        if batch.rejected is None:
            covered.setdefault((*who, header.sequence), (batch.events, batch.repeats))
        else:
            dead.append(_named(who) | {"sequence": header.sequence, "reason": batch.rejected})
    ranges = []
    for who, sequences in groupby(sorted(covered), key=itemgetter(0, 1, 2, 3, 4)):
        for first, run in _runs([key[5] for key in sequences]):
            counts = [covered[(*who, sequence)] for sequence in run]
            ranges.append(
                _named(who)
                | {
                    "first_sequence": first,
                    "events": [events for events, _ in counts],
                    "repeats": [repeats for _, repeats in counts],
                }
            )
    return {"ranges": ranges, "dead": dead} if ranges or dead else None


def _named(who: tuple[str, str, str, int, int]) -> dict[str, Any]:
    return dict(zip(("cluster", "node", "boot_id", "producer_epoch", "partition"), who, strict=True))


def _runs(sequences: list[int]) -> list[tuple[int, list[int]]]:
    """Return (first, numbers) of each stretch without holes of ascending numbers."""
    runs: list[tuple[int, list[int]]] = []
    for number in sequences:
        if runs and runs[-1][1][-1] == number - 1:
            runs[-1][1].append(number)
        else:
            runs.append((number, [number]))
    return runs
