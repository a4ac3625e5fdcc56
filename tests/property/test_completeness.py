"""Whatever is killed, lost, spooled, skipped or taken over: COMPLETE is said of what is complete only, and then surely.

A model of nodes, Kafka and workers makes the reports and the coverage; it knows where each event has gone.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from enricher.completeness import GRACE_MS, Completeness
from enricher.intervals import Place
from enricher.statements import key_of
from podwire.audit import EXIT_COMPLETE, in_words, judge

PARTITIONS = 2
RING_EVENTS = 5
UNIX_US = 1_790_000_000_000_000
TICK_US = 1000
OPS = (
    "run",
    "run",
    "run",
    "event",
    "event",
    "read",
    "deliver",
    "spool",
    "report",
    "work",
    "cover",
    "kill",
    "stop",
    "load",
    "worker_kill",
    "tick",
    "take_over",
    "burn",
    "skip",
    "starve",
)
GENTLE = tuple(op for op in OPS if op not in ("burn", "skip"))


@dataclass(eq=False)
class Batch:
    """A message on its way to the raw topic, or in it."""

    node: str
    boot: str
    epoch: int
    partition: int
    sequence: int
    events: list[tuple[int, int]]  # (time, number)
    safe: bool = False


@dataclass(eq=False)
class Collector:
    """A node: its kernel with ring and counters, the process that reads it, and its disk."""

    name: str
    boot: str = "boot-1"
    life: int = 0
    ring: list[tuple[int, int]] = field(default_factory=list)
    read: int = 0  # of the ring's events, those read and not released
    attempted: int = 0
    lost: int = 0
    lives: int = 0
    spool: list[list[Batch]] = field(default_factory=list)

    def start(self, now_us: int, *, probes_live: bool) -> None:
        """Start a process, with new probes or with those that live."""
        if not probes_live:
            self.lives += 1
            self.ring, self.attempted, self.lost = [], 0, 0
        self.read = 0
        self.epoch = UNIX_US + now_us
        self.next = dict.fromkeys(range(PARTITIONS), 0)
        self.flushes: list[list[Batch]] = []  # not released, in the ring's order
        self.earlier, self.spool = self.spool, []
        self.marker: dict[int, int] = {}
        self.reports = self.received = self.unreadable = 0
        self.from_us = self.until_us = now_us

    def batch(self, partition: int, events: list[tuple[int, int]]) -> Batch:
        """Return the next batch."""
        made = Batch(self.name, self.boot, self.epoch, partition, self.next[partition], events)
        self.next[partition] += 1
        return made


class World:
    """Nodes, the raw topic, one worker's progress per partition, the topics that the joiner reads, and the joiner."""

    def __init__(self) -> None:
        self.now_us = 1_000_000
        self.numbers = 0
        self.raw: list[list[Batch]] = [[] for _ in range(PARTITIONS)]
        self.taken = [0] * PARTITIONS  # processed by the worker
        self.acked = [0] * PARTITIONS
        self.skipped: set[Batch] = set()
        self.blind: set[tuple[str, int]] = set()  # processes that were killed with probes that live on
        self.topic: list[tuple[str, int, dict[str, Any]]] = []  # reports and coverage in the order of arrival
        self.happened: dict[str, list[tuple[int, int]]] = defaultdict(list)
        self.delivered: set[int] = set()
        self.said: list[dict[str, Any]] = []
        self.joiner, self.fed = Completeness("c"), 0
        self.nodes = [Collector("node-0"), Collector("node-1")]
        for node in self.nodes:
            node.start(self.now_us, probes_live=False)

    def do(self, op: str, which: int, amount: int) -> None:
        """Do one step of node or partition `which`."""
        self.now_us += TICK_US
        node, partition = self.nodes[which % len(self.nodes)], which % PARTITIONS
        if op == "run":  # as on an ordinary day
            for part, much in (("event", amount), ("read", 9), ("deliver", 9), ("report", 0), ("tick", 0)):
                self.do(part, which, much)
            for part in ("work", "cover"):
                for number in range(PARTITIONS):
                    self.do(part, number, 9)
            return
        if op in ("work", "cover", "skip"):
            getattr(self, op)(partition, amount)
        elif op in ("worker_kill", "tick", "take_over"):
            getattr(self, op)()
        else:
            getattr(self, op)(node, amount)

    # ---- the node ----

    def event(self, node: Collector, amount: int) -> None:
        """Let connections happen."""
        for _ in range(amount):
            self.now_us += 1
            self.numbers += 1
            node.attempted += 1
            self.happened[node.name].append((self.now_us, self.numbers))
            if len(node.ring) < RING_EVENTS:
                node.ring.append((self.now_us, self.numbers))
            else:
                node.lost += 1

    def read(self, node: Collector, amount: int) -> None:
        """Read the ring to its end, or the first `amount` of it, and number the batches."""
        if not node.marker and not node.earlier:
            node.marker = dict(node.next)
            node.flushes.append([node.batch(partition, []) for partition in range(PARTITIONS)])
        events = node.ring[node.read : node.read + amount]
        if node.read + amount >= len(node.ring):
            node.until_us = self.now_us
        node.read += len(events)
        node.received += len(events)
        parts = [
            [one for one in events if one[1] % PARTITIONS == partition] for partition in range(PARTITIONS)
        ]
        if events:
            node.flushes.append([node.batch(p, part) for p, part in enumerate(parts) if part])

    def deliver(self, node: Collector, amount: int) -> None:
        """Let Kafka take and acknowledge the next messages, those of earlier processes first."""
        for _ in range(amount):
            queue = node.earlier or node.spool or node.flushes
            waiting = [batch for flush in queue for batch in flush if not batch.safe]
            if not waiting:
                return
            batch = waiting[0]
            batch.safe = True
            self.raw[batch.partition].append(batch)
            node.earlier = [flush for flush in node.earlier if not all(one.safe for one in flush)]
            node.spool = [flush for flush in node.spool if not all(one.safe for one in flush)]
            self.release(node)

    def release(self, node: Collector) -> None:
        """Give ring space back."""
        spooled = [id(one) for flush in node.spool for one in flush]
        while node.flushes and all(one.safe or id(one) in spooled for one in node.flushes[0]):
            count = sum(len(one.events) for one in node.flushes.pop(0))
            del node.ring[:count]
            node.read -= count

    def spool(self, node: Collector, _: int) -> None:
        """Put the oldest flush that Kafka has not acknowledged on the disk."""
        if node.flushes:
            node.spool.append(node.flushes[0])
            self.release(node)

    def burn(self, node: Collector, _: int) -> None:
        """Make a file of the spool unreadable."""
        for files in (node.earlier, node.spool):
            if files:
                files.pop(0)
                node.unreadable += 1
                return

    def report(self, node: Collector, amount: int, *, last: bool = False) -> None:
        """Send a report."""
        text = {str(partition): number for partition, number in node.next.items()}
        record = {
            "cluster": "c",
            "node": node.name,
            "boot_id": node.boot,
            "producer_epoch": node.epoch,
            "sequence": node.reports,
            "from_unix_us": UNIX_US + node.from_us,
            "to_unix_us": UNIX_US + node.until_us,
            "from_boot_us": node.from_us,
            "to_boot_us": node.until_us,
            "counted_unix_us": UNIX_US + self.now_us,
            "tier": "fentry",
            "attempted": node.attempted,
            "received": node.received,
            "published": 0,
            "spooled": len(node.spool) + len(node.earlier),
            "lost": {"ring_full": node.lost, "name_ring_full": 3 * node.lost},
            "untracked": 0,
            "skipped_runs": 0,
            "clock_error_us": 1,
            "batches": {},
            "last": last,
            "sequences": text,
            "marker": {str(partition): number for partition, number in node.marker.items()},
            "probes": str(node.lives),
            "unaccounted": 0,
            "unreadable": 0,
            "unreadable_files": node.unreadable,
        }
        node.reports += 1
        node.from_us = node.until_us
        self.topic.append(("report", self.now_ms(), record))

    def kill(self, node: Collector, amount: int, *, in_order: bool = False) -> None:
        """Kill the collector; the next one finds its probes, or not, and in any case its disk."""
        node.spool = node.earlier + node.spool
        probes_live = amount % 2 == 0
        if probes_live and not in_order:
            self.blind.add((node.name, node.epoch))
            for batch in [one for one in self.skipped if self.is_unseen(one)]:
                self.skipped.discard(batch)
                self.delivered |= {number for _, number in batch.events}
        node.start(self.now_us, probes_live=probes_live)

    def load(self, node: Collector, _: int) -> None:
        """Reboot the node; its disk survives."""
        node.boot += "+"
        self.kill(node, 1)

    def stop(self, node: Collector, amount: int) -> None:
        """End the collector in order: everything is delivered, then a last report."""
        self.read(node, RING_EVENTS)
        self.deliver(node, 1000)
        self.report(node, 0, last=True)
        self.kill(node, amount, in_order=True)

    def starve(self, node: Collector, _: int) -> None:
        """Let a process take over that is killed before its first report."""
        self.kill(node, 0)
        self.read(node, 3)
        self.deliver(node, 2)
        self.now_us += TICK_US
        self.kill(node, 0)

    # ---- the workers ----

    def work(self, partition: int, amount: int) -> None:
        """Let the worker process messages: their flows are delivered."""
        for batch in self.raw[partition][self.taken[partition] :][:amount]:
            self.taken[partition] += 1
            if batch not in self.skipped:
                self.delivered |= {number for _, number in batch.events}

    def cover(self, partition: int, _: int) -> None:
        """Publish what was covered and acknowledge it."""
        ranges = [
            {
                "cluster": "c",
                "node": one.node,
                "boot_id": one.boot,
                "producer_epoch": one.epoch,
                "partition": partition,
                "first_sequence": one.sequence,
                "events": [len(one.events)],
                "repeats": [0],
            }
            for one in self.raw[partition][self.acked[partition] : self.taken[partition]]
            if one not in self.skipped
        ]
        self.topic.append(("coverage", self.now_ms(), {"ranges": ranges, "dead": []}))
        self.acked[partition] = self.taken[partition]

    def worker_kill(self) -> None:
        """Kill the worker: what it did not acknowledge is processed again."""
        self.taken = list(self.acked)

    def skip(self, partition: int, _: int) -> None:
        """Lose the next message between Kafka and the flows, as a defect would."""
        left = self.raw[partition][self.taken[partition] :]
        if left and not self.numbers_elsewhere(left[0]) and not self.is_unseen(left[0]):
            self.skipped.add(left[0])

    def is_unseen(self, batch: Batch) -> bool:
        """Return whether nobody could notice that a batch was skipped, a known limit.

        It is the last that a killed process with pinned probes sent to its partition: as if it was never sent, then
        the next process would have sent its events again.
        """
        return (batch.node, batch.epoch) in self.blind and all(
            one.sequence <= batch.sequence
            for one in self.raw[batch.partition]
            if (one.node, one.epoch) == (batch.node, batch.epoch)
        )

    def numbers_elsewhere(self, batch: Batch) -> bool:
        """Return whether a batch is in the topic twice."""
        return any(
            one is not batch
            and one.sequence == batch.sequence
            and one.epoch == batch.epoch
            and one.node == batch.node
            for one in self.raw[batch.partition]
        )

    # ---- the joiner ----

    def now_ms(self) -> int:
        """Return Unix time in ms."""
        return (UNIX_US + self.now_us) // 1000

    def tick(self, later_ms: int = 0) -> None:
        """Let the joiner read all there is and say what it knows; nobody may take that for proof of what is not."""
        for offset in range(self.fed, len(self.topic)):
            kind, at_ms, record = self.topic[offset]
            if kind == "report":
                self.joiner.report(record, Place(offset, at_ms))
            else:
                self.joiner.coverage(record, at_ms)
        self.fed = len(self.topic)
        self.said += self.joiner.tick(self.now_ms() + later_ms)
        for node in self.nodes:
            missing = [one for one in self.happened[node.name] if one[1] not in self.delivered]
            for at, _ in missing[:10] + missing[-10:]:
                answer = judge(self.said, UNIX_US + at - 1, UNIX_US + at, (node.name,))
                assert answer.exit_code != EXIT_COMPLETE, (at, in_words(answer))

    def take_over(self) -> None:
        """Let another joiner begin where this one has to be gone on from."""
        kept = self.joiner.cursor()
        cursor = kept.offset if kept else 0
        self.joiner, self.fed = Completeness("c"), cursor
        if (
            self.topic and self.topic[cursor][2].get("sequence") == 0
        ):  # of a process's first batches, from before it
            for kind, at_ms, record in self.topic[:cursor]:
                if kind == "coverage":
                    self.joiner.coverage(record, at_ms)

    def finish(self) -> None:
        """Let everything that is under way arrive."""
        for node in self.nodes:
            for _ in range(3):
                self.now_us += TICK_US
                self.read(node, RING_EVENTS)
                self.deliver(node, 1000)
            self.now_us += TICK_US
            self.report(node, 0)
        for partition in range(PARTITIONS):
            self.work(partition, 1000)
            self.cover(partition, 0)
        for _ in range(3):
            self.tick()
        self.tick(GRACE_MS + 1)


STEPS = st.tuples(st.integers(0, 3), st.integers(1, 4))


def play(steps: list[tuple[str, tuple[int, int]]]) -> World:
    """Return the world after these steps, everything arrived."""
    world = World()
    for op, (which, amount) in steps:
        world.do(op, which, amount)
    world.finish()
    return world


UNREPORTED = [
    ("run", (0, 1)),
    ("event", (0, 4)),
    ("read", (0, 4)),
    ("deliver", (0, 4)),
    ("skip", (0, 1)),
    ("event", (0, 4)),
    ("read", (0, 4)),
    ("deliver", (0, 4)),
    ("kill", (0, 2)),
]
"""A batch that no report names is skipped, and the collector killed."""
REPORTED = [*UNREPORTED[:3], ("report", (0, 1)), *UNREPORTED[3:]]
"""A batch that a report names is skipped, and the collector killed."""


READ_AHEAD = [
    ("read", (0, 4)),
    ("event", (0, 2)),
    ("read", (0, 1)),
    ("report", (0, 1)),
    ("deliver", (0, 4)),
    ("work", (1, 1)),
    ("skip", (1, 1)),
]
"""An event that was read ahead is skipped: its batch is the first interval's, its time the second's."""


UNREAD = [("run", (0, 1)), ("event", (0, 1)), ("kill", (0, 2)), ("report", (0, 1)), ("kill", (0, 1))]
"""A process that takes over the ring reports before it has read it, and is killed with the ring."""


@example(UNREPORTED)
@example(REPORTED)
@example(READ_AHEAD)
@example(UNREAD)
@example([("run", (0, 1)), ("run", (0, 1)), ("event", (0, 1)), ("stop", (0, 2)), ("skip", (1, 1))])
@given(st.lists(st.tuples(st.sampled_from(OPS), STEPS), max_size=40))
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_audit_never_says_complete_of_a_time_of_which_something_is_missing(
    steps: list[tuple[str, tuple[int, int]]],
) -> None:
    """No order of kills, losses, spooling, burnt files, skipped messages and take-overs makes a false COMPLETE."""
    play(steps)


@given(st.lists(st.tuples(st.sampled_from(GENTLE), STEPS), max_size=40))
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_interval_is_called_complete_once_it_is(steps: list[tuple[str, tuple[int, int]]]) -> None:
    """When everything has arrived, an interval that is not COMPLETE has a reason that really happened."""
    world = play(steps)
    last: dict[str, dict[str, Any]] = {}
    for record in world.said:
        if record["outcome"] != "SILENT" and last.get(key_of(record), {}).get("outcome") != "COMPLETE":
            last[key_of(record)] = record
    for record in last.values():
        assert record["outcome"] in ("COMPLETE", "GAP"), record
        if record["outcome"] == "GAP":
            assert record["reason"] in ("RING_FULL", "COLLECTOR_KILLED", "NOT_WATCHED"), record
