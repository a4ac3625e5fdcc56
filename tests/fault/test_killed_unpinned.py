"""A collector that is killed without pins takes what it had in its hands along: a gap that says so, and no more."""

from __future__ import annotations

from typing import TYPE_CHECKING

from podwire.audit import EXIT_MISSING
from tests.fault.books import halves_of
from tests.fault.faults import kill_service
from tests.fault.rounds import HALVES_PER_CONNECTION, Setting, Traffic, World, audit_until
from tests.pipeline import need_root_and_btf

if TYPE_CHECKING:
    from pathlib import Path

MADE = 150
LASTING_US = 1_000_000
"""More than a connection of the traffic's takes from begin to end."""


def test_nothing_is_missing_outside_the_gap_of_a_killed_collector(tmp_path: Path) -> None:
    """The audit names one gap of unknown count around the kill; each connection with a missing half began within it."""
    need_root_and_btf()
    with World(Setting("no pins", pinned=False), tmp_path) as world:
        traffic = Traffic(world)
        traffic.more(MADE)
        kill_service("node")(world, traffic, 0)
        traffic.more(MADE)
        said = traffic.end()
        begun_us = [one["begin_unix_ns"] // 1000 for one in said]
        answer = audit_until(world, begun_us[0] // 1000, EXIT_MISSING)
        world.read()
        lost_us = [
            at
            for at, one in zip(begun_us, said, strict=True)
            if len({half for flow in world.flows_of([one]) for half in halves_of(flow)})
            < HALVES_PER_CONNECTION
        ]
    assert "COLLECTOR_KILLED" in {gap.reason for gap in answer.findings}
    assert {gap.events for gap in answer.findings if gap.reason == "COLLECTOR_KILLED"} == {None}
    assert lost_us
    for at in lost_us:
        assert any(gap.from_unix_us - LASTING_US <= at <= gap.to_unix_us for gap in answer.findings), (
            at,
            answer,
        )
    assert begun_us[0] < min(gap.from_unix_us for gap in answer.findings)
    assert max(gap.to_unix_us for gap in answer.findings) < begun_us[-1]
