"""What the texts of filter settings mean, as rules in the kernel's maps."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from collector.errors import SettingsError
from collector.node.abi import Controller, Filter
from collector.node.core import LoadPlan
from collector.node.filters import Filters, hierarchy_devices
from collector.node.plan import identity_of
from collector.node.settings import parse_print

OUT, ONLY = struct.pack("<I", Filter.OUT), struct.pack("<I", Filter.ONLY)


def test_no_lists_are_no_rules() -> None:
    """Nothing is filtered, and nothing is put into a map."""
    assert Filters().map_contents() == {}
    assert set(Filters().modes().values()) == {Filter.OFF}


def test_ports_and_ranges_become_one_rule_each() -> None:
    """Both ends of a range belong to it."""
    rules = dict(Filters(only_ports="443, 8000-8002", not_ports="8001").map_contents()["filter_ports"])
    assert rules == {
        struct.pack("<I", port): rule for port, rule in ((443, ONLY), (8000, ONLY), (8001, OUT), (8002, ONLY))
    }


def test_networks_are_v6_prefixes() -> None:
    """IPv4 is ::ffff/96, as in the events."""
    rules = dict(Filters(not_cidrs="10.0.0.0/8,fd00::/8").map_contents()["filter_cidrs"])
    mapped = bytes(10) + b"\xff\xff" + bytes([10, 0, 0, 0])
    assert rules == {
        struct.pack("<I", 104) + mapped: OUT,
        struct.pack("<I", 8) + bytes.fromhex("fd") + bytes(15): OUT,
    }


def test_paths_become_inodes(tmp_path: Path) -> None:
    """A namespace is named by its inode or by a path that has it."""
    contents = Filters(only_netns=f"4026531840,{tmp_path}").map_contents()
    inode = tmp_path.stat().st_ino
    assert contents["filter_netns"] == (
        (struct.pack("<I", 4026531840), ONLY),
        (struct.pack("<I", inode), ONLY),
    )


def test_folder_that_is_no_cgroup_of_the_hierarchy_is_refused(tmp_path: Path) -> None:
    """Its inode could be the id of some other cgroup."""
    with pytest.raises(SettingsError, match="no cgroup of the hierarchy"):
        Filters(not_cgroups=str(tmp_path)).map_contents()


MOUNTS = """\
22 27 0:21 / /proc rw,relatime - proc proc rw
36 31 0:33 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
37 31 0:34 / /sys/fs/cgroup/cpu rw,relatime shared:7 - cgroup cgroup rw,cpuacct,cpu
41 31 0:40 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
"""


@pytest.mark.parametrize(
    ("controller", "minor"), [(Controller.MEMORY, 33), (Controller.CPU, 34), (Controller.DEFAULT, 40)]
)
def test_hierarchy_is_recognised_by_its_device(controller: Controller, minor: int) -> None:
    """Controllers that are mounted together share one."""
    assert hierarchy_devices(MOUNTS, controller) == {os.makedev(0, minor)}


def test_mode_says_whether_others_are_let_in() -> None:
    """A list of what to follow leaves out the rest, a list of what to leave out does not."""
    modes = Filters(not_ports="1", only_cidrs="::/0", not_cidrs="fd00::/8").modes()
    assert modes == {
        "filter_ports": Filter.OUT,
        "filter_cidrs": Filter.ONLY,
        "filter_netns": Filter.OFF,
        "filter_cgroups": Filter.OFF,
    }


def test_probes_with_other_filters_are_not_taken_over() -> None:
    """The rules belong to what must be equal for a successor to use pinned probes."""
    plans = [
        LoadPlan(Path("none.o"), (), {}, {}, Filters(not_ports=port).map_contents())
        for port in ("1", "2", "1")
    ]
    first, second, third = map(identity_of, plans)
    assert first == third != second


def test_missing_path_says_what_to_do() -> None:
    """Known only when the kernel is to be told, so it is a fatal error of its own."""
    with pytest.raises(SettingsError, match="/nowhere, which can't be asked"):
        Filters(not_cgroups="/nowhere").map_contents()


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--only-ports", "0"),
        ("--only-ports", "90-80"),
        ("--not-ports", "http"),
        ("--not-ports", "70000"),
        ("--only-cidrs", "10.0.0.1/8"),
        ("--not-cidrs", "ten"),
        ("--only-netns", "run/netns/x"),
        ("--not-cgroups", "12"),
    ],
)
def test_mistake_names_the_setting(flag: str, value: str) -> None:
    """Before the kernel is touched."""
    with pytest.raises(SettingsError, match=flag.strip("-").replace("-", "_")):
        parse_print([flag, value])
