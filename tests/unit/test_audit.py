"""Complete is answered only where complete intervals join end to end around the whole time."""

from __future__ import annotations

import json
from typing import Any

import pytest

from podwire.audit import EXIT_COMPLETE, EXIT_MISSING, EXIT_UNKNOWN, as_json, in_words, judge

AT = 1_790_000_000_000_000
S = 1_000_000


def record(number: int, outcome: str = "COMPLETE", **changes: Any) -> dict[str, Any]:
    """Return the Completeness of second `number` of node n."""
    return {
        "cluster": "c",
        "node": "n",
        "outcome": outcome,
        "reason": {"GAP": "RING_FULL", "PENDING": "NOT_COVERED", "SILENT": "REPORT_MISSING"}.get(outcome),
        "missing": None,
        "detail": None,
        "from_unix_us": AT + number * S,
        "to_unix_us": AT + (number + 1) * S,
        "uncertainty_us": 10,
        "losses_until_unix_us": None,
        "boot_id": "b",
        "producer_epoch": 1,
        "report_sequence": number,
        "events": 100,
        "repeats": 0,
        "decided_at": 0,
    } | changes


def silent(number: int, **changes: Any) -> dict[str, Any]:
    """Return the word that node n is silent since second `number`, said a minute later."""
    return record(number, "SILENT", report_sequence=None, to_unix_us=AT + (number + 60) * S, **changes)


ALL = [record(number) for number in range(5)]


def test_intervals_that_join_around_the_time_are_complete() -> None:
    """In any order, with their events."""
    answer = judge(reversed(ALL), AT + S + 11, AT + 4 * S - 11)
    assert (answer.exit_code, answer.nodes, answer.events, answer.findings) == (EXIT_COMPLETE, 1, 300, ())
    assert in_words(answer) == "complete: 1 node, 2026-09-21T14:13:21Z to 2026-09-21T14:13:23Z, 300 events"
    assert json.loads(as_json(answer))["complete"] is True


@pytest.mark.parametrize(
    ("records", "span", "reason", "status"),
    [
        ([], (1, 4), "NOT_REPORTED", EXIT_UNKNOWN),
        (ALL[2:], (1, 4), "NOT_REPORTED", EXIT_UNKNOWN),
        (ALL[:3], (1, 4), "NOT_REPORTED", EXIT_UNKNOWN),
        ([*ALL[:2], *ALL[3:]], (1, 4), "NOT_REPORTED", EXIT_UNKNOWN),
        (ALL, (0, 4), "NOT_REPORTED", EXIT_UNKNOWN),
        (ALL, (1, 5), "NOT_REPORTED", EXIT_UNKNOWN),
        ([*ALL[:3], silent(3)], (1, 4), "SILENT", EXIT_UNKNOWN),
        ([silent(0)], (1, 4), "SILENT", EXIT_UNKNOWN),
        ([*ALL[:2], record(2, "PENDING"), *ALL[3:]], (1, 4), "NOT_COVERED", EXIT_UNKNOWN),
        ([*ALL[:2], record(2, "GAP"), *ALL[3:]], (1, 4), "RING_FULL", EXIT_MISSING),
        ([record(0, "GAP", losses_until_unix_us=AT + S + 50), *ALL[1:]], (1, 4), "RING_FULL", EXIT_MISSING),
        ([record(0, "GAP", uncertainty_us=2 * S), *ALL[1:]], (2, 4), "RING_FULL", EXIT_MISSING),
    ],
    ids=[
        "nothing",
        "begins_late",
        "ends_early",
        "hole",
        "first_uncertain",
        "last_uncertain",
        "silent",
        "only_silent",
        "pending",
        "gap",
        "loss_counted_late",
        "clock_step",
    ],
)
def test_anything_else_is_not_complete(
    records: list[dict[str, Any]], span: tuple[int, int], reason: str, status: int
) -> None:
    """A hole, an end that is not reached, a gap that may reach into the time."""
    answer = judge(records, AT + span[0] * S, AT + span[1] * S)
    assert reason in [finding.reason for finding in answer.findings]
    assert answer.exit_code == status
    assert in_words(answer).startswith("NOT ")


def test_proof_stands_whatever_was_said_before_or_is_said_after() -> None:
    """Two workers may speak for a while; COMPLETE wins, else the last word counts."""
    pending = record(2, "PENDING")
    for middle in ([pending, ALL[2]], [ALL[2], pending], [record(2, "GAP"), ALL[2]]):
        assert judge([*ALL[:2], *middle, *ALL[3:]], AT + S + 11, AT + 4 * S).exit_code == EXIT_COMPLETE
    answer = judge([*ALL[:2], pending, record(2, "GAP"), *ALL[3:]], AT + S + 11, AT + 4 * S)
    assert answer.exit_code == EXIT_MISSING


def test_each_node_must_be_complete_and_wanted_ones_must_be_there() -> None:
    """One silent node is enough; with --node the others do not matter, and an unknown one is not complete."""
    records = [*ALL, silent(-10, node="mute")]
    answer = judge(records, AT + 2 * S, AT + 3 * S)
    assert (answer.exit_code, answer.nodes) == (EXIT_UNKNOWN, 2)
    assert "mute silent since 2026-09-21T14:13:22Z" in in_words(answer)
    assert judge(records, AT + 2 * S, AT + 3 * S, ("n",)).exit_code == EXIT_COMPLETE
    assert judge(records, AT + 2 * S, AT + 3 * S, ("n", "other")).exit_code == EXIT_UNKNOWN


def test_clusters_that_share_the_topic_do_not_mix() -> None:
    """Nodes of the same name in two clusters are two; with a cluster given the other one does not matter."""
    other = [
        record(number, "GAP" if number == 2 else "COMPLETE", cluster="d", boot_id="e") for number in range(5)
    ]
    records, span = [*ALL, *other], (AT + S + 11, AT + 4 * S - 11)
    both = judge(records, *span)
    assert (both.exit_code, both.nodes, len(both.findings)) == (EXIT_MISSING, 2, 1)
    assert judge(records, *span, cluster="c").exit_code == EXIT_COMPLETE
    assert judge(records, *span, ("n",), "d").exit_code == EXIT_MISSING
    assert judge(records, *span, cluster="nowhere").exit_code == EXIT_UNKNOWN


def test_node_whose_word_ended_before_does_not_count() -> None:
    """A node that was removed long ago is nobody's gap."""
    records = [*ALL, record(-100, node="old"), silent(-99, node="old")]
    assert judge(records, AT + 2 * S, AT + 3 * S).nodes == 1


def test_gaps_that_join_are_one_finding_with_the_sum() -> None:
    """Ten seconds of a full ring are one line, not ten; an unknown count makes the sum unknown."""
    gaps = [record(number, "GAP", missing=number * 10) for number in (1, 2, 3)]
    answer = judge([ALL[0], *gaps, ALL[4]], AT + S, AT + 4 * S)
    assert in_words(answer).endswith("n gap 2026-09-21T14:13:21Z-2026-09-21T14:13:24Z RING_FULL 60 events")
    gaps[1]["missing"] = None
    (finding,) = judge([ALL[0], *gaps, ALL[4]], AT + S, AT + 4 * S).findings
    assert finding.events is None
