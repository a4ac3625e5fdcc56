"""Initial RAM file systems: cpio archives in the "newc" form (kernel: Documentation/driver-api/early-userspace).

Owns the format only. The kernel unpacks several archives one after the other, so an image is a concatenation of
layers. Called by `image`.
"""

from __future__ import annotations

import stat
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from collections.abc import Iterable

_TRAILER = "TRAILER!!!"


@dataclass(frozen=True)
class File:
    """A file of the guest: `path` absolute in the guest, `source` a file of this machine or the bytes."""

    path: str
    source: Path | bytes
    mode: int = 0o644


@dataclass(frozen=True)
class Link:
    """A symbolic link of the guest."""

    path: str
    target: str


def write(out: BinaryIO, entries: Iterable[File | Link]) -> None:
    """Write one archive: the entries, each preceded by its folders. Times are kept: Python's caches need them."""
    seen: set[str] = set()
    number = 0
    for entry in sorted(entries, key=lambda entry: entry.path):
        for folder in [*reversed(PurePosixPath(entry.path).parents)][1:]:
            if str(folder) not in seen:
                seen.add(str(folder))
                number += 1
                _member(out, str(folder), stat.S_IFDIR | 0o755, b"", inode=number)
        number += 1
        if isinstance(entry, Link):
            _member(out, entry.path, stat.S_IFLNK | 0o777, entry.target.encode(), inode=number)
        elif isinstance(entry.source, bytes):
            _member(out, entry.path, stat.S_IFREG | entry.mode, entry.source, inode=number)
        else:
            status = entry.source.stat()
            mode = stat.S_IFREG | entry.mode | (status.st_mode & 0o111)
            _member(
                out, entry.path, mode, entry.source.read_bytes(), inode=number, mtime=int(status.st_mtime)
            )
    _member(out, _TRAILER, 0, b"", inode=0)


def _member(out: BinaryIO, path: str, mode: int, data: bytes, *, inode: int, mtime: int = 0) -> None:
    name = path.lstrip("/").encode() + b"\0"
    fields = (inode, mode, 0, 0, 1, mtime, len(data), 0, 0, 0, 0, len(name), 0)
    head = b"070701" + b"".join(b"%08X" % field for field in fields) + name
    out.write(head + bytes(-len(head) % 4))
    out.write(data)
    out.write(bytes(-len(data) % 4))
