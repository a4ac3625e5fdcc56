"""The table of scenarios as a table: published as it is, and with what each tier must tell."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from collector.node.abi import EventType
from tests.kernel import scenarios

TESTS = Path(scenarios.__file__).parent


def test_published_page_is_the_table() -> None:
    """docs/kernels.md is generated."""
    assert scenarios.PAGE.read_text(encoding="utf-8") == scenarios.page(), "run `make docs`"


def test_every_scenario_is_played_by_a_test() -> None:
    """A row without a test would be a promise that nobody checks; a test's row must exist."""
    played: set[str] = set()
    for path in TESTS.glob("test_*.py"):
        text = path.read_text(encoding="utf-8")
        played |= set(re.findall(r"""(?:mark\.scenario|\b_?row)\(\s*"([^"]+)\"""", text))
    assert played == set(scenarios.SCENARIOS)


@pytest.mark.parametrize("tier", ["fentry", "kprobe"])
def test_best_tiers_see_everything(tier: str) -> None:
    """Their expected events are the table's."""
    for scenario in scenarios.TABLE:
        assert scenario.expected(tier) == (scenario.client, scenario.server)
        assert scenario.unseen(tier) == ""


def test_lowest_tier_tells_no_failed_route_and_no_process_of_an_accept() -> None:
    """What tp_btf can't see is left out of what is expected, and said."""
    assert scenarios.SCENARIOS["no route"].expected("tp_btf") == ((), ())
    assert scenarios.SCENARIOS["no route"].unseen("tp_btf") == "CONNECT_FAILED ENETUNREACH"
    _, server = scenarios.SCENARIOS["IPv4"].expected("tp_btf")
    assert [(told.kind, told.owner) for told in server] == [
        (EventType.ACCEPT, "none"),
        (EventType.CLOSE, "process"),
    ]
    assert scenarios.SCENARIOS["IPv4"].unseen("tp_btf") == "the process of ACCEPT"
