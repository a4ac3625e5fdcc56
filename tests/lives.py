"""The lives of an enricher's engine over one log: delivered, killed, started again, with times and deliveries by hand.

Stands in for Kafka in unit and property tests of what must hold across a kill: what was delivered stays, what a
dead worker had in its hands is gone or still arrives, its acknowledged input is not read again.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from enricher import corrections
from enricher.engine import Engine, Limits, RawMessage
from enricher.flow import FlowBuilder
from enricher.history import History
from enricher.metadata import Change
from enricher.networks import Networks
from enricher.output import Output
from enricher.resolve import Resolver
from podwire.demo.totals import identity
from schemas import catalog, codec
from schemas.registry import CatalogIds
from tests import halves

if TYPE_CHECKING:
    from collections.abc import Iterator

NOW_MS = halves.NOW_US // 1000
WINDOW_MS = 5000
WAIT_MS = 1000
CORRECTION_MS = 60_000
GROUP = "lives"


class Sent(NamedTuple):
    """A message on its way or delivered."""

    topic: str
    partition: int
    key: bytes
    value: bytes | None
    on_delivery: Any


@dataclass
class Log:
    """What Kafka keeps: input with its committed offset, metadata, and what was delivered.

    Attributes:
        inputs: messages of partition 0 of the raw topic.
        committed: offset of the first that is not acknowledged.
    """

    inputs: list[bytes] = field(default_factory=list)
    committed: int = 0
    metadata: list[Change] = field(default_factory=list)
    delivered: list[Sent] = field(default_factory=list)

    def flows(self) -> list[dict[str, Any]]:
        """Return the flows delivered, in order."""
        return [
            codec.decode("Flow", sent.value or b"")
            for sent in self.delivered
            if sent.topic == catalog.FLOWS.name
        ]

    def live(self, partition: int = 0) -> dict[bytes, bytes]:
        """Return the changelog's live entries."""
        last = {
            sent.key: sent.value
            for sent in self.delivered
            if sent.topic == catalog.CORRECTIONS.name and sent.partition == partition
        }
        return {key: value for key, value in last.items() if value is not None}


class Life:
    """One worker, from its start on what the log has to its death (nobody calls it any more)."""

    def __init__(
        self, log: Log, now_ms: int = NOW_MS, *, pending_max: int = 100, correction_ms: int = CORRECTION_MS
    ) -> None:
        self.log = log
        self.now_ms = now_ms
        self.on_the_way: deque[Sent] = deque()
        history, networks = History(), Networks({})
        builder = FlowBuilder(
            halves.CLUSTER, catalog.FLOWS.schema_id, history, networks, Resolver(history, networks)
        )
        limits = Limits(WINDOW_MS, 500, WAIT_MS, 100, GROUP, corrections.Limits(correction_ms, pending_max))
        self.engine = Engine(limits, CatalogIds(), history, builder, Output(self))
        self.engine.tick(list(log.metadata), now_ms)
        self.partition = self.engine.assign(0, log.committed)
        self._next = log.committed
        self.engine.warm(self.partition, [(NOW_MS, value) for value in log.inputs[: log.committed]])
        found, unreadable = self.engine.corrections.unpack(log.live())
        assert unreadable == 0
        self.engine.corrections.restore(self.partition, found, now_ms)

    def produce(
        self,
        topic: str,
        value: bytes | None,
        key: bytes,
        partition: int = -1,
        *,
        timestamp: int,
        on_delivery: Any,
    ) -> None:
        """Put one message on its way."""
        self.on_the_way.append(Sent(topic, partition, key, value, on_delivery))

    def poll(self, timeout: float) -> int:
        """Report nothing by itself."""
        return 0

    def take(self, *events: dict[str, Any]) -> None:
        """Append one batch of these events to the input and take it."""
        self.log.inputs.append(halves.batch(list(events), sequence=len(self.log.inputs)))
        self.take_next()

    def take_next(self) -> bool:
        """Take the next message of the input, if there is one."""
        if self._next >= len(self.log.inputs):
            return False
        offset = self._next
        self._next += 1
        message = RawMessage(offset, NOW_MS, None, self.log.inputs[offset])
        self.engine.take(self.partition, message, lambda: self._commit(offset + 1), self.now_ms)
        return True

    def _commit(self, offset: int) -> None:
        self.log.committed = offset

    def publish(self, *changes: Change) -> None:
        """Publish metadata and let the engine take it."""
        self.log.metadata += changes
        self.engine.tick(list(changes), self.now_ms)

    def later(self, ms: int = 0) -> None:
        """Let time pass and the engine look around."""
        self.now_ms += ms
        self.engine.tick([], self.now_ms)

    def deliver(self, topic: catalog.Topic | None = None) -> bool:
        """Deliver the oldest message on its way (to a topic), if there is one."""
        for sent in self.on_the_way:
            if topic is None or sent.topic == topic.name:
                self.on_the_way.remove(sent)
                self.log.delivered.append(sent)
                sent.on_delivery(None, None)
                return True
        return False

    def settle(self) -> None:
        """Deliver everything, and what follows from it."""
        while self.deliver():
            self.later()


def pod(number: int, address: str | None = None) -> Change:
    """Return the change that publishes pod `number`."""
    record = halves.pod_record(number, address)
    return Change("pods", record["uid"], record)


def node() -> Change:
    """Return the change that publishes node-1."""
    return Change("nodes", "node-1-uid", halves.node_record())


def watermark(until_us: int = halves.NOW_US + 1_000_000) -> Change:
    """Return the change that says the pods topic is complete up to a time."""
    return Change("pods", "", None, until_us)


def counting(flows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield what a reader counts who drops repeats (the first one stays) and takes the highest revision."""
    firsts: dict[tuple[Any, ...], dict[str, Any]] = {}
    for flow in flows:
        firsts.setdefault(identity(flow), flow)
    highest: dict[tuple[Any, ...], dict[str, Any]] = {}
    for flow in firsts.values():
        key = identity(flow)[:4]
        if key not in highest or flow["revision"] > highest[key]["revision"]:
            highest[key] = flow
    yield from highest.values()
