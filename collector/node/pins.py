"""Keeps probes alive while no collector runs: their maps and links, pinned in a folder of a bpffs.

Owns the folder's content and the lock that keeps a second collector out. What is pinned lies in a subfolder
named by what made it (ABI, object, settings), so that a collector that differs in any of these does not take
over what it would misread. Never loads and never reads. Called by probes.py.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

from collector.errors import SettingsError

SUBFOLDER_PREFIX = "podwire_"


def is_bpffs(folder: Path, mountinfo: str) -> bool:
    """Return whether a folder lies on a bpf file system, by the text of /proc/self/mountinfo."""
    best, kind = -1, ""
    for line in mountinfo.splitlines():
        fields, _, options = line.partition(" - ")
        mount_point = Path(fields.split()[4].replace("\\040", " "))
        if folder.is_relative_to(mount_point) and len(mount_point.parts) >= best:
            best, kind = len(mount_point.parts), options.split()[0]
    return kind == "bpf"


def life_of(descriptor: int) -> str:
    """Return what tells a map, by its descriptor, from all others of this boot, also after the process has ended."""
    lines = Path(f"/proc/self/fdinfo/{descriptor}").read_text(encoding="ascii").splitlines()
    return next((line.split()[1] for line in lines if line.startswith("map_id:")), "")


class PinFolder:
    """The pin folder of one collector, locked until `close`."""

    def __init__(self, root: Path) -> None:
        """Create and lock the folder.

        Raises:
            SettingsError: it is not on a bpffs, or another collector holds it.
        """
        root = root.resolve()
        if not is_bpffs(root, Path("/proc/self/mountinfo").read_text(encoding="utf-8")):
            raise SettingsError(
                f"PODWIRE_PIN_DIR {root} is not on a bpf file system.",
                "mount one there (mount -t bpf bpf /sys/fs/bpf), or leave PODWIRE_PIN_DIR empty.",
            )
        root.mkdir(parents=True, exist_ok=True)
        self._root = root
        self._lock = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._lock)
            raise SettingsError(
                f"Another collector uses the probes pinned in {root}.",
                "stop it, or give this one a PODWIRE_PIN_DIR of its own.",
            ) from error

    def subfolder(self, identity: str) -> Path:
        """Return where a collector of this identity pins, which need not exist."""
        return self._root / f"{SUBFOLDER_PREFIX}{identity}"

    def holds(self, identity: str, names: set[str]) -> bool:
        """Return whether everything of these names is pinned by a collector of this identity."""
        folder = self.subfolder(identity)
        return folder.is_dir() and names <= {pinned.name for pinned in folder.iterdir()}

    def is_empty(self) -> bool:
        """Return whether nothing is pinned, by whomever."""
        return not any(self._root.glob(f"{SUBFOLDER_PREFIX}*"))

    def make(self, identity: str) -> Path:
        """Make the subfolder to pin into."""
        folder = self.subfolder(identity)
        folder.mkdir(exist_ok=True)
        return folder

    def remove_all(self) -> None:
        """Unpin everything that any collector pinned here; unless held elsewhere, probes are then detached."""
        for subfolder in self._root.glob(f"{SUBFOLDER_PREFIX}*"):
            for pinned in subfolder.iterdir():
                pinned.unlink()
            subfolder.rmdir()

    def close(self) -> None:
        """Give up the lock and leave the pins; removes the folder if it is empty."""
        with contextlib.suppress(OSError):
            self._root.rmdir()
        os.close(self._lock)
