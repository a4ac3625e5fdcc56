"""The verdict on each fault, and the table of them. Pure. Called by `rounds`, `reuse` and `__main__`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from podwire.audit import EXIT_COMPLETE, EXIT_MISSING, EXIT_UNKNOWN

if TYPE_CHECKING:
    from collections.abc import Sequence


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
        recover_s: from the fault's end until all connections made until then were in flows.
        complaints: sums that do not hold, and answers of `podwire audit` that the books contradict.
        audit: its exit status for the time of the round; None where it was not asked.
    """

    fault: str
    made: int
    flows: int
    repeats: int
    lost: int
    unaccounted: int
    wrong: int
    recover_s: float
    complaints: list[str]
    audit: int | None = None

    @property
    def good(self) -> bool:
        """Return whether nothing is missing unsaid and nothing is wrong."""
        return not (self.unaccounted or self.wrong or self.complaints)


HEAD = (
    "fault",
    "connections",
    "flows",
    "repeats",
    "lost, accounted",
    "lost, unaccounted",
    "wrong pods",
    "recovered in s",
    "audit",
)
AUDIT = {EXIT_COMPLETE: "complete", EXIT_MISSING: "gap", EXIT_UNKNOWN: "unknown", None: "-"}


def table(rows: Sequence[Row]) -> str:
    """Return the rows as a table with the complaints below it."""
    cells = [HEAD] + [
        (
            row.fault,
            str(row.made),
            str(row.flows),
            str(row.repeats),
            str(row.lost),
            str(row.unaccounted),
            str(row.wrong),
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
    lines += [f"{row.fault}: {complaint}" for row in rows for complaint in row.complaints]
    return "\n".join(lines) + "\n"
