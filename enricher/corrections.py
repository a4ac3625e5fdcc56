"""Records that went out with a side that metadata to come may yet name, and the corrected ones that follow.

Owns what is pending, in memory and in the changelog topic. Write-ahead: a flow with such a side is sent only after
its changelog entry was delivered, so that whoever reads the flow can count on the correction, whatever dies. An
entry lives until its correction was delivered or its time is up; then a tombstone takes it out. One correction per
record: when both sides are settled, else at the end of the time with what is known by then. Single-threaded, times
come in. Called by `engine`; `app` reads the entries that an earlier worker left.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from enricher import avro, raw
from enricher.flow import RECORD_TYPES, Flow, Moment, comm_end
from enricher.pair import Pair
from schemas import catalog, codec

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Callable, Iterable, Mapping

    from enricher.flow import FlowBuilder
    from enricher.history import History
    from enricher.output import Entry, Output
    from schemas.registry import SchemaIds

ROUND_INTERVAL_MS = 1000
"""Least time between two rounds of looking at all that is pending."""
PATIENCE = 4
"""Who has waited longer is asked for more rarely: after a fourth of the time waited so far."""
ROUND_SLICE = 500
"""Records looked at per tick, 4 us each at most, so that a round never holds the other partitions up."""
LEFT_BEHIND_MS = catalog.RAW.retention_ms
"""An entry found this long after its end is dropped: metadata is not kept for longer either."""


class Owner(Protocol):
    """What is asked of a partition."""

    number: int
    dropped: bool


@dataclass(frozen=True)
class Limits:
    """How long (ms; 0: never) and how many records may be pending."""

    correction_ms: int
    pending_max: int


OFF = Limits(0, 0)


@dataclass(eq=False, slots=True)
class Pending:
    """A record that may be corrected.

    Attributes:
        key: of its changelog entry.
        expires_ms: end of its time, Unix time in ms.
        grades: of the answers that went out.
        version: of the history that was asked last.
        next_ms: not to be asked for before, Unix time in ms.
        under_way: whether its correction was sent.
    """

    key: bytes
    pair: Pair
    expires_ms: int
    grades: tuple[int, int]
    version: int = -1
    next_ms: int = 0
    under_way: bool = False


def identity(flow: Flow, pair: Pair) -> str:
    """Return what all revisions of a record share, as text."""
    first = pair.client or pair.server
    assert first is not None
    observed_by = "CLIENT" if pair.server is None else "SERVER" if pair.client is None else "BOTH"
    progress_seq, _ = avro.read_long(first.data, comm_end(first.data))
    return f"{flow.key.decode()}/{RECORD_TYPES[first.data[raw.TYPE_AT]]}/{observed_by}/{progress_seq}"


def encode(one: Pending, group: bytes, schema_id: int) -> bytes:
    """Return the value of a changelog entry; `group` comes as Avro text. A test compares with fastavro."""
    return b"".join(
        (
            codec.prefix(schema_id),
            group,
            avro.cached_long(one.expires_ms),
            avro.cached_long(one.grades[0]),
            avro.cached_long(one.grades[1]),
            _encoded(one.pair.client),
            _encoded(one.pair.server),
        )
    )


def _encoded(half: raw.Half | None) -> bytes:
    if half is None:
        return avro.NULL
    index, size = avro.cached_long(half.index), avro.cached_long(len(half.data))
    return avro.PRESENT + half.header.encoded + index + size + half.data


def _is_better(new: tuple[int, int], old: tuple[int, int]) -> bool:
    """Return whether neither side got worse and one got better."""
    return new != old and new[0] >= old[0] and new[1] >= old[1]


def decode(key: bytes, value: bytes, group: str, writer: Any = None) -> Pending | None:
    """Return the pending record of a changelog entry, None when it is another group's.

    ValueError, LookupError, TypeError or EOFError when it can't be read.
    """
    record = codec.decode(catalog.CORRECTIONS.schema, value, writer)
    if record["group"] != group:
        return None
    pair = Pair(_half(record["client"]), _half(record["server"]))
    if pair == (None, None):
        raise ValueError("an entry without halves")
    expires_ms = round(record["expires_at"].timestamp() * 1000)
    return Pending(key, pair, expires_ms, (record["client_grade"], record["server_grade"]))


def _half(record: dict[str, Any] | None) -> raw.Half | None:
    if record is None:
        return None
    rest = dict(record)
    index, event = rest.pop("index"), rest.pop("event")
    return raw.half(raw.Header(**rest), index, event)


class Corrections:
    """All that is pending in one worker, by partition.

    Attributes:
        outcomes: how many were corrected, expired or had no room.
    """

    def __init__(
        self,
        limits: Limits,
        group: str,
        ids: SchemaIds,
        history: History,
        builder: FlowBuilder,
        output: Output,
        outcomes: Counter[str],
    ) -> None:
        self.outcomes = outcomes
        self._limits = limits
        self._group = group
        self._group_text = avro.text(group)
        self._ids = ids
        self._schema_id = ids.id_of(catalog.CORRECTIONS)
        self._history = history
        self._builder = builder
        self._output = output
        self._pending: dict[Owner, dict[bytes, Pending]] = {}
        self._writing = 0
        self._round: list[tuple[Owner, Pending]] = []
        self._round_ms = 0

    @property
    def pending(self) -> int:
        """Records that went out and may yet be corrected."""
        return sum(map(len, self._pending.values()))

    def hold(
        self, partition: Owner, pair: Pair, flow: Flow, timestamp_ms: int, entry: Entry, now_ms: int
    ) -> bool:
        """Send a flow with an unsettled side once its changelog entry is delivered; False: the caller sends it.

        False where corrections are off; where there is no room, so that nothing is promised; and where the entry
        of an earlier worker or an earlier reading stands already.
        """
        assert flow.grades is not None
        if self._limits.correction_ms == 0:
            return False
        key = f"{self._group}/{identity(flow, pair)}".encode()
        if key in self._pending.get(partition, ()):
            return False
        if self.pending + self._writing >= self._limits.pending_max:
            self.outcomes["no_room"] += 1
            return False
        expires_ms = now_ms + self._limits.correction_ms
        one = Pending(key, pair, expires_ms, flow.grades, self._history.version)

        def written() -> None:
            self._writing -= 1
            entry.pending -= 1
            if not partition.dropped:
                self._output.send(catalog.FLOWS.name, flow.key, flow.value, timestamp_ms, entry)
                self._pending.setdefault(partition, {}).setdefault(key, one)

        entry.pending += 1
        self._writing += 1
        value = encode(one, self._group_text, self._schema_id)
        self._write_entry(partition, key, value, now_ms, written)
        return True

    def unpack(self, live: Mapping[bytes, bytes]) -> tuple[list[Pending], int]:
        """Return this group's records among a partition's live entries, and how many could not be read.

        May run in another thread.
        """
        found, unreadable = [], 0
        for key, value in live.items():
            try:
                schema_id, _ = codec.split(value)
                writer = None if schema_id == self._schema_id else self._ids.writer_schema(schema_id)
                one = decode(key, value, self._group, writer)
            except (ValueError, LookupError, TypeError, EOFError):
                unreadable += 1
                continue
            if one is not None:
                found.append(one)
        return found, unreadable

    def restore(self, partition: Owner, found: Iterable[Pending], now_ms: int) -> None:
        """Take over the entries that the partition's earlier workers left; call before its first message."""
        for one in found:
            if one.expires_ms + LEFT_BEHIND_MS < now_ms:
                self._drop(partition, one, now_ms, "expired")
            elif self.pending + self._writing >= self._limits.pending_max:
                self._drop(partition, one, now_ms, "no_room")
            else:
                self._pending.setdefault(partition, {})[one.key] = one

    def revoke(self, partition: Owner) -> None:
        """Forget a partition's records: another worker has them from the changelog."""
        self._pending.pop(partition, None)

    def tick(self, now_ms: int) -> None:
        """Look at some of what is pending: ask again where metadata has changed, end what is out of time."""
        if not self._round:
            if not self._pending or now_ms - self._round_ms < ROUND_INTERVAL_MS:
                return
            self._round_ms = now_ms
            self._round = [
                (partition, one) for partition, ones in self._pending.items() for one in ones.values()
            ]
        moment = Moment.at(now_ms, self._history.pods_complete_until_us)
        for _ in range(min(ROUND_SLICE, len(self._round))):
            partition, one = self._round.pop()
            if not one.under_way and not partition.dropped:
                self._look_at(partition, one, moment)

    def _look_at(self, partition: Owner, one: Pending, moment: Moment) -> None:
        is_late = one.expires_ms <= moment.now_ms
        if not is_late and (one.version == self._history.version or moment.now_ms < one.next_ms):
            return
        one.version = self._history.version
        waited_ms = moment.now_ms - one.expires_ms + self._limits.correction_ms
        one.next_ms = moment.now_ms + waited_ms // PATIENCE
        flow = self._builder.build(one.pair, moment, final=is_late, revision=1)
        if flow is None:
            return
        if flow.grades is not None and not _is_better(flow.grades, one.grades):
            self._drop(partition, one, moment.now_ms, "expired")
            return
        one.under_way = True
        self.outcomes["corrected"] += 1

        def delivered() -> None:
            if not partition.dropped:
                self._drop(partition, one, moment.now_ms, None)

        timestamp_ms = min(flow.event_ms, moment.now_ms)
        self._output.write(catalog.FLOWS.name, flow.key, flow.value, timestamp_ms, then=delivered)

    def _write_entry(
        self, partition: Owner, key: bytes, value: bytes | None, now_ms: int, then: Callable[[], None] | None
    ) -> None:
        topic = catalog.CORRECTIONS.name
        self._output.write(topic, key, value, now_ms, partition=partition.number, then=then)

    def _drop(self, partition: Owner, one: Pending, now_ms: int, outcome: str | None) -> None:
        if outcome is not None:
            self.outcomes[outcome] += 1
        self._pending.get(partition, {}).pop(one.key, None)
        self._write_entry(partition, one.key, None, now_ms, None)
