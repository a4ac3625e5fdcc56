"""When sockets are walked, and how many at once."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np
import pytest

from collector.node.existing import IteratorPass, Pass, SweepPass, Walk, Walks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture
def iterator(tmp_path: Path) -> Callable[[int], Callable[[], Pass]]:
    """Make openers of iterators that make so many events."""

    def make(events: int) -> Callable[[], Pass]:
        path = tmp_path / f"{events}"
        path.write_bytes(b"\1" * events)
        return lambda: IteratorPass(os.open(path, os.O_RDONLY))

    return make


def test_walk_goes_on_where_the_last_step_ended(iterator: Callable[[int], Callable[[], Pass]]) -> None:
    """Ten at a time, until the end; then nothing before the next start is due."""
    walk = Walk(iterator(25), 0.0, 60.0)
    assert [walk.step(now_s, 10) for now_s in range(6)] == [10, 10, 5, 0, 0, 0]
    assert walk.step(60.0, 10) == 10
    walk.close()


def test_walk_that_is_late_starts_anew_only_after_its_end(
    iterator: Callable[[int], Callable[[], Pass]],
) -> None:
    """A walk slower than its period is finished first: no connection waits twice."""
    walk = Walk(iterator(25), 0.0, 1.0)
    assert [walk.step(10.0 * n, 10) for n in range(5)] == [10, 10, 5, 0, 10]
    walk.close()


def test_walks_over_files_are_two(iterator: Callable[[int], Callable[[], Pass]]) -> None:
    """Sockets of before are looked for at once and a little later, and then no more."""
    walks = Walks(iterator(3), iterator(0), progress_interval_s=0.0, events_max=10)
    assert [walks.step(now_s) for now_s in (0.0, 1.0, 4.0, 5.0, 6.0, 7.0, 1000.0)] == [3, 0, 0, 3, 0, 0, 0]
    walks.close()
    assert walks.step(2000.0) == 0


def test_sweeps_come_four_times_an_interval(iterator: Callable[[int], Callable[[], Pass]]) -> None:
    """So that a PROGRESS is late by a fourth at most; a sweep has its end at its second step."""
    walks = Walks(None, iterator(1), progress_interval_s=8.0, events_max=10)
    assert [walks.step(float(now_s)) for now_s in range(9)] == [1, 0, 1, 0, 1, 0, 1, 0, 1]
    walks.close()


@pytest.fixture
def slow_iterator() -> Iterator[tuple[Callable[[], Pass], Callable[[bytes], int]]]:
    """An iterator that the kernel breaks off without an event and without an end, as it does after a million."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    yield lambda: IteratorPass(reader), lambda made: os.write(writer, made)
    os.close(writer)


def test_walk_goes_on_after_a_step_without_events(
    slow_iterator: tuple[Callable[[], Pass], Callable[[bytes], int]],
) -> None:
    """EAGAIN is neither an event nor the end."""
    start, make = slow_iterator
    walk = Walk(start, 0.0, 60.0)
    assert walk.step(0.0, 10) == 0
    make(b"\1\1")
    assert walk.step(1.0, 10) == 2
    walk.close()


def test_sweep_ends_a_step_by_events_and_by_entries() -> None:
    """A step makes no more events than it may, and stops at twice as many entries; nothing is looked at twice."""
    looks: list[int] = []

    def look_at(keys: np.ndarray) -> int:
        looks.append(len(keys))
        return int((keys == 1).sum())

    chunks = [[1] * 6, [0] * 20, [1] * 3]
    sweep = SweepPass(iter([np.array(chunk, "<u8") for chunk in chunks]), look_at, 4)
    made = [sweep.advance(5) for _ in range(5)]
    assert made == [5, 1, 3, None, None]
    assert looks[:6] == [4, 1, 1, 4, 4, 4]
    assert sum(looks) == 29
