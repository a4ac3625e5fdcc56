"""What is left out on purpose, and what is lost: counted, and exactly."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from collector.node.abi import EventType
from tests.kernel.node import Watch, text

if TYPE_CHECKING:
    from collections.abc import Callable

    from collector.node.probes import Probes
    from tests.kernel.conftest import AssertExact
    from tests.kernel.node import Namespace


def talk(client: Namespace, server: Namespace, address: str, connections: int) -> None:
    """Open and close so many connections."""
    listener = server.listen(address)
    for _ in range(connections):
        dialler = client.connect(address, listener.getsockname()[1])
        accepted, _ = listener.accept()
        dialler.close()
        accepted.close()
    listener.close()


@pytest.mark.parametrize("address", ["127.0.0.1", "127.8.8.8", "::1"])
def test_loopback_is_left_out(watch: Watch, client: Namespace, server: Namespace, address: str) -> None:
    """Connections between loopback addresses make no event and are not counted as lost."""
    talk(client, client, address, 3)
    talk(client, server, "10.91.1.2", 1)
    watch.count(EventType.CLOSE, None, 2)
    assert len(watch.events) == 4


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_loopback_is_seen_where_it_is_wanted(
    open_probes: Callable[..., Probes], client: Namespace, server: Namespace, address: str
) -> None:
    """The filter is an option."""
    watch = Watch(open_probes(filter_loopback=False), client)
    talk(client, client, address, 2)
    watch.count(EventType.CLOSE, None, 4)


def test_own_address_is_seen_although_it_uses_the_loopback_device(watch: Watch, client: Namespace) -> None:
    """The filter goes by address, not by device: pods of one node may meet on `lo`."""
    talk(client, client, "10.91.1.1", 1)
    events = watch.count(EventType.CLOSE, None, 2)
    assert {text(event["remote_address"]) for event in events} == {"::ffff:10.91.1.1"}


def test_full_ring_is_counted_exactly(
    open_probes: Callable[..., Probes], client: Namespace, server: Namespace, assert_exact: AssertExact
) -> None:
    """With room for 23 events, attempted = received + lost, and the ring works again once released."""
    watch = Watch(open_probes(ring_bytes=4096), client, server)
    talk(client, server, "10.91.1.2", 100)
    watch.pull()
    counters = watch.probes.counters()
    assert counters["lost_ring_full"] >= 400 - 4096 // 176
    talk(client, server, "10.91.1.2", 2)
    watch.count(EventType.CLOSE, None, int(sum(watch.events["type"] == EventType.CLOSE)) + 4)
    watch.stop()
    assert assert_exact(watch.probes, watch.received)["lost_socket_map_full"] == 0


def test_unreleased_events_are_kept(
    open_probes: Callable[..., Probes], client: Namespace, server: Namespace
) -> None:
    """What was read but not released keeps its room: the ring fills, nothing is overwritten."""
    probes = open_probes(ring_bytes=4096)
    talk(client, server, "10.91.1.2", 5)
    first = probes.read(1_000)
    used = probes.events.used_bytes()
    assert used == len(first) * 176
    talk(client, server, "10.91.1.2", 20)
    assert probes.counters()["lost_ring_full"] > 0
    assert len(probes.read(1_000)) + len(first) == 4096 // 176
    probes.events.release(probes.events.read_position)
    assert probes.events.used_bytes() == 0


def test_full_socket_map_is_counted_exactly(
    open_probes: Callable[..., Probes], client: Namespace, server: Namespace, assert_exact: AssertExact
) -> None:
    """With room for 8 sockets, attempted = received + lost, and closes of forgotten sockets are untracked."""
    watch = Watch(open_probes(sockets_max=8), client, server)
    listener = server.listen("10.91.1.2", 64)
    diallers = [client.connect("10.91.1.2", listener.getsockname()[1]) for _ in range(30)]
    accepted = [listener.accept()[0] for _ in range(30)]
    for end in diallers + accepted:
        end.close()
    listener.close()
    talk(client, server, "10.91.1.2", 1)
    watch.stop()
    counters = assert_exact(watch.probes, watch.received)
    assert counters["lost_socket_map_full"] > 0
    assert counters["untracked"] > 0


def test_open_connections_of_before_are_untracked(
    open_probes: Callable[..., Probes], client: Namespace, server: Namespace
) -> None:
    """Sockets that were open before the probes came close without an event, but counted."""
    listener = server.listen("10.91.1.2")
    dialler = client.connect("10.91.1.2", listener.getsockname()[1])
    accepted, _ = listener.accept()
    watch = Watch(open_probes(), client, server)
    before = watch.probes.counters()["untracked"]
    dialler.close()
    accepted.close()
    talk(client, server, "10.91.1.2", 1)
    watch.count(EventType.CLOSE, None, 2)
    assert watch.probes.counters()["untracked"] >= before + 2
    listener.close()
