"""What is covered of a collector process, and what the step to the next process proves.

Owns the bookkeeping of sequences; never decides what an interval is called. Pure. Called by `intervals` and
`completeness`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


BATCHES_MAX = 20_000
"""Batches kept per process and partition, 150 bytes each: half an hour of ten a second without a report of them."""


class Sums(NamedTuple):
    """Halves in some batches, and those of them that were dropped as repeats."""

    events: int
    repeats: int


class Covered:
    """The covered batches of one collector process: (node, boot id, producer epoch).

    Attributes:
        dead: reason per (partition, sequence) of batches that went to the dead letters.
        touched_ms: when something was last heard of it, the broker's clock.
    """

    def __init__(self) -> None:
        self._halves: dict[int, dict[int, Sums]] = {}
        self._floor: dict[int, int] = {}
        self.dead: dict[tuple[int, int], str] = {}
        self.touched_ms = 0

    def add(self, one: Mapping[str, Any]) -> None:
        """Take a CoveredRange; what was covered before, or is not asked for any more, changes nothing.

        Of more than BATCHES_MAX the older ones are forgotten, so nothing that needs them is ever proven.
        """
        partition, floor = one["partition"], self._floor.get(one["partition"], 0)
        halves = self._halves.setdefault(partition, {})
        counts = zip(one["events"], one["repeats"], strict=True)
        for sequence, (events, repeats) in enumerate(counts, one["first_sequence"]):
            if sequence >= floor:
                halves.setdefault(sequence, Sums(events, repeats))
        if len(halves) > BATCHES_MAX:
            self.forget_below({partition: sorted(halves)[len(halves) // 2]})

    def add_dead(self, partition: int, sequence: int, reason: str) -> None:
        """Take a DeadBatch."""
        if len(self.dead) < BATCHES_MAX:
            self.dead[partition, sequence] = reason

    def has(self, partition: int, sequence: int) -> bool:
        """Return whether a batch is covered."""
        return sequence in self._halves.get(partition, ())

    def sums(self, slices: Mapping[int, range]) -> Sums:
        """Return the sums over covered batches."""
        found = [self._halves[partition][sequence] for partition, part in slices.items() for sequence in part]
        return Sums(sum(one.events for one in found), sum(one.repeats for one in found))

    def is_prefix(self, starts: Mapping[int, int]) -> bool:
        """Return whether, per partition, what is covered from `starts` on (default 0) has no hole."""
        for partition, halves in self._halves.items():
            start = starts.get(partition, 0)
            later = [sequence for sequence in halves if sequence >= start]
            if later and max(later) - start + 1 != len(later):
                return False
        return True

    def forget_below(self, floor: Mapping[int, int]) -> None:
        """Forget the batches that no interval asks for any more."""
        for partition, first in floor.items():
            halves = self._halves.get(partition, {})
            if first > self._floor.get(partition, 0):
                self._floor[partition] = first
                for sequence in [one for one in halves if one < first]:
                    del halves[sequence]
        for key in [key for key in self.dead if key[1] < floor.get(key[0], 0)]:
            del self.dead[key]


@dataclass(eq=False)
class Step:
    """From one collector process of a node to the next that reported.

    Its marker is an empty batch in each partition that the later process sent after Kafka had acknowledged all that
    the earlier ones left; since workers acknowledge from the head, covering it means having covered all of theirs.

    Attributes:
        before, before_next: what is covered of the earlier process, and the sequences that its last report named.
        between: returns the processes between the two that never reported, as far as anything of them is covered.
        after: what is covered of the later process.
        same_probes: the later one took over probes, ring and counters.
        in_order: the earlier one ended in order: Kafka had acknowledged all that its last report named.
        marker: sequence per partition; empty until reported.
        unreadable: spool files could not be read back by the later process.
        following: the step after this one.
    """

    before: Covered
    before_next: dict[int, int]
    between: Callable[[], list[Covered]]
    after: Covered
    same_probes: bool
    in_order: bool
    marker: dict[int, int] = field(default_factory=dict)
    unreadable: bool = False
    following: Step | None = None
    _proven: bool = False

    def proven(self) -> bool:
        """Return whether all that will ever come of the earlier process has been covered."""
        if not self._proven:
            own = bool(self.marker) and all(self.after.has(*one) for one in self.marker.items())
            self._proven = own or (self.following is not None and self.following.proven())
        return self._proven

    def lost_files(self) -> bool:
        """Return whether some of what was in the spool is gone."""
        return self.unreadable or (self.following is not None and self.following.lost_files())

    def has_holes(self) -> bool:
        """Return whether a batch is missing among those that no report named."""
        ends = self.before.is_prefix(self.before_next)
        return not (ends and all(one.is_prefix({}) for one in self.between()))
