"""The matrix of kernel x tier x scenario, from the lines that the kernel tests write.

Pure: lines in, text and a verdict out. Called by `__main__` and by tests of the guests.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from tests.kernel.scenarios import CELL, SCENARIOS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

BY_BADNESS = ("passed", "skipped", "failed")
MISSING = "-"

Cells = dict[tuple[str, str], str]
"""One guest's outcomes by tier and scenario; of a scenario with several tests the worst."""


def note(cells: Cells, line: str) -> None:
    """Take the line's outcome into `cells`, if it has one."""
    words = line.split("\t")
    if words[0] != CELL or len(words) != 4:
        return
    _, tier, outcome, scenario = words
    known = cells.get((tier, scenario), outcome)
    cells[tier, scenario] = max(known, outcome, key=BY_BADNESS.index)


def verdict(cells: Cells, tier: str, scenario: str) -> str:
    """Return what the matrix shows: ok and less are good, less where the tier can't see all."""
    outcome = cells.get((tier, scenario), MISSING)
    if outcome != "passed":
        return outcome.upper()
    return "less" if SCENARIOS[scenario].unseen(tier) else "ok"


def good(cells: Cells, scenarios: Sequence[str], tiers: Sequence[str]) -> bool:
    """Return whether every scenario was played and went as the table says in every tier."""
    return all(verdict(cells, tier, scenario) in {"ok", "less"} for tier in tiers for scenario in scenarios)


def matrix(guests: Mapping[str, Cells], scenarios: Sequence[str], tiers: Mapping[str, Sequence[str]]) -> str:
    """Return the table: a row per scenario, a column per guest and tier; last, how many cells of each were good."""
    heads = [(name, tier) for name in guests for tier in tiers[name]]
    rows = [
        [scenario, *(verdict(guests[name], tier, scenario) for name, tier in heads)] for scenario in scenarios
    ]
    sums = [sum(row[column] in {"ok", "less"} for row in rows) for column in range(1, len(heads) + 1)]
    table = [
        ["kernel", *(name for name, _ in heads)],
        ["tier", *(tier for _, tier in heads)],
        *rows,
        [f"good of {len(rows)}", *map(str, sums)],
    ]
    return _aligned(table)


def sums(guests: Mapping[str, Mapping[str, str]], files: Sequence[str]) -> str:
    """Return a table of tests: a row per file, a column per guest, in the cells how many ended how."""
    table = [["in the tier chosen there", *guests]]
    for file in files:
        row = [file]
        for tests in guests.values():
            ends = Counter(end for test, end in tests.items() if test.startswith(f"{file}::"))
            row.append(", ".join(f"{number} {end}" for end, number in sorted(ends.items())) or MISSING)
        table.append(row)
    return _aligned(table)


def _aligned(table: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() + "\n"
        for row in table
    )
