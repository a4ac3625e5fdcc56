"""Addresses and CIDR ranges: text forms, scope, and the longest configured range that holds an address.

Pure. An address is 16 bytes, IPv4 as ::ffff/96, as in the events. Called by `history`, `resolve` and `flow`.
"""

from __future__ import annotations

import ipaddress
from functools import lru_cache
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

Value = TypeVar("Value")

CLOUD_METADATA = "cloud-metadata"
BUILT_IN = {CLOUD_METADATA: ("169.254.169.254/32", "fd00:ec2::254/128")}
ADDRESS_BITS = 128
V4_MAPPED_BITS = 96
_CACHE = 100_000


def packed(address: str) -> bytes:
    """Return an address's 16 bytes; ValueError when the text is none."""
    value = ipaddress.ip_address(address)
    return value.packed if value.version == 6 else b"\x00" * 10 + b"\xff\xff" + value.packed  # noqa: PLR2004


@lru_cache(maxsize=_CACHE)
def parsed(address: bytes) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """Return the address, ::ffff/96 as IPv4."""
    value = ipaddress.IPv6Address(address)
    return value.ipv4_mapped or value


def scope(address: bytes) -> str:
    """Return LOOPBACK, LINK_LOCAL, PRIVATE or PUBLIC.

    PRIVATE is what Python's `ipaddress` calls not global: RFC 1918, RFC 6598, RFC 4193 and the special ranges.
    """
    value = parsed(address)
    if value.is_loopback:
        return "LOOPBACK"
    if value.is_link_local:
        return "LINK_LOCAL"
    return "PUBLIC" if value.is_global else "PRIVATE"


class Prefixes(Generic[Value]):
    """CIDR ranges with a value each; a look-up costs one dictionary look-up per distinct prefix length."""

    def __init__(self) -> None:
        self._by_shift: dict[int, dict[int, list[Value]]] = {}

    def add(self, cidr: str, value: Value) -> None:
        """Add a range; ValueError when the text is none."""
        shift, prefix = _range(cidr)
        self._by_shift.setdefault(shift, {}).setdefault(prefix, []).append(value)
        self._by_shift = dict(sorted(self._by_shift.items()))

    def remove(self, cidr: str, value: Value) -> None:
        """Take one range out that was added with an equal value."""
        shift, prefix = _range(cidr)
        values = self._by_shift[shift][prefix]
        values.remove(value)
        if not values:
            del self._by_shift[shift][prefix]

    def holding(self, address: bytes) -> Iterator[Value]:
        """Yield the values of all ranges that hold the address."""
        number = int.from_bytes(address, "big")
        for shift, ranges in self._by_shift.items():
            yield from ranges.get(number >> shift, ())

    def longest(self, address: bytes) -> Value | None:
        """Return the value of the longest range that holds the address; among equal ranges the first added."""
        number = int.from_bytes(address, "big")
        for shift, ranges in self._by_shift.items():
            values = ranges.get(number >> shift)
            if values:
                return values[0]
        return None


def _range(cidr: str) -> tuple[int, int]:
    network = ipaddress.ip_network(cidr, strict=False)
    length = network.prefixlen + (V4_MAPPED_BITS if network.version == 4 else 0)  # noqa: PLR2004
    shift = ADDRESS_BITS - length
    return shift, int.from_bytes(packed(str(network.network_address)), "big") >> shift


class Networks:
    """The configured ranges: named ones, and the cluster's own."""

    def __init__(self, named: Mapping[str, Sequence[str]], cluster: Sequence[str] = ()) -> None:
        self._named: Prefixes[str] = Prefixes()
        built_in = [(name, cidrs) for name, cidrs in BUILT_IN.items() if name not in named]
        for name, cidrs in [*sorted(named.items()), *built_in]:
            for cidr in cidrs:
                self._named.add(cidr, name)
        self._cluster: Prefixes[bool] = Prefixes()
        for cidr in cluster:
            self._cluster.add(cidr, True)
        self._has_cluster = bool(cluster)
        self.name = lru_cache(maxsize=_CACHE)(self._name)

    def _name(self, address: bytes) -> str | None:
        """Return the name of the longest range that holds the address; among equal ones the first by name.

        A range of our own, as that of the clouds' metadata services, gives way to an equal one from the settings.
        """
        return self._named.longest(address)

    def in_cluster(self, address: bytes) -> bool | None:
        """Return whether a cluster range holds the address; None when none is configured.

        The clouds' metadata services are outside, whatever range they lie in.
        """
        if self.name(address) == CLOUD_METADATA:
            return False
        return self._cluster.longest(address) is not None if self._has_cluster else None
