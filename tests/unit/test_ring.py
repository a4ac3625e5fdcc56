"""Reading a BPF ring as arrays, on a file that stands in for the mapping."""

from __future__ import annotations

import mmap
import os
import struct
from typing import TYPE_CHECKING

import numpy as np
import pytest

from collector.errors import AbiError
from collector.node.abi import CGROUP_NAME, EVENT
from collector.node.ring import BUSY, DISCARDED, EventRing, NameRing, require_ordered_loads

if TYPE_CHECKING:
    from collections.abc import Iterator

SIZE = 4096
STRIDE = 176


class Kernel:
    """Writes as kernel/bpf/ringbuf.c does; the file repeats the data where the kernel maps it twice."""

    def __init__(self) -> None:
        self.descriptor = os.memfd_create("ring")
        os.ftruncate(self.descriptor, 2 * mmap.PAGESIZE + 2 * SIZE)
        self.position = 0

    def _write(self, position: int, content: bytes) -> None:
        place = position % SIZE
        for at in (place - SIZE, place, place + SIZE):
            begin = max(0, -at)
            end = min(len(content), 2 * SIZE - at)
            if begin < end:
                os.pwrite(self.descriptor, content[begin:end], 2 * mmap.PAGESIZE + at + begin)

    def put(self, content: bytes, flags: int = 0) -> int:
        """Write a record, move the producer's position, return where the record begins."""
        begin = self.position
        self._write(begin, struct.pack("<II", len(content) | flags, 0) + content)
        self.position += 8 + (len(content) + 7) // 8 * 8
        os.pwrite(self.descriptor, struct.pack("<Q", self.position), mmap.PAGESIZE)
        return begin

    def event(self, cookie: int, flags: int = 0) -> int:
        """Write an event that is known by its cookie."""
        event = np.zeros(1, EVENT)
        event["socket_cookie"] = cookie
        return self.put(event.tobytes(), flags)

    def finish(self, begin: int, length: int, flags: int = 0) -> None:
        """Clear the busy flag of a record."""
        self._write(begin, struct.pack("<I", length | flags))


@pytest.fixture
def kernel() -> Iterator[Kernel]:
    """An empty ring of one page."""
    made = Kernel()
    yield made
    os.close(made.descriptor)


@pytest.fixture
def ring(kernel: Kernel) -> Iterator[EventRing]:
    """The reader of that ring."""
    made = EventRing(kernel.descriptor, SIZE)
    yield made
    made.close()


def cookies(ring: EventRing, records_max: int = 1_000) -> list[int]:
    """Read and return which events came."""
    return [int(cookie) for cookie in ring.read(records_max)["socket_cookie"]]


def test_empty_ring_yields_an_empty_array(ring: EventRing) -> None:
    """Nothing there: an array of the right type, no wait."""
    assert ring.read(10).dtype == EVENT
    assert len(ring.read(10)) == 0


def test_records_come_once_in_order_and_in_slices(kernel: Kernel, ring: EventRing) -> None:
    """A slice ends at its limit and the next goes on there."""
    for cookie in range(7):
        kernel.event(cookie)
    assert cookies(ring, 3) == [0, 1, 2]
    assert cookies(ring, 3) == [3, 4, 5]
    assert cookies(ring, 3) == [6]
    assert cookies(ring, 3) == []


def test_records_survive_many_wraps(kernel: Kernel, ring: EventRing) -> None:
    """176 does not divide 4096, so records lie across the end in every lap."""
    for lap in range(40):
        sent = list(range(lap * 20, lap * 20 + 20))
        for cookie in sent:
            kernel.event(cookie)
        assert cookies(ring) == sent
        ring.release(ring.read_position)
    assert ring.read_position == 40 * 20 * STRIDE


def test_busy_record_stops_the_reader_until_it_is_done(kernel: Kernel, ring: EventRing) -> None:
    """What another CPU is still writing is not read, nor what lies behind it."""
    kernel.event(1)
    busy = kernel.event(2, BUSY)
    kernel.event(3)
    assert cookies(ring) == [1]
    assert cookies(ring) == []
    kernel.finish(busy, EVENT.itemsize)
    assert cookies(ring) == [2, 3]


def test_discarded_records_of_any_length_are_skipped(kernel: Kernel, ring: EventRing) -> None:
    """A discarded record takes room and is nothing."""
    kernel.put(b"x" * 20, DISCARDED)
    kernel.event(1)
    kernel.event(2, DISCARDED)
    kernel.put(b"", DISCARDED)
    kernel.event(3)
    kernel.event(4, DISCARDED)
    assert cookies(ring) == [1, 3]
    assert ring.read_position == kernel.position


def test_record_of_another_length_is_fatal(kernel: Kernel, ring: EventRing) -> None:
    """Another object's ring must not be misread."""
    kernel.put(b"y" * 160)
    with pytest.raises(AbiError, match="160 bytes instead of 168"):
        ring.read(10)


def test_released_room_is_the_kernels_again(kernel: Kernel, ring: EventRing) -> None:
    """Reading alone gives nothing back; the consumer's position is stored on release."""
    for cookie in range(4):
        kernel.event(cookie)
    ring.read(3)
    assert ring.used_bytes() == 4 * STRIDE
    ring.release(2 * STRIDE)
    assert ring.used_bytes() == 2 * STRIDE
    assert os.pread(kernel.descriptor, 8, 0) == struct.pack("<Q", 2 * STRIDE)


def test_release_beyond_what_was_read_is_refused(kernel: Kernel, ring: EventRing) -> None:
    """It would be a loss that nobody counts."""
    kernel.event(1)
    with pytest.raises(AssertionError):
        ring.release(STRIDE)


def test_second_reader_starts_where_the_first_released(kernel: Kernel, ring: EventRing) -> None:
    """What was read but not released comes again after a crash."""
    for cookie in range(4):
        kernel.event(cookie)
    ring.read(3)
    ring.release(1 * STRIDE)
    again = EventRing(kernel.descriptor, SIZE)
    assert cookies(again) == [1, 2, 3]
    again.close()


def test_copies_outlive_the_room_they_came_from(kernel: Kernel, ring: EventRing) -> None:
    """What was read does not change when the kernel writes over it."""
    kernel.event(1)
    first = ring.read(1)
    ring.release(ring.read_position)
    for cookie in range(100, 100 + SIZE // STRIDE + 1):
        kernel.event(cookie)
    assert int(first["socket_cookie"][0]) == 1


def test_names_are_drained_to_the_end(kernel: Kernel) -> None:
    """Every name that was reserved before the call is there after it."""
    names = NameRing(kernel.descriptor, SIZE)
    for number in range(4):
        name = np.zeros(1, CGROUP_NAME)
        name["cgroup_id"] = number
        kernel.put(name.tobytes())
    assert list(names.drain()["cgroup_id"]) == [0, 1, 2, 3]
    assert len(names.drain()) == 0
    names.close()


def test_other_cpus_are_refused() -> None:
    """Plain loads are acquires on x86-64 only."""
    require_ordered_loads("x86_64")
    with pytest.raises(AbiError, match="aarch64"):
        require_ordered_loads("aarch64")
