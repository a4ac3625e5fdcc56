"""The books: attempted = received + lost, to the last event, whatever overflows and however fast it comes."""

from __future__ import annotations

import contextlib
import signal
import socket
import struct
import time
from pathlib import Path
from typing import TYPE_CHECKING

from collector.node import core
from collector.node.abi import EventType, Role
from collector.node.tiers import read_environment
from tests.kernel.node import Watch
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from collector.node.probes import Probes
    from tests.kernel.conftest import AssertExact
    from tests.kernel.node import Namespace

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
    watch.probes.detach()
    watch.pull()
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
    watch.probes.detach()
    watch.pull()
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
    watch.probes.detach()
    watch.pull()
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
    watch.probes.detach()
    watch.pull()
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
