"""Whose connection it is: process, user, name and cgroup, on both ends."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from collector.node.abi import ClosedBy, EventType, Owner, Role
from tests.kernel.node import Process, Watch, text
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Callable

    from collector.node.probes import Probes
    from tests.kernel.conftest import AssertExact
    from tests.kernel.node import Cgroup, Namespace
    from tests.kernel.scenarios import Scenario

UIDS = {"client": "aaaaaaaa-1111-4222-8333-444444444444", "server": "bbbbbbbb-1111-4222-8333-444444444444"}
PORT = 7070
CLOSE_WAIT = " 08 "
WANDERER = """
import os, socket, sys
for cgroup in sys.argv[2:]:
    with open(cgroup + "/cgroup.procs", "w") as file:
        file.write(str(os.getpid()))
    peer = socket.socket()
    peer.connect(("10.91.1.2", int(sys.argv[1])))
    peer.close()
"""


def in_pod(make_cgroup: Callable[[str], Cgroup], name: str) -> Cgroup:
    """Make the cgroup of a container in a pod, as the cgroupfs driver does."""
    return make_cgroup(f"/kubepods/burstable/pod{UIDS[name]}/{name[0].encode().hex() * 32}")


@pytest.mark.scenario("owners and pods")
@pytest.mark.parametrize("comm", [b"plain", b"\xff\xfe caf\xe9", b"fifteen-bytes-x"], ids=repr)
def test_both_owners_are_told_with_their_pods(
    watch: Watch,
    client: Namespace,
    server: Namespace,
    make_cgroup: Callable[[str], Cgroup],
    make_process: Callable[..., Process],
    scenario: Scenario,
    comm: bytes,
) -> None:
    """Every event has pid, uid, comm (arbitrary bytes), cgroup and pod of the process on its own end."""
    processes = {
        Role.SERVER: make_process(server, in_pod(make_cgroup, "server"), uid=4321, comm=b"server"),
        Role.CLIENT: make_process(client, in_pod(make_cgroup, "client"), uid=1234, comm=comm),
    }
    for role, command in ((Role.SERVER, "accept"), (Role.CLIENT, "connect")):
        processes[role].start(command, "10.91.1.2", PORT)
        if role == Role.SERVER:
            processes[role].expect("listening")
    for process in processes.values():
        process.expect("ready")
    for role in (Role.CLIENT, Role.SERVER):
        processes[role].go_on()
        processes[role].expect("closed")
    watch.tells(scenario)
    # where accept is not watched, ACCEPT has no process, and on cgroup v1 no pod
    events = watch.events[watch.events["owner"] == Owner.PROCESS]
    owners = watch.probes.cgroups.owners_of(events)
    for event, uid, container in zip(events, owners.pod_uids, owners.container_ids, strict=True):
        process, name = processes[event["role"]], Role(event["role"]).name.lower()
        assert (event["tgid"], event["uid"], event["owner"]) == (process.pid, process.uid, Owner.PROCESS)
        assert bytes(event["comm"]).rstrip(b"\0") == process.comm
        assert process.cgroup
        assert event["cgroup_id"] == process.cgroup.id
        assert watch.probes.cgroups.path(int(event["cgroup_id"])).endswith(process.cgroup.path)
        assert uid.tobytes() == bytes.fromhex(UIDS[name].replace("-", ""))
        assert container.tobytes().hex() == name[0].encode().hex() * 32
    assert not owners.from_namespace.any()


@pytest.mark.scenario("killed process")
def test_owner_survives_a_killed_process(
    watch: Watch,
    client: Namespace,
    server: Namespace,
    make_process: Callable[..., Process],
    scenario: Scenario,
) -> None:
    """After kill -9 the CLOSE still has the owner of the open."""
    listener = server.listen("10.91.1.2")
    process = make_process(client, comm=b"victim")
    process.start("connect", "10.91.1.2", listener.getsockname()[1])
    process.expect("ready")
    accepted, _ = listener.accept()
    process.stop()
    assert accepted.recv(1) == b""
    accepted.close()
    watch.tells(scenario)
    event = watch.one(EventType.CLOSE, Role.CLIENT)
    assert (event["tgid"], bytes(event["comm"]).rstrip(b"\0")) == (process.pid, b"victim")
    listener.close()


def test_names_are_known_before_their_events(
    open_probes: Callable[..., Probes],
    client: Namespace,
    server: Namespace,
    make_cgroup: Callable[[str], Cgroup],
) -> None:
    """While connections come from ever new cgroups, each event's name is known whenever the event is read."""
    probes = open_probes()
    listener = server.listen("10.91.1.2", 512)
    cgroups = [make_cgroup(f"/many/{number}") for number in range(200)]
    words = [str(listener.getsockname()[1]), *(str(cgroup.folders[0]) for cgroup in cgroups)]
    with client.entered():
        wanderer = subprocess.Popen([sys.executable, "-c", WANDERER, *words])
    seen: set[str | None] = set()
    while wanderer.poll() is None or len(seen) < len(cgroups):
        events = probes.read(1_000)
        mine = events[events["netns_ino"] == client.inode]
        seen |= {probes.cgroups.path(int(cgroup)) for cgroup in mine["cgroup_id"]}
        assert wanderer.poll() in {None, 0}
    assert None not in seen
    assert len(seen) == len(cgroups)
    listener.close()


def test_full_names_ring_is_counted_and_told_again(
    open_probes: Callable[..., Probes],
    client: Namespace,
    server: Namespace,
    make_cgroup: Callable[[str], Cgroup],
    make_process: Callable[..., Process],
    assert_exact: AssertExact,
) -> None:
    """With room for four names no event is lost, and a cgroup whose name found no room is told at its next event."""
    watch = Watch(open_probes(names_ring_bytes=4096), client, server)
    listener = server.listen("10.91.1.2", 64)
    processes = [make_process(client, make_cgroup(f"/few/{number}")) for number in range(8)]
    for process in processes:
        process.start("connect", "10.91.1.2", listener.getsockname()[1])
        process.expect("ready")
        process.stop()
    closes = watch.count(EventType.CLOSE, Role.CLIENT, 8)
    counters = watch.probes.counters()
    assert counters["lost_name_ring_full"] >= 4
    assert counters["lost_ring_full"] == 0
    assert sum(watch.probes.cgroups.path(int(event["cgroup_id"])) is None for event in closes) >= 4
    again = make_process(client, processes[-1].cgroup)
    again.start("connect", "10.91.1.2", listener.getsockname()[1])
    again.expect("ready")
    again.stop()
    events = watch.count(EventType.CLOSE, Role.CLIENT, 9)
    assert watch.probes.cgroups.path(int(events[-1]["cgroup_id"])).endswith("/few/7")
    listener.close()
    watch.stop()
    assert_exact(watch.probes, watch.received)


def test_tp_btf_tier_tells_accept_at_establishment(
    open_probes: Callable[..., Probes], client: Namespace, server: Namespace
) -> None:
    """Without the accept tracepoints ACCEPT comes from softirq without a process; the owner is learnt at close."""
    watch = Watch(open_probes(tier="tp_btf"), client, server)
    assert watch.probes.tier == "tp_btf"
    assert "tracepoint" in watch.probes.refused
    listener = server.listen("10.91.1.2")
    dialler = client.connect("10.91.1.2", listener.getsockname()[1])
    accept = watch.one(EventType.ACCEPT)
    assert accept["owner"] in {Owner.NONE, Owner.CGROUP}
    assert accept["tgid"] == 0
    assert text(accept["remote_address"]) == "::ffff:10.91.1.1"
    accepted, _ = listener.accept()
    dialler.close()
    accepted.close()
    assert watch.one(EventType.CLOSE, Role.SERVER)["owner"] == Owner.PROCESS
    watch.one(EventType.ACCEPT)
    listener.close()


def test_closer_is_known_though_the_last_ack_comes_late(
    open_probes: Callable[..., Probes],
    make_process: Callable[..., Process],
    client: Namespace,
    server: Namespace,
) -> None:
    """Without an accept hook, the process that closes is told even where the kernel ends the socket in softirq."""
    watch = Watch(open_probes(tier="tp_btf"), client, server)
    process = make_process(server)
    process.start("accept", "10.91.1.2", PORT)
    process.expect("listening")
    dialler = client.connect("10.91.1.2", PORT)
    process.expect("ready")
    dialler.close()
    until(lambda: CLOSE_WAIT in server.tcp_table(), "the server's CLOSE_WAIT")
    server.run("nft", "add table ip t; add chain ip t c { type filter hook input priority 0; policy drop; }")
    process.go_on()
    process.expect("closed")
    server.run("nft", "delete table ip t")
    closed = watch.one(EventType.CLOSE, Role.SERVER)
    assert (closed["tgid"], closed["owner"], closed["closed_by"]) == (
        process.pid,
        Owner.PROCESS,
        ClosedBy.REMOTE,
    )
