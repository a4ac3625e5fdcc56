"""Makes the CollectorReport: the counts that let a reader of Kafka tell whether something is missing.

Pure. Never sends. Called by `node.collect`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from schemas import codec

if TYPE_CHECKING:
    from collections.abc import Mapping

    from collector.node.columns import Origin

LOST = "lost_"
LOST_NAMES = "lost_name_ring_full"


@dataclass(frozen=True)
class Counts:
    """What happened so far; the attributes mean what the fields of `schemas/CollectorReport.avsc` do.

    Attributes:
        kernel: the probes' counters: attempted, untracked, skipped_runs, and `lost_<reason>` for each reason.
        received: events read from the ring by this process.
        published: events acknowledged by Kafka.
        inherited, in_flight, spooled: as in the schema.
        batches: acknowledged batches by partition.
        sequences, marker: batch sequences by partition.
        probes, unaccounted, unreadable, unreadable_files: as in the schema.
    """

    kernel: Mapping[str, int]
    received: int
    published: int
    spooled: int
    batches: Mapping[int, int]
    sequences: Mapping[int, int] = field(default_factory=dict)
    marker: Mapping[int, int] = field(default_factory=dict)
    probes: str = ""
    unaccounted: int = 0
    unreadable: int = 0
    unreadable_files: int = 0
    inherited: int = 0
    in_flight: int = 0

    def lost(self) -> dict[str, int]:
        """Return events lost in the kernel by reason: the counters of enum podwire_counter."""
        return {
            name.removeprefix(LOST): count for name, count in self.kernel.items() if name.startswith(LOST)
        }


@dataclass(frozen=True)
class Interval:
    """What a report speaks of, and its number; the attributes mean what the fields of the schema do."""

    sequence: int
    from_unix_us: int
    to_unix_us: int
    from_boot_us: int
    to_boot_us: int
    counted_unix_us: int
    clock_error_us: int
    last: bool


def encode(schema_id: int, origin: Origin, tier: str, counts: Counts, interval: Interval) -> bytes:
    """Return the framed CollectorReport."""
    record = {
        "cluster": origin.cluster,
        "node": origin.node,
        "boot_id": origin.boot_id,
        "producer_epoch": origin.producer_epoch,
        "sequence": interval.sequence,
        "from_unix_us": interval.from_unix_us,
        "to_unix_us": interval.to_unix_us,
        "tier": tier,
        "attempted": counts.kernel["attempted"],
        "received": counts.received,
        "published": counts.published,
        "spooled": counts.spooled,
        "lost": counts.lost(),
        "untracked": counts.kernel["untracked"],
        "skipped_runs": counts.kernel.get("skipped_runs", 0),
        "clock_error_us": interval.clock_error_us,
        "batches": _by_text(counts.batches),
        "last": interval.last,
        "counted_unix_us": interval.counted_unix_us,
        "from_boot_us": interval.from_boot_us,
        "to_boot_us": interval.to_boot_us,
        "sequences": _by_text(counts.sequences),
        "marker": _by_text(counts.marker),
        "probes": counts.probes,
        "unaccounted": counts.unaccounted,
        "unreadable": counts.unreadable,
        "unreadable_files": counts.unreadable_files,
        "inherited": counts.inherited,
        "in_flight": counts.in_flight,
    }
    return codec.encode("CollectorReport", record, schema_id)


def _by_text(by_partition: Mapping[int, int]) -> dict[str, int]:
    return {str(partition): count for partition, count in sorted(by_partition.items())}


def unaccounted(kernel: Mapping[str, int], taken_before: int, taken_after: int) -> int:
    """Return what the probes attempted beyond losses and what the ring took, read before and after the counters.

    A running probe counts an attempt before it writes, so on a busy node this may be off by a few for a moment;
    a difference that stays is a defect. Names that are told again are no events.
    """
    taken = kernel["attempted"] - sum(
        count for name, count in kernel.items() if name.startswith(LOST) and name != LOST_NAMES
    )
    return taken - min(max(taken, taken_before), taken_after)
