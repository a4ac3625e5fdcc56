"""One connection through address translation: different tuples, one ISN pair."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from collector.node.abi import EventType
from tests.kernel.node import Watch, text, wire

if TYPE_CHECKING:
    from collections.abc import Callable

    from _pytest.mark import ParameterSet

    from collector.node.probes import Probes
    from tests.kernel.node import Namespace
    from tests.kernel.scenarios import Scenario

HOOKS = """
add table {family} t
add chain {family} t pre {{ type nat hook prerouting priority -100; }}
add chain {family} t post {{ type nat hook postrouting priority 100; }}
"""
DNAT = "add rule {family} t pre {family} daddr {service} tcp dport 80 dnat to {server}:{port}"
MASQUERADE = "add rule {family} t post masquerade"


def _row(name: str, family: str, rules: tuple[str, ...], dialled: str, seen_by_server: str) -> ParameterSet:
    return pytest.param(
        family, rules, dialled, seen_by_server, id=name.replace(" ", "-"), marks=pytest.mark.scenario(name)
    )


@pytest.fixture
def router(make_namespace: Callable[[str], Namespace]) -> tuple[Namespace, Namespace, Namespace]:
    """Client, router and server in a row; the router forwards."""
    client, middle, server = (make_namespace(name) for name in ("c", "r", "s"))
    wire(client, middle, 1)
    wire(middle, server, 2)
    middle.sysctl("net.ipv4.ip_forward", "1")
    middle.sysctl("net.ipv6.conf.all.forwarding", "1")
    client.run("ip", "route", "add", "default", "via", "10.91.1.2")
    server.run("ip", "route", "add", "default", "via", "10.91.2.1")
    client.run("ip", "-6", "route", "add", "default", "via", "fd91:1::2")
    return client, middle, server


@pytest.mark.parametrize(
    ("family", "rules", "dialled", "seen_by_server"),
    [
        _row("DNAT", "ip", (DNAT,), "10.96.0.10", "::ffff:10.91.1.1"),
        _row("masquerade", "ip", (MASQUERADE,), "10.91.2.2", "::ffff:10.91.2.1"),
        _row("DNAT and masquerade", "ip", (DNAT, MASQUERADE), "10.96.0.10", "::ffff:10.91.2.1"),
        _row("DNAT and masquerade, IPv6", "ip6", (DNAT, MASQUERADE), "fd96::10", "fd91:2::1"),
    ],
)
def test_pair_is_equal_through_address_translation(
    open_probes: Callable[..., Probes],
    router: tuple[Namespace, Namespace, Namespace],
    scenario: Scenario,
    family: str,
    rules: tuple[str, ...],
    dialled: str,
    seen_by_server: str,
) -> None:
    """The client dials a Service or the server, the server may see the router; both kernels tell the same pair."""
    client, middle, server = router
    own = "fd91:2::2" if family == "ip6" else "10.91.2.2"
    listener = server.listen(own)
    port = listener.getsockname()[1]
    place = f"[{own}]" if family == "ip6" else own
    for line in (HOOKS + "\n".join(rules)).strip().splitlines():
        middle.run("nft", line.format(family=family, service=dialled, server=place, port=port))
    watch = Watch(open_probes(), client, server)
    dialler = client.connect(dialled, 80 if DNAT in rules else port)
    accepted, _ = listener.accept()
    dialler.sendall(b"through")
    assert accepted.recv(7) == b"through"
    dialler.close()
    accepted.close()
    watch.tells(scenario)
    connect, accept = watch.one(EventType.CONNECT), watch.one(EventType.ACCEPT)
    assert text(connect["remote_address"]).endswith(dialled)
    assert text(accept["remote_address"]) == seen_by_server
    listener.close()
