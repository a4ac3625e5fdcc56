"""Every way in which a connection ends early: who closed it, with which error and flags."""

from __future__ import annotations

import socket
import struct
from typing import TYPE_CHECKING

import pytest

from collector.node.abi import EventType, Role
from tests.kernel.node import LIBC, Watch
from tests.kernel.wire import FIN

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from collector.node.probes import Probes
    from tests.kernel.node import Namespace
    from tests.kernel.scenarios import Scenario
    from tests.kernel.wire import HeldWire

SILENCE = "add table ip t; add chain ip t c { type filter hook input priority 0; policy drop; }"
RESET_NOW = struct.pack("ii", 1, 0)
"""struct linger: on, for 0 s."""


@pytest.fixture
def ends(client: Namespace, server: Namespace) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A connection: the dialling and the accepted socket."""
    listener = server.listen("10.91.1.2")
    dialler = client.connect("10.91.1.2", listener.getsockname()[1])
    accepted, _ = listener.accept()
    listener.close()
    yield dialler, accepted
    dialler.close()
    accepted.close()


@pytest.mark.scenario("reset by the client")
def test_reset_by_the_client_is_local_there_and_remote_here(
    watch: Watch, ends: tuple[socket.socket, socket.socket], scenario: Scenario
) -> None:
    """SO_LINGER 0 sends a RST: the client reset it, the server was reset."""
    dialler, _ = ends
    dialler.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_NOW)
    dialler.close()
    watch.tells(scenario)


@pytest.mark.scenario("unread data")
def test_reset_by_the_server_is_remote_on_the_client(
    watch: Watch, ends: tuple[socket.socket, socket.socket], scenario: Scenario
) -> None:
    """Closing with unread data sends a RST."""
    dialler, accepted = ends
    dialler.sendall(b"never read")
    assert accepted.recv(1, socket.MSG_PEEK) == b"n"
    accepted.close()
    watch.tells(scenario)


@pytest.mark.scenario("reset by the server after FIN")
def test_reset_after_the_peers_fin_keeps_the_first_closer(
    watch: Watch, ends: tuple[socket.socket, socket.socket], scenario: Scenario
) -> None:
    """FIN from the client, then a RST from the server: the client closed first, the server reset."""
    dialler, accepted = ends
    dialler.shutdown(socket.SHUT_WR)
    assert accepted.recv(1) == b""
    accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_NOW)
    accepted.close()
    watch.tells(scenario)


@pytest.mark.scenario("data after close")
def test_reset_that_answers_late_data_is_epipe(
    watch: Watch, ends: tuple[socket.socket, socket.socket], scenario: Scenario
) -> None:
    """Data sent to a peer that has closed both ways is answered by a RST: EPIPE in CLOSE_WAIT."""
    dialler, accepted = ends
    accepted.close()
    assert dialler.recv(1) == b""
    dialler.sendall(b"too late")
    watch.tells(scenario)


@pytest.mark.scenario("disconnect")
def test_disconnect_is_a_local_reset(
    watch: Watch, client: Namespace, ends: tuple[socket.socket, socket.socket], scenario: Scenario
) -> None:
    """connect(AF_UNSPEC) drops the connection with a RST."""
    dialler, _ = ends
    assert LIBC.connect(dialler.fileno(), struct.pack("H14x", socket.AF_UNSPEC), 16) == 0
    watch.tells(scenario)


@pytest.mark.scenario("never accepted")
def test_connection_never_accepted_is_flagged(
    watch: Watch, client: Namespace, server: Namespace, scenario: Scenario
) -> None:
    """A listener that closes resets what it never accepted: no ACCEPT, a CLOSE with the flag and without a process."""
    listener = server.listen("10.91.1.2")
    dialler = client.connect("10.91.1.2", listener.getsockname()[1])
    listener.close()
    watch.tells(scenario)
    dialler.close()


@pytest.mark.scenario("user timeout")
def test_dead_peer_is_closed_by_a_timer(
    watch: Watch, server: Namespace, ends: tuple[socket.socket, socket.socket], scenario: Scenario
) -> None:
    """When acknowledgements stop coming the kernel gives up: TIMER, ETIMEDOUT."""
    dialler, _ = ends
    dialler.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 300)
    server.run("nft", SILENCE)
    dialler.send(b"into the void")
    watch.tells(scenario)
    assert watch.one(EventType.CLOSE, Role.CLIENT)["retransmits"] > 0


@pytest.mark.scenario("keepalive death")
def test_silent_peer_is_closed_by_keepalive(
    watch: Watch, server: Namespace, ends: tuple[socket.socket, socket.socket], scenario: Scenario
) -> None:
    """An idle connection whose probes go unanswered: TIMER, ETIMEDOUT."""
    dialler, _ = ends
    server.run("nft", SILENCE)
    for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT):
        dialler.setsockopt(socket.IPPROTO_TCP, option, 1)
    dialler.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    watch.tells(scenario)


@pytest.mark.scenario("reset while the FIN is under way")
def test_reset_before_the_fin_is_acknowledged(
    watch: Watch, server: Namespace, ends: tuple[socket.socket, socket.socket], scenario: Scenario
) -> None:
    """Each end thinks it was first: the client's FIN never arrived, the server reset."""
    dialler, accepted = ends
    server.run("nft", SILENCE)
    dialler.shutdown(socket.SHUT_WR)
    accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_NOW)
    accepted.close()
    watch.tells(scenario)


@pytest.mark.scenario("FIN never acknowledged")
def test_fin_that_is_never_acknowledged_times_out(
    watch: Watch,
    client: Namespace,
    server: Namespace,
    ends: tuple[socket.socket, socket.socket],
    scenario: Scenario,
) -> None:
    """The kernel gives up a socket without a process: closed by the client, ETIMEDOUT."""
    dialler, _ = ends
    client.sysctl("net.ipv4.tcp_orphan_retries", "1")
    server.run("nft", SILENCE)
    dialler.close()
    watch.tells(scenario)


@pytest.mark.scenario("crossing FINs")
def test_crossing_fins_are_closed_by_both(
    open_probes: Callable[..., Probes], held_wire: tuple[HeldWire, Namespace, Namespace], scenario: Scenario
) -> None:
    """Each end's FIN leaves before the other's arrives: BOTH on both."""
    wire, client, server = held_wire
    watch = Watch(open_probes(), client, server)
    listener = server.listen("10.91.1.2")
    dialler = client.connect("10.91.1.2", listener.getsockname()[1])
    accepted, _ = listener.accept()
    wire.hold()
    dialler.close()
    accepted.close()
    wire.release(FIN)
    watch.tells(scenario)
    listener.close()
