"""A node's wall clock that can be stepped: of one collector's process, by what is preloaded into it (stepped_clock.c).

Owns the file that the clock reads. Called by `rounds` and `faults`.
"""

from __future__ import annotations

import mmap
import struct
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

SOURCE = Path(__file__).with_name("stepped_clock.c")


class Clock:
    """Shows the system's time until it is stepped.

    Attributes:
        settings: environment of the process that is to have this clock.
    """

    def __init__(self, folder: Path) -> None:
        library, file = folder / "stepped_clock.so", folder / "clock"
        flags = ["-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
        subprocess.run(["clang", *flags, "-o", library, SOURCE, "-ldl"], check=True)
        file.write_bytes(struct.pack("<q", 0))
        with file.open("r+b") as opened:
            self._seconds = mmap.mmap(opened.fileno(), 8)
        self.settings: Mapping[str, str] = {"LD_PRELOAD": str(library), "PODWIRE_TEST_CLOCK": str(file)}

    def step(self, seconds: int) -> None:
        """Show so many seconds more than the system, at once."""
        self._seconds[:] = struct.pack("<q", seconds)


def move_to_second_node(items: list[dict[str, Any]], pod: str, name: str) -> None:
    """Add a node like the first one to the API's objects, and put that pod on it."""
    node = next(item for item in items if item["kind"] == "Node")
    addresses = [{"type": "InternalIP", "address": "10.251.0.1"}]
    metadata = node["metadata"] | {"name": name, "uid": "c10c0000-0000-4000-8000-000000000000"}
    items.append(node | {"metadata": metadata, "status": node["status"] | {"addresses": addresses}})
    for item in items:
        if item["kind"] == "Pod" and item["metadata"]["name"] == pod:
            item["spec"]["nodeName"] = name
