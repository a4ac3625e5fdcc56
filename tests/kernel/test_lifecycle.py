"""A connection's events on both ends: connect, accept, close."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from collector.node.abi import ClosedBy, EventType, Owner, Role
from tests.kernel.node import Watch, pair, text, until

if TYPE_CHECKING:
    from collections.abc import Callable

    from collector.node.probes import Probes
    from tests.kernel.node import Namespace

FAMILIES = pytest.mark.parametrize(
    ("listen", "dial", "seen_client", "seen_server"),
    [
        ("10.91.1.2", "10.91.1.2", "::ffff:10.91.1.1", "::ffff:10.91.1.2"),
        ("fd91:1::2", "fd91:1::2", "fd91:1::1", "fd91:1::2"),
        ("::", "10.91.1.2", "::ffff:10.91.1.1", "::ffff:10.91.1.2"),
        ("::", "::ffff:10.91.1.2", "::ffff:10.91.1.1", "::ffff:10.91.1.2"),
    ],
    ids=["v4", "v6", "v4-to-dual-stack", "v4-mapped"],
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
        assert (event["netns_ino"], event["role"], event["owner"]) == (
            client.inode,
            Role.CLIENT,
            Owner.PROCESS,
        )
    for event in (accept, server_close):
        assert (text(event["local_address"]), text(event["remote_address"])) == (seen_server, seen_client)
        assert (event["local_port"], event["remote_port"]) == (port, client_port)
        assert (event["netns_ino"], event["role"], event["owner"]) == (
            server.inode,
            Role.SERVER,
            Owner.PROCESS,
        )
    assert (client_close["bytes_sent"], client_close["bytes_received"]) == (70_000, 1_234)
    assert (server_close["bytes_sent"], server_close["bytes_received"]) == (1_234, 70_000)
    assert (client_close["closed_by"], server_close["closed_by"]) == (ClosedBy.LOCAL, ClosedBy.REMOTE)
    assert connect["start_ns"] < connect["established_ns"] == connect["time_ns"] < client_close["time_ns"]
    assert connect["socket_cookie"] == client_close["socket_cookie"] != accept["socket_cookie"]
    assert {int(event["flags"]) for event in watch.events} == {0}
    assert {int(event["error"]) for event in watch.events} == {0}


def test_server_close_first_is_told_on_both_ends(watch: Watch, client: Namespace, server: Namespace) -> None:
    """When the server's FIN comes first, the server says LOCAL and the client REMOTE."""
    listener = server.listen("10.91.1.2")
    dialler = client.connect("10.91.1.2", listener.getsockname()[1])
    accepted, _ = listener.accept()
    accepted.close()
    assert dialler.recv(1) == b""
    dialler.close()
    assert watch.one(EventType.CLOSE, Role.SERVER)["closed_by"] == ClosedBy.LOCAL
    assert watch.one(EventType.CLOSE, Role.CLIENT)["closed_by"] == ClosedBy.REMOTE
    listener.close()


def test_half_closed_connection_counts_what_comes_after(
    watch: Watch, client: Namespace, server: Namespace
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
    client_close, server_close = (
        watch.one(EventType.CLOSE, Role.CLIENT),
        watch.one(EventType.CLOSE, Role.SERVER),
    )
    assert (client_close["bytes_sent"], client_close["bytes_received"]) == (8, 11)
    assert (server_close["bytes_sent"], server_close["bytes_received"]) == (11, 8)
    assert (client_close["closed_by"], server_close["closed_by"]) == (ClosedBy.LOCAL, ClosedBy.REMOTE)
    listener.close()


@pytest.mark.parametrize("established_late", [False, True], ids=["usual", "accepted-before-established"])
def test_fast_open_connection_has_one_pair(
    watch: Watch, client: Namespace, server: Namespace, established_late: bool
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
        assert watch.one(EventType.ACCEPT)["owner"] == Owner.PROCESS
    dialler.close()
    assert accepted.recv(1) == b""
    accepted.close()
    connect, accept = watch.one(EventType.CONNECT), watch.one(EventType.ACCEPT)
    client_close, server_close = (
        watch.one(EventType.CLOSE, Role.CLIENT),
        watch.one(EventType.CLOSE, Role.SERVER),
    )
    assert pair(connect) == pair(accept) == pair(client_close) == pair(server_close)
    assert accept["owner"] == Owner.PROCESS
    assert client_close["bytes_sent"] == server_close["bytes_received"] == 5
    listener.close()


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
        until(lambda: len(watch.pull()) == 4 * dialled, "four events each", deadline_s=3)
    return dialled
