"""Transactions of the publisher, with a producer that fails on demand."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

import pytest

from collector import kafka
from collector.cluster.metrics import Metrics
from collector.cluster.publish import Publisher, restore
from collector.cluster.state import TOPICS, State
from collector.cluster.stop import Stop, StopRequested
from collector.errors import KafkaFatalError
from schemas import catalog, codec
from schemas.registry import CatalogIds, RegistryAwayError
from tests import halves

if TYPE_CHECKING:
    from collector.cluster.records import Kind

CHANGES: dict[tuple[Kind, str], bytes | None] = {
    ("pods", "a"): b"A",
    ("pods", "b"): None,
    ("nodes", "n"): b"N",
}
TEMPORARY = {"retriable": True}
ABORT = {"txn_requires_abort": True}
FATAL = {"fatal": True}


def failure(**flags: bool) -> kafka.KafkaException:
    """Return an error as the client raises it."""
    return kafka.KafkaException(kafka.KafkaError(kafka.KafkaError._FAIL, "test", **flags))


class Delivered:
    """A delivered message."""

    def __init__(self, topic: str, offset: int) -> None:
        self._topic, self._offset = topic, offset

    def topic(self) -> str:
        """Return the topic."""
        return self._topic

    def offset(self) -> int:
        """Return the offset."""
        return self._offset


class Producer:
    """A transactional producer in memory: `script` holds what the next call of a name raises (None: works)."""

    def __init__(self, **script: list[kafka.KafkaException | BufferError | None]) -> None:
        self.script = {name: deque(errors) for name, errors in script.items()}
        self.open: list[tuple[str, str, bytes | None]] = []
        self.committed: list[list[tuple[str, str, bytes | None]]] = []
        self.calls: list[str] = []
        self.offsets: dict[str, int] = {}
        self.delivery_error: Any = None
        self.waiting: list[Any] = []

    def _next(self, name: str) -> None:
        self.calls.append(name)
        error = self.script[name].popleft() if self.script.get(name) else None
        if error is not None:
            raise error

    def init_transactions(self, timeout: float) -> None:
        """Do as scripted."""
        self._next("init")

    def begin_transaction(self) -> None:
        """Begin."""
        self._next("begin")
        self.open = []

    def produce(
        self, topic: str, value: bytes | None, key: bytes, *, partition: int, on_delivery: Any
    ) -> None:
        """Take a message."""
        assert partition == 0
        self._next("produce")
        self.open.append((topic, key.decode(), value))
        offset = self.offsets.get(topic, 0)
        self.offsets[topic] = offset + 1
        if on_delivery:
            self.waiting.append(lambda: on_delivery(self.delivery_error, Delivered(topic, offset)))

    def flush(self, timeout: float) -> int:
        """Deliver all, or say how many wait when scripted to."""
        self.calls.append("flush")
        if self.script.get("flush"):
            self.script["flush"].popleft()
            return 1
        while self.waiting:
            self.waiting.pop(0)()
        return 0

    def commit_transaction(self, timeout: float) -> None:
        """Commit."""
        self._next("commit")
        self.committed.append(self.open)

    def abort_transaction(self, timeout: float) -> None:
        """Abort."""
        self._next("abort")
        self.open = []


def publisher(producer: Producer, stop: Stop | None = None) -> Publisher:
    """Return a publisher on a producer."""
    return Publisher(
        producer,
        cluster="c",
        source="manifests",
        watermark_schema_id=6,
        status_lag_us=10_000_000,
        stop=stop or Stop(),
        metrics=Metrics(),
    )


def watermarks(messages: list[tuple[str, str, bytes | None]]) -> dict[str, tuple[int, int]]:
    """Return (complete_until_us, end_offset) of the watermarks among messages, by kind."""
    found = {}
    for topic, key, value in messages:
        if topic == "podwire.k8s.watermarks.v1" and value is not None:
            record = codec.decode("Watermark", value)
            assert key == f"{record['cluster']}/{record['kind']}"
            found[record["kind"]] = (record["complete_until_us"], record["end_offset"])
    return found


def test_changes_and_watermarks_are_one_transaction() -> None:
    """Watermarks follow the records and tell the offset after the last one of their topic."""
    producer = Producer()
    one = publisher(producer)
    one.end_offsets["services"] = 40
    producer.offsets["podwire.k8s.pods.v1"] = 7
    assert one.publish(CHANGES, {"pods": 100, "services": 100})
    (messages,) = producer.committed
    assert messages[:3] == [
        ("podwire.k8s.pods.v1", "a", b"A"),
        ("podwire.k8s.pods.v1", "b", None),
        ("podwire.k8s.nodes.v1", "n", b"N"),
    ]
    assert watermarks(messages) == {"pods": (100, 9), "services": (100, 40)}


def test_watermark_is_written_only_when_it_advances() -> None:
    """A kind whose completeness stands still needs no record."""
    producer = Producer()
    one = publisher(producer)
    one.publish({}, {"pods": 100, "nodes": 100})
    one.publish({}, {"pods": 200, "nodes": 100})
    assert [watermarks(messages) for messages in producer.committed] == [
        {"pods": (100, 0), "nodes": (100, 0)},
        {"pods": (200, 0)},
    ]


@pytest.mark.parametrize(
    "script",
    [
        {"commit": [failure(**ABORT)]},
        {"begin": [failure(**ABORT)], "abort": [failure()]},
        {"produce": [None, failure(**ABORT)]},
        {"commit": [failure(**ABORT)], "abort": [failure(**TEMPORARY), None]},
        {"commit": [failure()]},
    ],
    ids=["commit", "begin", "produce", "abort_twice", "plain"],
)
def test_failed_transaction_is_aborted_and_offered_again(script: dict[str, Any]) -> None:
    """False leaves everything to the next attempt, which carries it all."""
    producer = Producer(**script)
    one = publisher(producer)
    assert not one.publish(CHANGES, {"pods": 100})
    assert "abort" in producer.calls
    assert (producer.committed, one.end_offsets["pods"], one.complete_until_us) == ([], 0, {})
    assert one.publish(CHANGES, {"pods": 100})
    assert len(producer.committed[0]) == len(CHANGES) + 1


def test_unknown_outcome_of_a_commit_is_asked_again() -> None:
    """A commit that timed out may have happened: it's repeated, never aborted."""
    producer = Producer(commit=[failure(**TEMPORARY), failure(**TEMPORARY)])
    assert publisher(producer).publish(CHANGES, {})
    assert producer.calls.count("commit") == 3
    assert "abort" not in producer.calls


def test_observing_goes_on_while_the_broker_is_away() -> None:
    """What happens during an outage is seen, although nothing can be written."""
    looks: list[str] = []
    one = publisher(Producer(flush=[None, None], commit=[failure(**TEMPORARY)]))
    one.meanwhile = lambda: looks.append("look")
    assert one.publish(CHANGES, {})
    assert len(looks) == 3


def test_undelivered_record_aborts() -> None:
    """A record that the broker never took must not be followed by a watermark."""
    producer = Producer()
    producer.delivery_error = kafka.KafkaError(kafka.KafkaError._FAIL, "timed out")
    assert not publisher(producer).publish(CHANGES, {"pods": 100})
    assert producer.committed == []


def test_full_queue_is_flushed_and_gone_on() -> None:
    """More than the client's queue holds goes out in one transaction all the same."""
    producer = Producer(produce=[None, BufferError(), None])
    assert publisher(producer).publish(CHANGES, {})
    assert [key for _, key, _ in producer.committed[0]] == ["a", "b", "n"]


@pytest.mark.parametrize("call", ["begin", "commit"])
def test_fenced_watcher_gives_up(call: str) -> None:
    """Another watcher of the cluster took over: this process ends with its own exit code."""
    one = publisher(Producer(**{call: [failure(**FATAL)]}))
    with pytest.raises(KafkaFatalError) as caught:
        one.publish(CHANGES, {})
    assert caught.value.exit_code == 23


@pytest.mark.parametrize("error", [failure(**FATAL), failure()], ids=["fatal", "denied"])
def test_refused_transactions_are_fatal(error: kafka.KafkaException) -> None:
    """Without the right to transactions there is nothing to wait for."""
    with pytest.raises(KafkaFatalError):
        publisher(Producer(init=[error])).take_over(lambda what: None)


def test_take_over_waits_for_the_coordinator() -> None:
    """A broker that isn't ready yet is waited for, and what for is said."""
    said: list[str] = []
    publisher(Producer(init=[failure(**TEMPORARY), None])).take_over(said.append)
    assert len(said) == 1


@pytest.mark.parametrize(
    "script", [{"flush": [None]}, {"commit": [failure(**TEMPORARY)]}], ids=["flush", "commit"]
)
def test_stop_ends_waiting_for_a_broker_that_is_away(script: dict[str, Any]) -> None:
    """SIGTERM must not wait for a broker; what wasn't written is worked out again at the next start."""
    stop = Stop()
    stop.request()
    with pytest.raises(StopRequested):
        publisher(Producer(**script), stop).publish(CHANGES, {})


def test_take_over_reads_again_once_the_registry_is_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry that goes away while the topics are read makes no record unreadable: all are read again."""

    class Away(CatalogIds):
        def writer_schema(self, schema_id: int) -> Any:
            if not said:
                raise RegistryAwayError("the schema registry")
            return super().writer_schema(schema_id)

    class Written(Delivered):
        def value(self) -> bytes:
            return codec.encode("Pod", halves.pod_record(1), catalog.PODS.schema_id)

    said: list[str] = []
    state = State(halves.CLUSTER, {kind: topic.schema_id for kind, topic in TOPICS.items()}, 0, 10**15)
    monkeypatch.setattr(kafka, "read_to_end", lambda *_, **__: [Written(catalog.PODS.name, 0)])
    restore(
        "broker",
        catalog.PODS,
        halves.CLUSTER,
        state=state,
        publisher=publisher(Producer()),
        ids=Away(),
        wait=said.append,
    )
    assert said == ["the schema registry"]
    assert state.present_count("pods") == 1
