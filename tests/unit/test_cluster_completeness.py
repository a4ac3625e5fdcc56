"""When a watch may be said to have seen everything."""

from __future__ import annotations

import pytest

from collector.cluster.completeness import Completeness


def test_nothing_is_complete_before_the_first_list() -> None:
    """A version to compare with doesn't help while nothing was handed over."""
    completeness = Completeness(quiet_us=0)
    completeness.asked("5", 100)
    assert completeness.until_us(200) is None


@pytest.mark.parametrize(
    ("reached", "asked", "expected"),
    [("5", "5", 100), ("10", "9", 100), ("9", "10", None), ("abc", "abc", 100), ("abd", "abc", None)],
)
def test_complete_once_the_watch_has_come_to_the_version(
    reached: str, asked: str, expected: int | None
) -> None:
    """Versions compare as numbers, and for equality where they are none."""
    completeness = Completeness(quiet_us=0)
    completeness.asked(asked, 100)
    completeness.reached(reached, 150)
    assert completeness.until_us(10**9) == expected


def test_newest_reached_question_counts() -> None:
    """Of several questions the latest that has been reached is told, once."""
    completeness = Completeness(quiet_us=0)
    for version, asked_us in (("5", 100), ("6", 200), ("8", 300)):
        completeness.asked(version, asked_us)
    completeness.reached("7", 350)
    assert completeness.until_us(400) == 200
    assert completeness.until_us(400) is None
    completeness.reached("8", 450)
    assert completeness.until_us(500) == 300


def watching(quiet_us: int) -> Completeness:
    """Return a watch at version 5, open since 50, asked for at 100 and told 9."""
    completeness = Completeness(quiet_us)
    completeness.reached("5", 40)
    completeness.opened(50)
    completeness.asked("9", 100)
    return completeness


def test_quiet_watch_counts_as_having_come() -> None:
    """The store's version grows with other kinds; a watch that stays quiet has nothing to bring."""
    completeness = watching(quiet_us=1000)
    assert completeness.until_us(1099) is None
    assert completeness.until_us(1100) == 100


def test_watch_that_still_brings_older_events_is_not_quiet() -> None:
    """A backlog on its way puts the quiet time off."""
    completeness = watching(quiet_us=1000)
    completeness.reached("7", 900)
    assert completeness.until_us(1100) is None
    assert completeness.until_us(1900) == 100


def test_closed_or_later_opened_watch_is_not_quiet() -> None:
    """Only a watch that was open at the time of the question and since can have brought what there was."""
    completeness = watching(quiet_us=1000)
    completeness.closed()
    assert completeness.until_us(9000) is None
    completeness.opened(9000)
    assert completeness.until_us(99_000) is None


def test_quiet_rule_can_be_turned_off() -> None:
    """With 0 only events and bookmarks count."""
    assert watching(quiet_us=0).until_us(10**9) is None
