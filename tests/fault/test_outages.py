"""What ends in mid-traffic and comes back: nothing that was connected meanwhile is missing afterwards.

The faults of the suite that a test run has time for, each held to more than the suite can ask of all: both halves meet.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.fault.faults import FAULTS, PLAIN
from tests.fault.rounds import Traffic, World
from tests.pipeline import need_root_and_btf

if TYPE_CHECKING:
    from collections.abc import Iterator

OPEN_AND_CLOSE = {("OPEN", "BOTH"), ("CLOSE", "BOTH")}
SAY_MORE = 150


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Everything running; processes do not come back by themselves."""
    need_root_and_btf()
    with World(PLAIN, tmp_path_factory.mktemp("fault")) as world:
        yield world


def check_nothing_is_missing(world: World, said: list[dict[str, Any]]) -> None:
    """Every connection is there as OPEN and CLOSE, two-sided, with right pods; what came again came the same."""
    found = world.settled(world.client, said, OPEN_AND_CLOSE, 120)
    for one in said:
        for flow in found[one["port"]]:
            if flow["observed_by"] == "BOTH":
                assert flow["client_pod"] == "web"
                assert flow["server_pod"] == "api"
                assert flow["client_pid"] == one["pid"]
                assert flow["service_name"] == "api"
        assert len({flow["flow_id"] for flow in found[one["port"]]}) == 1
        assert len([flow for flow in found[one["port"]] if flow["observed_by"] == "BOTH"]) == 2


@pytest.mark.parametrize(
    "name",
    [
        "collector killed, probes pinned",
        "worker killed",
        "watcher killed",
        "broker killed",
        "broker stalled",
    ],
)
def test_outage_in_mid_traffic_loses_no_flow(world: World, name: str) -> None:
    """Before, during and after the outage: every connection comes out, and repeats have the same identity."""
    fault = FAULTS[name]
    traffic = Traffic(world)
    traffic.more(SAY_MORE)
    fault.cause(world, traffic, fault.seconds[True])
    traffic.more(SAY_MORE)
    check_nothing_is_missing(world, traffic.end())
    assert (
        'podwire_node_lost_events_total{reason="ring_full"} 0.0' in world.services.processes["node"].metrics()
    )
