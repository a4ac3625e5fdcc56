"""Connections that never came to be: one CONNECT_FAILED each, with its errno."""

from __future__ import annotations

import errno
import socket
import struct
import subprocess
from typing import TYPE_CHECKING

import pytest

from collector.node.abi import EventType, Role
from tests.kernel.node import Process, text
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from _pytest.mark import ParameterSet

    from tests.kernel.node import Namespace, Watch
    from tests.kernel.scenarios import Scenario

BLACKHOLE = "add table ip t; add chain ip t c { type filter hook input priority 0; policy drop; }"
PORT = 7070


def check_failed(watch: Watch, scenario: Scenario) -> np.void:
    """Wait for the one event and check what all failures have."""
    watch.tells(scenario)
    event = watch.one(EventType.CONNECT_FAILED)
    assert (event["established_ns"], event["role"]) == (0, Role.CLIENT)
    assert 0 < event["start_ns"] <= event["time_ns"]
    return event


def row(name: str, *values: object) -> ParameterSet:
    """Return a parameter set that plays a row of the table."""
    return pytest.param(*values, id=name.replace(" ", "-"), marks=pytest.mark.scenario(name))


@pytest.mark.parametrize("address", [row("refused", "10.91.1.2"), row("refused, IPv6", "fd91:1::2")])
def test_refused_connect_has_econnrefused(
    watch: Watch, client: Namespace, server: Namespace, scenario: Scenario, address: str
) -> None:
    """A port without a listener answers with a RST."""
    with pytest.raises(ConnectionRefusedError):
        client.connect(address, PORT)
    event = check_failed(watch, scenario)
    assert text(event["remote_address"]).endswith(address)
    assert event["remote_port"] == PORT
    assert event["local_port"] > 0


@pytest.mark.scenario("timeout")
def test_unanswered_connect_has_etimedout(
    watch: Watch, client: Namespace, server: Namespace, scenario: Scenario
) -> None:
    """A peer that says nothing: the kernel gives up."""
    server.run("nft", BLACKHOLE)
    dialler = client.socket()
    dialler.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 500)
    with pytest.raises(TimeoutError):
        dialler.connect(("10.91.1.2", PORT))
    event = check_failed(watch, scenario)
    assert event["time_ns"] - event["start_ns"] >= 500_000_000
    dialler.close()


@pytest.mark.parametrize(
    "reject",
    [
        row("host unreachable", "icmp type host-unreachable"),
        row("net unreachable", "icmp type net-unreachable"),
        row("port unreachable", "icmp type port-unreachable"),
    ],
)
def test_icmp_error_ends_the_connect(
    watch: Watch, client: Namespace, server: Namespace, scenario: Scenario, reject: str
) -> None:
    """An ICMP answer becomes the errno."""
    server.run("nft", BLACKHOLE)
    server.run("nft", f"add rule ip t c tcp dport {PORT} reject with {reject}")
    dialler = client.socket()
    dialler.settimeout(None)  # a caller that polls reads the first answer as a soft error and gives up itself
    with pytest.raises(OSError, match=r"route|unreachable|refused"):
        dialler.connect(("10.91.1.2", PORT))
    check_failed(watch, scenario)


@pytest.mark.scenario("aborted")
def test_closed_connect_is_aborted_without_error(
    watch: Watch, client: Namespace, server: Namespace, scenario: Scenario
) -> None:
    """A caller that closes while connecting: error 0."""
    server.run("nft", BLACKHOLE)
    dialler = client.socket()
    dialler.setblocking(False)
    assert dialler.connect_ex(("10.91.1.2", PORT)) == errno.EINPROGRESS
    dialler.close()
    check_failed(watch, scenario)


@pytest.mark.scenario("aborted by kill -9")
def test_killed_connect_is_aborted_with_its_owner(
    watch: Watch,
    client: Namespace,
    server: Namespace,
    make_process: Callable[..., Process],
    scenario: Scenario,
) -> None:
    """A kill -9 in the middle of connect: error 0, and the dead process is named."""
    server.run("nft", BLACKHOLE)
    server.run("nft", "add rule ip t c counter")
    process = make_process(client, comm=b"hasty")
    process.start("connect", "10.91.1.2", PORT)
    _wait_for_syn(server)
    process.stop()
    event = check_failed(watch, scenario)
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


@pytest.mark.scenario("no free port")
def test_connect_without_a_free_port_has_eaddrnotavail(
    watch: Watch, client: Namespace, server: Namespace, scenario: Scenario
) -> None:
    """When all ports are taken, the socket went through SYN_SENT and back."""
    client.sysctl("net.ipv4.ip_local_port_range", "40000 40001")
    holders = []
    for port in (40000, 40001):
        holders.append(client.socket())
        holders[-1].bind(("", port))
        holders[-1].listen()
    assert client.socket().connect_ex(("10.91.1.2", PORT)) == errno.EADDRNOTAVAIL
    assert check_failed(watch, scenario)["local_port"] == 0


@pytest.mark.scenario("aborted by a send timeout")
def test_connect_given_up_by_a_send_timeout_is_aborted(
    watch: Watch, client: Namespace, server: Namespace, scenario: Scenario
) -> None:
    """The call returns EINPROGRESS, and the socket is closed in SYN_SENT."""
    server.run("nft", BLACKHOLE)
    dialler = client.socket()
    dialler.settimeout(None)
    dialler.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("qq", 0, 100_000))
    assert dialler.connect_ex(("10.91.1.2", PORT)) == errno.EINPROGRESS
    dialler.close()
    check_failed(watch, scenario)


@pytest.mark.parametrize(
    ("family", "address"),
    [
        row("no route", socket.AF_INET, "198.51.100.9"),
        row("no route, IPv6", socket.AF_INET6, "2001:db8::9"),
        row("unreachable route", socket.AF_INET, "203.0.113.9"),
    ],
)
def test_connect_without_a_route_fails_at_once(
    watch: Watch, client: Namespace, server: Namespace, scenario: Scenario, family: int, address: str
) -> None:
    """Only tiers that watch connect calls tell it; a later connection shows that others told nothing."""
    client.run("ip", "route", "add", "unreachable", "203.0.113.0/24")
    expected = [told.error for told in scenario.client]
    assert [client.socket(family).connect_ex((address, PORT))] == expected
    watch.tells(scenario)
    assert client.socket().connect_ex(("10.91.1.2", PORT)) == errno.ECONNREFUSED
    told, _ = scenario.expected(watch.tier, connect_watched=bool(len(watch.events)))
    failed = watch.count(EventType.CONNECT_FAILED, None, len(told) + 1)
    assert failed[-1]["error"] == errno.ECONNREFUSED
