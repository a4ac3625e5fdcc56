"""What is said of one interval: what the counts say, what is not known yet, and who is silent."""

from __future__ import annotations

from typing import Any

import pytest

from enricher.completeness import GRACE_MS, HOLD_MS, Completeness
from enricher.covered import BATCHES_MAX
from enricher.intervals import Place
from enricher.statements import key_of
from schemas import catalog, codec

START_US = 1_790_000_000_000_000
SECOND_US = 1_000_000


def report(number: int, **changes: Any) -> dict[str, Any]:
    """Return report `number` of node-1, each of one second, with ten events in one batch of partition 0."""
    to_us = (number + 1) * SECOND_US
    return {
        "cluster": "c",
        "node": "node-1",
        "boot_id": "boot",
        "producer_epoch": 1,
        "sequence": number,
        "from_unix_us": START_US + to_us - SECOND_US,
        "to_unix_us": START_US + to_us,
        "from_boot_us": to_us - SECOND_US,
        "to_boot_us": to_us,
        "counted_unix_us": START_US + to_us + 100,
        "tier": "fentry",
        "attempted": 10 * (number + 1),
        "received": 10 * (number + 1),
        "published": 0,
        "spooled": 0,
        "lost": {"ring_full": 0, "name_ring_full": number},
        "untracked": 0,
        "skipped_runs": 0,
        "clock_error_us": 1,
        "batches": {},
        "last": False,
        "sequences": {"0": number + 1, "1": 0},
        "marker": {},
        "probes": "7",
        "unaccounted": 0,
        "unreadable": 0,
        "unreadable_files": 0,
        "inherited": 0,
        "in_flight": 10 * (number + 1),
    } | changes


def covered(number: int, events: int = 10, repeats: int = 0) -> dict[str, Any]:
    """Return the Coverage of batch `number`."""
    one = {"cluster": "c", "node": "node-1", "boot_id": "boot", "producer_epoch": 1, "partition": 0}
    return {
        "ranges": [one | {"first_sequence": number, "events": [events], "repeats": [repeats]}],
        "dead": [],
    }


class Story:
    """A joiner that is fed; a report arrives when its interval ends."""

    def __init__(self) -> None:
        self.state = Completeness("c")
        self.now_ms = START_US // 1000
        self.offset = 0

    def report(self, record: dict[str, Any]) -> None:
        """Let a report arrive."""
        self.now_ms = START_US // 1000 + (record["sequence"] + 1) * 1000
        self.state.report(record, Place(self.offset, self.now_ms))
        self.offset += 1

    def cover(self, *numbers: int, **counts: int) -> None:
        """Let batches be covered."""
        for number in numbers:
            self.state.coverage(covered(number, **counts), self.now_ms)

    def said(self, later_ms: int = 0) -> list[tuple[Any, ...]]:
        """Return (outcome, reason, missing) of what is said now."""
        return [(one["outcome"], one["reason"], one["missing"]) for one in self.records(later_ms)]

    def records(self, later_ms: int = 0) -> list[dict[str, Any]]:
        """Return what is said now; all of it can be encoded."""
        records = self.state.tick(self.now_ms + later_ms)
        for record in records:
            assert (
                codec.decode("Completeness", codec.encode("Completeness", record, 10))["node"]
                == record["node"]
            )
        return records


def test_interval_is_complete_when_its_batches_are_covered_and_is_said_once() -> None:
    """Report and coverage may come in either order."""
    story = Story()
    story.report(report(0))
    assert story.said() == []
    story.cover(0, repeats=2)
    (record,) = story.records()
    assert (record["outcome"], record["reason"], record["events"], record["repeats"]) == (
        "COMPLETE",
        None,
        8,
        2,
    )
    assert (record["from_unix_us"], record["to_unix_us"]) == (START_US, START_US + SECOND_US)
    story.cover(0, 1)
    story.report(report(1))
    assert story.said() == [("COMPLETE", None, None)]
    assert story.said() == []
    assert story.state.undecided == 0


def test_quiet_interval_is_complete_without_any_batch() -> None:
    """Reports alone prove that a node on which nothing happened is complete."""
    story = Story()
    for number in range(3):
        story.report(report(number, sequences={"0": 0, "1": 0}, received=0, attempted=0))
    assert story.said() == [("COMPLETE", None, None)] * 3


def test_losses_of_the_kernel_are_a_gap_with_their_count() -> None:
    """Counters are cumulative: each interval misses what was lost since the report before; names are no events."""
    story = Story()
    story.report(report(0))
    story.report(report(1, lost={"ring_full": 5, "socket_map_full": 2, "name_ring_full": 9}, untracked=1))
    story.report(report(2, lost={"ring_full": 5, "socket_map_full": 2, "name_ring_full": 9}, untracked=1))
    story.cover(0, 1, 2)
    records = story.records()
    assert [(one["outcome"], one["reason"], one["missing"]) for one in records] == [
        ("COMPLETE", None, None),
        ("GAP", "RING_FULL", 8),
        ("COMPLETE", None, None),
    ]
    assert records[1]["detail"] == "RING_FULL 5, SOCKET_MAP_FULL 2, UNTRACKED 1"
    assert records[1]["losses_until_unix_us"] == START_US + 2 * SECOND_US + 100


@pytest.mark.parametrize(
    ("changes", "reason", "missing"),
    [
        ({"skipped_runs": 4}, "SKIPPED_RUNS", None),
        ({"lost": {"new_counter": 3}}, "NEW_COUNTER", 3),
        ({"received": 13}, "MISCOUNT", 3),
    ],
    ids=["skipped", "unknown_counter", "fewer_events_than_read"],
)
def test_what_the_counts_say_is_never_ignored(
    changes: dict[str, Any], reason: str, missing: int | None
) -> None:
    """Possible losses have no count, counters that this version does not know count, and so do events that vanished."""
    story = Story()
    story.report(report(0, **changes))
    story.cover(0)
    assert story.said() == [("GAP", reason, missing)]


def test_books_that_do_not_balance_are_told_when_they_stay_so() -> None:
    """A difference that the next report does not show was an event under way; one that stays is a gap."""
    story = Story()
    story.report(report(0))
    story.report(report(1, unaccounted=1))
    story.cover(0, 1, 2, 3, 4)
    assert story.said() == [("COMPLETE", None, None)]
    story.report(report(2))
    assert story.said() == [("COMPLETE", None, None)] * 2
    story.report(report(3, unaccounted=2))
    assert story.said() == []
    story.report(report(4, unaccounted=2))
    assert story.said() == [("GAP", "MISCOUNT", 2)] * 2


def test_uncovered_interval_is_pending_after_a_while_and_complete_when_covered() -> None:
    """What Kafka or a worker still holds back is not known to be missing."""
    story = Story()
    story.report(report(0, spooled=3))
    assert [one for one in story.said(GRACE_MS - 1) if one[0] != "SILENT"] == []
    assert ("PENDING", "SPOOLED", None) in story.said(GRACE_MS)
    story.cover(0)
    assert ("COMPLETE", None, None) in story.said(GRACE_MS + 1)


def test_dead_letter_is_a_gap_until_the_batch_comes_whole() -> None:
    """The header of a dead letter explains why a batch is not covered, and proves nothing."""
    story = Story()
    story.report(report(0))
    dead = {
        name: value for name, value in covered(0)["ranges"][0].items() if name not in ("events", "repeats")
    }
    dead = dead | {"sequence": 0, "reason": "UNDECODABLE"}
    story.state.coverage({"ranges": [], "dead": [dead]}, story.now_ms)
    assert ("GAP", "DEAD_LETTER", None) in story.said(GRACE_MS)
    story.cover(0)
    assert ("COMPLETE", None, None) in story.said(GRACE_MS + 1)


def test_nothing_is_complete_into_which_an_interval_reaches_that_nothing_was_said_of() -> None:
    """A batch holds events of after its interval's end: the next one waits until that is decided or said."""
    story = Story()
    story.report(report(0))
    story.report(report(1))
    story.cover(1)
    assert story.said() == []
    late = [one for one in story.said(GRACE_MS - 1000) if one[0] != "SILENT"]
    assert late == [("PENDING", "NOT_COVERED", None), ("COMPLETE", None, None)]
    story.report(report(2))
    story.report(report(3))
    story.cover(3)
    assert [one for one in story.said() if one[0] != "SILENT"] == []
    story.cover(2)
    assert story.said() == [("COMPLETE", None, None)] * 2


def test_step_of_the_clock_widens_what_is_said() -> None:
    """Unix time went 5 s forward within the interval: its events may lie that far beyond its ends."""
    story = Story()
    story.report(report(0))
    later = report(1)
    story.report(later | {name: later[name] + 5 * SECOND_US for name in ("to_unix_us", "counted_unix_us")})
    story.cover(0, 1)
    assert [one["uncertainty_us"] for one in story.records()] == [1, 5 * SECOND_US + 1]


def test_first_report_that_a_joiner_sees_proves_nothing_of_before() -> None:
    """The next report is counted from it, and from when its counts were read: until then it may have read ahead."""
    story = Story()
    story.report(report(4))
    story.report(report(5))
    story.cover(5)
    (record,) = story.records()
    assert (record["outcome"], record["report_sequence"]) == ("COMPLETE", 5)
    assert record["from_unix_us"] == START_US + 5 * SECOND_US + 100
    assert story.state.cursor() == Place(0, START_US // 1000 + 5000)


def test_cursor_stays_at_the_base_of_the_oldest_undecided_interval() -> None:
    """A successor that begins there, one report earlier than it seems, can decide all that is left."""
    story = Story()
    for number in range(4):
        story.report(report(number))
    story.cover(0, 2, 3)
    story.said()
    assert story.state.cursor() == Place(0, START_US // 1000 + 1000)
    story.cover(1)
    story.said()
    assert story.state.cursor() == Place(2, START_US // 1000 + 3000)


def test_silence_is_told_again_and_again_and_is_bounded() -> None:
    """A node that stops to report is silent from the end of its last interval on, until it is forgotten."""
    story = Story()
    story.report(report(0))
    story.cover(0)
    assert story.said() == [("COMPLETE", None, None)]
    assert story.said(15_000) == []
    (record,) = story.records(15_001)
    assert (record["outcome"], record["reason"]) == ("SILENT", "REPORT_MISSING")
    assert record["from_unix_us"] == START_US + SECOND_US
    assert record["to_unix_us"] == (story.now_ms + 15_001) * 1000
    assert key_of(record) == f"{record['cluster']}/node-1/silent"
    assert story.said(20_000) == []
    assert story.said(31_000) == [("SILENT", "REPORT_MISSING", None)]
    story.said(HOLD_MS + 1)
    assert story.said(HOLD_MS + 60_000) == []


def test_number_of_undecided_intervals_is_bounded_and_the_oldest_are_given_up() -> None:
    """Who is given up is said to be unproven at once, and stays so; the others are decided as ever."""
    story = Story()
    story.state = Completeness("c", undecided_max=2)
    for number in range(4):
        story.report(report(number))
    assert story.said() == [("PENDING", "NOT_COVERED", None)] * 2
    assert story.state.undecided == 2
    story.cover(0, 1, 2, 3)
    assert [one["report_sequence"] for one in story.records()] == [2, 3]


def test_covered_batches_of_a_process_that_does_not_report_are_bounded() -> None:
    """The older ones are forgotten; an interval that needs them is never called complete, a later one is."""
    story = Story()
    one = covered(0)["ranges"][0]
    count = BATCHES_MAX + 1
    whole = one | {"events": [10] * count, "repeats": [0] * count}
    story.state.coverage({"ranges": [whole], "dead": []}, START_US // 1000)
    story.report(report(0))
    story.report(report(1, sequences={"0": count - 1, "1": 0}))
    story.report(report(2, sequences={"0": count, "1": 0}, received=30))
    said = {one["report_sequence"]: one["outcome"] for one in story.records(GRACE_MS)}
    assert said == {0: "PENDING", 1: "PENDING", 2: "COMPLETE", None: "SILENT"}
    assert story.state.undecided == 2


def test_node_that_kubernetes_has_removed_does_not_hold_the_cursor_back() -> None:
    """Of a node that is gone only what is undecided is still needed."""
    story = Story()
    story.state.node("1", kubernetes_node("node-1"))
    story.report(report(0))
    story.report(report(0, node="node-2"))
    story.state.node("1", None)
    assert story.state.cursor() == Place(0, story.now_ms)
    story.cover(0)
    story.said()
    assert story.state.cursor() == Place(1, story.now_ms)


def kubernetes_node(name: str, **changes: Any) -> dict[str, Any]:
    """Return the Node record of a node, as far as it is read."""
    return {"cluster": "c", "name": name, "valid_from_us": START_US, "valid_to_us": None} | changes


def test_node_of_kubernetes_that_never_reports_is_silent_and_one_that_is_gone_is_not() -> None:
    """A node without a collector is told; what another cluster has and what was removed is not."""
    story = Story()
    story.state.node("1", kubernetes_node("node-1"))
    story.state.node("2", kubernetes_node("node-2"))
    story.state.node("3", kubernetes_node("node-3", cluster="other"))
    story.report(report(0))
    story.cover(0)
    story.said()
    story.state.node("1", kubernetes_node("node-1", valid_to_us=START_US + 1))
    records = story.records(GRACE_MS + 1)
    assert [(one["node"], one["reason"]) for one in records] == [("node-2", "NEVER_REPORTED")]
    story.state.node("2", None)
    assert story.said(3 * GRACE_MS) == []


def test_reports_of_older_collectors_prove_nothing() -> None:
    """Without sequences nobody knows which batches an interval needs."""
    story = Story()
    story.report(report(0, sequences={}, to_boot_us=None))
    assert story.said(GRACE_MS) == []


def test_report_of_our_schema_has_every_field_that_is_read() -> None:
    """What these tests feed is what the schema says."""
    value = codec.encode("CollectorReport", report(0), catalog.COLLECTOR.schema_id)
    assert codec.decode("CollectorReport", value) == report(0)
