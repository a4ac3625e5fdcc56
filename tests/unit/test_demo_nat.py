"""The nftables rules behind a lab's Services, as text."""

from __future__ import annotations

from podwire.demo import nat
from podwire.demo.manifest import Port


def test_rules_forward_each_port_to_the_backends_in_turn() -> None:
    """A Service's port goes to the pods' target port, one after the other."""
    text = nat.rules([nat.Forwarding("10.96.0.10", (Port(80, 8080),), ("10.244.0.2", "10.244.0.3"))])
    assert (
        "ip daddr 10.96.0.10 tcp dport 80 dnat ip to numgen inc mod 2 "
        "map { 0 : 10.244.0.2 . 8080, 1 : 10.244.0.3 . 8080 }" in text
    )


def test_rules_speak_the_family_of_the_address() -> None:
    """An IPv6 Service is matched and forwarded as IPv6, its node port too."""
    text = nat.rules([nat.Forwarding("fd00::a", (Port(80, node_port=30080),), ("fd00::2",))])
    assert "ip6 daddr fd00::a tcp dport 80 dnat ip6 to" in text
    assert "meta nfproto ipv6 fib daddr type local tcp dport 30080 dnat ip6 to" in text


def test_rules_force_source_ports_before_they_masquerade_the_rest() -> None:
    """The narrower rule stands first, since the first masquerade decides."""
    text = nat.rules([nat.Forwarding("10.96.0.10", (Port(80),), ("10.244.0.2",), (20000, 29999))])
    forced = text.index("ct original ip daddr 10.96.0.10 masquerade to :20000-29999")
    assert forced < text.index("ct status dnat masquerade")


def test_rules_leave_a_service_without_pods_unreachable() -> None:
    """Without a backend there is nothing to forward to."""
    assert "dnat" not in nat.rules([nat.Forwarding("10.96.0.10", (Port(80),), ())]).replace("status dnat", "")
