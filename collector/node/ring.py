"""A BPF ring buffer, mapped and read in slices as numpy arrays.

Owns the mapping and the two positions: how far we have read, and how far the kernel may reuse. Never waits,
never interprets a record. Called by probes.py and, through it, by the run loop.

Layout (kernel/bpf/ringbuf.c): one page with the consumer's position, one with the producer's, then the data
mapped twice in a row, so a record that wraps is contiguous. Each record is a header of 8 bytes (u32 length
with two flags) and the value, padded to 8. A header is written before the producer's position passes it.
Reading the position or a header before the data needs acquire semantics, which any load has on x86-64 only.
"""

from __future__ import annotations

import mmap
import os
import platform
from typing import Any

import numpy as np

from collector.errors import AbiError
from collector.node.abi import CGROUP_NAME, EVENT

Records = np.ndarray[Any, np.dtype[Any]]

HEADER_BYTES = 8
BUSY = 1 << 31
DISCARDED = 1 << 30


def _padded(length: int) -> int:
    return (length + 7) & ~7


def require_ordered_loads(machine: str) -> None:
    """Refuse a CPU on which a plain load is not an acquire.

    Raises:
        AbiError: on anything but x86-64.
    """
    if machine != "x86_64":
        raise AbiError(
            f"The ring buffer is read without memory barriers, which {machine} would need.",
            "run this collector on x86-64 nodes only.",
        )


class Ring:
    """One ring whose records all have the type `record`.

    Attributes:
        read_position: first byte that has not been read, counted since the ring was made.
        size_bytes: the ring's size, a power of two.
    """

    record: np.dtype[Any]

    def __init__(self, descriptor: int, size_bytes: int) -> None:
        require_ordered_loads(platform.machine())
        self.size_bytes = size_bytes
        self._stride_bytes = HEADER_BYTES + _padded(self.record.itemsize)
        self._slot = np.dtype(
            {
                "names": ["length", "value"],
                "formats": ["<u4", self.record],
                "offsets": [0, HEADER_BYTES],
                "itemsize": self._stride_bytes,
            }
        )
        page = mmap.PAGESIZE
        self._consumer_page = mmap.mmap(descriptor, page, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        self._data = mmap.mmap(
            descriptor, page + 2 * size_bytes, mmap.MAP_SHARED, mmap.PROT_READ, offset=page
        )
        self._consumer = np.frombuffer(self._consumer_page, "<u8", count=1)
        self._producer = np.frombuffer(self._data, "<u8", count=1)
        self.read_position = int(self._consumer[0])

    def producer_position(self) -> int:
        """Return the first byte that the kernel has not reserved."""
        return int(self._producer[0])

    def used_bytes(self) -> int:
        """Return how many bytes the kernel may not reuse: unread, or read and not released."""
        return int(self._producer[0]) - int(self._consumer[0])

    def read_until(self, limit: int, records_max: int) -> Records:
        """Return copies of the next records before position `limit`, in order, and move the read position.

        Stops at a record that is still being written; skips discarded ones. 0.08 us per record of 168 bytes.

        Raises:
            AbiError: for a record of another length, which means another object filled the ring.
        """
        parts = []
        while self.read_position < limit and records_max > 0:
            slots = self._ready(min((limit - self.read_position) // self._stride_bytes, records_max))
            if len(slots):
                parts.append(slots["value"].copy())
                records_max -= len(slots)
                self.read_position += len(slots) * self._stride_bytes
                continue
            skipped = self._discarded_bytes()
            if not skipped:
                break
            self.read_position += skipped
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts) if parts else np.empty(0, self.record)

    def _ready(self, count: int) -> Records:
        """Return the run of complete records at the read position, at most `count`, as a view."""
        offset = mmap.PAGESIZE + self.read_position % self.size_bytes
        slots: Records = np.ndarray((count,), self._slot, self._data, offset)
        complete = slots["length"] == self.record.itemsize
        return slots if complete.all() else slots[: int(complete.argmin())]

    def _discarded_bytes(self) -> int:
        """Return the size of the discarded record at the read position; 0 if it is still being written."""
        offset = mmap.PAGESIZE + self.read_position % self.size_bytes
        header = int(np.frombuffer(self._data, "<u4", 1, offset)[0])
        if header & BUSY or header == self.record.itemsize:
            return 0
        length = header & ~DISCARDED
        if not header & DISCARDED:
            raise AbiError(
                f"The ring holds a record of {length} bytes instead of {self.record.itemsize}.",
                "empty PODWIRE_PIN_DIR, rebuild the BPF object (make bpf) and start again.",
            )
        return HEADER_BYTES + _padded(length)

    def release(self, position: int) -> None:
        """Let the kernel reuse everything before `position`, which must not be beyond the read position."""
        assert int(self._consumer[0]) <= position <= self.read_position, "released what was not read"
        self._consumer[0] = position

    def close(self) -> None:
        """Unmap; the ring itself lives as long as its map."""
        del self._consumer, self._producer
        self._data.close()
        self._consumer_page.close()


class EventRing(Ring):
    """The ring of struct podwire_event: a write-ahead log that is released as Kafka or the spool takes over."""

    record = EVENT

    def read(self, records_max: int) -> Records:
        """Return the next events that are there, at most `records_max`; the read position alone moves."""
        return self.read_until(self.producer_position(), records_max)


class NameRing(Ring):
    """The ring of struct podwire_cgroup_name."""

    record = CGROUP_NAME

    def drain(self) -> Records:
        """Return every name whose place was reserved before this call.

        A record that is still being written is waited for: another CPU's probe does it in under a us.
        """
        limit = self.producer_position()
        parts = [self.read_until(limit, self.size_bytes)]
        while self.read_position < limit:
            os.sched_yield()
            parts.append(self.read_until(limit, self.size_bytes))
        return np.concatenate(parts)
