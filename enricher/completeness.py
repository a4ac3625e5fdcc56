"""Says per node and interval whether every event of it is delivered: CollectorReports joined with Coverage.

Owns the intervals that are not decided yet, what is known of each node's collector, and the rules. COMPLETE is said on
proof only and never withdrawn: the kernel lost nothing, every batch that may hold an event of the interval is
covered, and the events in these batches are as many as the collector read. Pure: records in, records out, times come
in. Called by `joiner`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from enricher import statements
from enricher.covered import Covered, Step
from enricher.expected import Expected
from enricher.intervals import (
    begins_well,
    by_number,
    counted_as_end,
    ends_well,
    inside,
    lost_files,
    make,
    process_of,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from enricher.covered import Sums
    from enricher.intervals import Interval, Losses, Place

GRACE_MS = 30_000
"""How long after its report an interval may be undecided before it is called PENDING."""
HOLD_MS = 6 * 3_600_000
"""How long an interval that is not complete, or a node that is silent, is followed."""
UNDECIDED_MAX = 100_000
"""How many intervals of all nodes are followed, 2 kB each; of more the oldest are given up."""
SILENT_INTERVALS = 3
SILENT_MS_MIN = 15_000


@dataclass(eq=False)
class Node:
    """What is known of a node that has reported.

    Attributes:
        last: its last report that ends an interval; place: where that is; before: where the one before is, from which
            a successor must begin to know just when the interval after `last` begins.
    """

    last: Mapping[str, Any]
    before: Place
    place: Place
    arrived_ms: int
    batches: Covered
    ended: bool = False
    spooled: int = 0
    lost_files: bool = False
    step: Step | None = None
    pending: list[Interval] = field(default_factory=list)
    newest: Interval | None = None
    books: int | None = None
    books_last: int | None = None
    silent_said_ms: int = 0


class Completeness:
    """The join, for one cluster."""

    def __init__(self, cluster: str, undecided_max: int = UNDECIDED_MAX) -> None:
        self._cluster = cluster
        self._undecided_max = undecided_max
        self._nodes: dict[str, Node] = {}
        self._covered: dict[str, dict[tuple[str, int], Covered]] = {}
        self._expected = Expected(cluster)
        self._out: list[dict[str, Any]] = []

    @property
    def undecided(self) -> int:
        """Intervals that are neither proven nor given up."""
        return sum(len(node.pending) for node in self._nodes.values())

    def cursor(self) -> Place | None:
        """Return the place of the oldest report that is still needed; None before the first.

        The last report of a node that Kubernetes has no more is not: nothing follows on it.
        """
        places = [
            place
            for name, node in self._nodes.items()
            for place in (
                *(() if name in self._expected.gone else (node.before,)),
                *(one.base for one in node.pending),
            )
        ]
        return min(places, default=None)

    def node(self, uid: str, record: Mapping[str, Any] | None) -> None:
        """Take a Node record of Kubernetes under its UID, None for a tombstone."""
        self._expected.node(uid, record)

    def coverage(self, record: Mapping[str, Any], at_ms: int) -> None:
        """Take a Coverage record that was appended at `at_ms`."""
        for one in record["ranges"]:
            if one["cluster"] == self._cluster:
                self._process(one, at_ms).add(one)
        for one in record["dead"]:
            if one["cluster"] == self._cluster:
                self._process(one, at_ms).add_dead(one["partition"], one["sequence"], one["reason"])

    def _process(self, one: Mapping[str, Any], at_ms: int) -> Covered:
        known = self._covered.setdefault(one["node"], {})
        covered = known.setdefault((one["boot_id"], one["producer_epoch"]), Covered())
        covered.touched_ms = max(covered.touched_ms, at_ms)
        return covered

    def report(self, record: Mapping[str, Any], place: Place) -> None:
        """Take a CollectorReport, with its place in the topic."""
        at_ms = place.append_ms
        if record["cluster"] != self._cluster:
            return
        node = self._nodes.get(record["node"])
        if not record["sequences"] or record["to_boot_us"] is None:
            if node is not None:
                node.arrived_ms = at_ms
            return  # of a collector that does not say enough to prove anything
        batches = self._process(record, at_ms)
        if node is None:
            is_first = record["sequence"] == 0
            last = record if is_first else counted_as_end(record)
            node = self._nodes[record["node"]] = Node(last, place, place, at_ms, batches)
            if is_first:
                node.books = 0
                self._add(node, None, place, record, at_ms)
        elif process_of(record) == process_of(node.last):
            self._next(node, record, place)
        elif (
            record["boot_id"] == node.last["boot_id"]
            and record["producer_epoch"] < node.last["producer_epoch"]
        ):
            return  # of a process that has a successor already
        elif record["to_boot_us"] > record["from_boot_us"]:
            self._successor(node, batches, record, place)
        else:
            node.arrived_ms = at_ms
            return  # it has not read what it took over yet, and leaves all to its next one
        node.arrived_ms, node.ended, node.spooled = at_ms, record["last"], record["spooled"]
        node.lost_files = lost_files(record)
        if node.step is not None:
            node.step.marker = by_number(record["marker"])
            node.step.unreadable = node.lost_files
        self._balance(node, record)

    def _next(self, node: Node, record: Mapping[str, Any], place: Place) -> None:
        """Take another report of the same process; one whose interval is empty leaves all to the next one."""
        if record["to_boot_us"] > node.last["to_boot_us"]:
            self._add(node, node.last, node.before, record, place.append_ms)
            node.last, node.before, node.place = record, node.place, place

    def _successor(self, node: Node, batches: Covered, record: Mapping[str, Any], place: Place) -> None:
        """Take the first report of a process that follows on another one."""
        before = node.last
        same_boot = record["boot_id"] == before["boot_id"]
        same_probes = same_boot and record["probes"] == before["probes"] != ""
        epochs = (before["producer_epoch"], record["producer_epoch"])
        processes = self._covered[record["node"]]

        def between() -> list[Covered]:
            return [
                covered
                for (boot_id, epoch), covered in processes.items()
                if boot_id == record["boot_id"] and epochs[0] < epoch < epochs[1]
            ]

        step = Step(node.batches, by_number(before["sequences"]), between, batches, same_probes, node.ended)
        if node.step is not None:
            node.step.following = step
        if not same_probes:
            unwatched = statements.of_unwatched(
                self._cluster, before, record, place.append_ms, killed=not node.ended
            )
            self._out.append(unwatched)
            node.books, node.books_last = 0, None
        base = before if same_probes else None
        interval = self._add(node, base, node.before, record, place.append_ms)
        interval.begins = step if same_probes else None
        for one in node.pending:
            if one is not interval and one.ends is None:
                one.ends, one.succeeded_by = step, interval
        node.last, node.before, node.place = record, node.place, place
        node.batches, node.step = batches, step

    def _add(
        self,
        node: Node,
        base: Mapping[str, Any] | None,
        base_place: Place,
        record: Mapping[str, Any],
        at_ms: int,
    ) -> Interval:
        """Add the interval that `record` ends; counted from `base`, or from nothing where that is None."""
        interval = make(record, base, base_place, self._process(record, at_ms), at_ms)
        node.pending.append(interval)
        node.newest = interval
        return interval

    def _balance(self, node: Node, record: Mapping[str, Any]) -> None:
        """Look whether attempted, lost and received agree; a difference counts when two reports show the same.

        One that is gone with the next report was an event under way. After a restart of ours (books None) a difference
        that stays is an old one.
        """
        newest = node.newest
        if newest is None or node.last is not record:
            return
        difference = record["unaccounted"]
        if difference == (node.books or 0):
            node.books = difference
            self._close_books(node, record, 0)
        elif difference == node.books_last:
            newest.books_open = True
            self._close_books(node, record, 0 if node.books is None else difference - node.books)
            node.books = difference
        else:
            newest.books_open = True
        node.books_last = difference

    @staticmethod
    def _close_books(node: Node, record: Mapping[str, Any], difference: int) -> None:
        """Settle all intervals that waited for the books, with what they miss."""
        for one in node.pending:
            if one.books_open and one.report["probes"] == record["probes"]:
                one.books_open = False
                if difference:
                    one.losses["MISCOUNT"] = abs(difference)

    def tick(self, now_ms: int) -> list[dict[str, Any]]:
        """Decide what can be decided at `now_ms` and return the Completeness records to publish."""
        arrivals = sorted(one.arrived_ms for node in self._nodes.values() for one in node.pending)
        too_many = arrivals[: -self._undecided_max]
        held_from_ms = max([now_ms - HOLD_MS, *too_many[-1:]])
        for name, node in list(self._nodes.items()):
            self._judge_all(node, now_ms, max(held_from_ms, now_ms - GRACE_MS))
            node.pending = [one for one in node.pending if not one.decided and one.arrived_ms > held_from_ms]
            self._forget(node)
            if name not in self._expected.gone:
                self._listen(name, node, now_ms)
            if now_ms - node.arrived_ms > HOLD_MS:
                del self._nodes[name]
        for name, valid_from_us in self._expected.mute(self._nodes, now_ms):
            since_us = max(valid_from_us, (now_ms - HOLD_MS) * 1000)
            self._out.append(statements.of_silence(self._cluster, name, None, since_us, now_ms))
        for name, processes in list(self._covered.items()):
            for key in [key for key, one in processes.items() if now_ms - one.touched_ms > HOLD_MS]:
                del processes[key]
            if not processes:
                del self._covered[name]
        out, self._out = sorted(self._out, key=lambda record: record["from_unix_us"]), []
        return out

    def _judge_all(self, node: Node, now_ms: int, late_until_ms: int) -> None:
        """Judge a node's intervals; those that arrived up to then are late.

        Batches of an interval reach into the next ones (see `counted_as_end`). So none is called COMPLETE before
        something was said of those that reach into it: a reader must see both.
        """
        reach_us = 0
        for one in node.pending:
            late = one.arrived_ms <= late_until_ms
            self._judge(node, one, now_ms, late=late, reached=reach_us > one.from_us)
            if one.said is None and one.succeeded_by is None:
                reach_us = max(reach_us, one.report["counted_unix_us"])
        for one in node.pending:
            if one.said is None and one.succeeded_by is not None and one.succeeded_by.decided:
                self._judge(node, one, now_ms, late=True, reached=False)

    def _judge(self, node: Node, interval: Interval, now_ms: int, *, late: bool, reached: bool) -> None:
        losses = dict(interval.losses)
        sums, decided = None, False
        if interval.all_batches_covered():
            sums = interval.batches.sums(interval.slices)
            if sums.events != interval.received:
                losses["MISCOUNT"] = abs(sums.events - interval.received)
            decided = begins_well(interval, losses)
        elif interval.ends is not None and interval.ends.proven():
            decided = ends_well(interval, losses)
        elif late and any(inside(key, interval.slices) for key in interval.batches.dead):
            losses["DEAD_LETTER"] = None
        elif late and node.lost_files:
            losses["SPOOL_UNREADABLE"] = None
        open_books = decided and interval.books_open and not losses
        if decided and not losses and reached and not late:
            return
        if decided and not open_books:
            interval.decided = True
            interval.covered = losses == interval.losses
        if interval.decided or losses or late:
            reason = "BOOKS_OPEN" if open_books else "SPOOLED" if node.spooled else "NOT_COVERED"
            pending = None if interval.decided or losses else reason
            self._say(interval, losses, pending, sums if interval.decided else None, now_ms)

    def _say(
        self, interval: Interval, losses: Losses, pending: str | None, sums: Sums | None, now_ms: int
    ) -> None:
        """Publish what is known of an interval, unless just that was said last."""
        said = (dict(losses), pending, sums, interval.decided)
        if interval.said != said:
            interval.said = said
            self._out.append(statements.of_interval(self._cluster, interval, losses, pending, sums, now_ms))

    def _listen(self, name: str, node: Node, now_ms: int) -> None:
        """Say of a node that it is silent, again and again, while it is."""
        last = node.last
        interval_ms = (last["to_boot_us"] - last["from_boot_us"]) // 1000
        patience_ms = max(SILENT_MS_MIN, SILENT_INTERVALS * interval_ms)
        if now_ms - max(node.arrived_ms, node.silent_said_ms) > patience_ms:
            node.silent_said_ms = now_ms
            self._out.append(statements.of_silence(self._cluster, name, last, last["to_unix_us"], now_ms))

    @staticmethod
    def _forget(node: Node) -> None:
        """Forget the batches that no interval of the present process, and no unproven step, asks for any more."""
        floor = by_number(node.last["sequences"])
        if node.step is not None and not node.step.proven():
            floor = {
                partition: min(floor[partition], node.step.marker.get(partition, 0)) for partition in floor
            }
        for one in node.pending:
            if one.batches is node.batches:
                floor = {partition: min(floor[partition], one.slices[partition].start) for partition in floor}
        node.batches.forget_below(floor)
