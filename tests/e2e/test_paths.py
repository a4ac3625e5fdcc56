"""Connections on every path that a cluster has come out once, with the right pods, processes, Service and direction.

A pod to itself, through its Service and inside it; processes of the node to a pod and back; a pod in the node's own
network; a node port; a proxy in user space. Each over IPv4 and IPv6.
"""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

from podwire.demo.lab import Port
from tests.pipeline import Pipeline, need_root_and_btf, program, said_by, serve

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from podwire.demo.lab import Pod
    from podwire.flows import Flow
    from tests.pipeline import Place

ONCE = [("CLOSE", "BOTH"), ("OPEN", "BOTH")]
PORT, NODE_SERVER_PORT, AGENT_PORT, PROXY_PORT, NODE_PORT = 8080, 9100, 9200, 8000, 30080
COUNT = 3


@dataclass(frozen=True)
class NodeItself:
    """The node's own network, for processes outside every pod."""

    netns: str
    ip: str
    ip6: str | None
    _started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def _argv(self, command: Sequence[str]) -> list[str]:
        return ["nsenter", f"--net=/run/netns/{self.netns}", "--", *command]

    def run(self, command: Sequence[str], timeout: float) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        return subprocess.run(
            self._argv(command), capture_output=True, text=True, timeout=timeout, check=False
        )

    def popen(self, command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
        """Start a command; `end` ends it."""
        self._started.append(subprocess.Popen(self._argv(command), **options))
        return self._started[-1]

    def end(self) -> None:
        """End what was started."""
        for process in self._started:
            process.kill()
            process.wait()


class Street(Pipeline):
    """Pods, a Service in front of one of them, a proxy in front of that, and servers on the node."""

    def build(self) -> None:
        """Make all that, start servers and Podwire's services."""
        lab = self.lab
        self.host = NodeItself(f"{lab.prefix}-node", lab.node_ip, lab.node_ip6)
        self._stack.callback(self.host.end)
        self.web = lab.pod("web-5b9c7d6f8-aaaaa", "shop", deployment="web")
        self.buyer = lab.pod("buyer-6d8f9c4b7-x7k2p", "street", deployment="buyer")
        self.proxy = lab.pod("proxy-7c9d8e5f6-bbbbb", "edge", deployment="proxy")
        self.agent = lab.pod("agent", "system", host_network=True)
        ports = (Port(80, PORT, "http", NODE_PORT),)
        four = lab.service("web", [self.web], ports, namespace="shop")
        six = lab.service("web-six", [self.web], (Port(80, PORT, "http"),), namespace="shop", family=6)
        self.service = {4: four, 6: six}
        self.write_manifests()
        serve(self.web, "web", PORT)
        serve(self.host, "sshd", NODE_SERVER_PORT)
        serve(self.agent, "agent", AGENT_PORT)
        self.forwarder = serve(self.proxy, "proxy", PROXY_PORT, "proxy", address=four, onward_port=80)
        self.run()

    def address(self, place: Place, family: int) -> str:
        """Return an address of a pod or of the node."""
        address = place.ip if family == 4 else place.ip6
        if address is None:
            # The lab does without where the kernel was built or booted so. CI fails on this skip.
            pytest.skip("the kernel has no IPv6")
        return address

    def made(self, place: Place, name: str, address: str, port: int) -> dict[int, list[Flow]]:
        """Make connections and return their records: one OPEN and one CLOSE each, of both halves."""
        said = said_by(place, program("talk", name, port, address=address, count=COUNT))
        assert len(said) == COUNT
        return self.records(place, said)

    def records(self, place: Place, said: list[dict[str, Any]]) -> dict[int, list[Flow]]:
        """Return the records of what a client said; each of one connection, and no other."""
        found = self.settled(place, said, set(ONCE))
        for one in said:
            flows = found[one["port"]]
            assert sorted((flow["record_type"], flow["observed_by"]) for flow in flows) == ONCE
            assert len({flow["flow_id"] for flow in flows}) == 1
            close = next(flow for flow in flows if flow["record_type"] == "CLOSE")
            assert close["client_bytes_sent"] == close["server_bytes_received"] == one["sent"]
            assert close["client_bytes_received"] == close["server_bytes_sent"] == one["received"]
        return found


@pytest.fixture(scope="module")
def street(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Street]:
    """The street, with everything running; loopback is followed too."""
    need_root_and_btf()
    settings = {"PODWIRE_FILTER_LOOPBACK": "false"}
    with Street("paths", tmp_path_factory.mktemp("street"), settings) as street:
        street.build()
        yield street


def every(found: dict[int, list[Flow]]) -> list[Flow]:
    """Return the records of all connections."""
    return [flow for flows in found.values() for flow in flows]


def check_pod(flow: Flow, side: str, pod: Pod, process: str) -> None:
    """A side is a pod's process, told by its own kernel."""
    assert flow[f"{side}_resolution"] == "SOCKET"
    assert flow[f"{side}_pod_uid"] == pod.uid
    assert flow[f"{side}_pod"] == pod.name
    assert flow[f"{side}_namespace"] == pod.namespace
    assert flow[f"{side}_container_id"] == pod.container_id
    assert flow[f"{side}_netns_ino"] == pod.netns_ino
    assert flow[f"{side}_process"] == process
    assert flow[f"{side}_reason"] is None


def check_node(flow: Flow, side: str, street: Street, process: str) -> None:
    """A side is a process of the node, in no pod."""
    assert flow[f"{side}_resolution"] == "NODE"
    assert flow[f"{side}_node"] == street.lab.node
    assert flow[f"{side}_pod"] is None
    assert flow[f"{side}_process"] == process


def check_service(flow: Flow, name: str | None, via: str | None = None) -> None:
    """The dialled Service, or none."""
    assert (flow["service_name"], flow["service_via"]) == (name, via)
    assert flow["service_namespace"] == ("shop" if name else None)


def service_name(family: int) -> str:
    """Return the name of the Service of a family."""
    return "web" if family == 4 else "web-six"


@pytest.mark.parametrize("family", [4, 6])
def test_pod_to_itself_through_its_service(street: Street, family: int) -> None:
    """Hairpin: both ends are the one pod, though each sees another address in the other's place."""
    for flow in every(street.made(street.web, "mirror", street.service[family], 80)):
        check_pod(flow, "client", street.web, "mirror")
        check_pod(flow, "server", street.web, "web")
        check_service(flow, service_name(family), "CLUSTER_IP")
        assert flow["dialed_address"] == street.service[family]
        assert flow["server_address"] == flow["client_address"] == street.address(street.web, family)
        assert flow["source_nat_address"] == street.address(street.host, family)
        assert (flow["direction"], flow["cross_namespace"]) == ("INTERNAL", False)


@pytest.mark.parametrize("address", ["own", "own_six", "127.0.0.1", "::1"])
def test_connection_inside_one_pod(street: Street, address: str) -> None:
    """To the pod's own address or to loopback: both halves come from one kernel and one network namespace."""
    dialed = {"own": 4, "own_six": 6}.get(address, 0)
    target = street.address(street.web, dialed) if dialed else address
    for flow in every(street.made(street.web, "probe", target, PORT)):
        check_pod(flow, "client", street.web, "probe")
        check_pod(flow, "server", street.web, "web")
        check_service(flow, None)
        assert flow["client_address"] == flow["server_address"] == target
        assert flow["source_nat_address"] is None
        assert (flow["direction"], flow["cross_namespace"]) == ("INTERNAL", False)


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("through", ["service", "pod"])
def test_process_of_the_node_to_a_pod(street: Street, through: str, family: int) -> None:
    """As a kubelet's probe, or a daemon that dials a Service: a process of the node, by its cgroup."""
    own = street.address(street.web, family)
    target, port = (street.service[family], 80) if through == "service" else (own, PORT)
    for flow in every(street.made(street.host, "kubelet", target, port)):
        check_node(flow, "client", street, "kubelet")
        check_pod(flow, "server", street.web, "web")
        is_service = through == "service"
        check_service(
            flow, service_name(family) if is_service else None, "CLUSTER_IP" if is_service else None
        )
        assert flow["client_address"] == street.address(street.host, family)
        assert (flow["direction"], flow["cross_namespace"]) == ("INTERNAL", None)


@pytest.mark.parametrize("family", [4, 6])
def test_pod_to_a_process_of_the_node(street: Street, family: int) -> None:
    """The node's address leads to the node, and its process is on record."""
    target = street.address(street.host, family)
    for flow in every(street.made(street.buyer, "admin", target, NODE_SERVER_PORT)):
        check_pod(flow, "client", street.buyer, "admin")
        check_node(flow, "server", street, "sshd")
        check_service(flow, None)
        assert flow["server_address"] == target
        assert flow["direction"] == "INTERNAL"


@pytest.mark.parametrize("family", [4, 6])
def test_pod_to_a_pod_in_the_nodes_network(street: Street, family: int) -> None:
    """The same address, but the process belongs to a pod: its cgroup says so, where no address could."""
    target = street.address(street.host, family)
    for flow in every(street.made(street.buyer, "scraper", target, AGENT_PORT)):
        check_pod(flow, "client", street.buyer, "scraper")
        check_pod(flow, "server", street.agent, "agent")
        assert (flow["direction"], flow["cross_namespace"]) == ("INTERNAL", True)


def test_pod_in_the_nodes_network_as_client(street: Street) -> None:
    """Its address is the node's; the pod is named all the same."""
    for flow in every(street.made(street.agent, "push", street.service[4], 80)):
        check_pod(flow, "client", street.agent, "push")
        check_pod(flow, "server", street.web, "web")
        check_service(flow, "web", "CLUSTER_IP")
        assert flow["client_address"] == street.lab.node_ip


@pytest.mark.parametrize("family", [4, 6])
def test_processes_of_one_node(street: Street, family: int) -> None:
    """Both ends outside pods, on one node."""
    target = street.address(street.host, family)
    for flow in every(street.made(street.host, "cron", target, NODE_SERVER_PORT)):
        check_node(flow, "client", street, "cron")
        check_node(flow, "server", street, "sshd")
        assert flow["direction"] == "NODE_LOCAL"


def test_node_port_names_service_and_backend(street: Street) -> None:
    """A node's address and a node port: the Service by what was dialled, the pod by its own half."""
    for flow in every(street.made(street.buyer, "outer", street.lab.node_ip, NODE_PORT)):
        check_pod(flow, "client", street.buyer, "outer")
        check_pod(flow, "server", street.web, "web")
        check_service(flow, "web", "NODE_PORT")
        assert (flow["dialed_address"], flow["dialed_port"]) == (street.lab.node_ip, NODE_PORT)
        assert flow["cross_namespace"] is True


def test_proxy_in_user_space_makes_two_connections(street: Street) -> None:
    """Buyer to proxy and proxy to web are two flows; neither hides the other, and no one joins them."""
    incoming = street.made(street.buyer, "buyer", street.proxy.ip, PROXY_PORT)
    assert street.forwarder.stdout is not None
    said = [json.loads(street.forwarder.stdout.readline()) for _ in range(COUNT)]
    outgoing = street.records(street.proxy, said)
    for flow in every(incoming):
        check_pod(flow, "client", street.buyer, "buyer")
        check_pod(flow, "server", street.proxy, "proxy")
        check_service(flow, None)
    for flow in every(outgoing):
        check_pod(flow, "client", street.proxy, "proxy")
        check_pod(flow, "server", street.web, "web")
        check_service(flow, "web", "CLUSTER_IP")
    ids = {flow["flow_id"] for flow in every(incoming) + every(outgoing)}
    assert len(ids) == 2 * COUNT


def test_every_connection_of_the_street_came_out_as_a_pair(street: Street) -> None:
    """Nothing between these places is one-sided, of an unknown direction, or under an address alone."""
    street.made(street.buyer, "last", street.service[4], 80)
    places = {street.lab.node_ip, street.lab.node_ip6}
    for pod in (street.web, street.buyer, street.proxy):
        places |= {pod.ip, pod.ip6}
    mine = [
        flow for flow in street.flows.values() if {flow["client_address"], flow["server_address"]} <= places
    ]
    assert {flow["observed_by"] for flow in mine} == {"BOTH"}
    kinds = {flow[f"{side}_resolution"] for flow in mine for side in ("client", "server")}
    assert kinds <= {"SOCKET", "NODE"}
    assert {flow["direction"] for flow in mine} <= {"INTERNAL", "NODE_LOCAL"}
