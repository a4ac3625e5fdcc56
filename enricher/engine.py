"""What happens to a partition's messages from arrival to acknowledgement.

Owns, per assigned partition, the pairing and the queue of unacknowledged messages, and for all of them the
records that wait for metadata. A message is acknowledged when all that it caused was delivered, from the head
only, and so was the Coverage of the batches that it settled. Never waits, never reads a clock (times come in) and
knows no Faust. Called by `app`.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from enricher import corrections, coverage, metadata, raw
from enricher.coverage import Unsettled
from enricher.flow import Moment
from enricher.metrics import Counts
from enricher.output import Entry
from enricher.pair import PairCounts, Pairing, warm_up_ms
from schemas import catalog, codec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from enricher.flow import FlowBuilder
    from enricher.history import History
    from enricher.metadata import Change
    from enricher.output import Output
    from enricher.pair import Pair
    from schemas.registry import SchemaIds

DEAD_LETTER_BYTES_MAX = 900_000
"""The broker refuses messages above 1 MB, and a refused dead letter would stop the worker for ever."""
COVERAGE_INTERVAL_MS = 1000
"""Time between two Coverage records: one for all that was settled meanwhile, in all partitions."""
RETRY_INTERVAL_MS = 100
"""Least time between two rounds of asking again for all that waits."""


@dataclass(eq=False)
class Partition:
    """One assigned partition.

    Attributes:
        number: its number.
        position: offset of the message expected next; None before the first where nothing is committed.
        entries: unacknowledged messages and idle rounds, oldest first.
        unsettled: batches of which halves may still wait.
        unacknowledged: messages taken and not acknowledged.
        dropped: set when it was revoked: nothing of it is sent or acknowledged any more.
    """

    number: int
    pairing: Pairing
    position: int | None = None
    entries: deque[Entry] = field(default_factory=deque)
    unsettled: Unsettled = field(default_factory=Unsettled)
    unacknowledged: int = 0
    dropped: bool = False

    @property
    def head(self) -> int | None:
        """Offset of the first message that is not acknowledged; None while no offset is known."""
        return None if self.position is None else self.position - self.unacknowledged


class RawMessage(NamedTuple):
    """A message of the raw topic; `append_ms` is the broker's clock when it was appended, Unix time in ms."""

    offset: int
    append_ms: int
    key: bytes | None
    value: bytes | None


class _Round(NamedTuple):
    """Messages that are done, and the Coverage record that must be delivered before they are acknowledged."""

    told: Entry
    acks: list[tuple[Partition, Callable[[], None]]]


class _Waiting(NamedTuple):
    """A record that waits for metadata, until `deadline_ms` on the caller's clock."""

    partition: Partition
    entry: Entry
    pair: Pair
    deadline_ms: int


@dataclass(frozen=True)
class Limits:
    """The settings that the engine needs, as in `Settings`."""

    window_ms: int
    idle_slack_ms: int
    metadata_wait_ms: int
    waiting_max: int
    group: str = ""
    corrections: corrections.Limits = corrections.OFF


class Engine:
    """All partitions of one worker.

    Attributes:
        partitions: the assigned ones, by number.
        counts: what happened so far.
        corrections: what went out unsettled.
        closing: set when an orderly end began: Coverage is told without delay.
        read_again: messages read for warm-ups.
    """

    def __init__(
        self, limits: Limits, ids: SchemaIds, history: History, builder: FlowBuilder, output: Output
    ) -> None:
        self.closing = False
        self.read_again = 0
        self._done: list[tuple[Partition, Callable[[], None]]] = []
        self._settled: list[coverage.Batch] = []
        self._rounds: deque[_Round] = deque()
        self._told_ms = 0
        self.partitions: dict[int, Partition] = {}
        self.counts = Counts()
        self.history = history
        self.output = output
        self._limits = limits
        self._ids = ids
        self._raw_id = ids.id_of(catalog.RAW)
        self._raw_prefix = codec.prefix(self._raw_id)
        self._dead_letter_id = ids.id_of(catalog.DEADLETTER)
        self._coverage_id = ids.id_of(catalog.COVERAGE)
        self._builder = builder
        self.corrections = corrections.Corrections(
            limits.corrections,
            limits.group,
            ids,
            history,
            builder,
            output,
            self.counts.corrections,
        )
        self._waiting: deque[_Waiting] = deque()
        self._asked_version = -1
        self._asked_ms = 0

    @property
    def waiting_metadata(self) -> int:
        """Records that wait for metadata."""
        return len(self._waiting)

    @property
    def unacknowledged(self) -> int:
        """Messages processed and not acknowledged."""
        left = sum(len(partition.entries) for partition in list(self.partitions.values()))
        return left + len(self._done) + sum(len(one.acks) for one in list(self._rounds))

    @property
    def uncovered(self) -> int:
        """Batches processed whose Coverage is not handed to Kafka."""
        return len(self._settled) + sum(len(one.unsettled) for one in list(self.partitions.values()))

    @property
    def warm_up_ms(self) -> int:
        """How far before the last acknowledged message a partition must be re-read, in ms of append time."""
        return warm_up_ms(self._limits.window_ms)

    def assign(self, number: int, position: int | None) -> Partition:
        """Begin with a partition anew; whatever was held for it before is dropped."""
        self.revoke(number)
        pairing = Pairing(self._limits.window_ms, self.counts.pairs)
        self.partitions[number] = Partition(number, pairing, position)
        return self.partitions[number]

    def revoke(self, number: int) -> None:
        """Forget a partition: its unacknowledged messages are another worker's now."""
        old = self.partitions.pop(number, None)
        if old is not None:
            old.dropped = True
            self.corrections.revoke(old)
            self._waiting = deque(one for one in self._waiting if one.partition is not old)

    def warm(
        self,
        partition: Partition,
        messages: Iterable[tuple[int, bytes | None]],
        *,
        acknowledged: bool = False,
    ) -> None:
        """Rebuild the waiting halves from (append time, value) of earlier messages; nothing comes out.

        What they completed was delivered before their offsets were committed. Where they were `acknowledged`, the
        Coverage of the last window is told again, since it waits for halves that its messages do not wait for. May
        run in another thread as long as the partition is not used.
        """
        pairing = partition.pairing = Pairing(self._limits.window_ms, PairCounts())
        unsettled = partition.unsettled = Unsettled()
        for append_ms, value in messages:
            self.read_again += 1
            before = pairing.counts.repeats
            halves = self.cut(partition.number, value)
            header, foreign = self._header(value, halves)
            if foreign:
                header, halves = None, []
            pairing.add(append_ms, halves if isinstance(halves, list) else [])
            unsettled.add(append_ms, header, halves, pairing.counts.repeats - before)
            unsettled.keep_last(self._limits.window_ms)
        pairing.counts = self.counts.pairs
        if acknowledged:
            entry = Entry(self.output, None)
            entry.settled = unsettled.settle(pairing)
            entry.pending = 0
            partition.entries.append(entry)
        else:
            partition.unsettled = Unsettled()

    def may_ask_registry(self, value: bytes | None) -> bool:
        """Return whether a message was not written with our own schema, so that cutting it may ask the registry."""
        return value is None or not value.startswith(self._raw_prefix)

    def cut(self, number: int, value: bytes | None) -> list[raw.Half] | raw.Rejected:
        """Return the halves of a message of partition `number`, or why it was rejected; RegistryAwayError for now.

        May run in another thread.
        """
        return raw.cut(value, number, self._ids, self._raw_id)

    def take(
        self,
        partition: Partition,
        message: RawMessage,
        ack: Callable[[], None],
        now_ms: int,
        halves: list[raw.Half] | raw.Rejected | None = None,
    ) -> None:
        """Process one message; `ack` is called once all that it caused was delivered.

        `halves` is what it was cut into, where that was asked before.
        """
        if halves is None:
            halves = self.cut(partition.number, message.value)
        entry = Entry(self.output, ack)
        partition.entries.append(entry)
        partition.unacknowledged += 1
        partition.position = message.offset + 1
        self.counts.batches += 1
        header, foreign = self._header(message.value, halves)
        if foreign:
            header, halves = None, []
            self.counts.foreign_batches += 1
        if isinstance(halves, raw.Rejected):
            self._dead_letter(partition.number, message, halves, entry, now_ms)
        repeats = partition.pairing.counts.repeats
        pairs = partition.pairing.add(message.append_ms, halves if isinstance(halves, list) else [])
        repeats = partition.pairing.counts.repeats - repeats
        partition.unsettled.add(message.append_ms, header, halves, repeats)
        entry.settled = partition.unsettled.settle(partition.pairing)
        self._emit(partition, entry, pairs, now_ms)

    def _header(
        self, value: bytes | None, halves: list[raw.Half] | raw.Rejected
    ) -> tuple[raw.Header | None, bool]:
        """Return a message's header, None if it can't be read, and whether the message is another cluster's.

        Its enricher shares the topic, and takes and covers it: its pods are not ours. Where the checksum is wrong the
        cluster's name may be too, so every cluster sets it aside.
        """
        header = raw.header_of(value, halves, self._ids, self._raw_id)
        if header is None or (isinstance(halves, raw.Rejected) and halves.reason == raw.CHECKSUM_MISMATCH):
            return header, False
        return header, header.cluster != self._builder.cluster

    def has_idle_halves(self, partition: Partition, now_ms: int) -> bool:
        """Return whether halves wait whose window has passed on our clock, slack included."""
        limit_ms = self._limits.window_ms + self._limits.idle_slack_ms
        oldest_ms = partition.pairing.oldest_untold_ms
        return oldest_ms is not None and oldest_ms + limit_ms < now_ms

    def tell_idle(self, partition: Partition, now_ms: int) -> None:
        """Send, one-sided, the halves of a partition that has nothing more to read."""
        pairs = partition.pairing.tell_idle(now_ms - self._limits.idle_slack_ms)
        if pairs:
            entry = Entry(self.output, None)
            partition.entries.append(entry)
            entry.settled = partition.unsettled.settle(partition.pairing)
            self._emit(partition, entry, pairs, now_ms)

    def tick(self, changes: list[Change], now_ms: int) -> None:
        """Take metadata changes and delivery reports; send what waited long enough or need not wait any more."""
        metadata.apply(self.history, changes)
        if self._waiting:
            self._retry(now_ms)
        self.corrections.tick(now_ms)
        self.output.poll()
        for partition in self.partitions.values():
            entries = partition.entries
            while entries and entries[0].pending == 0:
                entry = entries.popleft()
                self._settled += entry.settled
                if entry.ack is not None:
                    self._done.append((partition, entry.ack))
        due = self.closing or abs(now_ms - self._told_ms) >= COVERAGE_INTERVAL_MS
        if (self._settled and due) or (self._done and not self._settled):
            self._tell_coverage(now_ms)
        while self._rounds and self._rounds[0].told.pending == 0:
            for partition, ack in self._rounds.popleft().acks:
                if not partition.dropped:
                    ack()
                    partition.unacknowledged -= 1

    def _tell_coverage(self, now_ms: int) -> None:
        """Send the Coverage of what was settled; the messages that are done are acknowledged after it is delivered."""
        told = Entry(self.output, None)
        record = coverage.record(self._settled)
        if record is not None:
            self._told_ms = now_ms
            value = codec.encode("Coverage", record, self._coverage_id)
            self.output.send(catalog.COVERAGE.name, b"", value, now_ms, told)
        told.pending -= 1
        self._rounds.append(_Round(told, self._done))
        self._done, self._settled = [], []

    def _emit(self, partition: Partition, entry: Entry, pairs: list[Pair], now_ms: int) -> None:
        """Send these or let them wait for metadata, then take the entry's own 1 off its pending count."""
        moment = Moment.at(now_ms, self.history.pods_complete_until_us)
        limits = self._limits
        final = limits.metadata_wait_ms == 0
        for pair in pairs:
            if not self._send(partition, pair, entry, moment, final=final):
                entry.pending += 1
                self._waiting.append(_Waiting(partition, entry, pair, now_ms + limits.metadata_wait_ms))
        while len(self._waiting) > limits.waiting_max:
            self._give_up(self._waiting.popleft(), moment, "no_room")
        entry.pending -= 1

    def _give_up(self, one: _Waiting, moment: Moment, outcome: str) -> None:
        """Send a record that waited, with what is known of it."""
        self._send(one.partition, one.pair, one.entry, moment, final=True)
        one.entry.pending -= 1
        self.counts.metadata_waits[outcome] += 1

    def _send(self, partition: Partition, pair: Pair, entry: Entry, moment: Moment, *, final: bool) -> bool:
        flow = self._builder.build(pair, moment, final=final)
        if flow is None:
            return False
        self.counts.flows += 1
        self.counts.resolutions[flow.kinds[0]] += 1
        self.counts.resolutions[flow.kinds[1]] += 1
        timestamp_ms = min(flow.event_ms, moment.now_ms)
        if flow.grades is None or not self.corrections.hold(
            partition, pair, flow, timestamp_ms, entry, moment.now_ms
        ):
            self.output.send(catalog.FLOWS.name, flow.key, flow.value, timestamp_ms, entry)
        return True

    def _retry(self, now_ms: int) -> None:
        """Ask again for all when metadata has changed, else only for those whose time is up."""
        moment = Moment.at(now_ms, self.history.pods_complete_until_us)
        rested = now_ms - self._asked_ms >= RETRY_INTERVAL_MS
        changed = rested and self.history.version != self._asked_version
        if changed:
            self._asked_version, self._asked_ms = self.history.version, now_ms
        still: deque[_Waiting] = deque()
        while self._waiting and (changed or self._waiting[0].deadline_ms <= now_ms):
            one = self._waiting.popleft()
            if self._send(one.partition, one.pair, one.entry, moment, final=False):
                one.entry.pending -= 1
                self.counts.metadata_waits["resolved"] += 1
            elif one.deadline_ms <= now_ms:
                self._give_up(one, moment, "timed_out")
            else:
                still.append(one)
        self._waiting.extendleft(reversed(still))

    def _dead_letter(
        self, partition: int, message: RawMessage, why: raw.Rejected, entry: Entry, now_ms: int
    ) -> None:
        self.counts.dead_letters[why.reason] += 1
        value = message.value or b""
        cut = (
            f"; {len(value)} bytes, cut to {DEAD_LETTER_BYTES_MAX}"
            if len(value) > DEAD_LETTER_BYTES_MAX
            else ""
        )
        record = {
            "topic": catalog.RAW.name,
            "partition": partition,
            "offset": message.offset,
            "reason": why.reason,
            "detail": why.detail + cut,
            "key": message.key,
            "value": value[:DEAD_LETTER_BYTES_MAX],
            "failed_at": now_ms,
            "schema_id": why.schema_id,
        }
        encoded = codec.encode("DeadLetter", record, self._dead_letter_id)
        key = f"{catalog.RAW.name}/{partition}/{message.offset}".encode()
        self.output.send(catalog.DEADLETTER.name, key, encoded, now_ms, entry)
