"""What a right record is, the verdict on each fault, and the table of them. Pure.

Called by `rounds`, `reuse` and `__main__`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from podwire.audit import EXIT_COMPLETE, EXIT_MISSING, EXIT_UNKNOWN, in_words

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from podwire.audit import Answer
    from podwire.flows import Flow

CLIENT, SERVER, SERVICE = "web", "api", "api"
SIDES = ("client", "server")
OF_THE_MOMENT = {"emitted_at", "metadata_age_ms"}
PLACES = ("producer_epoch", "sequence", "event_index")
MEASURED = ("clock_error_us", "event_unix_us", "established_unix_us")
OF_A_PLACE = {"event_time", "event_unix_us"} | {f"{s}_{name}" for s in SIDES for name in PLACES + MEASURED}
"""What may differ where a successor has read an event from the ring again: its place, and its times, as the clock was
measured anew."""
NAMELESS = {"IP_AMBIGUOUS", "NODE", "SERVICE_ONLY"}
"""What may stand for the side that was not heard: an address within a band, the node's, or the Service's alone."""

Loses = Literal["nothing", "counted", "dead letters", "gap"]
"""What a fault costs: nothing; events that the kernel counts; batches that are set aside; or what a collector without
pins had in its hands, which is a gap of unknown count."""


def names_wrongly(flow: Flow) -> bool:
    """Return whether the record names another pod, or another Service, than took part."""
    return (
        flow["client_pod"] not in {None, CLIENT}
        or flow["server_pod"] not in {None, SERVER}
        or flow["service_name"] not in {None, SERVICE}
    )


def leaves_open(flow: Flow) -> bool:
    """Return whether a name is missing that was to be had: a heard side's, or one's without a reason that may be."""
    for side in SIDES:
        heard = flow["observed_by"] in ("BOTH", side.upper())
        if flow[f"{side}_pod"] is None and (heard or flow[f"{side}_resolution"] not in NAMELESS):
            return True
    return flow["observed_by"] != "SERVER" and flow["service_name"] is None


def latest(flows: Iterable[Flow]) -> list[Flow]:
    """Return each record in its highest revision."""
    found: dict[tuple[object, ...], Flow] = {}
    for flow in flows:
        key = (flow["flow_id"], flow["record_type"], flow["observed_by"], flow["progress_seq"])
        if key not in found or found[key]["revision"] < flow["revision"]:
            found[key] = flow
    return list(found.values())


def difference(first: Flow, again: Flow) -> set[str]:
    """Return the fields in which a repeat contradicts the record that it repeats."""
    names = {name for name in first if first[name] != again[name]} - OF_THE_MOMENT
    moved = any(f"{side}_{name}" in names for side in SIDES for name in PLACES)
    return names - OF_A_PLACE if moved else names


def audit_complaints(answer: Answer, loses: Loses, lost: int) -> list[str]:
    """Return what `podwire audit` says that the books contradict."""
    reasons = {finding.reason for finding in answer.findings}
    counted = sum(finding.events or 0 for finding in answer.findings)
    right = {
        "nothing": answer.exit_code == EXIT_COMPLETE,
        "counted": answer.exit_code == EXIT_MISSING and counted == lost,
        "dead letters": answer.exit_code == EXIT_MISSING and reasons == {"DEAD_LETTER"},
        "gap": answer.exit_code == EXIT_MISSING and "COLLECTOR_KILLED" in reasons,
    }
    return [] if right[loses] else [f"audit: {in_words(answer)}"]


@dataclass
class Row:
    """The verdict on a fault.

    Attributes:
        made: connections that the client says it made.
        flows: distinct flow records of them.
        repeats: records that came again.
        lost: halves that the books say were lost.
        unaccounted: halves that are neither in a flow nor lost by the books.
        wrong: records that name a pod that was not there.
        unresolved: records without a name that was to be had, after corrections.
        recover_s: from the fault's end until all connections made until then were in flows.
        complaints: sums that do not hold, and answers of `podwire audit` that the books contradict.
        audit: its exit status for the time of the round; None where it was not asked.
        sums: the books of the fault's world so far.
    """

    fault: str
    made: int
    flows: int
    repeats: int
    lost: int
    unaccounted: int
    wrong: int
    unresolved: int
    recover_s: float
    complaints: list[str]
    audit: int | None = None
    sums: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        """Return whether nothing is missing unsaid and nothing is wrong."""
        return not (self.unaccounted or self.wrong or self.unresolved or self.complaints)


HEAD = (
    "fault",
    "connections",
    "flows",
    "repeats",
    "lost, accounted",
    "lost, unaccounted",
    "wrong pods",
    "unresolved",
    "recovered in s",
    "audit",
)
AUDIT = {EXIT_COMPLETE: "complete", EXIT_MISSING: "gap", EXIT_UNKNOWN: "unknown", None: "-"}


def table(rows: Sequence[Row]) -> str:
    """Return the rows as a table, with the books and the complaints below it."""
    cells = [HEAD] + [
        (
            row.fault,
            str(row.made),
            str(row.flows),
            str(row.repeats),
            str(row.lost),
            str(row.unaccounted),
            str(row.wrong),
            str(row.unresolved),
            f"{row.recover_s:.1f}",
            AUDIT[row.audit],
        )
        for row in rows
    ]
    widths = [max(len(line[column]) for line in cells) for column in range(len(HEAD))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    lines += [f"{row.fault}: {'; '.join(row.sums)}" for row in rows if row.sums]
    lines += [f"{row.fault}: {complaint}" for row in rows for complaint in row.complaints]
    return "\n".join(lines) + "\n"
