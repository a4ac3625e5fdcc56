"""Folders in every mounted cgroup hierarchy, so that a demo pod looks like a kubelet's on v1, hybrid and v2 machines.

Owns folders under a root that the caller names, and ends what runs in them before it removes them. Never
touches a folder outside that root and never enables a controller. Called by `podwire.demo.lab`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

from podwire.demo.errors import CgroupError

REMOVE_SECONDS_MAX = 10.0
_POLL_SECONDS = 0.02


def hierarchies() -> list[Path]:
    """Return one mount point per cgroup hierarchy of this machine, v1 and v2."""
    found: dict[str, Path] = {}
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines():
        left, _, right = line.partition(" - ")
        if right.split()[0] in ("cgroup", "cgroup2"):
            fields = left.split()
            found.setdefault(fields[2], Path(fields[4]))  # fields[2], the device, is one per hierarchy
    return list(found.values())


def make(path: str) -> list[Path]:
    """Make `path` in every hierarchy that is writable and return the folders; CgroupError when none is."""
    made = []
    for mount in hierarchies():
        folder = mount
        try:
            for part in path.strip("/").split("/"):
                folder /= part
                folder.mkdir(exist_ok=True)
                _inherit_cpuset(folder)
        except OSError:
            continue
        made.append(folder)
    if not made:
        raise CgroupError("no mounted cgroup hierarchy is writable; mount cgroup2 on /sys/fs/cgroup")
    return made


def _inherit_cpuset(folder: Path) -> None:
    """Give a v1 cpuset folder its parent's CPUs and memory nodes: without them it takes no process."""
    for name in ("cpuset.cpus", "cpuset.mems"):
        own, parent = folder / name, folder.parent / name
        if own.exists() and parent.exists() and not own.read_text().strip():
            own.write_text(parent.read_text())


def processes(root: str) -> set[int]:
    """Return the ids of all processes in or below `root`, in any hierarchy."""
    pids: set[int] = set()
    for mount in hierarchies():
        for folder, _, _ in os.walk(mount / root):
            with contextlib.suppress(OSError):
                pids.update(int(pid) for pid in (Path(folder) / "cgroup.procs").read_text().split())
    return pids


def remove(root: str) -> None:
    """Kill what runs in or below `root` and remove it from every hierarchy; CgroupError when it stays."""
    deadline = time.monotonic() + REMOVE_SECONDS_MAX
    while True:
        for pid in processes(root):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        left = [folder for mount in hierarchies() if not _removed(folder := mount / root)]
        if not left:
            return
        if time.monotonic() > deadline:
            raise CgroupError(f"{left[0]} could not be removed: {sorted(processes(root))} run in it")
        time.sleep(_POLL_SECONDS)  # the kernel tells nobody when the last process has left a v1 folder


def _removed(top: Path) -> bool:
    for folder, _, _ in os.walk(top, topdown=False):
        with contextlib.suppress(OSError):
            Path(folder).rmdir()
    return not top.exists()
