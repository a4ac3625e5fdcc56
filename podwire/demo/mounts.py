"""The kernel file systems that the probes want, mounted for one run and unmounted after it.

Owns only mounts whose source is the owner's name; a mount that somebody else made stays. Called by
`podwire.demo.run` and the tests.
"""

from __future__ import annotations

import subprocess
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

TRACEFS = Path("/sys/kernel/tracing")


def _mounts() -> list[tuple[str, str, str]]:
    """Return (mount point, file system type, source) of every mount, the latest last."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines():
        left, _, right = line.partition(" - ")
        kind, source = right.split()[:2]
        found.append((left.split()[4], kind, source))
    return found


def of(owner: str) -> list[Path]:
    """Return the mount points that `owner` made, the latest first."""
    return [Path(point) for point, _, source in reversed(_mounts()) if source == owner]


def remove(owner: str) -> None:
    """Unmount what a killed run of `owner` left."""
    for point in of(owner):
        _unmount(point)


@contextmanager
def mounted(kind: str, point: Path, owner: str = "podwire") -> Iterator[bool]:
    """Mount a file system of `kind` on `point` while the block runs; yield whether it is there.

    `owner` is the mount's source, by which leftovers are found. Where something of that kind is mounted already,
    nothing is done. Not being allowed to mount is no error.
    """
    if any(where == str(point) and is_ == kind for where, is_, _ in _mounts()):
        yield True
        return
    command = ["mount", "-t", kind, owner, str(point)]
    made = subprocess.run(command, capture_output=True, check=False).returncode == 0
    try:
        yield made
    finally:
        if made:
            _unmount(point)


def _unmount(point: Path) -> None:
    """Unmount at once, or as soon as its last user is gone."""
    if subprocess.run(["umount", str(point)], capture_output=True, check=False).returncode != 0:
        subprocess.run(["umount", "--lazy", str(point)], capture_output=True, check=False)
