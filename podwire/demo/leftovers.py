"""What a demo that was killed (SIGKILL, power) left behind: processes by their mark, mounts by their source.

Never touches what carries neither. Namespaces and cgroups are the lab's to clear. Called by `podwire.demo.run`
once it holds the lab's name, so that nobody else's demo can be meant.
"""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

from podwire.demo import mounts

MARK = "PODWIRE_DEMO_PROCESS"
OWNER = "podwire-demo"


def mark() -> None:
    """Make every process that this one starts from now on recognisable as the demo's."""
    os.environ[MARK] = "1"


def processes() -> list[int]:
    """Return the ids of all processes that carry the mark, without this one."""
    found = []
    wanted = f"{MARK}=1".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return [pid for pid in found if pid != os.getpid()]


def remove() -> None:
    """End what a killed demo left running and unmount what it mounted."""
    for pid in processes():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    mounts.remove(OWNER)
