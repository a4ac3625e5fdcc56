"""Makes RawBatch messages of kernel events: key, partition, encode, cut.

Owns the sequence numbers of this process's batches. Never reads a clock, a ring or Kafka. Called by `node.run`.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from collector.node.columns import Owners, tcp_event_columns, tcp_keys
from collector.node.encode import Header, empty_batch, encode_events, raw_batch

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from collector.node.clock import ClockOffset
    from collector.node.columns import Events, Origin
    from collector.node.encode import Integers

BATCH_BYTES_MAX = 900_000  # of events and their sizes; Kafka's default limit of a message is 1,048,588 bytes
SIZE_ENTRY_BYTES = 2  # an event's entry in event_sizes: 64 to 8,191 bytes
ROWS_MAX = (
    2048  # encoded together: 0.8 us per event against 1.1 at 4096, when the columns outgrow a CPU's cache
)


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


class _Stretch(NamedTuple):
    """Encoded events of one partition: the size of each, and all of them one after the other."""

    sizes: Integers
    bodies: memoryview

    def bytes(self) -> int:
        """Return what they take in a message."""
        return len(self.bodies) + SIZE_ENTRY_BYTES * len(self.sizes)


class Batcher:
    """Numbers and encodes the batches of one producer epoch."""

    def __init__(self, origin: Origin, partitions: int, schema_id: int) -> None:
        self._origin = origin
        self._partitions = partitions
        self._schema_id = schema_id
        self._sequences = [0] * partitions

    def batches(self, events: Events, owners: Owners, clock: ClockOffset) -> list[Batch]:
        """Return the messages that hold `events`: in kernel order within a partition, none above the size limit."""
        stretches: list[list[_Stretch]] = [[] for _ in range(self._partitions)]
        for start in range(0, len(events), ROWS_MAX):
            rows = slice(start, start + ROWS_MAX)
            some = Owners(*(column[rows] for column in owners))  # type: ignore[arg-type]
            self._encode(events[rows], some, clock, stretches)
        return [
            self._batch(partition, message, clock)
            for partition, found in enumerate(stretches)
            for message in messages(found, BATCH_BYTES_MAX)
        ]

    def sequences(self) -> dict[int, int]:
        """Return the number of the next batch by partition."""
        return dict(enumerate(self._sequences))

    def empty(self, clock: ClockOffset) -> list[Batch]:
        """Return a batch without events for each partition."""
        return [
            Batch(partition, 0, empty_batch(self._schema_id, self._header(partition, clock)))
            for partition in range(self._partitions)
        ]

    def _encode(
        self, events: Events, owners: Owners, clock: ClockOffset, stretches: list[list[_Stretch]]
    ) -> None:
        """Encode some events and add what belongs to each partition to its stretches."""
        keys = tcp_keys(events, self._origin)
        partitions = keys % np.uint64(self._partitions)
        order = np.argsort(partitions, kind="stable")
        bodies, sizes = encode_events(tcp_event_columns(events, keys, owners, clock), order)
        offsets = np.concatenate(([0], np.cumsum(sizes)))
        edges = np.searchsorted(partitions[order], np.arange(self._partitions + 1))
        for partition, (first, last) in enumerate(pairwise(edges)):
            if last > first:
                stretches[partition].append(
                    _Stretch(sizes[first:last], bodies[offsets[first] : offsets[last]])
                )

    def _batch(self, partition: int, message: list[_Stretch], clock: ClockOffset) -> Batch:
        sizes = np.concatenate([stretch.sizes for stretch in message])
        bodies = [stretch.bodies for stretch in message]
        return Batch(
            partition, len(sizes), raw_batch(self._schema_id, self._header(partition, clock), sizes, bodies)
        )

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


def messages(stretches: Iterable[_Stretch], bytes_max: int) -> Iterator[list[_Stretch]]:
    """Yield consecutive stretches, as many as fit into `bytes_max` each time; each one fits by itself."""
    message: list[_Stretch] = []
    for stretch in stretches:
        if message and sum(map(_Stretch.bytes, message)) + stretch.bytes() > bytes_max:
            yield message
            message = []
        message.append(stretch)
    if message:
        yield message
