"""The ring as write-ahead log: what is released when, what is spooled when, and that nothing is forgotten."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from collector.errors import KafkaFatalError
from collector.kafka import KafkaError
from collector.node.batches import Batch
from collector.node.publish import Publisher
from collector.node.spool import Spool
from tests.node_events import FakeError, FakeProducer

if TYPE_CHECKING:
    from pathlib import Path

SPOOL_AFTER_S = 2.0


class FakeRing:
    """A ring of 1000 bytes that remembers up to where it was released."""

    size_bytes = 1000

    def __init__(self) -> None:
        self.used = 0
        self.released = 0

    def used_bytes(self) -> int:
        """Return what the test says."""
        return self.used

    def release(self, position: int) -> None:
        """Remember the position; it never goes back."""
        assert position >= self.released
        self.released = position


class Rig:
    """A publisher with fakes around it and a real spool folder."""

    def __init__(self, folder: Path, *, room: int = 1000, spool_bytes: int = 1 << 20, epoch: int = 5) -> None:
        self.producer, self.ring = FakeProducer(room), FakeRing()
        self.spool = Spool(folder, spool_bytes, "boot", epoch, 4)
        self.publisher = Publisher(self.producer, self.ring, self.spool, SPOOL_AFTER_S)
        self.publisher.is_open = True
        self.submitted = 0

    def submit(self, end: int, *values: bytes, now_s: float = 0.0) -> None:
        """Submit one flush with a batch of 10 events per value."""
        batches = [Batch(number % 4, 10, value) for number, value in enumerate(values)]
        self.publisher.submit(batches, end, now_s)
        self.submitted += 10 * len(batches)

    def check_balance(self) -> None:
        """Fail unless each event that came in is in exactly one place."""
        totals = self.publisher.totals
        places = (totals.published, totals.spooled, totals.in_flight, totals.unreadable)
        assert min(places) >= 0
        assert self.submitted + totals.inherited == sum(places), totals

    def delivered(self) -> list[bytes]:
        """Return the values that Kafka has, in order."""
        return [value for _, _, value in self.producer.delivered]


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    """A publisher whose topics are there."""
    return Rig(tmp_path)


def test_ring_is_released_after_the_last_acknowledgement(rig: Rig) -> None:
    """Space goes back when all batches of the flush are acknowledged, not before."""
    rig.submit(100, b"a", b"b")
    rig.publisher.turn(0.0)
    rig.producer.answer(1)
    rig.publisher.turn(0.1)
    assert rig.ring.released == 0
    rig.producer.answer(1)
    rig.publisher.turn(0.2)
    assert rig.ring.released == 100
    assert rig.publisher.idle()
    assert rig.publisher.totals.published == 20
    assert rig.publisher.totals.batches == {0: 1, 1: 1}


def test_ring_is_released_in_order_only(rig: Rig) -> None:
    """A later flush that is acknowledged first does not free the space of an earlier one."""
    rig.submit(100, b"a")
    rig.submit(200, b"b")
    rig.publisher.turn(0.0)
    first = rig.producer.queue.popleft()
    rig.producer.answer()
    rig.publisher.turn(0.1)
    assert rig.ring.released == 0
    rig.producer.queue.append(first)
    rig.producer.answer()
    rig.publisher.turn(0.2)
    assert rig.ring.released == 200


def test_nothing_is_sent_before_the_topic_is_known(rig: Rig) -> None:
    """While the start-up still waits for Kafka, flushes wait, and go out in order afterwards."""
    rig.publisher.is_open = False
    rig.submit(100, b"a")
    rig.submit(200, b"b")
    rig.publisher.turn(0.0)
    assert not rig.producer.queue
    rig.publisher.is_open = True
    rig.publisher.turn(0.1)
    rig.producer.answer()
    assert rig.delivered() == [b"a", b"b"]


def test_late_flush_is_spooled_and_its_space_released(rig: Rig) -> None:
    """After `spool_after` without acknowledgement the flush is on disk and the ring free, and still delivered once."""
    rig.submit(100, b"a")
    rig.publisher.turn(1.9)
    assert (rig.ring.released, rig.spool.waiting_events) == (0, 0)
    rig.publisher.turn(2.0)
    assert (rig.ring.released, rig.spool.waiting_events) == (100, 10)
    rig.producer.answer()
    rig.publisher.turn(2.1)
    assert rig.delivered() == [b"a"]
    assert rig.spool.waiting_events == 0
    assert rig.publisher.idle()


@pytest.mark.parametrize(("used", "patience_s"), [(0, 2.0), (375, 1.0), (600, 0.4), (750, 0.0), (1000, 0.0)])
def test_patience_ends_as_the_ring_fills(rig: Rig, used: int, patience_s: float) -> None:
    """A flush may wait for Kafka the shorter, the fuller the ring is; from three quarters on not at all."""
    rig.submit(used, b"a")
    rig.ring.used = used
    rig.publisher.turn(patience_s - 0.01)
    assert rig.spool.waiting_events == 0
    rig.publisher.turn(patience_s + 0.01)
    assert rig.spool.waiting_events == 10
    assert rig.ring.released == used


def test_full_queue_is_spooled_and_read_back(tmp_path: Path) -> None:
    """What librdkafka has no room for goes to disk and comes back from there, in order, when there is room."""
    rig = Rig(tmp_path, room=2)
    rig.submit(100, b"a", b"b", b"c")
    rig.submit(200, b"d")
    rig.publisher.turn(0.0)
    assert rig.ring.released == 200
    while not rig.publisher.idle():
        assert rig.producer.queue
        rig.producer.answer(1)
        rig.publisher.turn(0.1)
    assert rig.delivered() == [b"a", b"b", b"c", b"d"]
    assert list(tmp_path.iterdir()) == []


def test_full_spool_keeps_the_ring_until_there_is_room(tmp_path: Path) -> None:
    """Where the spool takes nothing the ring is not released: the kernel counts what it then loses."""
    rig = Rig(tmp_path, spool_bytes=0)
    rig.submit(100, b"a")
    rig.publisher.turn(5.0)
    assert rig.ring.released == 0
    rig.producer.answer()
    rig.publisher.turn(5.1)
    assert rig.ring.released == 100
    assert rig.publisher.totals.published == 10


def test_failed_batch_is_sent_again(rig: Rig) -> None:
    """A temporary error of the broker costs a repeat, not an event, also when only the spool holds the batch."""
    rig.submit(100, b"a", b"b")
    rig.publisher.turn(2.0)
    assert rig.ring.released == 100
    rig.producer.answer(error=FakeError(KafkaError.UNKNOWN_TOPIC_OR_PART))
    rig.publisher.turn(2.1)
    rig.producer.answer()
    assert sorted(rig.delivered()) == [b"a", b"b"]
    assert rig.publisher.totals.retries == 2
    assert rig.publisher.idle()


@pytest.mark.parametrize(
    "error",
    [FakeError(1, fatal=True), FakeError(KafkaError.TOPIC_AUTHORIZATION_FAILED)],
    ids=["fatal", "acl"],
)
def test_refusal_for_good_is_fatal_and_loses_nothing(rig: Rig, error: FakeError, tmp_path: Path) -> None:
    """When Kafka will never take a batch the process ends with it on disk."""
    rig.submit(100, b"a")
    rig.publisher.turn(0.0)
    rig.producer.answer(error=error)
    with pytest.raises(KafkaFatalError, match="Operator action"):
        rig.publisher.turn(0.1)
    assert rig.publisher.finish() == 0
    assert Rig(tmp_path, epoch=6).spool.waiting_events == 10


def test_finish_spools_the_rest_and_a_new_process_replays_it(tmp_path: Path) -> None:
    """An orderly end without Kafka leaves everything in the spool; the next process sends it, oldest first."""
    first = Rig(tmp_path)
    first.submit(100, b"a", b"b")
    first.submit(200, b"c")
    first.publisher.turn(0.0)
    first.producer.answer(1)
    assert first.publisher.finish() == 0
    assert (first.ring.released, first.producer.purged) == (200, True)
    second = Rig(tmp_path, epoch=6)
    second.submit(50, b"new")
    second.publisher.turn(0.0)
    second.producer.answer()
    second.publisher.turn(0.1)
    assert second.delivered() == [b"b", b"c", b"new"]
    assert (second.publisher.totals.inherited, second.publisher.totals.published) == (20, 30)
    second.check_balance()
    assert second.publisher.idle()
    assert list(tmp_path.iterdir()) == []


def test_finish_tells_how_many_events_are_left(tmp_path: Path) -> None:
    """What neither Kafka nor the disk took is counted."""
    rig = Rig(tmp_path, spool_bytes=0)
    rig.submit(100, b"a", b"b")
    rig.publisher.turn(0.0)
    rig.producer.answer(1)
    assert rig.publisher.finish() == 10


def test_unreadable_spool_file_is_counted_and_does_not_stop_the_rest(tmp_path: Path) -> None:
    """A damaged file of an earlier process is a counted loss; what comes after it is delivered."""
    rig = Rig(tmp_path)
    rig.submit(100, b"a")
    rig.submit(200, b"b")
    rig.publisher.finish()
    oldest = min(tmp_path.iterdir())
    oldest.write_bytes(oldest.read_bytes()[:-1] + b"?")
    later = Rig(tmp_path, epoch=6)
    later.publisher.turn(0.0)
    later.producer.answer()
    later.publisher.turn(0.1)
    assert later.delivered() == [b"b"]
    assert later.publisher.totals.unreadable == 10
    later.check_balance()
    assert later.publisher.idle()


def test_unreadable_spool_file_of_failed_batches_is_counted_once(rig: Rig, tmp_path: Path) -> None:
    """Batches that Kafka gives back after their file was damaged are a counted loss, not a crash."""
    rig.submit(100, b"a", b"b")
    rig.publisher.turn(2.0)
    (file,) = tmp_path.iterdir()
    file.write_bytes(b"?")
    rig.producer.answer(1, FakeError(KafkaError.UNKNOWN_TOPIC_OR_PART))
    rig.publisher.turn(2.1)
    assert rig.publisher.totals.unreadable == 10
    assert rig.publisher.totals.in_flight == 10
    rig.check_balance()
    rig.producer.answer(1, FakeError(KafkaError.UNKNOWN_TOPIC_OR_PART))
    rig.publisher.turn(2.2)
    assert rig.publisher.totals.unreadable == 20
    rig.check_balance()
    assert rig.publisher.idle()


STEP = st.one_of(
    st.tuples(st.just("submit"), st.integers(1, 3)),
    st.tuples(st.just("answer"), st.integers(1, 5)),
    st.tuples(st.just("fail"), st.integers(1, 2)),
    st.tuples(st.just("press"), st.sampled_from([0, 900])),
    st.tuples(st.just("wait"), st.sampled_from([0, 3])),
    st.tuples(st.just("disk"), st.sampled_from([0, 400, 1 << 20])),
)


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(STEP, max_size=40), room=st.integers(1, 6))
def test_released_space_is_always_covered(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int]], room: int
) -> None:
    """Whatever happens in whatever order, a kill loses no released batch, the books balance, and none comes twice."""
    folder = tmp_path_factory.mktemp("spool")
    rig = Rig(folder, room=room)
    submitted: dict[int, list[bytes]] = {}
    now_s, number = 0.0, 0
    for what, count in steps:
        if what == "submit":
            values = [f"{number}.{part}".encode() for part in range(count)]
            number += 1
            submitted[number * 100] = values
            rig.submit(number * 100, *values, now_s=now_s)
        elif what == "answer":
            rig.producer.answer(count)
        elif what == "fail":
            rig.producer.answer(count, FakeError(KafkaError.UNKNOWN_TOPIC_OR_PART))
        elif what == "press":
            rig.ring.used = count
        elif what == "wait":
            now_s += count
        else:
            rig.spool._size_bytes_max = count
        rig.publisher.turn(now_s)
        rig.check_balance()
        on_disk = {batch.value for path in folder.glob("*.flush") for batch in _parsed(path.read_bytes())}
        safe = on_disk | set(rig.delivered())
        for end, values in submitted.items():
            if end <= rig.ring.released:
                assert safe.issuperset(values)
    for _ in range(200):
        rig.producer.answer()
        rig.publisher.turn(now_s)
    every = [value for values in submitted.values() for value in values]
    assert rig.publisher.idle()
    assert Counter(rig.delivered()) == Counter(every)
    rig.check_balance()
    assert rig.publisher.totals.published == 10 * len(every)
    assert rig.ring.released == max(submitted, default=0)
    assert list(folder.iterdir()) == []


def _parsed(content: bytes) -> list[Batch]:
    from collector.node.spool import parse

    reason, batches = parse(content, 4)
    assert reason is None
    return batches
