"""What a replay does with one partition: which messages it reads, which records of them belong to the span.

Pure: messages in, flows out. Never reads Kafka, and no clock decides: one partition's messages give the same
flows whoever reads them, on however many processes. Called by `replay_run`.

A record belongs to a span when its own `event_unix_us` lies in [from, to), so spans that touch share no record
and leave none out. Its halves were appended at another time than they happened: `early_ms` before at most (a node's
clock that runs ahead), `late_ms` after at most (a spool after an outage). What lies outside that is not covered.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from enricher import raw
from enricher.pair import PairCounts, Pairing, warm_up_ms
from schemas import catalog

if TYPE_CHECKING:
    from collections.abc import Iterator

    from enricher.flow import Flow, FlowBuilder, Moment
    from schemas.registry import SchemaIds


@dataclass(frozen=True)
class Span:
    """What is asked for, all Unix time.

    Attributes:
        from_us, to_us: event time of the records wanted; `to_us` itself is not.
        early_ms, late_ms: how far before and after it happened a half may have been appended.
        window_ms: the pairing window, which must be the one of the first time.
        now_ms: up to here the broker's clock has surely come; the same for all processes of a replay.
    """

    from_us: int
    to_us: int
    early_ms: int
    late_ms: int
    window_ms: int
    now_ms: int

    @property
    def warm_ms(self) -> int:
        """Append time from which what comes out counts; before, halves that wait are gathered."""
        return self.from_us // 1000 - self.early_ms

    @property
    def first_ms(self) -> int:
        """Append time from which messages are read, so that the halves that wait are those of the first time."""
        return self.warm_ms - warm_up_ms(self.window_ms)

    @property
    def last_ms(self) -> int:
        """Append time up to which messages are read, itself included: the last half's partner may come then."""
        return -(-self.to_us // 1000) + self.late_ms + self.window_ms

    @property
    def settled_ms(self) -> int:
        """Append time up to which nothing more can come: windows that ended before are closed."""
        return min(self.last_ms, self.now_ms)

    def holds(self, event_unix_us: int) -> bool:
        """Return whether a record of this event time belongs to the span."""
        return self.from_us <= event_unix_us < self.to_us


def share(partitions: int, number: int, of: int) -> list[int]:
    """Return the partitions of process `number` (from 1) of `of`; every partition is in exactly one share."""
    return [partition for partition in range(partitions) if partition % of == number - 1]


@dataclass
class Counts:
    """What a replay has done so far.

    Attributes:
        messages, halves: read, the overlap included.
        records: records of the span.
        outside: records left out since they happened before or after the span.
        unsettled: halves at the end of the topic whose other half may still come, left out.
        provisional: records of the span that metadata still to come could better.
        unreadable: messages that became dead letters the first time.
    """

    messages: int = 0
    halves: int = 0
    records: int = 0
    outside: int = 0
    unsettled: int = 0
    provisional: int = 0
    unreadable: int = 0


class PartitionReplay:
    """One partition from the first message of its span to the last."""

    def __init__(
        self, span: Span, partition: int, ids: SchemaIds, builder: FlowBuilder, counts: Counts
    ) -> None:
        self._span = span
        self._partition = partition
        self._ids = ids
        self._raw_id = ids.id_of(catalog.RAW)
        self._builder = builder
        self._counts = counts
        self._pairing = Pairing(span.window_ms, PairCounts())

    def take(self, append_ms: int, value: bytes | None, moment: Moment) -> Iterator[Flow]:
        """Yield the span's flows that one message lets out; messages come in the order of their offsets."""
        halves = raw.cut(value, self._partition, self._ids, self._raw_id)
        self._counts.messages += 1
        header = raw.header_of(value, halves, self._ids, self._raw_id)
        if header is not None and header.cluster != self._builder.cluster:
            halves = []
        elif isinstance(halves, raw.Rejected):
            self._counts.unreadable += 1
            halves = []
        self._counts.halves += len(halves)
        yield from self._flows(append_ms, halves, moment)

    def end(self, moment: Moment) -> Iterator[Flow]:
        """Yield the flows of the windows that are over after the last message."""
        yield from self._flows(self._span.settled_ms, [], moment)
        self._counts.unsettled += sum(
            self._span.holds(half.event_unix_us) for half in self._pairing.waiting_halves()
        )

    def _flows(self, append_ms: int, halves: list[raw.Half], moment: Moment) -> Iterator[Flow]:
        for pair in self._pairing.add(append_ms, halves):
            first = pair.client or pair.server
            assert first is not None
            if append_ms < self._span.warm_ms or not self._span.holds(first.event_unix_us):
                self._counts.outside += 1
                continue
            flow = self._builder.build(pair, moment, final=False)
            if flow is None:
                self._counts.provisional += 1
                flow = self._builder.build(pair, moment, final=True)
                assert flow is not None
            self._counts.records += 1
            yield flow
