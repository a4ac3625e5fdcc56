"""One interval of a node: what a report claims of it, what it needs to be proven, and what becomes of it at its ends.

Pure. Called by `completeness`, which decides when to say what.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

    from enricher.covered import Covered, Step

NO_EVENTS_LOST = "name_ring_full"
REASONS = (
    "RING_FULL",
    "SOCKET_MAP_FULL",
    "MISSED_OPEN",
    "MISSED_CLOSE",
    "UNTRACKED",
    "SPOOL_UNREADABLE",
    "COLLECTOR_KILLED",
    "DEAD_LETTER",
    "MISCOUNT",
    "NOT_COVERED",
    "SKIPPED_RUNS",
    "NOT_WATCHED",
)
"""Why a GAP is one; the first that holds is the record's reason."""


class Place(NamedTuple):
    """Where a report is in its topic, and when it was appended, the broker's clock."""

    offset: int
    append_ms: int


Losses = dict[str, int | None]
"""What is missing, by reason; None is an unknown count."""


KEPT = ("node", "boot_id", "producer_epoch", "sequence", "probes", "to_unix_us", "counted_unix_us")
"""Fields of the report that are asked for later; the others have been counted then."""


@dataclass(eq=False, slots=True)
class Interval:
    """What a report says of the time since the one before, until that is proven or known to be lost.

    Attributes:
        report: what is KEPT of the CollectorReport that ends it.
        base: place of the report that it is counted from.
        arrived_ms: when it was appended, the broker's clock.
        slices: the batches, per partition, that hold its events.
        received: events in them.
        losses: what is missing, by reason; None is an unknown count.
        books_open: attempted, lost and received do not agree, which may be a passing thing.
        begins: the step by which it begins, where it begins with an earlier process.
        ends: the step after which no batch of its process comes any more.
        succeeded_by: the first interval of the process after that.
        decided: nothing that may still come changes what was said.
        covered: decided, and nothing is missing but `losses`.
    """

    report: Mapping[str, Any]
    base: Place
    arrived_ms: int
    from_us: int
    uncertainty_us: int
    batches: Covered
    slices: dict[int, range]
    received: int
    losses: Losses
    books_open: bool = False
    begins: Step | None = None
    ends: Step | None = None
    succeeded_by: Interval | None = None
    decided: bool = False
    covered: bool = False
    missing: tuple[int, int] | None = None
    said: object = None

    def all_batches_covered(self) -> bool:
        """Return whether each of its batches is; remembers the first that is not, and asks for that one first."""
        if self.missing is not None and not self.batches.has(*self.missing):
            return False
        for partition, part in self.slices.items():
            for sequence in part:
                if not self.batches.has(partition, sequence):
                    self.missing = (partition, sequence)
                    return False
        self.missing = None
        return True

    def first_missing(self) -> dict[int, int]:
        """Return per partition its first batch that is not covered, or the one after its last."""
        return {
            partition: next((one for one in part if not self.batches.has(partition, one)), part.stop)
            for partition, part in self.slices.items()
        }


def make(
    report: Mapping[str, Any],
    base: Mapping[str, Any] | None,
    base_place: Place,
    batches: Covered,
    arrived_ms: int,
) -> Interval:
    """Return the interval that `report` ends, counted from `base` of the same probes, else from their loading."""
    goes_on = base is not None and process_of(base) == process_of(report)
    starts = by_number(base["sequences"]) if base is not None and goes_on else {}
    from_us, from_boot_us = (
        (report["from_unix_us"], report["from_boot_us"])
        if base is None
        else (base["to_unix_us"], base["to_boot_us"])
    )
    clock_step_us = (report["to_unix_us"] - from_us) - (report["to_boot_us"] - from_boot_us)
    return Interval(
        report={name: report[name] for name in KEPT},
        base=base_place,
        arrived_ms=arrived_ms,
        from_us=from_us,
        uncertainty_us=report["clock_error_us"] + abs(clock_step_us),
        batches=batches,
        slices={
            partition: range(starts.get(partition, 0), stop)
            for partition, stop in by_number(report["sequences"]).items()
        },
        received=report["received"] - (base["received"] if base is not None and goes_on else 0),
        losses=_losses(report, base),
    )


def counted_as_end(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return a report of which the batches are not known as the base of the interval after it.

    They hold events up to when its counts were read, after its end. So only from then on the next batches have all.
    """
    beyond_us = report["counted_unix_us"] - report["to_unix_us"]
    return dict(report) | {
        "to_unix_us": report["counted_unix_us"],
        "to_boot_us": report["to_boot_us"] + beyond_us,
    }


def begins_well(interval: Interval, losses: Losses) -> bool:
    """Return whether it is decided how the interval begins; where it begins with an earlier process, add losses."""
    step = interval.begins
    if step is None:
        return True
    if not step.proven():
        return False
    if step.lost_files():
        losses["SPOOL_UNREADABLE"] = None
    elif step.has_holes():
        losses["NOT_COVERED"] = None
    return True


def ends_well(interval: Interval, losses: Losses) -> bool:
    """Return whether it is decided what became of batches that will never come, and add losses.

    A successor that took over the ring has read again what was not acknowledged: the last batches in each partition.
    Its first interval then answers for them.
    """
    step, heir = interval.ends, interval.succeeded_by
    assert step is not None
    assert heir is not None
    if step.lost_files():
        losses["SPOOL_UNREADABLE"] = None
    elif not step.same_probes:
        losses["COLLECTOR_KILLED"] = None
    elif step.in_order or not interval.batches.is_prefix(interval.first_missing()):
        losses["NOT_COVERED"] = None
    elif not heir.decided:
        return False
    elif not heir.covered:
        losses["NOT_COVERED"] = None
    return begins_well(interval, losses)


def _losses(record: Mapping[str, Any], base: Mapping[str, Any] | None) -> Losses:
    """Return what the kernel lost since the base, or since the probes were loaded where there is none."""
    counts = {name.upper(): count for name, count in record["lost"].items() if name != NO_EVENTS_LOST}
    counts |= {"UNTRACKED": record["untracked"], "SKIPPED_RUNS": record["skipped_runs"]}
    if base is not None:
        counts = {
            name: count - base["lost"].get(name.lower(), base.get(name.lower(), 0))
            for name, count in counts.items()
        }
    losses: Losses = {name: count if count > 0 else None for name, count in counts.items() if count}
    if "SKIPPED_RUNS" in losses:
        losses["SKIPPED_RUNS"] = None  # so many at most, maybe none
    return losses


def lost_files(record: Mapping[str, Any]) -> bool:
    """Return whether the process could not read back spool files."""
    return bool(record["unreadable"] or record["unreadable_files"])


def process_of(report: Mapping[str, Any]) -> tuple[str, int]:
    """Return which process of the node a report is of."""
    return report["boot_id"], report["producer_epoch"]


def by_number(by_text: Mapping[str, int]) -> dict[int, int]:
    """Return a map by partition with numbers for keys."""
    return {int(partition): value for partition, value in by_text.items()}


def inside(key: tuple[int, int], slices: Mapping[int, range]) -> bool:
    """Return whether a (partition, sequence) is in the slices."""
    return key[1] in slices.get(key[0], ())


def rank(reason: str) -> int:
    """Return the place of a reason among several; one that is not known here comes first."""
    return REASONS.index(reason) if reason in REASONS else -1


def total(losses: Losses) -> int | None:
    """Return how many events are missing; None when none are, or nobody knows."""
    known = [count for count in losses.values() if count is not None]
    return sum(known) if known and len(known) == len(losses) else None


def in_words(reason: str, count: int | None) -> str:
    """Return a reason with its count, if known."""
    return reason if count is None else f"{reason} {count}"
