"""The README's SQL for readers of flows, run as it stands there, on what workers really send twice or more."""

from __future__ import annotations

import re
import sqlite3
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from enricher import corrections
from tests import halves
from tests.lives import NOW_MS, WAIT_MS, WINDOW_MS, Life, Log, pod

if TYPE_CHECKING:
    from collections.abc import Iterator

README = (Path(__file__).parents[2] / "README.md").read_text()
PAIRED, CORRECTED, TOLD_EARLY, ALONE, LONG = range(1, 6)
LATER_MS = 30_000
LATE_POD = 77


def a_worker_does_all(log: Log, now_ms: int) -> Life:
    """Send each kind of connection, up to the one that went out unsettled."""
    life = Life(log, now_ms)
    life.publish(pod(1), pod(2))
    life.take(*halves.opened(halves.key(PAIRED)))
    client, server = halves.opened(halves.key(TOLD_EARLY))
    life.take(client, halves.event("ACCEPT", "SERVER", halves.key(ALONE)))
    life.later(2 * WINDOW_MS)
    life.engine.tell_idle(life.partition, life.now_ms)
    life.later(WAIT_MS)
    life.take(server)
    life.take(*halves.opened(halves.key(LONG)))
    for number in (1, 2):
        life.take(
            *(
                halves.event("PROGRESS", role, halves.key(LONG), progress_seq=number)
                for role in ("CLIENT", "SERVER")
            )
        )
    late = {"pod_uid": halves.uid(LATE_POD).bytes, "container_id": halves.container_id(LATE_POD)}
    life.take(*(event | late for event in halves.opened(halves.key(CORRECTED))))
    life.later(WAIT_MS)
    life.settle()
    return life


@pytest.fixture
def flows() -> list[dict[str, Any]]:
    """What a topic holds after a worker, and after another that did all of it again and then corrected."""
    log = Log()
    a_worker_does_all(log, NOW_MS)
    log.inputs, log.committed = [], 0  # nothing of it was committed
    life = a_worker_does_all(log, NOW_MS + LATER_MS)
    life.publish(pod(LATE_POD))
    life.later(corrections.ROUND_INTERVAL_MS)
    life.settle()
    return log.flows()


@pytest.fixture
def table(flows: list[dict[str, Any]]) -> Iterator[sqlite3.Connection]:
    """The flows as a table with the columns of the schema."""
    columns = list(flows[0])
    database = sqlite3.connect(":memory:")
    database.row_factory = sqlite3.Row
    database.execute(f"CREATE TABLE flows ({', '.join(columns)})")
    plain = [
        [value if isinstance(value, int | str | None) else str(value) for value in flow.values()]
        for flow in flows
    ]
    database.executemany(f"INSERT INTO flows VALUES ({', '.join('?' * len(columns))})", plain)
    yield database
    database.close()


def test_flows_hold_what_the_lines_are_for(flows: list[dict[str, Any]]) -> None:
    """Repeats with a later emitted_at, one-sided records beside their BOTH, and two revisions of one record."""
    of = {
        number: [flow for flow in flows if flow["tcp_key"] == halves.key(number).hex()]
        for number in range(1, 6)
    }
    assert len({flow["emitted_at"] for flow in of[PAIRED]}) == len(of[PAIRED]) == 2
    assert [flow["observed_by"] for flow in of[TOLD_EARLY]] == ["BOTH", "CLIENT", "CLIENT", "BOTH"]
    assert {flow["revision"] for flow in of[CORRECTED]} == {0, 1}


def test_query_of_the_readme_leaves_one_record_of_each_kind(
    table: sqlite3.Connection,
) -> None:
    """Of repeats the first stays, of revisions the highest, of one-sided and BOTH the latter; all else stays."""
    (query,) = re.findall(r"```sql\n(.*?)```", README, re.DOTALL)
    found = [dict(row) for row in table.execute(query)]
    shown = sorted(
        (row["tcp_key"], row["record_type"], row["observed_by"], row["progress_seq"], row["revision"])
        for row in found
    )
    assert shown == [
        (halves.key(PAIRED).hex(), "OPEN", "BOTH", 0, 0),
        (halves.key(CORRECTED).hex(), "OPEN", "BOTH", 0, 1),
        (halves.key(TOLD_EARLY).hex(), "OPEN", "BOTH", 0, 0),
        (halves.key(ALONE).hex(), "OPEN", "SERVER", 0, 0),
        (halves.key(LONG).hex(), "OPEN", "BOTH", 0, 0),
        (halves.key(LONG).hex(), "PROGRESS", "CLIENT", 1, 0),
        (halves.key(LONG).hex(), "PROGRESS", "CLIENT", 2, 0),
        (halves.key(LONG).hex(), "PROGRESS", "SERVER", 1, 0),
        (halves.key(LONG).hex(), "PROGRESS", "SERVER", 2, 0),
    ]
    second_began = str(datetime.fromtimestamp((NOW_MS + LATER_MS) / 1000, UTC))
    assert all(row["emitted_at"] < second_began for row in found if row["revision"] == 0)
