"""A bounded folder of flushes that Kafka has not acknowledged yet; it survives restarts of the process.

Owns the files: one per flush, written under another name and renamed, so that a file is whole or not there. Never
decides what is spooled or sent. A full or broken disk and a damaged file are values here, not exceptions. Called by
`node.publish`.

Files are not synced: waiting for the disk would stall the ring, and a power cut, the one thing that a sync helps
against, ends the ring and its connections too. What it leaves half written is known by its checksum.

A file is one line of JSON (what is in it), the batches' values one after the other, and the CRC-32 of all that as 4
little-endian bytes. File names sort by producer epoch, then by number: the order of replay.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

from collector.node.batches import Batch

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

SUFFIX = ".flush"
SET_ASIDE_SUFFIX = ".unreadable"
CRC_BYTES = 4

log = structlog.get_logger()


@dataclass(frozen=True)
class SpoolFile:
    """A flush on disk.

    Attributes:
        path: where it is.
        size_bytes: its size.
        events: how many events are in it.
    """

    path: Path
    size_bytes: int
    events: int


class Spool:
    """The spool's folder.

    Attributes:
        used_bytes: size of all files that are to be replayed.
        waiting_events: events in them.
        unreadable_files: files set aside by this process because they are damaged or of another topic layout.
    """

    def __init__(self, folder: Path, size_bytes_max: int, boot_id: str, epoch: int, partitions: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._size_bytes_max = size_bytes_max
        self._boot_id, self._epoch, self._partitions = boot_id, epoch, partitions
        self._number = 0
        self._failing = False
        self.used_bytes = 0
        self.waiting_events = 0
        self.unreadable_files = 0

    def leftovers(self) -> list[SpoolFile]:
        """Return the files of earlier processes in the order of replay, and count them as waiting.

        Call it once, before the first `write`. Removes what a crash left half written.
        """
        for unfinished in self._folder.glob("*.tmp"):
            unfinished.unlink()
        found = []
        for path in sorted(self._folder.glob("*" + SUFFIX)):
            try:
                with path.open("rb") as source:
                    events = sum(batch[1] for batch in json.loads(source.readline())["batches"])
                file = SpoolFile(path, path.stat().st_size, events)
            except (ValueError, KeyError, TypeError, IndexError):
                self._set_aside(path, "its first line is damaged")
                continue
            except OSError as error:
                self._set_aside(path, f"it can't be read: {error.strerror}")
                continue
            self._account(file, 1)
            found.append(file)
        return found

    def write(self, batches: Sequence[Batch]) -> SpoolFile | None:
        """Return the file that now holds `batches`; None when the bound or the disk forbids it."""
        head = {
            "boot_id": self._boot_id,
            "epoch": self._epoch,
            "partitions": self._partitions,
            "batches": [[batch.partition, batch.events, len(batch.value)] for batch in batches],
        }
        content = b"".join([json.dumps(head).encode(), b"\n", *(batch.value for batch in batches)])
        content += zlib.crc32(content).to_bytes(CRC_BYTES, "little")
        if self.used_bytes + len(content) > self._size_bytes_max:
            self._says_it_fails("the spool has reached PODWIRE_SPOOL_BYTES_MAX")
            return None
        path = self._folder / f"{self._epoch:020d}-{self._number:012d}{SUFFIX}"
        try:
            self._store(path, content)
        except OSError as error:
            self._says_it_fails(f"the disk refuses: {error.strerror}")
            return None
        if self._failing:
            self._failing = False
            log.info("spool_writable_again", used_bytes=self.used_bytes)
        self._number += 1
        file = SpoolFile(path, len(content), sum(batch.events for batch in batches))
        self._account(file, 1)
        return file

    def _store(self, path: Path, content: bytes) -> None:
        unfinished = path.with_suffix(".tmp")
        try:
            with unfinished.open("wb") as target:
                target.write(content)
            unfinished.rename(path)
        except OSError:
            unfinished.unlink(missing_ok=True)
            raise

    def _says_it_fails(self, reason: str) -> None:
        if not self._failing:
            self._failing = True
            log.error(
                "spool_not_writable", reason=reason, used_bytes=self.used_bytes, folder=str(self._folder)
            )

    def _account(self, file: SpoolFile, sign: int) -> None:
        self.used_bytes += sign * file.size_bytes
        self.waiting_events += sign * file.events

    def read(self, file: SpoolFile) -> list[Batch] | None:
        """Return the batches of a file; None when it can't be used: then it is set aside, logged and counted."""
        try:
            content = file.path.read_bytes()
        except OSError as error:
            self._account(file, -1)
            self._set_aside(file.path, f"it can't be read: {error.strerror}")
            return None
        reason, batches = parse(content, self._partitions)
        if reason is not None:
            self._account(file, -1)
            self._set_aside(file.path, reason)
            return None
        return batches

    def delete(self, file: SpoolFile) -> None:
        """Forget a file whose batches Kafka has acknowledged."""
        self._account(file, -1)
        try:
            file.path.unlink(missing_ok=True)
        except OSError as error:  # it is replayed after the next start: repeats, no loss
            log.warning("spool_file_not_deleted", file=str(file.path), reason=error.strerror)

    def _set_aside(self, path: Path, reason: str) -> None:
        self.unreadable_files += 1
        log.error("spool_file_set_aside", file=str(path), reason=reason)
        try:
            path.rename(path.with_suffix(SET_ASIDE_SUFFIX))
        except OSError as error:
            log.warning("spool_file_not_moved", file=str(path), reason=error.strerror)


def parse(content: bytes, partitions: int) -> tuple[str | None, list[Batch]]:
    """Return (None, batches) of a spool file's content, or (what is wrong with it, [])."""
    body = content[:-CRC_BYTES]
    if zlib.crc32(body).to_bytes(CRC_BYTES, "little") != content[-CRC_BYTES:]:
        return "its checksum is wrong", []
    line, _, values = body.partition(b"\n")
    head = json.loads(line)
    if head["partitions"] != partitions:
        return f"it was written for {head['partitions']} partitions, not {partitions}", []
    batches = []
    at = 0
    for partition, events, size in head["batches"]:
        batches.append(Batch(partition, events, values[at : at + size]))
        at += size
    return None, batches
