"""A connection's events on both ends: connect, accept, close."""

from __future__ import annotations

import contextlib
import errno
import select
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from collector.node.abi import EventType, Role
from tests.kernel.node import DEADLINE_S, Watch, pair, text
from tests.kernel.wire import SYN
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Callable

    from _pytest.mark import ParameterSet

    from collector.node.probes import Probes
    from tests.kernel.node import Namespace
    from tests.kernel.scenarios import Scenario
    from tests.kernel.wire import HeldWire


def _row(name: str, *values: str) -> ParameterSet:
    return pytest.param(*values, id=name.replace(" ", "-"), marks=pytest.mark.scenario(name))


FAMILIES = pytest.mark.parametrize(
    ("listen", "dial", "seen_client", "seen_server"),
    [
        _row("IPv4", "10.91.1.2", "10.91.1.2", "::ffff:10.91.1.1", "::ffff:10.91.1.2"),
        _row("IPv6", "fd91:1::2", "fd91:1::2", "fd91:1::1", "fd91:1::2"),
        _row("dual stack", "::", "10.91.1.2", "::ffff:10.91.1.1", "::ffff:10.91.1.2"),
        _row("v4-mapped", "::", "::ffff:10.91.1.2", "::ffff:10.91.1.1", "::ffff:10.91.1.2"),
    ],
)

DIALLED_EACH = 700
ACCEPTING = """
import socket, sys
listener = socket.socket(fileno=int(sys.argv[1]))
listener.settimeout(None)
for _ in range(int(sys.argv[2])):
    peer, _ = listener.accept()
    peer.recv(1)
    peer.close()
"""
DIALLING = """
import socket, sys
for _ in range(int(sys.argv[2])):
    peer = socket.socket()
    peer.connect(("10.91.1.2", int(sys.argv[1])))
    peer.close()
"""


@FAMILIES
def test_connection_is_seen_on_both_ends(
    watch: Watch,
    client: Namespace,
    server: Namespace,
    scenario: Scenario,
    listen: str,
    dial: str,
    seen_client: str,
    seen_server: str,
) -> None:
    """One OPEN and one CLOSE per end, with the same ISN pair, addresses, ports, bytes and who closed."""
    listener = server.listen(listen)
    port = listener.getsockname()[1]
    dialler = client.connect(dial, port)
    accepted, _ = listener.accept()
    dialler.sendall(b"q" * 70_000)
    assert len(accepted.recv(70_000, socket.MSG_WAITALL)) == 70_000
    accepted.sendall(b"a" * 1_234)
    assert len(dialler.recv(1_234, socket.MSG_WAITALL)) == 1_234
    client_port = dialler.getsockname()[1]
    dialler.close()
    assert accepted.recv(1) == b""
    accepted.close()
    watch.tells(scenario)
    connect, accept = watch.one(EventType.CONNECT), watch.one(EventType.ACCEPT)
    client_close, server_close = (
        watch.one(EventType.CLOSE, Role.CLIENT),
        watch.one(EventType.CLOSE, Role.SERVER),
    )
    listener.close()

    assert pair(connect) == pair(accept) == pair(client_close) == pair(server_close)
    for event in (connect, client_close):
        assert (text(event["local_address"]), text(event["remote_address"])) == (seen_client, seen_server)
        assert (event["local_port"], event["remote_port"]) == (client_port, port)
        assert (event["netns_ino"], event["role"]) == (client.inode, Role.CLIENT)
    for event in (accept, server_close):
        assert (text(event["local_address"]), text(event["remote_address"])) == (seen_server, seen_client)
        assert (event["local_port"], event["remote_port"]) == (port, client_port)
        assert (event["netns_ino"], event["role"]) == (server.inode, Role.SERVER)
    assert connect["start_ns"] < connect["established_ns"] == connect["time_ns"] < client_close["time_ns"]
    assert connect["socket_cookie"] == client_close["socket_cookie"] != accept["socket_cookie"]


@pytest.mark.scenario("closed by the server")
def test_server_close_first_is_told_on_both_ends(
    watch: Watch, client: Namespace, server: Namespace, scenario: Scenario
) -> None:
    """When the server's FIN comes first, the server says LOCAL and the client REMOTE."""
    listener = server.listen("10.91.1.2")
    dialler = client.connect("10.91.1.2", listener.getsockname()[1])
    accepted, _ = listener.accept()
    accepted.close()
    assert dialler.recv(1) == b""
    dialler.close()
    watch.tells(scenario)
    listener.close()


@pytest.mark.scenario("half-close")
def test_half_closed_connection_counts_what_comes_after(
    watch: Watch, client: Namespace, server: Namespace, scenario: Scenario
) -> None:
    """Bytes that flow after the client's shutdown are counted, and the first FIN decides who closed."""
    listener = server.listen("fd91:1::2")
    dialler = client.connect("fd91:1::2", listener.getsockname()[1])
    accepted, _ = listener.accept()
    dialler.sendall(b"question")
    dialler.shutdown(socket.SHUT_WR)
    assert accepted.recv(100, socket.MSG_WAITALL) == b"question"
    accepted.sendall(b"late answer")
    accepted.close()
    assert dialler.recv(100, socket.MSG_WAITALL) == b"late answer"
    dialler.close()
    watch.tells(scenario)
    listener.close()


@pytest.mark.parametrize(
    "established_late",
    [
        pytest.param(False, id="usual", marks=pytest.mark.scenario("Fast Open")),
        pytest.param(
            True, id="accepted-before-established", marks=pytest.mark.scenario("Fast Open, accepted early")
        ),
    ],
)
def test_fast_open_connection_has_one_pair(
    watch: Watch, client: Namespace, server: Namespace, scenario: Scenario, established_late: bool
) -> None:
    """With data in the SYN both ends tell one pair and owner, even when accept comes before ESTABLISHED."""
    for namespace in (client, server):
        namespace.sysctl("net.ipv4.tcp_fastopen", "519")  # client, server, no cookie needed
    if established_late:
        server.run("nft", "add table ip t; add chain ip t c { type filter hook input priority 0; }")
        server.run("nft", "add rule ip t c tcp flags & (syn | ack) == ack drop")
    listener = server.socket()
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_FASTOPEN, 5)
    listener.bind(("10.91.1.2", 0))
    listener.listen(5)
    dialler = client.socket()
    dialler.settimeout(None)  # else the call reports EINPROGRESS
    assert dialler.sendto(b"early", socket.MSG_FASTOPEN, ("10.91.1.2", listener.getsockname()[1])) == 5
    accepted, _ = listener.accept()
    assert accepted.recv(5, socket.MSG_WAITALL) == b"early"
    if established_late:
        assert not watch.select(EventType.ACCEPT)
        server.run("nft", "delete table ip t")
        watch.one(EventType.ACCEPT)
    dialler.close()
    assert accepted.recv(1) == b""
    accepted.close()
    watch.tells(scenario)
    listener.close()


@pytest.mark.scenario("syncookies")
def test_syncookie_connection_has_one_pair(
    watch: Watch, client: Namespace, server: Namespace, scenario: Scenario
) -> None:
    """The server's socket is made from the cookie in the last ACK."""
    server.sysctl("net.ipv4.tcp_syncookies", "2")  # always, not only under flood
    listener = server.listen("10.91.1.2")
    dialler = client.connect("10.91.1.2", listener.getsockname()[1])
    accepted, _ = listener.accept()
    dialler.sendall(b"crumb")
    dialler.close()
    assert accepted.recv(6, socket.MSG_WAITALL) == b"crumb"
    accepted.close()
    watch.tells(scenario)
    listener.close()


@pytest.mark.scenario("non-blocking")
def test_nonblocking_connect_is_told_once(
    watch: Watch, client: Namespace, server: Namespace, scenario: Scenario
) -> None:
    """EINPROGRESS is no failure; the handshake ends while the caller waits, and asking again changes nothing."""
    listener = server.listen("10.91.1.2")
    dialler = client.socket()
    dialler.setblocking(False)
    address = ("10.91.1.2", listener.getsockname()[1])
    assert dialler.connect_ex(address) == errno.EINPROGRESS
    assert select.select([], [dialler], [], DEADLINE_S)[1]
    assert [dialler.connect_ex(address) for _ in range(2)] == [0, errno.EISCONN]
    accepted, _ = listener.accept()
    dialler.close()
    assert accepted.recv(1) == b""
    accepted.close()
    watch.tells(scenario)
    listener.close()


@pytest.mark.scenario("simultaneous open")
def test_simultaneous_open_is_told_by_both_diallers(
    open_probes: Callable[..., Probes], held_wire: tuple[HeldWire, Namespace, Namespace], scenario: Scenario
) -> None:
    """Both SYNs cross: each end is a client, and the pairs are mirrored."""
    wire, client, server = held_wire
    watch = Watch(open_probes(), client, server)
    ends = []
    for namespace, host in ((client, 1), (server, 2)):
        ends.append(namespace.socket())
        ends[-1].bind((f"10.91.1.{host}", 7001 if host == 1 else 7002))
        ends[-1].setblocking(False)
    wire.hold()
    assert ends[0].connect_ex(("10.91.1.2", 7002)) == errno.EINPROGRESS
    assert ends[1].connect_ex(("10.91.1.1", 7001)) == errno.EINPROGRESS
    wire.release(SYN)
    watch.count(EventType.CONNECT, None, 2)
    for end in ends:
        end.settimeout(DEADLINE_S)
    ends[0].close()
    assert ends[1].recv(1) == b""
    ends[1].close()
    watch.tells(scenario)


@pytest.mark.scenario("self-connect")
def test_self_connect_is_one_client(
    watch: Watch, client: Namespace, server: Namespace, scenario: Scenario
) -> None:
    """A socket may dial itself: one CONNECT and one CLOSE, and its own FIN crosses itself."""
    dialler = client.socket()
    dialler.bind(("10.91.1.1", 7003))
    dialler.connect(("10.91.1.1", 7003))
    dialler.close()
    watch.tells(scenario)


def test_burst_of_connections_is_complete(
    open_probes: Callable[..., Probes], client: Namespace, server: Namespace
) -> None:
    """Processes that interrupt each other: each connection has two opens and two closes with its pair.

    One of two rounds must be complete: a sandbox's kernel was seen to run no probe in softirqs that interrupt its
    own supervisor. No event may come twice in any.
    """
    for _ in range(2):
        watch = Watch(open_probes(), client, server)
        dialled = burst(watch, client, server)
        assert len(watch.events) == len(
            {(pair(event), event["type"], event["role"]) for event in watch.events}
        )
        if len(watch.events) == 4 * dialled:
            assert len({pair(event) for event in watch.events}) == dialled
            assert not watch.events["flags"].any()
            return
        watch.probes.close()
    raise AssertionError("events were missing twice")


def burst(watch: Watch, client: Namespace, server: Namespace) -> int:
    """Make connections from three processes to a fourth; return how many."""
    dialled = 3 * DIALLED_EACH
    for namespace in (client, server):
        namespace.sysctl(
            "net.ipv4.tcp_max_tw_buckets", "65536"
        )  # small machines end sockets early for want of room
    listener = server.listen("10.91.1.2", 512)
    number = listener.fileno()
    words = [sys.executable, "-c", ACCEPTING, str(number), str(dialled)]
    accepting = subprocess.Popen(words, pass_fds=[number])
    words = [sys.executable, "-c", DIALLING, str(listener.getsockname()[1]), str(DIALLED_EACH)]
    with client.entered():
        dialling = [subprocess.Popen(words) for _ in range(3)]
    assert [process.wait() for process in (*dialling, accepting)] == [0, 0, 0, 0]
    listener.close()
    with contextlib.suppress(AssertionError):
        until(lambda: len(watch.pull()) == 4 * dialled, "four events each", seconds_max=3)
    return dialled
