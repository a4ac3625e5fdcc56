"""Every way in which a connection ends early: who closed it, with which error and flags."""

from __future__ import annotations

import errno
import socket
import struct
import subprocess
from typing import TYPE_CHECKING

import pytest

from collector.node.abi import ClosedBy, EventType, Flag, Owner, Role
from tests.kernel.node import LIBC

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np

    from tests.kernel.node import Namespace, Watch

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


def closes(watch: Watch) -> tuple[np.void, np.void]:
    """Wait for the CLOSE of client and server."""
    return watch.one(EventType.CLOSE, Role.CLIENT), watch.one(EventType.CLOSE, Role.SERVER)


def verdict(event: np.void) -> tuple[int, int, int]:
    """Return who closed, the flags and the error."""
    return ClosedBy(event["closed_by"]), int(event["flags"]), int(event["error"])


def test_reset_by_the_client_is_local_there_and_remote_here(
    watch: Watch, ends: tuple[socket.socket, socket.socket]
) -> None:
    """SO_LINGER 0 sends a RST: the client reset it, the server was reset."""
    dialler, _ = ends
    dialler.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_NOW)
    dialler.close()
    client_close, server_close = closes(watch)
    assert verdict(client_close) == (ClosedBy.LOCAL, Flag.RESET_LOCAL, 0)
    assert verdict(server_close) == (ClosedBy.REMOTE, Flag.RESET_REMOTE, errno.ECONNRESET)


def test_reset_by_the_server_is_remote_on_the_client(
    watch: Watch, ends: tuple[socket.socket, socket.socket]
) -> None:
    """Closing with unread data sends a RST."""
    dialler, accepted = ends
    dialler.sendall(b"never read")
    assert accepted.recv(1, socket.MSG_PEEK) == b"n"
    accepted.close()
    client_close, server_close = closes(watch)
    assert verdict(server_close) == (ClosedBy.LOCAL, Flag.RESET_LOCAL, 0)
    assert verdict(client_close) == (ClosedBy.REMOTE, Flag.RESET_REMOTE, errno.ECONNRESET)


def test_reset_after_the_peers_fin_keeps_the_first_closer(
    watch: Watch, ends: tuple[socket.socket, socket.socket]
) -> None:
    """FIN from the client, then a RST from the server: the client closed first, the server reset."""
    dialler, accepted = ends
    dialler.shutdown(socket.SHUT_WR)
    assert accepted.recv(1) == b""
    accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_NOW)
    accepted.close()
    client_close, server_close = closes(watch)
    assert verdict(server_close) == (ClosedBy.REMOTE, Flag.RESET_LOCAL, 0)
    assert verdict(client_close) == (ClosedBy.LOCAL, Flag.RESET_REMOTE, errno.ECONNRESET)


def test_reset_that_answers_late_data_is_epipe(
    watch: Watch, ends: tuple[socket.socket, socket.socket]
) -> None:
    """Data sent to a peer that has closed both ways is answered by a RST: EPIPE in CLOSE_WAIT."""
    dialler, accepted = ends
    accepted.close()
    assert dialler.recv(1) == b""
    dialler.sendall(b"too late")
    client_close, server_close = closes(watch)
    assert verdict(client_close) == (ClosedBy.REMOTE, Flag.RESET_REMOTE, errno.EPIPE)
    assert verdict(server_close)[0] == ClosedBy.LOCAL


def test_disconnect_is_a_local_reset(
    watch: Watch, client: Namespace, ends: tuple[socket.socket, socket.socket]
) -> None:
    """connect(AF_UNSPEC) drops the connection with a RST."""
    dialler, _ = ends
    assert LIBC.connect(dialler.fileno(), struct.pack("H14x", socket.AF_UNSPEC), 16) == 0
    client_close, server_close = closes(watch)
    assert verdict(client_close) == (ClosedBy.LOCAL, Flag.RESET_LOCAL, 0)
    assert verdict(server_close) == (ClosedBy.REMOTE, Flag.RESET_REMOTE, errno.ECONNRESET)


def test_connection_never_accepted_is_flagged(watch: Watch, client: Namespace, server: Namespace) -> None:
    """A listener that closes resets what it never accepted: no ACCEPT, a CLOSE with the flag and without a process."""
    listener = server.listen("10.91.1.2")
    dialler = client.connect("10.91.1.2", listener.getsockname()[1])
    listener.close()
    client_close, server_close = closes(watch)
    assert verdict(server_close) == (ClosedBy.LOCAL, Flag.RESET_LOCAL | Flag.NEVER_ACCEPTED, 0)
    assert server_close["owner"] != Owner.PROCESS
    assert verdict(client_close) == (ClosedBy.REMOTE, Flag.RESET_REMOTE, errno.ECONNRESET)
    assert not watch.select(EventType.ACCEPT)
    dialler.close()


def test_dead_peer_is_closed_by_a_timer(
    watch: Watch, server: Namespace, ends: tuple[socket.socket, socket.socket]
) -> None:
    """When acknowledgements stop coming the kernel gives up: TIMER, ETIMEDOUT."""
    dialler, _ = ends
    dialler.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 300)
    server.run("nft", "add table ip t; add chain ip t c { type filter hook input priority 0; policy drop; }")
    dialler.send(b"into the void")
    event = watch.one(EventType.CLOSE, Role.CLIENT)
    assert verdict(event) == (ClosedBy.TIMER, 0, errno.ETIMEDOUT)
    assert event["retransmits"] > 0
    assert event["bytes_sent"] == 13


def test_crossing_fins_are_closed_by_both(
    watch: Watch, client: Namespace, server: Namespace, ends: tuple[socket.socket, socket.socket]
) -> None:
    """Each end's FIN leaves before the other's arrives: BOTH on both."""
    dialler, accepted = ends
    for namespace in (client, server):
        namespace.run(
            "nft", "add table ip t; add chain ip t c { type filter hook input priority 0; policy drop; }"
        )
    dialler.close()
    accepted.close()
    opening = [  # at the same time: a FIN that is sent again between the two would acknowledge the other
        subprocess.Popen(["ip", "netns", "exec", namespace.name, "nft", "delete", "table", "ip", "t"])
        for namespace in (client, server)
    ]
    assert [process.wait() for process in opening] == [0, 0]
    client_close, server_close = closes(watch)
    assert verdict(client_close) == verdict(server_close) == (ClosedBy.BOTH, 0, 0)
