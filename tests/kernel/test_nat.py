"""One connection through address translation: different tuples, one ISN pair."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from collector.node.abi import EventType, Role
from tests.kernel.node import Watch, pair, text, wire

if TYPE_CHECKING:
    from collections.abc import Callable

    from collector.node.probes import Probes
    from tests.kernel.node import Namespace

RULES = {
    "ip": """
add table ip t
add chain ip t pre { type nat hook prerouting priority -100; }
add chain ip t post { type nat hook postrouting priority 100; }
add rule ip t pre ip daddr 10.96.0.10 tcp dport 80 dnat to 10.91.2.2:%d
add rule ip t post masquerade
""",
    "ip6": """
add table ip6 t
add chain ip6 t pre { type nat hook prerouting priority -100; }
add chain ip6 t post { type nat hook postrouting priority 100; }
add rule ip6 t pre ip6 daddr fd96::10 tcp dport 80 dnat to [fd91:2::2]:%d
add rule ip6 t post masquerade
""",
}


@pytest.fixture
def router(make_namespace: Callable[[str], Namespace]) -> tuple[Namespace, Namespace, Namespace]:
    """Client, router and server in a row; the router forwards."""
    client, middle, server = (make_namespace(name) for name in ("c", "r", "s"))
    wire(client, middle, 1)
    wire(middle, server, 2)
    middle.sysctl("net.ipv4.ip_forward", "1")
    middle.sysctl("net.ipv6.conf.all.forwarding", "1")
    client.run("ip", "route", "add", "default", "via", "10.91.1.2")
    client.run("ip", "-6", "route", "add", "default", "via", "fd91:1::2")
    return client, middle, server


@pytest.mark.parametrize(
    ("family", "service", "seen_by_server"),
    [("ip", "10.96.0.10", "::ffff:10.91.2.1"), ("ip6", "fd96::10", "fd91:2::1")],
)
def test_pair_is_equal_through_dnat_and_masquerade(
    open_probes: Callable[..., Probes],
    router: tuple[Namespace, Namespace, Namespace],
    family: str,
    service: str,
    seen_by_server: str,
) -> None:
    """The client dials a Service, the server sees the router; both kernels tell the same pair."""
    client, middle, server = router
    listener = server.listen("fd91:2::2" if family == "ip6" else "10.91.2.2")
    for line in (RULES[family] % listener.getsockname()[1]).strip().splitlines():
        middle.run("nft", line)
    watch = Watch(open_probes(), client, server)
    dialler = client.connect(service, 80)
    accepted, _ = listener.accept()
    dialler.sendall(b"through")
    assert accepted.recv(7) == b"through"
    dialler.close()
    accepted.close()
    connect, accept = watch.one(EventType.CONNECT), watch.one(EventType.ACCEPT)
    assert text(connect["remote_address"]).endswith(service)
    assert connect["remote_port"] == 80
    assert text(accept["remote_address"]) == seen_by_server
    assert pair(connect) == pair(accept)
    for role in (Role.CLIENT, Role.SERVER):
        assert pair(watch.one(EventType.CLOSE, role)) == pair(connect)
    listener.close()
