"""Connections that never came to be: one CONNECT_FAILED each, with its errno."""

from __future__ import annotations

import errno
import socket
import subprocess
from typing import TYPE_CHECKING

import pytest

from collector.node.abi import EventType, Owner, Role
from tests.kernel.node import Process, pair, text, until

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np

    from tests.kernel.node import Namespace, Watch

BLACKHOLE = "add table ip t; add chain ip t c { type filter hook input priority 0; policy drop; }"
PORT = 7070


def check_failed(watch: Watch, error: int) -> np.void:
    """Wait for the one event and check what all failures have."""
    event = watch.one(EventType.CONNECT_FAILED)
    assert event["error"] == error
    assert (pair(event), event["established_ns"], event["role"]) == ((0, 0), 0, Role.CLIENT)
    assert event["owner"] == Owner.PROCESS
    assert 0 < event["start_ns"] <= event["time_ns"]
    assert len(watch.events) == 1
    return event


@pytest.mark.parametrize("address", ["10.91.1.2", "fd91:1::2"])
def test_refused_connect_has_econnrefused(
    watch: Watch, client: Namespace, server: Namespace, address: str
) -> None:
    """A port without a listener answers with a RST."""
    with pytest.raises(ConnectionRefusedError):
        client.connect(address, PORT)
    event = check_failed(watch, errno.ECONNREFUSED)
    assert text(event["remote_address"]).endswith(address)
    assert event["remote_port"] == PORT
    assert event["local_port"] > 0


def test_unanswered_connect_has_etimedout(watch: Watch, client: Namespace, server: Namespace) -> None:
    """A peer that says nothing: the kernel gives up."""
    server.run("nft", BLACKHOLE)
    dialler = client.socket()
    dialler.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 500)
    with pytest.raises(TimeoutError):
        dialler.connect(("10.91.1.2", PORT))
    event = check_failed(watch, errno.ETIMEDOUT)
    assert event["time_ns"] - event["start_ns"] >= 500_000_000
    dialler.close()


@pytest.mark.parametrize(
    ("reject", "error"),
    [
        ("icmp type host-unreachable", errno.EHOSTUNREACH),
        ("icmp type net-unreachable", errno.ENETUNREACH),
        ("icmp type port-unreachable", errno.ECONNREFUSED),
    ],
)
def test_icmp_error_ends_the_connect(
    watch: Watch, client: Namespace, server: Namespace, reject: str, error: int
) -> None:
    """An ICMP answer becomes the errno."""
    server.run("nft", BLACKHOLE)
    server.run("nft", f"add rule ip t c tcp dport {PORT} reject with {reject}")
    dialler = client.socket()
    dialler.settimeout(None)  # a caller that polls reads the first answer as a soft error and gives up itself
    with pytest.raises(OSError, match=r"route|unreachable|refused"):
        dialler.connect(("10.91.1.2", PORT))
    check_failed(watch, error)


def test_closed_connect_is_aborted_without_error(watch: Watch, client: Namespace, server: Namespace) -> None:
    """A caller that closes while connecting: error 0."""
    server.run("nft", BLACKHOLE)
    dialler = client.socket()
    dialler.setblocking(False)
    assert dialler.connect_ex(("10.91.1.2", PORT)) == errno.EINPROGRESS
    dialler.close()
    check_failed(watch, 0)


def test_killed_connect_is_aborted_with_its_owner(
    watch: Watch, client: Namespace, server: Namespace, make_process: Callable[..., Process]
) -> None:
    """A kill -9 in the middle of connect: error 0, and the dead process is named."""
    server.run("nft", BLACKHOLE)
    server.run("nft", "add rule ip t c counter")
    process = make_process(client, comm=b"hasty")
    process.start("connect", "10.91.1.2", PORT)
    _wait_for_syn(server)
    process.stop()
    event = check_failed(watch, 0)
    assert (event["tgid"], bytes(event["comm"]).rstrip(b"\0")) == (process.pid, b"hasty")


def _wait_for_syn(server: Namespace) -> None:
    """Wait until the counter of the rule has seen a packet."""

    def listed() -> bool:
        shown = subprocess.run(
            ["ip", "netns", "exec", server.name, "nft", "list", "ruleset"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        return "counter packets 0" not in shown

    until(listed, "the SYN at the server")


def test_connect_without_a_free_port_has_eaddrnotavail(
    watch: Watch, client: Namespace, server: Namespace
) -> None:
    """When all ports to the peer are taken, the socket went through SYN_SENT and back."""
    client.sysctl("net.ipv4.ip_local_port_range", "40000 40001")
    listener = server.listen("10.91.1.2")
    taken = []
    with pytest.raises(OSError, match="assign requested address"):
        taken.extend(client.connect("10.91.1.2", listener.getsockname()[1]) for _ in range(3))
    event = watch.one(EventType.CONNECT_FAILED)
    assert (event["error"], event["local_port"]) == (errno.EADDRNOTAVAIL, 0)
    listener.close()
