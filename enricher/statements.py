"""The Completeness records: what is said of an interval, of the time between two collectors, and of silence.

Pure, and decides nothing: `completeness` does, and calls it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from enricher.intervals import in_words, rank, total

if TYPE_CHECKING:
    from collections.abc import Mapping

    from enricher.covered import Sums
    from enricher.intervals import Interval, Losses

Record = dict[str, Any]


def key_of(record: Record) -> str:
    """Return the message key of a Completeness record: records with the same key speak of the same thing."""
    node = f"{record['cluster']}/{record['node']}"
    if record["outcome"] == "SILENT":
        return f"{node}/silent"
    sequence = "between" if record["report_sequence"] is None else record["report_sequence"]
    return f"{node}/{record['boot_id']}/{record['producer_epoch']}/{sequence}"


def of_interval(
    cluster: str, interval: Interval, losses: Losses, pending: str | None, sums: Sums | None, now_ms: int
) -> Record:
    """Return what is said of an interval: that it is PENDING for a reason, a GAP for its losses, or COMPLETE."""
    ordered = sorted(losses, key=rank)
    report = interval.report
    words = ", ".join(in_words(reason, losses[reason]) for reason in ordered)
    return _record(cluster, report["node"], report) | {
        "outcome": "PENDING" if pending else "GAP" if losses else "COMPLETE",
        "reason": pending or (ordered[0] if ordered else None),
        "missing": total(losses),
        "detail": pending or words or None,
        "from_unix_us": interval.from_us,
        "to_unix_us": report["to_unix_us"],
        "uncertainty_us": interval.uncertainty_us,
        "losses_until_unix_us": report["counted_unix_us"] if pending or losses else None,
        "report_sequence": report["sequence"],
        "events": None if sums is None else sums.events - sums.repeats,
        "repeats": None if sums is None else sums.repeats,
        "decided_at": now_ms,
    }


def of_unwatched(
    cluster: str, before: Mapping[str, Any], after: Mapping[str, Any], now_ms: int, *, killed: bool
) -> Record:
    """Return the gap between the last report of a process and the opening of its successor's own probes."""
    reason = "COLLECTOR_KILLED" if killed else "NOT_WATCHED"
    return _record(cluster, after["node"], after) | {
        "outcome": "GAP",
        "reason": reason,
        "detail": reason,
        "from_unix_us": before["to_unix_us"],
        "to_unix_us": after["from_unix_us"],
        "uncertainty_us": max(before["clock_error_us"], after["clock_error_us"]),
        "decided_at": now_ms,
    }


def of_silence(cluster: str, name: str, last: Mapping[str, Any] | None, since_us: int, now_ms: int) -> Record:
    """Return that nothing is heard of a node since its `last` report; None: it has never reported."""
    return _record(cluster, name, last) | {
        "outcome": "SILENT",
        "reason": "NEVER_REPORTED" if last is None else "REPORT_MISSING",
        "from_unix_us": since_us,
        "to_unix_us": now_ms * 1000,
        "decided_at": now_ms,
    }


def _record(cluster: str, name: str, report: Mapping[str, Any] | None) -> Record:
    """Return a record whose fields are null, but for who it is about."""
    return {
        "cluster": cluster,
        "node": name,
        "missing": None,
        "detail": None,
        "uncertainty_us": 0,
        "losses_until_unix_us": None,
        "boot_id": None if report is None else report["boot_id"],
        "producer_epoch": None if report is None else report["producer_epoch"],
        "report_sequence": None,
        "events": None,
        "repeats": None,
    }
