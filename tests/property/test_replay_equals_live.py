"""A replay gives the records of the first time: whatever order, restarts, quiet spells and late metadata there were.

The first time may have been corrected: where metadata came after a record went out, the corrected one counts.
"""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from enricher import corrections, metadata
from enricher.engine import COVERAGE_INTERVAL_MS, Engine, Limits, RawMessage
from enricher.flow import FlowBuilder, Moment
from enricher.history import History
from enricher.metadata import Change
from enricher.networks import Networks
from enricher.output import Output
from enricher.replay import Counts, PartitionReplay, Span
from enricher.resolve import Resolver
from schemas import catalog, codec
from schemas.registry import CatalogIds
from tests import halves
from tests.delivering import Delivering

WINDOW_MS = 1000
START_MS = halves.NOW_US // 1000
FOREVER_MS = 10**9
GROUP = "live"
OF_THE_MOMENT = ("emitted_at", "revision", "metadata_age_ms")
IDS = CatalogIds()
Message = tuple[int, list[dict[str, Any]]]
"""Append time in ms after the start, events."""
Record = tuple[str, str, str, int]

CHANGES = [
    *(Change("pods", record["uid"], record) for record in (halves.pod_record(1), halves.pod_record(2))),
    *(Change("pods", record["uid"], record) for record in (halves.pod_record(3, "10.0.0.3"),)),
    *(Change("pods", record["uid"], record) for record in (halves.pod_record(4, "10.0.0.4"),)),
]
KNOWN = [
    Change("services", "service-1", halves.service_record()),
    Change("nodes", "node-1-uid", halves.node_record()),
]
ALL_KNOWN = Change("pods", "", None, halves.NOW_US + 3_600_000_000)


def half(number: int, type_: str, role: str, at_ms: int, pod: int) -> dict[str, Any]:
    """Return a half of connection `number`; `pod` 0 is a process outside pods."""
    if type_ == "PROGRESS":
        changes: dict[str, Any] = {"progress_seq": 1 + at_ms % 3}
    elif type_ == "CONNECT_FAILED":
        return halves.failed(halves.key(number), event_unix_us=halves.NOW_US + at_ms * 1000)
    else:
        changes = {}
    if pod == 0:
        changes |= {
            "pod_uid": bytes(16),
            "container_id": bytes(32),
            "local_address": halves.ip("192.168.7.1"),
        }
    elif pod > 2:  # known by its address alone
        changes |= {"pod_uid": bytes(16), "container_id": bytes(32), "owner_source": "UNKNOWN"}
        changes |= {"local_address": halves.ip(f"10.0.0.{pod}")}
    return halves.event(
        type_, role, halves.key(number), event_unix_us=halves.NOW_US + at_ms * 1000, **changes
    )


@st.composite
def logs(draw: st.DrawFn) -> list[Message]:
    """Draw a partition: halves in any order and distance, some twice within a window, and a last message far behind."""
    arrivals: list[tuple[int, dict[str, Any]]] = []
    for number in range(draw(st.integers(1, 6))):
        at_ms = draw(st.integers(0, 8 * WINDOW_MS))
        for type_, role in draw(
            st.lists(
                st.sampled_from(
                    [
                        ("CONNECT", "CLIENT"),
                        ("ACCEPT", "SERVER"),
                        ("CLOSE", "CLIENT"),
                        ("CLOSE", "SERVER"),
                        ("CONNECT_FAILED", "CLIENT"),
                        ("PROGRESS", "SERVER"),
                    ]
                ),
                min_size=1,
                max_size=5,
                unique=True,
            )
        ):
            happened_ms = at_ms + draw(st.integers(0, WINDOW_MS))
            one = half(number, type_, role, happened_ms, draw(st.integers(0, 4)))
            come_ms = happened_ms + draw(st.integers(0, 2 * WINDOW_MS))
            arrivals.append((come_ms, one))
            if draw(st.booleans()):
                arrivals.append((come_ms + draw(st.integers(0, WINDOW_MS)), one))
    messages: list[Message] = []
    for come_ms, one in sorted(arrivals, key=lambda arrival: arrival[0]):
        if messages and draw(st.booleans()) and come_ms - messages[-1][0] < WINDOW_MS:
            messages[-1] = (come_ms, [*messages[-1][1], one])  # nothing comes before it happened
        else:
            messages.append((come_ms, [one]))
    return [*messages, (100 * WINDOW_MS, [])]


class FakeProducer(Delivering):
    """Keeps what a reader of Kafka would have.

    Attributes:
        values: the flows.
        changelog: the live entries of the corrections topic.
    """

    def __init__(self) -> None:
        super().__init__()
        self.values: list[bytes] = []
        self.changelog: dict[bytes, bytes] = {}

    def took(self, topic: str, key: bytes, value: bytes | None) -> None:
        """Keep one record."""
        if topic == catalog.CORRECTIONS.name and value is None:
            self.changelog.pop(key, None)
        elif topic == catalog.CORRECTIONS.name:
            self.changelog[key] = value or b""
        elif topic == catalog.FLOWS.name:
            self.values.append(value or b"")
        else:
            assert topic == catalog.COVERAGE.name


def builder(history: History) -> FlowBuilder:
    """Return a builder that asks this history."""
    networks = Networks({"lab": ("192.168.0.0/16",)})
    return FlowBuilder(
        halves.CLUSTER, catalog.FLOWS.schema_id, history, networks, Resolver(history, networks)
    )


class Live:
    """Workers one after the other over one partition; each begins at what the one before committed.

    A record waits for metadata `wait_ms`: for ever, or not at all, and then it is corrected.
    """

    def __init__(self, messages: list[Message], wait_ms: int) -> None:
        self.messages = messages
        self.wait_ms = wait_ms
        self.producer = FakeProducer()
        self.committed = 0
        self.known: list[Change] = list(KNOWN)
        self.now_ms = START_MS
        self.start()

    def start(self) -> None:
        """Begin anew, as after kill -9: with the metadata so far, and waiting halves from two windows back."""
        history = History()
        metadata.apply(history, self.known)
        self.producer.forget()
        limits = Limits(
            WINDOW_MS, 0, self.wait_ms, FOREVER_MS, GROUP, corrections.Limits(FOREVER_MS, FOREVER_MS)
        )
        self.engine = Engine(limits, IDS, history, builder(history), Output(self.producer))
        self.partition = self.engine.assign(0, self.committed)
        if self.committed:
            since_ms = self.messages[self.committed - 1][0] - self.engine.warm_up_ms
            before = [message for message in self.messages[: self.committed] if message[0] >= since_ms]
            batches = [(START_MS + at, halves.batch(events)) for at, events in before]
            self.engine.warm(self.partition, batches, acknowledged=True)
        found, unreadable = self.engine.corrections.unpack(self.producer.changelog)
        assert unreadable == 0
        self.engine.corrections.restore(self.partition, found, self.now_ms)
        self.position = self.committed

    def take(self) -> None:
        """Process the next message."""
        at_ms, events = self.messages[self.position]
        offset = self.position
        self.position += 1

        def ack() -> None:
            self.committed = max(self.committed, offset + 1)

        message = RawMessage(offset, START_MS + at_ms, None, halves.batch(events))
        self.engine.take(self.partition, message, ack, START_MS + at_ms)

    def learn(self, changes: list[Change]) -> None:
        """Take metadata, and let the engine send and acknowledge."""
        self.known += changes
        for _ in range(3):  # flows, then what they cover, then the acknowledgement
            self.now_ms += max(corrections.ROUND_INTERVAL_MS, COVERAGE_INTERVAL_MS)
            self.engine.tick(changes, self.now_ms)
            changes = []

    def settle(self) -> None:
        """Let the time for corrections pass: what can be corrected is, at its end at the latest."""
        self.now_ms += 2 * FOREVER_MS
        self.learn([])
        assert (self.engine.corrections.pending, self.producer.changelog) == (0, {})


def lived(messages: list[Message], data: st.DataObject) -> list[bytes]:
    """Return what live workers send for this log, with drawn restarts, quiet spells and metadata."""
    live = Live(messages, data.draw(st.sampled_from([0, FOREVER_MS])))
    to_come = data.draw(st.permutations(CHANGES))
    while live.position < len(messages):
        live.take()
        step = data.draw(st.sampled_from(["go on", "restart", "idle", "metadata", "tick"]))
        if step == "restart":
            live.start()
        elif step == "idle":
            at_ms = messages[live.position - 1][0] + data.draw(st.integers(0, 3 * WINDOW_MS))
            live.engine.tell_idle(live.partition, START_MS + at_ms)
        elif step == "metadata" and to_come:
            live.learn([to_come.pop()])
        elif step == "tick":
            live.learn([])
    live.learn([*to_come, ALL_KNOWN])
    live.settle()
    assert live.engine.waiting_metadata == 0
    return live.producer.values


def replayed(messages: list[Message], span: Span) -> list[bytes]:
    """Return what a replay of a span sends for this log."""
    history = History()
    metadata.apply(history, [*KNOWN, *CHANGES, ALL_KNOWN])
    one = PartitionReplay(span, 0, IDS, builder(history), Counts())
    moment = Moment.at(START_MS + FOREVER_MS, history.pods_complete_until_us)
    out = []
    for at_ms, events in messages:
        if span.first_ms <= START_MS + at_ms <= span.last_ms:
            out += [flow.value for flow in one.take(START_MS + at_ms, halves.batch(events), moment)]
    return out + [flow.value for flow in one.end(moment)]


def records(values: list[bytes]) -> dict[Record, list[dict[str, Any]]]:
    """Return by identity the distinct contents of the highest revision, without what belongs to the moment."""
    flows = [codec.decode("Flow", value) for value in values]
    highest: dict[Record, int] = {}
    for flow in flows:
        highest[identity(flow)] = max(flow["revision"], highest.get(identity(flow), 0))
    out: dict[Record, list[dict[str, Any]]] = {}
    for flow in flows:
        lasting = {name: value for name, value in flow.items() if name not in OF_THE_MOMENT}
        contents = out.setdefault(identity(flow), [])
        if flow["revision"] == highest[identity(flow)] and lasting not in contents:
            contents.append(lasting)
    return out


def identity(flow: dict[str, Any]) -> Record:
    """Return what all revisions of a record share."""
    return flow["flow_id"], flow["record_type"], flow["observed_by"], flow["progress_seq"]


def within(span: Span, found: dict[Record, list[dict[str, Any]]]) -> dict[Record, list[dict[str, Any]]]:
    """Return those of a span; what was sent twice, in two windows, happened once."""
    return {
        record: contents for record, contents in found.items() if span.holds(contents[0]["event_unix_us"])
    }


def told_early(record: Record, among: dict[Record, Any]) -> bool:
    """Return whether a one-sided record is one that a quiet partition told before its other half came."""
    flow_id, record_type, observed_by, progress_seq = record
    return observed_by != "BOTH" and (flow_id, record_type, "BOTH", progress_seq) in among


@settings(max_examples=200, deadline=None)
@given(logs(), st.integers(1, 8 * WINDOW_MS), st.data())
def test_replay_of_any_span_equals_the_first_time(
    messages: list[Message], length_ms: int, data: st.DataObject
) -> None:
    """Each record of the span is the same; more there was the first time only where a quiet partition told early.

    An event that came twice, each time with its place in a batch, may be shown with either.
    """
    from_us = data.draw(
        st.sampled_from([event["event_unix_us"] for _, events in messages for event in events])
    )
    span = Span(from_us, from_us + length_ms * 1000, 0, 50 * WINDOW_MS, WINDOW_MS, START_MS + FOREVER_MS)
    live, again = records(lived(messages, data)), records(replayed(messages, span))
    assert all(span.holds(one["event_unix_us"]) for contents in again.values() for one in contents)
    missing = within(span, live).keys() - again.keys()
    assert {record for record in missing if not told_early(record, live)} == set()
    for record, contents in again.items():
        assert any(one in live[record] for one in contents), (contents, live[record])
