"""Long-lived connections: PROGRESS with the counters so far, and ends that the kernel did not show."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from collector.node.abi import EventType, Flag, Owner, Role
from collector.node.tiers import STATE_PROGRAMS
from tests.kernel.node import Watch, pair
from tests.waiting import until

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    import numpy as np

    from collector.node.probes import Probes
    from tests.kernel.node import Namespace

SERVER = "10.91.1.2"
LATER_S = 3600.0


def connected(client: Namespace, server: Namespace) -> tuple[socket.socket, socket.socket]:
    """Return the dialling and the accepted end of one connection."""
    listener = server.listen(SERVER)
    dialler = client.connect(SERVER, listener.getsockname()[1])
    accepted, _ = listener.accept()
    listener.close()
    return dialler, accepted


def progress(watch: Watch, role: Role, number: int) -> list[np.void]:
    """Walk until so many PROGRESS of a role came."""
    found: list[np.void] = until(
        lambda: [
            watch.probes.tend(time.monotonic()),
            chosen := watch.select(EventType.PROGRESS, role),
            len(chosen) >= number and chosen,
        ][2],
        f"{number} PROGRESS",
    )
    return found


def test_progress_counts_on(open_probes: Callable[..., Probes], client: Namespace, server: Namespace) -> None:
    """Numbered from 1, an interval apart, with owner, key and bytes so far; the CLOSE has no number."""
    watch = Watch(open_probes(progress_interval_s=0.3), client, server)
    dialler, accepted = connected(client, server)
    opened = watch.one(EventType.CONNECT)
    dialler.send(b"12345")
    assert accepted.recv(9) == b"12345"
    (first,) = progress(watch, Role.CLIENT, 1)
    dialler.send(b"678")
    assert accepted.recv(9) == b"678"
    second = progress(watch, Role.CLIENT, 2)[1]
    assert [int(one["progress_seq"]) for one in (first, second)] == [1, 2]
    assert [int(one["bytes_sent"]) for one in (first, second)] == [5, 8]
    assert second["time_ns"] - first["time_ns"] >= 300_000_000
    assert pair(first) == pair(second) == pair(opened)
    assert second["segments_sent"] > first["segments_sent"] > 0
    assert 0 < first["rtt_us"] < 1_000_000
    (server_side, *_) = progress(watch, Role.SERVER, 1)
    assert server_side["bytes_received"] in (5, 8)
    assert server_side["owner"] == first["owner"] == Owner.PROCESS
    dialler.close()
    accepted.close()
    close = watch.one(EventType.CLOSE, Role.CLIENT)
    assert (close["bytes_sent"], close["socket_cookie"]) == (8, first["socket_cookie"])


def test_no_progress_before_its_time(
    open_probes: Callable[..., Probes], client: Namespace, server: Namespace
) -> None:
    """Sweeps over young connections make no event; neither do any with an interval of 0."""
    for interval_s in (60.0, 0.0):
        watch = Watch(open_probes(existing=False, progress_interval_s=interval_s), client, server)
        dialler, accepted = connected(client, server)
        watch.one(EventType.ACCEPT)
        assert sum(watch.probes.tend(time.monotonic() + n * LATER_S) for n in range(4)) == 0
        dialler.close()
        accepted.close()


def test_many_progress_come_a_few_at_a_time(
    open_probes: Callable[..., Probes], client: Namespace, server: Namespace
) -> None:
    """With seven at a time no step makes more, and each connection gets its own."""
    watch = Watch(open_probes(existing=False, progress_interval_s=0.2, walk_events_max=7), client, server)
    ends = [connected(client, server) for _ in range(20)]
    watch.count(EventType.ACCEPT, None, 20)
    made: list[int] = []

    def all_told() -> bool:
        made.append(watch.probes.tend(time.monotonic()))
        return len({int(event["socket_cookie"]) for event in watch.select(EventType.PROGRESS)}) == 40

    until(all_told, "PROGRESS of 40 sockets")
    assert max(made) <= 7
    for end in (one for both in ends for one in both):
        end.close()


def test_end_that_was_not_shown_is_swept_and_counted(
    open_probes: Callable[..., Probes], client: Namespace, server: Namespace
) -> None:
    """Closes behind the probes' back: both entries go, each counted as lost; the sum stays exact."""
    watch = Watch(open_probes(), client, server)
    dialler, accepted = connected(client, server)
    kept = connected(client, server)
    watch.count(EventType.ACCEPT, None, 2)
    behind_the_back(watch.probes, lambda: (dialler.close(), accepted.close()))
    until(
        lambda: [
            watch.probes.tend(time.monotonic() + LATER_S),
            watch.probes.counters()["lost_missed_close"] == 2,
        ][1],
        "both entries swept",
    )
    kept[0].close()
    kept[1].close()
    watch.count(EventType.CLOSE, None, 2)
    watch.probes.detach()
    watch.pull()
    counters = watch.probes.counters()
    assert (
        counters["attempted"] == watch.received + counters["lost_missed_close"] + counters["lost_ring_full"]
    )


def test_establishment_that_was_not_shown_makes_no_failure(
    open_probes: Callable[..., Probes], client: Namespace, server: Namespace
) -> None:
    """A connect that ended unseen in a connection closes as one, and the missing CONNECT is counted."""
    watch = Watch(open_probes(), client, server)
    listener = server.listen(SERVER)
    server.run("nft", "add table ip t; add chain ip t c { type filter hook input priority 0; policy drop; }")
    dialler = client.socket()
    dialler.setblocking(False)
    dialler.connect_ex((SERVER, listener.getsockname()[1]))

    def come_through() -> None:
        server.run("nft", "delete table ip t")
        until(lambda: not dialler.connect_ex((SERVER, listener.getsockname()[1])), "connected")

    behind_the_back(watch.probes, come_through)
    dialler.close()
    close = watch.one(EventType.CLOSE, Role.CLIENT)
    assert (close["flags"] & Flag.OPEN_UNSEEN, close["local_port"] > 0) == (Flag.OPEN_UNSEEN, True)
    assert pair(close) != (0, 0)
    assert not watch.select(EventType.CONNECT_FAILED)
    assert watch.probes.counters()["lost_missed_open"] == 1
    listener.close()


def behind_the_back(probes: Probes, act: Callable[[], object]) -> None:
    """Do something that the state programs are not shown."""
    loaded = probes._loaded
    assert loaded
    states = [program for program in loaded._links if program in STATE_PROGRAMS]
    for program in states:
        loaded._library.bpf_link__destroy(loaded._links.pop(program))
    act()
    for program in states:
        loaded.attach(program)


def test_sweeps_harm_no_live_connection(
    open_probes: Callable[..., Probes], client: Namespace, server: Namespace
) -> None:
    """Opens and closes between the steps of sweeps: nothing is taken for missed, and all is told."""
    watch = Watch(open_probes(existing=False, progress_interval_s=0.01, walk_events_max=1), client, server)
    for turn in range(300):
        dialler, accepted = connected(client, server)
        watch.probes.tend(time.monotonic() + turn)
        dialler.close()
        watch.probes.tend(time.monotonic() + turn)
        accepted.close()
    watch.count(EventType.CLOSE, None, 600)
    counters = watch.probes.counters()
    assert (counters["lost_missed_close"], counters["untracked"]) == (0, 0)
