"""The books: attempted = received + lost, to the last event, whatever overflows and however fast it comes."""

from __future__ import annotations

import contextlib
import errno
import re
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from collector.node import core
from collector.node.abi import EventType, Role
from collector.node.probes import DEFAULT_OBJECT
from collector.node.tiers import read_environment
from tests.kernel import test_owner
from tests.kernel.node import Watch
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from collector.node.probes import Probes
    from tests.kernel.conftest import AssertExact
    from tests.kernel.node import Cgroup, Namespace

EMULATED = "QEMU TCG" in Path("/proc/cpuinfo").read_text()
BURST_CONNECTIONS = 1_000 if EMULATED else 50_000
"""An emulated CPU takes some 20 times as long."""
EVENTS_PER_CONNECTION = 4
SKIPPED_RUNS_SINCE = (5, 12)
RESET_NOW = struct.pack("ii", 1, 0)


def burst(namespace: Namespace, connections: int, every: Callable[[], object] = int) -> None:
    """Open and reset so many connections inside one namespace, one after the other; call `every` each thousand."""
    listener = namespace.listen("127.0.0.1")
    with namespace.entered():
        for number in range(connections):
            dialler = socket.create_connection(listener.getsockname())
            accepted, _ = listener.accept()
            dialler.setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, RESET_NOW
            )  # no TIME_WAIT: ports come again
            dialler.close()
            accepted.close()
            if number % 1000 == 999:
                every()
    listener.close()


@contextlib.contextmanager
def alarms() -> Iterator[list[int]]:
    """Signals every few ms, noted one by one."""
    seen: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, _: seen.append(number))
    signal.setitimer(signal.ITIMER_REAL, 0.003, 0.003)
    try:
        yield seen
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_burst_of_fifty_thousand_is_received_whole(
    open_probes: Callable[..., Probes], client: Namespace, assert_exact: AssertExact
) -> None:
    """Drained now and then, in the midst of signals, over many wraps of the ring: nothing is lost or doubled."""
    watch = Watch(open_probes(filter_loopback=False, ring_bytes=1 << 22), client)
    with alarms() as seen:
        burst(client, BURST_CONNECTIONS, watch.pull)
    assert seen
    for kind, role in (
        (EventType.CONNECT, Role.CLIENT),
        (EventType.ACCEPT, Role.SERVER),
        (EventType.CLOSE, Role.CLIENT),
        (EventType.CLOSE, Role.SERVER),
    ):
        assert len(watch.select(kind, role)) == BURST_CONNECTIONS
    watch.stop()
    counters = assert_exact(watch.probes, watch.received)
    assert counters["lost_ring_full"] == 0
    assert counters["attempted"] >= EVENTS_PER_CONNECTION * BURST_CONNECTIONS


def test_burst_into_a_small_ring_is_accounted_for(
    open_probes: Callable[..., Probes], client: Namespace, assert_exact: AssertExact
) -> None:
    """A ring of 372 events, emptied each thousand connections, loses most of what comes and knows how many."""
    watch = Watch(open_probes(filter_loopback=False, ring_bytes=1 << 16), client)
    thousands = 1 if EMULATED else 5
    burst(client, 1000 * thousands, watch.pull)
    watch.stop()
    counters = assert_exact(watch.probes, watch.received)
    assert counters["lost_ring_full"] >= thousands * (4_000 - (1 << 16) // 176)


def test_full_socket_map_under_a_burst_is_accounted_for(
    open_probes: Callable[..., Probes], client: Namespace, assert_exact: AssertExact
) -> None:
    """Held connections fill the map: what finds no room is lost for that reason, and the sum stays exact."""
    watch = Watch(open_probes(filter_loopback=False, sockets_max=64), client)
    listener = client.listen("127.0.0.1", 64)
    held = []
    with client.entered():
        for _ in range(50):
            held += [socket.create_connection(listener.getsockname()), listener.accept()[0]]
    burst(client, 1_000, watch.pull)
    for end in held:
        end.close()
    listener.close()
    watch.stop()
    assert assert_exact(watch.probes, watch.received)["lost_socket_map_full"] >= 2_000


def test_everything_at_once_is_accounted_for(
    open_probes: Callable[..., Probes], client: Namespace, assert_exact: AssertExact
) -> None:
    """EXISTING, PROGRESS, opens and closes through a ring and a map that are both too small."""
    listener = client.listen("127.0.0.1", 64)
    held = []
    with client.entered():
        for _ in range(20):
            held += [socket.create_connection(listener.getsockname()), listener.accept()[0]]
    options = {"ring_bytes": 4096, "sockets_max": 48, "progress_interval_s": 0.05}
    watch = Watch(open_probes(filter_loopback=False, **options), client)
    until(
        lambda: [
            watch.probes.tend(time.monotonic()),
            burst(client, 50),
            watch.probes.counters()["lost_ring_full"] > 200,
        ][2],
        "a ring that overflows",
    )
    for end in held:
        end.close()
    watch.stop()
    assert_exact(watch.probes, watch.received)
    listener.close()


def test_skipped_runs_are_asked_of_the_kernel(open_probes: Callable[..., Probes]) -> None:
    """The kernel says of each program how often it left it out; both state programs count as one."""
    probes = open_probes()
    programs = [number for name, number in probes._descriptors.items() if name.startswith("program_")]
    assert len(programs) >= 2
    if read_environment().release >= SKIPPED_RUNS_SINCE:
        for number in programs:
            assert "recursion_misses:" in Path(f"/proc/self/fdinfo/{number}").read_text()
    assert probes.counters()["skipped_runs"] <= sum(map(core.skipped_runs, programs))


WANDERER = """
import os, socket, sys
for cgroup in sys.argv[2:]:
    with open(cgroup + "/cgroup.procs", "w") as file:
        file.write(str(os.getpid()))
    socket.create_connection(("127.0.0.1", int(sys.argv[1]))).close()
"""
CROWD = """
import socket, sys, threading
def call():
    socket.socket().connect(("10.91.1.2", 7777))
for _ in range(int(sys.argv[1])):
    threading.Thread(target=call, daemon=True).start()
sys.stdin.readline()
"""


def test_full_memory_of_names_is_counted(
    open_probes: Callable[..., Probes],
    client: Namespace,
    make_cgroup: Callable[[str], Cgroup],
    assert_exact: AssertExact,
) -> None:
    """More cgroups than the kernel remembers to have told: those that come again are told again, and all are known."""
    watch = Watch(open_probes(filter_loopback=False, cgroups_max=16), client)
    cgroups = [make_cgroup(f"/many/{number}") for number in range(48)]
    listener = client.listen("127.0.0.1", 2 * len(cgroups))
    words = [str(listener.getsockname()[1]), *(str(cgroup.folders[0]) for cgroup in cgroups)]
    for _ in range(2):
        with client.entered():
            subprocess.run([sys.executable, "-c", WANDERER, *words], check=True)
        watch.pull()
    listener.close()
    watch.stop()
    counters = assert_exact(watch.probes, watch.received)
    assert watch.probes.cgroups.told_again >= len(cgroups) - 16
    assert counters["lost_name_ring_full"] == 0
    paths = [watch.probes.cgroups.path(int(one["cgroup_id"])) for one in watch.select(EventType.CONNECT)]
    assert None not in paths
    assert len(paths) == 2 * len(cgroups)


def test_full_memory_of_connect_calls_is_counted(
    open_probes: Callable[..., Probes], client: Namespace, server: Namespace, assert_exact: AssertExact
) -> None:
    """More calls of connect() under way than are remembered: as many are counted, and a failed route is still told."""
    watch = Watch(open_probes(tier="tracepoint", connects_max=64), client, server)
    server.run("nft", "add table ip t; add chain ip t c { type filter hook input priority 0; policy drop; }")
    with client.entered():
        crowd = subprocess.Popen([sys.executable, "-c", CROWD, "200"], stdin=subprocess.PIPE)
    try:
        until(lambda: watch.probes.counters()["forgotten_connects"] >= 200 - 64, "calls that are given up")
        assert client.socket().connect_ex(("198.51.100.9", 7777)) == errno.ENETUNREACH
        watch.count(EventType.CONNECT_FAILED, None, 1)
    finally:
        crowd.kill()
        crowd.communicate()
    watch.stop()
    assert_exact(watch.probes, watch.received)


def test_connect_calls_that_find_room_are_not_counted(
    open_probes: Callable[..., Probes], client: Namespace
) -> None:
    """However many there were: each leaves its place."""
    probes = open_probes(tier="tracepoint", connects_max=512)
    burst(client, 1_000)
    assert probes.counters()["forgotten_connects"] == 0


FILLED = {
    "events": test_burst_into_a_small_ring_is_accounted_for,
    "names": test_owner.test_full_names_ring_is_counted_and_told_again,
    "sockets": test_full_socket_map_under_a_burst_is_accounted_for,
    "named_cgroups": test_full_memory_of_names_is_counted,
    "dials": test_full_memory_of_connect_calls_is_counted,
}
NEVER_FULL = {
    "counters": "an array",
    "changes": "an array",
    "own_process": "an array",
    "filter_ports": "made for its rules",
    "filter_cidrs": "made for its rules",
    "filter_netns": "made for its rules",
    "filter_cgroups": "made for its rules",
}


def test_each_map_is_filled_or_can_not_be() -> None:
    """A new map needs a test above, or a reason why it is never full."""
    text = (DEFAULT_OBJECT.parents[2] / "bpf/maps.h").read_text()
    maps = re.findall(r"^} (\w+) SEC\(\"\.maps\"\);", text, re.MULTILINE)
    assert sorted(maps) == sorted([*FILLED, *NEVER_FULL])
