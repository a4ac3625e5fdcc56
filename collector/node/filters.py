"""Filters of the probes: what a setting's text means, and what the kernel's maps hold for it.

Pure, but for `Filters.map_contents`, which asks /proc and the file system for inodes. Never loads. Called by
settings.py, which checks the texts, and by plan.py.
"""

from __future__ import annotations

import ipaddress
import os
import struct
from dataclasses import dataclass, fields
from pathlib import Path

from collector.errors import SettingsError
from collector.node.abi import Controller, Filter
from collector.node.cgroup_paths import choose_hierarchy

PORT_MAX = 65_535
IPV4_BITS, IPV6_BITS = 32, 128

MapContents = tuple[tuple[bytes, bytes], ...]


@dataclass(frozen=True)
class Filters:
    """Lists as in the settings, comma between; empty lists filter nothing.

    Attributes:
        only_ports: follow connections to these server ports only: "443,8000-8099".
        not_ports: leave these out.
        only_cidrs: follow connections with an end in one of these networks only: "10.0.0.0/8,fd00::/8".
        not_cidrs: leave out connections with an end in one of these; the longest prefix that matches decides.
        only_netns: follow these network namespaces only: inodes or paths, "4026531840,/proc/1/ns/net".
        not_netns: leave these out.
        only_cgroups: follow processes in these cgroups and below only, by folder.
        not_cgroups: leave these out; the nearest ancestor decides.
    """

    only_ports: str = ""
    not_ports: str = ""
    only_cidrs: str = ""
    not_cidrs: str = ""
    only_netns: str = ""
    not_netns: str = ""
    only_cgroups: str = ""
    not_cgroups: str = ""

    def __post_init__(self) -> None:
        """Refuse what can't be read: ValueError names the setting."""
        for one in fields(self):
            for item in items(getattr(self, one.name)):
                try:
                    check(one.name.partition("_")[2], item)
                except ValueError as error:
                    raise ValueError(f"{one.name}: {error}") from error

    def modes(self) -> dict[str, int]:
        """Return the options of the probes: `filter_<what>` and its enum podwire_filter."""
        found = {}
        for what in ("ports", "cidrs", "netns", "cgroups"):
            mode = Filter.OUT if getattr(self, f"not_{what}") else Filter.OFF
            found[f"filter_{what}"] = int(Filter.ONLY if getattr(self, f"only_{what}") else mode)
        return found

    def map_contents(self) -> dict[str, MapContents]:
        """Return the rules by map name; SettingsError when a path is not there."""
        contents = {}
        for what, key_of in (
            ("ports", port_keys),
            ("cidrs", cidr_keys),
            ("netns", netns_keys),
            ("cgroups", cgroup_keys),
        ):
            rules = {
                key: struct.pack("<I", rule)
                for rule, name in ((Filter.ONLY, f"only_{what}"), (Filter.OUT, f"not_{what}"))
                for item in items(getattr(self, name))
                for key in key_of(item)
            }
            if rules:
                contents[f"filter_{what}"] = tuple(rules.items())
        return contents


def items(text: str) -> list[str]:
    """Return what stands between the commas."""
    return [item.strip() for item in text.split(",") if item.strip()]


def check(what: str, item: str) -> None:
    """Raise ValueError if an item of a list of ports, cidrs, netns or cgroups can't be read."""
    if what == "ports":
        port_keys(item)
    elif what == "cidrs":
        cidr_keys(item)
    elif not item.startswith("/") and not (what == "netns" and item.isascii() and item.isdigit()):
        raise ValueError(f"{item!r} is not an absolute path" + (" or an inode" if what == "netns" else ""))


def port_keys(item: str) -> list[bytes]:
    """Return the keys of a port or of a range of ports; ValueError when it is none."""
    first, dash, last = item.partition("-")
    low, high = int(first), int(last if dash else first)
    if not 0 < low <= high <= PORT_MAX:
        raise ValueError(f"{item!r} is not a port or a range of ports")
    return [struct.pack("<I", port) for port in range(low, high + 1)]


def cidr_keys(item: str) -> list[bytes]:
    """Return the key of a network, IPv4 as ::ffff/96; ValueError when it is none."""
    network = ipaddress.ip_network(item)
    address, bits = network.network_address, network.prefixlen
    if isinstance(address, ipaddress.IPv4Address):
        address, bits = ipaddress.IPv6Address(f"::ffff:{address}"), bits + IPV6_BITS - IPV4_BITS
    return [struct.pack("<I16s", bits, address.packed)]


def netns_keys(item: str) -> list[bytes]:
    """Return the key of a network namespace."""
    return [struct.pack("<I", int(item) if item.isdigit() else _inode(item))]


def cgroup_keys(item: str) -> list[bytes]:
    """Return the key of a cgroup's folder: its inode is its id in the kernel (fs/kernfs).

    SettingsError when it is a folder of another hierarchy than the probes ask: ids are unique in one only.
    """
    inode = _inode(item)
    controller, _ = choose_hierarchy(Path("/proc/self/cgroup").read_text(encoding="utf-8"))
    devices = hierarchy_devices(Path("/proc/self/mountinfo").read_text(encoding="utf-8"), controller)
    if Path(item).stat().st_dev not in devices:
        name = "version 2" if controller is Controller.DEFAULT else controller.name.lower()
        raise SettingsError(
            f"A filter names {item}, which is no cgroup of the hierarchy {name}.",
            "name the folder of the same cgroup below that hierarchy's mount.",
        )
    return [struct.pack("<Q", inode)]


def hierarchy_devices(mountinfo: str, controller: Controller) -> set[int]:
    """Return the devices of the hierarchy that the probes ask, by the text of /proc/self/mountinfo."""
    devices = set()
    for line in mountinfo.splitlines():
        fields_of_mount, _, rest = line.partition(" - ")
        kind, _, options = rest.split(" ", 2)
        mine = kind == "cgroup2" if controller is Controller.DEFAULT else kind == "cgroup"
        if mine and (kind == "cgroup2" or controller.name.lower() in options.split(",")):
            major, minor = fields_of_mount.split()[2].split(":")
            devices.add(os.makedev(int(major), int(minor)))
    return devices


def _inode(path: str) -> int:
    try:
        return Path(path).stat().st_ino
    except OSError as error:
        raise SettingsError(
            f"A filter names {path}, which can't be asked: {error.strerror}.",
            "correct the path, or show it to the collector (a mount of the host's folder).",
        ) from error
