"""What is published, what is there, and what still has to be written.

Pure but for its own memory: takes what a source observed, keeps each object's last record as Avro bytes (a third
of its size as a dict) and the changes that Kafka doesn't have yet. Never does I/O and never asks the time.
Called by `run`, which fills it from Kafka at start and hands its changes to `publish`.
"""

from __future__ import annotations

import heapq
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from collector.cluster import intervals
from collector.cluster.records import KINDS
from schemas import catalog, codec

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from collector.cluster.records import Kind, Record, Seen
    from schemas.catalog import Topic

TOPICS: dict[Kind, Topic] = dict(zip(KINDS, catalog.METADATA, strict=True))


@dataclass(frozen=True, slots=True)
class ListBegins:
    """The source starts to read all objects of a kind; nothing read earlier counts for absence."""

    kind: Kind


@dataclass(frozen=True, slots=True)
class Present:
    """Objects of one kind in a state read at `observed_us`."""

    kind: Kind
    objects: tuple[Seen, ...]
    observed_us: int


@dataclass(frozen=True, slots=True)
class Gone:
    """An object was deleted; the source saw that at `observed_us`."""

    kind: Kind
    uid: str
    observed_us: int


@dataclass(frozen=True, slots=True)
class ListEnds:
    """All objects of the kind were handed over since `ListBegins`; those that were not are gone."""

    kind: Kind
    observed_us: int


@dataclass(frozen=True, slots=True)
class Complete:
    """Every change of the kind up to `until_us` has been handed over before this."""

    kind: Kind
    until_us: int


Observation = ListBegins | Present | Gone | ListEnds | Complete


@dataclass(slots=True)
class _Objects:
    """One kind's objects by uid.

    Attributes:
        records: last record of each, framed Avro; with history, so also of those that are gone.
        there: uid of each that is there.
        ended: valid_to_us of each that is gone.
        listed: uids handed over since the list began; None while no list is read.
    """

    records: dict[str, bytes] = field(default_factory=dict)
    there: set[str] = field(default_factory=set)
    ended: dict[str, int] = field(default_factory=dict)
    listed: set[str] | None = None


class State:
    """All objects that the metadata topics know, and the changes they don't know yet.

    Attributes:
        changes: framed record, or None for a tombstone, by (kind, uid): what has to be written.
        complete_until_us: by kind, up to when everything was observed; missing before the first time.
        unencodable: by kind, states left out as their schema doesn't take them (a hand-made manifest's port "x").
    """

    def __init__(
        self, cluster: str, schema_ids: Mapping[Kind, int], status_lag_us: int, retention_us: int
    ) -> None:
        self._cluster = cluster
        self._schema_ids = schema_ids
        self._status_lag_us = status_lag_us
        self._retention_us = retention_us
        self._objects: dict[Kind, _Objects] = {kind: _Objects() for kind in KINDS}
        self._expiry: list[tuple[int, Kind, str]] = []
        self.changes: dict[tuple[Kind, str], bytes | None] = {}
        self.complete_until_us: dict[Kind, int] = {}
        self.unencodable: Counter[Kind] = Counter()

    def restore(self, kind: Kind, record: Record) -> None:
        """Take over a record that an earlier watcher wrote; another cluster's is none of ours."""
        if record["cluster"] != self._cluster:
            return
        uid = record["uid"]
        self.forget(kind, uid)
        self._objects[kind].records[uid] = self._encoded(kind, record)
        if record["valid_to_us"] is None:
            self._objects[kind].there.add(uid)
        else:
            self._has_ended(kind, uid, record["valid_to_us"])

    def forget(self, kind: Kind, uid: str) -> None:
        """Take over a tombstone."""
        objects = self._objects[kind]
        objects.records.pop(uid, None)
        objects.there.discard(uid)
        objects.ended.pop(uid, None)

    def apply(self, observation: Observation) -> None:
        """Take in what the source observed next; the order is the source's."""
        match observation:
            case ListBegins(kind):
                self._objects[kind].listed = set()
            case Present(kind, objects, observed_us):
                for seen in objects:
                    self._present(kind, seen, observed_us)
            case Gone(kind, uid, observed_us):
                self._close(kind, [uid], observed_us)
            case ListEnds(kind, observed_us):
                listed = self._objects[kind].listed
                assert listed is not None
                self._close(kind, sorted(self._objects[kind].there - listed), observed_us)
                self._objects[kind].listed = None
            case Complete(kind, until_us):
                self.complete_until_us[kind] = max(until_us, self.complete_until_us.get(kind, 0))

    def expire(self, now_us: int) -> None:
        """Turn what ended longer ago than the retention into tombstones; costs the number of those."""
        while self._expiry and self._expiry[0][0] + self._retention_us < now_us:
            ended_us, kind, uid = heapq.heappop(self._expiry)
            if self._objects[kind].ended.get(uid) == ended_us:
                self.forget(kind, uid)
                self.changes[kind, uid] = None

    def present_count(self, kind: Kind) -> int:
        """Return how many objects of the kind are there now."""
        return len(self._objects[kind].there)

    def history_count(self, kind: Kind) -> int:
        """Return how many objects of the kind are gone but kept."""
        return len(self._objects[kind].ended)

    def _moment(self, kind: Kind, observed_us: int) -> intervals.Moment:
        known_us = self.complete_until_us.get(kind, 0)
        return intervals.Moment(observed_us, known_us, self._status_lag_us, self._retention_us)

    def _present(self, kind: Kind, seen: Seen, observed_us: int) -> None:
        objects, uid = self._objects[kind], seen.uid
        if objects.listed is not None:
            objects.listed.add(uid)
        previous = self._record(kind, uid)
        record = intervals.advance(previous, seen, self._moment(kind, observed_us))
        if intervals.differs(previous, record):
            try:
                self._write(kind, uid, record)
            except (
                TypeError,
                ValueError,
                AttributeError,
                OverflowError,
            ):  # what fastavro raises for wrong types
                self.unencodable[kind] += 1
                return
        objects.there.add(uid)
        objects.ended.pop(uid, None)

    def _close(self, kind: Kind, uids: Iterable[str], observed_us: int) -> None:
        moment = self._moment(kind, observed_us)
        for uid in uids:
            if uid not in self._objects[kind].there:
                continue
            self._objects[kind].there.remove(uid)
            previous = self._record(kind, uid)
            assert previous is not None
            record = intervals.close(kind, previous, moment)
            self._has_ended(kind, uid, record["valid_to_us"])
            if intervals.differs(previous, record):
                self._write(kind, uid, record)

    def _has_ended(self, kind: Kind, uid: str, ended_us: int) -> None:
        self._objects[kind].ended[uid] = ended_us
        heapq.heappush(self._expiry, (ended_us, kind, uid))

    def _record(self, kind: Kind, uid: str) -> Record | None:
        value = self._objects[kind].records.get(uid)
        return None if value is None else codec.decode(TOPICS[kind].schema, value)

    def _write(self, kind: Kind, uid: str, record: Record) -> None:
        value = self._encoded(kind, record)
        self._objects[kind].records[uid] = value
        self.changes[kind, uid] = value

    def _encoded(self, kind: Kind, record: Record) -> bytes:
        return codec.encode(TOPICS[kind].schema, record, self._schema_ids[kind])
