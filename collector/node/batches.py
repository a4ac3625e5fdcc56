"""Makes RawBatch messages of kernel events: key, partition, encode, cut.

Owns the sequence numbers of this process's batches. Never reads a clock, a ring or Kafka. Called by `node.run`.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from collector.node.columns import tcp_event_columns, tcp_keys
from collector.node.encode import Header, encode_events, raw_batch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from collector.node.clock import ClockOffset
    from collector.node.columns import Events, Origin, Owners
    from collector.node.encode import Integers

BATCH_BYTES_MAX = 900_000  # of events and their sizes; Kafka's default limit of a message is 1,048,588 bytes
SIZE_ENTRY_BYTES = 2  # an event's entry in event_sizes: 64 to 8,191 bytes


@dataclass(frozen=True)
class Batch:
    """One message for the raw topic.

    Attributes:
        partition: the partition it belongs to.
        events: how many events are in it.
        value: the framed RawBatch.
    """

    partition: int
    events: int
    value: bytes


class Batcher:
    """Numbers and encodes the batches of one producer epoch."""

    def __init__(self, origin: Origin, partitions: int, schema_id: int) -> None:
        self._origin = origin
        self._partitions = partitions
        self._schema_id = schema_id
        self._sequences = [0] * partitions

    def batches(self, events: Events, owners: Owners, clock: ClockOffset) -> list[Batch]:
        """Return the messages that hold `events`: in kernel order within a partition, none above the size limit."""
        keys = tcp_keys(events, self._origin)
        partitions = keys % np.uint64(self._partitions)
        order = np.argsort(partitions, kind="stable")
        columns = tcp_event_columns(events, keys, owners, clock)
        bodies, sizes = encode_events(columns, order)
        ends = np.cumsum(sizes)
        edges = np.searchsorted(partitions[order], np.arange(self._partitions + 1))
        made = []
        for partition, (first, last) in enumerate(pairwise(edges)):
            for start, stop in cuts(sizes[first:last], BATCH_BYTES_MAX):
                rows = slice(first + start, first + stop)
                body = bodies[ends[rows.start] - sizes[rows.start] : ends[rows.stop - 1]]
                value = raw_batch(self._schema_id, self._header(partition, clock), sizes[rows], body)
                made.append(Batch(partition, int(stop - start), value))
        return made

    def _header(self, partition: int, clock: ClockOffset) -> Header:
        sequence = self._sequences[partition]
        self._sequences[partition] += 1
        origin = self._origin
        return Header(
            origin.cluster,
            origin.node,
            origin.boot_id,
            origin.producer_epoch,
            partition,
            sequence,
            origin.key_id,
            clock.offset_us,
            clock.error_us,
        )


def cuts(sizes: Integers, bytes_max: int) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of consecutive stretches, as long as possible, that take at most `bytes_max` each."""
    ends = np.cumsum(sizes + SIZE_ENTRY_BYTES)
    start = 0
    while start < len(sizes):
        before = int(ends[start - 1]) if start else 0
        stop = max(int(np.searchsorted(ends, before + bytes_max, side="right")), start + 1)
        yield start, stop
        start = stop
