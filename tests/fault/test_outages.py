"""What ends in mid-traffic and comes back: nothing that was connected meanwhile is missing afterwards.

The short form of the fault suite: one outage each of broker, collector, watcher and worker.
"""

from __future__ import annotations

import json
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from podwire.demo.lab import Port
from tests.pipeline import Pipeline, need_root_and_btf, program, serve

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from podwire.demo.lab import Pod

PORT = 8080
OPEN_AND_CLOSE = {("OPEN", "BOTH"), ("CLOSE", "BOTH")}
SAY_MORE = 150


class Shop(Pipeline):
    """One client and one server behind a Service; services that stay dead until a test starts them again."""

    def build(self) -> None:
        """Make pods, Service and server."""
        self.client = self.lab.pod("web", "shop")
        self.server = self.lab.pod("api", "shop")
        self.address = self.lab.service("api", [self.server], (Port(80, PORT),), namespace="shop")
        serve(self.server, "api", PORT)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    """Everything running; processes do not come back by themselves."""
    need_root_and_btf()
    with Shop("fault", tmp_path_factory.mktemp("fault"), restart=False) as shop:
        shop.build()
        shop.write_manifests()
        shop.run()
        yield shop


class Traffic:
    """A client that makes connections until it is told to stop, and says which."""

    def __init__(self, pod: Pod, address: str) -> None:
        self._process = pod.popen(
            program("keep-talking", "web", 80, address=address), stdout=subprocess.PIPE, stdin=subprocess.PIPE
        )
        self.said: list[dict[str, Any]] = []

    def more(self, count: int = SAY_MORE) -> None:
        """Return when `count` more connections have been made."""
        assert self._process.stdout is not None
        for _ in range(count):
            self.said.append(json.loads(self._process.stdout.readline()))

    def end(self) -> list[dict[str, Any]]:
        """Stop the client and return all connections that it made."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self.said += [json.loads(line) for line in self._process.stdout]
        assert self._process.wait() == 0
        return self.said


def check_nothing_is_missing(shop: Shop, said: list[dict[str, Any]]) -> None:
    """Every connection is there as OPEN and CLOSE, two-sided, with right pods; what came again came the same."""
    found = shop.settled(shop.client, said, OPEN_AND_CLOSE, 120)
    for one in said:
        for flow in found[one["port"]]:
            if flow["observed_by"] == "BOTH":
                assert flow["client_pod"] == "web"
                assert flow["server_pod"] == "api"
                assert flow["client_pid"] == one["pid"]
                assert flow["service_name"] == "api"
        assert len({flow["flow_id"] for flow in found[one["port"]]}) == 1
        assert len([flow for flow in found[one["port"]] if flow["observed_by"] == "BOTH"]) == 2


def kill_and_start(name: str) -> Callable[[Shop, Traffic], None]:
    """Return what kills a service with SIGKILL, lets traffic go on without it, and starts it again."""

    def fault(shop: Shop, traffic: Traffic) -> None:
        process = shop.services.processes[name]
        process.kill()
        traffic.more()
        process.start()
        process.wait_healthy()

    return fault


def broker_outage(shop: Shop, traffic: Traffic) -> None:
    """Crash Kafka, wait until the collector has put events on its disk, start Kafka again."""
    shop.broker.kill()
    spool = shop.folder / "services" / "node-state"
    while not any(path.suffix == ".flush" for path in spool.rglob("*")):
        traffic.more(10)
    traffic.more()
    shop.broker.start()


def broker_stall(shop: Shop, traffic: Traffic) -> None:
    """Stop Kafka with SIGSTOP in mid-traffic, and let it go on."""
    pid = shop.broker.pid
    assert pid is not None
    subprocess.run(["kill", "-STOP", str(pid)], check=True)
    traffic.more()
    subprocess.run(["kill", "-CONT", str(pid)], check=True)


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(kill_and_start("node"), id="collector_node_killed"),
        pytest.param(kill_and_start("enricher"), id="enricher_killed"),
        pytest.param(kill_and_start("cluster"), id="collector_cluster_killed"),
        pytest.param(broker_outage, id="kafka_killed"),
        pytest.param(broker_stall, id="kafka_stalled"),
    ],
)
def test_outage_in_mid_traffic_loses_no_flow(shop: Shop, fault: Callable[[Shop, Traffic], None]) -> None:
    """Before, during and after the outage: every connection comes out, and repeats have the same identity."""
    traffic = Traffic(shop.client, shop.address)
    traffic.more()
    fault(shop, traffic)
    traffic.more()
    check_nothing_is_missing(shop, traffic.end())
    assert (
        'podwire_node_lost_events_total{reason="ring_full"} 0.0' in shop.services.processes["node"].metrics()
    )
