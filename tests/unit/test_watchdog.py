"""When waiting is a stall: per partition, and not while there is a good reason to wait."""

from __future__ import annotations

from typing import Any

import pytest

from enricher.watchdog import Place, Progress, StallDetector
from tests import halves
from tests.unit.test_enricher_engine import NOW_MS, Rig, pod

CHECKS = 3
A, B = Place("raw", 0), Place("raw", 1)


def judged(*checks: tuple[Progress, dict[Place, tuple[int, int]]]) -> list[Place | None]:
    """Return what a detector says at each check."""
    detector = StallDetector(CHECKS)
    return [detector.stalled(progress, bounds) for progress, bounds in checks]


def test_stall_is_waiting_input_while_the_head_stands_still() -> None:
    """Named is the partition whose head did not move in as many checks as are allowed."""
    check = (Progress({A: 7, B: 5}), {A: (0, 7), B: (0, 6)})
    assert judged(*[check] * (CHECKS + 1)) == [None] * CHECKS + [B]


def test_one_stuck_partition_among_busy_ones_is_seen() -> None:
    """What the others do does not help it."""
    checks = [(Progress({A: 7 + number, B: 5}), {A: (0, 99), B: (0, 6)}) for number in range(CHECKS + 1)]
    assert judged(*checks)[-1] == B


def test_partition_of_which_nothing_ever_arrived_is_seen() -> None:
    """Its head is unknown, and yet something waits."""
    assert judged(*[(Progress({A: None}), {A: (2, 3)})] * (CHECKS + 1))[-1] == A


@pytest.mark.parametrize(
    ("changes", "bounds"),
    [
        ({"heads": {A: 6}}, {A: (0, 9)}),
        ({"heads": {A: 5}}, {A: (0, 5)}),
        ({"heads": {A: 5}}, {A: (9, 9)}),
        ({"heads": {A: None}}, {A: (9, 9)}),
        ({"heads": {}}, {}),
        ({"heads": {A: 5}}, {}),
        ({"heads": {A: 5}, "beside": 1}, {A: (0, 9)}),
        ({"heads": {A: 5}, "excused": True}, {A: (0, 9)}),
        ({"heads": {A: 5, B: 2}, "shared": True}, {A: (0, 9)}),
    ],
    ids=[
        "moved",
        "nothing_waits",
        "what_waited_was_deleted",
        "all_was_deleted_before_the_first",
        "nothing_assigned",
        "broker_away",
        "reads_again_to_begin",
        "registry_away",
        "waits_for_another_whose_output_moves",
    ],
)
def test_good_reason_to_wait_begins_the_time_anew(
    changes: dict[str, Any], bounds: dict[Place, tuple[int, int]]
) -> None:
    """One check with a reason among those without, and the count begins again."""
    stuck = (Progress({A: 5, B: 1}), {A: (0, 9)})
    found = judged(*[stuck] * CHECKS, (Progress(**changes), bounds), *[stuck] * (CHECKS - 1))
    assert found == [None] * (2 * CHECKS)
    assert judged(*[stuck] * (CHECKS + 1))[-1] == A


def test_head_stays_where_a_record_waits_for_metadata() -> None:
    """For no longer than that may take, which is why the watchdog adds it to its patience."""
    rig = Rig(pods=False)
    rig.take(*halves.opened(halves.key(1)))
    rig.tick(later_ms=500)
    assert rig.partition.head == 0
    rig.tick(pod(1), pod(2), later_ms=700)
    rig.producer.deliver(0)
    rig.tick(later_ms=1000)
    assert rig.partition.head == 1


def test_messages_that_are_read_again_are_counted() -> None:
    """A long warm-up brings no head forward, and is no stall."""
    rig = Rig()
    rig.engine.warm(rig.partition, [(NOW_MS, halves.batch(halves.opened(halves.key(1))))] * 3)
    assert rig.engine.read_again == 3
