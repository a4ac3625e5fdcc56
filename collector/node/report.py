"""Makes the CollectorReport: the counts that let a reader of Kafka tell whether something is missing.

Pure. Never sends. Called by `node.collect`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from schemas import codec

if TYPE_CHECKING:
    from collections.abc import Mapping

    from collector.node.columns import Origin

LOST = "lost_"


@dataclass(frozen=True)
class Counts:
    """What happened so far; the attributes mean what the fields of `schemas/CollectorReport.avsc` do.

    Attributes:
        kernel: the probes' counters: attempted, untracked, skipped_runs, and `lost_<reason>` for each reason.
        received: events read from the ring by this process.
        published: events acknowledged by Kafka.
        spooled: events in the spool now.
        batches: acknowledged batches by partition.
    """

    kernel: Mapping[str, int]
    received: int
    published: int
    spooled: int
    batches: Mapping[int, int]

    def lost(self) -> dict[str, int]:
        """Return events lost in the kernel by reason: the counters of enum podwire_counter."""
        return {
            name.removeprefix(LOST): count for name, count in self.kernel.items() if name.startswith(LOST)
        }


@dataclass(frozen=True)
class Interval:
    """When a report speaks: from the last report to now, Unix time in us, and its number."""

    sequence: int
    from_unix_us: int
    to_unix_us: int
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
        "batches": {str(partition): count for partition, count in sorted(counts.batches.items())},
        "last": interval.last,
    }
    return codec.encode("CollectorReport", record, schema_id)
