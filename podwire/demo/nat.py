"""The nftables rules that make a Service of a lab: DNAT to its pods in turn, and masquerade.

Pure: values in, the text for `nft -f` out. Called by `podwire.demo.lab`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from podwire.demo.manifest import Port


@dataclass(frozen=True)
class Forwarding:
    """One Service's address and what stands behind it.

    Attributes:
        backends: pod addresses of the same family; without any, the address stays unreachable.
        snat_ports: range that the masqueraded source port is forced into, None to keep the port if possible.
    """

    address: str
    ports: tuple[Port, ...]
    backends: tuple[str, ...]
    snat_ports: tuple[int, int] | None = None

    @property
    def ip(self) -> str:
        """The family in nftables' words."""
        return "ip6" if ":" in self.address else "ip"

    def dnat(self) -> Iterator[str]:
        """Yield the rules for its ports and node ports."""
        if not self.backends:
            return
        for port in self.ports:
            in_turn = ", ".join(f"{turn} : {pod} . {port.target}" for turn, pod in enumerate(self.backends))
            to = f"dnat {self.ip} to numgen inc mod {len(self.backends)} map {{ {in_turn} }}"
            yield f"{self.ip} daddr {self.address} tcp dport {port.port} {to}"
            if port.node_port:
                family = "ipv6" if self.ip == "ip6" else "ipv4"
                yield f"meta nfproto {family} fib daddr type local tcp dport {port.node_port} {to}"

    def snat(self) -> Iterator[str]:
        """Yield the rule that forces the source port."""
        if self.snat_ports:
            low, high = self.snat_ports
            yield f"meta l4proto tcp ct original {self.ip} daddr {self.address} masquerade to :{low}-{high}"


def rules(services: Sequence[Forwarding]) -> str:
    """Return the whole table, as one transaction that replaces the one before."""
    newline = "\n    "
    return f"""\
table inet podwire {{}}
delete table inet podwire
table inet podwire {{
  chain services {{
    {newline.join(rule for service in services for rule in service.dnat())}
  }}
  chain prerouting {{ type nat hook prerouting priority dstnat; jump services; }}
  chain output {{ type nat hook output priority -100; jump services; }}
  chain postrouting {{
    type nat hook postrouting priority srcnat
    {newline.join(rule for service in services for rule in service.snat())}
    ct status dnat masquerade
  }}
}}
"""
