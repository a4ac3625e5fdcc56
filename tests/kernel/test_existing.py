"""Connections that were open before the probes: told once, with the same key as if their open had been seen."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from collector.node.abi import EventType, Flag, Owner, Role
from tests.kernel.node import Watch, pair
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from collector.node.probes import Probes
    from tests.kernel.node import Cgroup, Namespace, Process

SERVER = "10.91.1.2"
Ends = tuple[socket.socket, socket.socket]


def walk(watch: Watch) -> int:
    """Ask the kernel once for what is due; return how many events it made."""
    return watch.probes.tend(time.monotonic())


def told(watch: Watch, role: Role, number: int = 1) -> list[object]:
    """Walk until so many sockets of a role were told of as EXISTING."""
    until(lambda: [walk(watch), len(watch.select(EventType.EXISTING, role)) >= number][1], f"EXISTING {role}")
    return watch.count(EventType.EXISTING, role, number)


def connected(
    client: Namespace, server: Namespace, address: str = SERVER, bind: tuple[str, int] | None = None
) -> Ends:
    """Return the dialling and the accepted end of one connection, whose listener is gone."""
    listener = server.listen(address)
    dialler = client.socket(listener.family)
    if bind:
        dialler.bind(bind)
    dialler.connect((address, listener.getsockname()[1]))
    accepted, _ = listener.accept()
    listener.close()
    return dialler, accepted


def _nothing(_: Ends) -> None:
    """Leave it as it is."""


def _data(ends: Ends) -> None:
    for one, other in (ends, ends[::-1]):
        one.sendall(b"x" * 100_000)
        left = 100_000
        while left:
            left -= len(other.recv(left))


def _client_shuts(ends: Ends) -> None:
    _data(ends)
    ends[0].shutdown(socket.SHUT_WR)
    assert ends[1].recv(1) == b""


def _server_shuts(ends: Ends) -> None:
    ends[1].shutdown(socket.SHUT_WR)
    assert ends[0].recv(1) == b""


@pytest.mark.parametrize("act", [_nothing, _data, _client_shuts, _server_shuts], ids=lambda act: act.__name__)
@pytest.mark.parametrize(
    ("address", "bind"),
    [
        (SERVER, None),
        ("fd91:1::2", None),
        (SERVER, ("0.0.0.0", 45_123)),
        (SERVER, ("10.91.1.1", 0)),
    ],
    ids=["v4", "v6", "bound_port", "bound_address"],
)
def test_role_and_key_are_those_of_the_open(
    open_probes: Callable[..., Probes],
    client: Namespace,
    server: Namespace,
    address: str,
    bind: tuple[str, int] | None,
    act: Callable[[Ends], None],
) -> None:
    """What probes that saw the open said of both ends, later probes say too, in every state of the connection."""
    before = Watch(open_probes(), client, server)
    ends = connected(client, server, address, bind)
    opened = before.one(EventType.CONNECT)
    act(ends)
    watch = Watch(open_probes(), client, server)
    ports = tuple(end.getsockname()[1] for end in ends)
    for role, local, remote in ((Role.CLIENT, *ports), (Role.SERVER, *ports[::-1])):
        (event,) = told(watch, role)
        assert pair(event) == pair(opened)
        assert (event["local_port"], event["remote_port"]) == (local, remote)
        assert event["established_ns"] == 0
    for end in ends:
        end.close()


def test_counters_and_owner_are_told(
    open_probes: Callable[..., Probes],
    make_cgroup: Callable[[str], Cgroup],
    make_process: Callable[..., Process],
    client: Namespace,
    server: Namespace,
) -> None:
    """The process that holds the socket, its cgroup, and the bytes so far."""
    cgroup = make_cgroup("/old")
    process = make_process(client, cgroup, uid=1234, comm=b"old \xff")
    listener = server.listen(SERVER)
    process.start("connect", SERVER, listener.getsockname()[1])
    accepted, _ = listener.accept()
    process.expect("ready")
    accepted.send(b"hello")
    watch = Watch(open_probes(), client, server)
    (event,) = told(watch, Role.CLIENT)
    assert (event["tgid"], event["uid"], event["owner"]) == (process.pid, 1234, Owner.PROCESS)
    assert bytes(event["comm"]).rstrip(b"\0") == b"old \xff"
    assert event["cgroup_id"] == cgroup.id
    assert watch.probes.cgroups.path(cgroup.id).endswith("/old")
    assert (event["bytes_sent"], event["bytes_received"]) == (0, 5)
    (event,) = told(watch, Role.SERVER)
    assert event["tgid"] == os.getpid()
    assert (event["bytes_sent"], event["bytes_received"]) == (5, 0)
    accepted.close()
    listener.close()


def test_close_of_an_existing_connection_is_tracked(
    open_probes: Callable[..., Probes], client: Namespace, server: Namespace
) -> None:
    """The same key and cookie, the final bytes, no duration to be had; nothing is untracked."""
    dialler, accepted = connected(client, server)
    watch = Watch(open_probes(), client, server)
    (existing,) = told(watch, Role.CLIENT)
    told(watch, Role.SERVER)
    dialler.send(b"bye")
    assert accepted.recv(9) == b"bye"
    dialler.close()
    accepted.close()
    close = watch.one(EventType.CLOSE, Role.CLIENT)
    assert pair(close) == pair(existing) == pair(watch.one(EventType.CLOSE, Role.SERVER))
    assert close["socket_cookie"] == existing["socket_cookie"]
    assert close["bytes_sent"] == 3
    assert (close["established_ns"], close["flags"]) == (0, Flag.OPEN_UNSEEN)


def test_connection_of_after_the_probes_is_not_existing(
    open_probes: Callable[..., Probes], client: Namespace, server: Namespace
) -> None:
    """A walk tells of what the probes did not see open, and of that once."""
    old = connected(client, server)
    watch = Watch(open_probes(), client, server)
    new = connected(client, server)
    told(watch, Role.CLIENT)
    told(watch, Role.SERVER)
    until(lambda: watch.probes.tend(time.monotonic() + 60) == 0, "second walk's end")
    until(lambda: watch.probes.tend(time.monotonic() + 120) == 0, "another walk's end")
    assert len(watch.select(EventType.EXISTING)) == 2
    for end in (*old, *new):
        end.close()


def test_loopback_is_left_out(
    open_probes: Callable[..., Probes], client: Namespace, server: Namespace
) -> None:
    """The filters hold for what was open before, too."""
    local = connected(client, client, "127.0.0.1")
    other = connected(client, server)
    watch = Watch(open_probes(), client, server)
    told(watch, Role.CLIENT)
    told(watch, Role.SERVER)
    assert len(watch.events) == 2
    for end in (*local, *other):
        end.close()


def test_many_come_a_few_at_a_time(
    open_probes: Callable[..., Probes], client: Namespace, server: Namespace
) -> None:
    """With ten at a time, thirty connections take several steps; none is left out."""
    ends = [connected(client, server) for _ in range(30)]
    watch = Watch(open_probes(walk_events_max=10, progress_interval_s=0), client, server)
    made = [walk(watch) for _ in range(3)]
    assert max(made) <= 10
    told(watch, Role.CLIENT, 30)
    told(watch, Role.SERVER, 30)
    for end in (one for both in ends for one in both):
        end.close()


def test_socket_map_without_room_is_counted(
    open_probes: Callable[..., Probes], client: Namespace, server: Namespace
) -> None:
    """An EXISTING that finds no room in the map is lost for that reason, and the sum stays exact."""
    ends = [connected(client, server) for _ in range(20)]
    watch = Watch(open_probes(sockets_max=8), client, server)
    until(lambda: [walk(watch), watch.probes.counters()["lost_socket_map_full"]][1], "map full")
    watch.probes.detach()
    watch.pull()
    counters = watch.probes.counters()
    assert counters["attempted"] == watch.received + counters["lost_socket_map_full"]
    for end in (one for both in ends for one in both):
        end.close()


# ---- without the node's processes in sight ----

CONTAINED = """
import sys, time
from pathlib import Path
from collector.node.abi import EventType
from collector.node.probes import ProbeOptions, Probes
probes = Probes.open(ProbeOptions(state_dir=Path(sys.argv[1])))
print("open", flush=True)
give_up = time.monotonic() + 20
while time.monotonic() < give_up:
    probes.tend(time.monotonic())
    for event in probes.read(1000):
        if event["netns_ino"] == int(sys.argv[2]):
            name = EventType(event["type"]).name
            print(name, event["role"], event["owner"], event["tgid"], event["client_isn"], event["server_isn"],
                  event["bytes_received"], flush=True)
    time.sleep(0.02)
"""


def test_receiving_socket_is_found_without_host_pids(
    open_probes: Callable[..., Probes], client: Namespace, server: Namespace, tmp_path: Path
) -> None:
    """A collector in its own pid namespace hears of an old connection when its owner next receives."""
    before = Watch(open_probes(), client, server)
    dialler, accepted = connected(client, server)
    opened = before.one(EventType.CONNECT)
    words = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", sys.executable, "-c", CONTAINED]
    command = [*words, str(tmp_path / "contained"), str(client.inode)]
    contained = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert contained.stdout
        assert contained.stdout.readline() == "open\n"
        accepted.send(b"ping")
        assert dialler.recv(9) == b"ping"
        found = contained.stdout.readline().split()
        assert found == [
            "EXISTING",
            str(int(Role.CLIENT)),
            str(int(Owner.PROCESS)),
            str(os.getpid()),
            *map(str, pair(opened)),
            "4",
        ]
        accepted.send(b"again")
        assert dialler.recv(9) == b"again"
        dialler.close()
        accepted.close()
        assert contained.stdout.readline().split()[0] == "CLOSE"
    finally:
        contained.kill()
        contained.communicate()


# ---- over a restart ----

HOLDER = """
import sys, time
from pathlib import Path
from collector.node.probes import ProbeOptions, Probes
probes = Probes.open(ProbeOptions(state_dir=Path(sys.argv[1]), pin_dir=Path(sys.argv[2]), progress_interval_s=0.5))
assert "pinning" not in probes.refused, probes.refused
print("open", flush=True)
while True:
    probes.tend(time.monotonic())
    probes.read(100000)
    probes.events.release(probes.events.read_position)
    if probes.counters()["attempted"] >= int(sys.argv[3]):
        print("told", flush=True)
        sys.stdin.readline()
    time.sleep(0.02)
"""


@pytest.fixture
def pin_dir(tmp_path: Path) -> Iterator[Path]:
    """A folder on a bpffs of its own."""
    place = tmp_path / "bpffs"
    place.mkdir()
    subprocess.run(["mount", "-t", "bpf", "bpf", place], check=True)
    yield place / "podwire"
    subprocess.run(["umount", "--lazy", place], check=True)


def test_killed_collector_leaves_nothing_to_tell_twice(
    open_probes: Callable[..., Probes], client: Namespace, server: Namespace, tmp_path: Path, pin_dir: Path
) -> None:
    """After kill -9 the successor tells neither EXISTING nor OPEN of known sockets; PROGRESS counts on, CLOSE comes."""
    old = connected(client, server)
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "state"), str(pin_dir), "2"]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout
    assert holder.stdout.readline() == "open\n"
    new = connected(client, server)
    assert holder.stdout.readline() == "told\n"
    holder.send_signal(signal.SIGKILL)
    holder.communicate()

    watch = Watch(open_probes(pin_dir=pin_dir, progress_interval_s=0.5), client, server)
    assert watch.probes.reused
    first = watch.probes.counters()
    until(lambda: [walk(watch), len(watch.select(EventType.PROGRESS)) >= 8][1], "PROGRESS of all, twice")
    assert first["lost_ring_full"] == 0
    for end in (*old, *new):
        end.close()
    watch.count(EventType.CLOSE, None, 4)
    cookies = [int(event["socket_cookie"]) for event in watch.select(EventType.EXISTING)]
    assert len(cookies) == len(set(cookies)) <= 2
    opens = watch.select(EventType.CONNECT) + watch.select(EventType.ACCEPT)
    assert len(opens) <= 2
    assert not {int(event["socket_cookie"]) for event in opens} & set(cookies)
    for close in watch.select(EventType.CLOSE):
        numbers = [
            int(event["progress_seq"])
            for event in watch.select(EventType.PROGRESS)
            if event["socket_cookie"] == close["socket_cookie"]
        ]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    watch.probes.detach()
    assert watch.probes.counters()["lost_missed_close"] == 0
