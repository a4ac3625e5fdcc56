"""Labs on this machine: pods reach each other through every kind of NAT, and nothing of them stays."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from podwire.demo import cgroup
from podwire.demo.errors import LabBusyError
from podwire.demo.lab import Lab, Pod, Port

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root makes network namespaces")

NAME = "test-lab"
SERVER = """
import socket
server = socket.create_server(("::", 8080), family=socket.AF_INET6, dualstack_ipv6=True)
print("listening", flush=True)
while True:
    connection, peer = server.accept()
    with connection:
        connection.sendall(f"{socket.gethostname()} {peer[0]} {peer[1]} {connection.getsockname()[0]}".encode())
"""
CLIENT = """
import socket, sys
with socket.create_connection((sys.argv[1], int(sys.argv[2])), 5) as connection:
    print(connection.getsockname()[1], connection.recv(1000).decode())
"""


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """A lab for all tests of this file."""
    with Lab(NAME) as made:
        yield made


@pytest.fixture(scope="module")
def backends(lab: Lab) -> tuple[Pod, Pod]:
    """Two pods that tell each caller who it is."""
    pods = (lab.pod("api-1", "shop"), lab.pod("api-2", "shop"))
    for pod in pods:
        server = pod.popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE)
        assert server.stdout is not None
        assert server.stdout.readline() == b"listening\n"
    return pods


@pytest.fixture(scope="module")
def client(lab: Lab) -> Pod:
    """A pod to call from."""
    return lab.pod("web", "shop")


def call(pod: Pod, address: str, port: int) -> tuple[int, str, int, str]:
    """Return (client's own port, client address and port as the server saw them, server's own address)."""
    done = pod.run([sys.executable, "-c", CLIENT, address, str(port)])
    assert done.returncode == 0, done.stderr
    own_port, _, seen, seen_port, server = done.stdout.split()
    return int(own_port), seen.removeprefix("::ffff:"), int(seen_port), server.removeprefix("::ffff:")


def runs(pid: int) -> bool:
    """Return whether the process lives; a zombie that init has not collected yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_service_spreads_over_its_pods_behind_masquerade(
    lab: Lab, backends: tuple[Pod, Pod], client: Pod
) -> None:
    """Two calls reach two pods, which see the node's address."""
    address = lab.service("api", backends, [Port(80, 8080)], namespace="shop")
    answers = [call(client, address, 80) for _ in range(2)]
    assert {answer[3] for answer in answers} == {pod.ip for pod in backends}
    assert {answer[1] for answer in answers} == {lab.node_ip}


def test_service_of_family_6_speaks_ipv6(lab: Lab, backends: tuple[Pod, Pod], client: Pod) -> None:
    """The same through IPv6, at once after the pods were made."""
    if client.ip6 is None:
        # The lab does without where the kernel was built or booted so. CI fails on this skip.
        pytest.skip("the kernel has no IPv6")
    address = lab.service("api6", backends, [Port(80, 8080)], namespace="shop", family=6)
    _, seen, _, server = call(client, address, 80)
    assert server in {pod.ip6 for pod in backends}
    assert seen == lab.node_ip6


def test_service_with_snat_ports_changes_the_source_port(
    lab: Lab, backends: tuple[Pod, Pod], client: Pod
) -> None:
    """The server sees a port from the range that was asked for, not the client's own."""
    address = lab.service("snat", backends, [Port(81, 8080)], snat_ports=(20000, 20999))
    own, _, seen, _ = call(client, address, 81)
    assert seen in range(20000, 21000)
    assert own != seen


def test_node_port_and_node_process_reach_the_pods(lab: Lab, backends: tuple[Pod, Pod], client: Pod) -> None:
    """A node port works from a pod, a cluster IP from a pod on the node's own network."""
    address = lab.service("outer", backends, [Port(82, 8080, node_port=30082)])
    assert call(client, lab.node_ip, 30082)[3] in {pod.ip for pod in backends}
    assert call(lab.pod("agent", host_network=True), address, 82)[3] in {pod.ip for pod in backends}


def test_process_runs_in_its_pods_cgroup_and_namespace_under_its_own_pid(client: Pod) -> None:
    """What starts in a pod is the process that Popen knows, inside before its first instruction."""
    process = client.popen([sys.executable, "-c", "print(flush=True); input()"], stdin=-1, stdout=-1)
    assert process.stdout is not None
    process.stdout.readline()
    assert Path(f"/proc/{process.pid}/ns/net").stat().st_ino == client.netns_ino
    paths = {line.split(":", 2)[2] for line in Path(f"/proc/{process.pid}/cgroup").read_text().splitlines()}
    assert any(path.endswith(f"/kubepods/burstable/pod{client.uid}/{client.container_id}") for path in paths)
    process.kill()
    process.wait()


def test_manifest_lists_what_was_made(lab: Lab, client: Pod) -> None:
    """Pods, Services and the node are there as kubectl would print them."""
    listed = {(item["kind"], item["metadata"]["name"]): item for item in lab.manifest()["items"]}
    pod = listed["Pod", "web"]
    assert pod["metadata"]["uid"] == client.uid
    assert pod["status"]["podIPs"][0] == {"ip": client.ip}
    assert pod["status"]["containerStatuses"][0]["containerID"] == f"containerd://{client.container_id}"
    assert ("Node", lab.node) in listed


@pytest.mark.usefixtures("lab")
def test_second_lab_of_a_name_is_refused() -> None:
    """A name belongs to one lab of the machine at a time."""
    with pytest.raises(LabBusyError, match=NAME):
        Lab(NAME)


def test_closed_lab_leaves_nothing_behind() -> None:
    """Namespaces, cgroups and processes go, also those that a pod's process started."""
    with Lab("test-lab-close") as lab:
        pod = lab.pod("web")
        shell = pod.popen(["sh", "-c", "sleep 60 & echo $!; wait"], stdout=subprocess.PIPE)
        assert shell.stdout is not None
        child = int(shell.stdout.readline())
    assert not runs(child)
    assert not any("test-lab-close" in path.name for path in Path("/run/netns").iterdir())
    assert not any((mount / lab.prefix).exists() for mount in cgroup.hierarchies())
