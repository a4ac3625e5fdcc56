"""Coverage is told of what is delivered down to the last half, before it is acknowledged, and again after a kill."""

from __future__ import annotations

from typing import Any

from enricher import coverage
from enricher.coverage import Batch, Name
from tests import halves
from tests.unit.test_enricher_engine import NOW_MS, WINDOW_MS, Rig


def sequences(rig: Rig) -> list[int]:
    """Return the sequences that were covered, in the order in which they were told."""
    return [
        sequence
        for record in rig.producer.coverage
        for one in record["ranges"]
        for sequence in range(one["first_sequence"], one["first_sequence"] + len(one["events"]))
    ]


def numbered(number: int, *events: dict[str, Any]) -> bytes:
    """Return batch `number` of these events."""
    return halves.batch(list(events), 0, number)


def test_batch_is_covered_when_its_last_half_has_found_its_other_half() -> None:
    """A half that waits keeps its batch uncovered, though the message is acknowledged."""
    rig = Rig()
    client, server = halves.opened(halves.key(1))
    rig.take(value=numbered(7, client))
    rig.tick()
    assert (rig.acked, sequences(rig)) == ([0], [])
    rig.take(value=numbered(8, server))
    rig.tick()
    assert (rig.acked, sequences(rig)) == ([0], [])
    rig.producer.deliver(0)
    rig.tick()
    assert (rig.acked, sequences(rig)) == ([0, 1], [7, 8])


def test_half_that_stays_alone_covers_its_batch_once_it_was_told() -> None:
    """On a quiet partition the round that tells the half one-sided settles its batch."""
    rig = Rig()
    rig.take(value=numbered(3, halves.opened(halves.key(1))[0]))
    rig.engine.tell_idle(rig.partition, NOW_MS + WINDOW_MS + 501)
    rig.tick()
    assert sequences(rig) == []
    rig.producer.deliver(0)
    rig.tick()
    assert sequences(rig) == [3]


def test_message_is_not_acknowledged_before_its_coverage_is_delivered() -> None:
    """A kill between the two would leave a batch that nobody ever covers."""
    rig = Rig()
    rig.producer.holds_coverage = True
    rig.take(value=numbered(0, *halves.opened(halves.key(1))))
    rig.producer.deliver(0)
    rig.tick()
    assert (sequences(rig), rig.acked) == ([0], [])
    assert rig.engine.unacknowledged == 1
    rig.producer.held[0](None, None)
    rig.tick()
    assert rig.acked == [0]


def test_coverage_of_many_messages_is_told_at_once() -> None:
    """Between two records a second passes, so that the hot path does not pay for each message."""
    rig = Rig()
    rig.engine.closing = False
    for number in range(50):
        rig.take(value=numbered(number, *halves.opened(halves.key(number))))
        rig.producer.deliver(number)
        rig.tick(later_ms=10 * number)
    assert sequences(rig) == [0]
    rig.tick(later_ms=1000)
    assert sequences(rig) == list(range(50))
    (one,) = rig.producer.coverage[1]["ranges"]
    assert (one["cluster"], one["node"], one["events"]) == (halves.CLUSTER, "node-1", [2] * 49)
    assert rig.acked == list(range(50))


def test_successor_tells_the_coverage_of_the_last_window_again() -> None:
    """What was acknowledged and waited for halves is covered by who re-reads it, older messages are not."""
    rig = Rig()
    client, server = halves.opened(halves.key(9))
    before = [
        (NOW_MS - WINDOW_MS - 1, numbered(0, *halves.opened(halves.key(1)))),
        (NOW_MS - 10, numbered(1, *halves.opened(halves.key(2)))),
        (NOW_MS, numbered(2, client)),
    ]
    rig.engine.warm(rig.partition, before, acknowledged=True)
    rig.tick()
    assert sequences(rig) == []
    rig.take(value=numbered(3, server))
    rig.producer.deliver(0)
    rig.tick()
    assert sequences(rig) == [1, 2, 3]


def test_messages_that_were_skipped_are_never_covered() -> None:
    """Re-reading what lies before an offset that Kafka jumped to proves nothing of it."""
    rig = Rig()
    rig.engine.warm(rig.partition, [(NOW_MS, numbered(5, *halves.opened(halves.key(1))))])
    rig.take(value=numbered(6))
    rig.tick()
    assert sequences(rig) == [6]


def test_dead_letter_with_a_readable_header_is_told_as_dead() -> None:
    """A truncated batch names itself; bytes that are no batch name nobody."""
    rig = Rig()
    rig.take(value=numbered(4, *halves.opened(halves.key(1)))[:-30])
    rig.take(value=b"\x07poison")
    for number in range(2):
        rig.producer.deliver(number)
    rig.tick()
    (record,) = rig.producer.coverage
    assert record["ranges"] == []
    assert [(one["sequence"], one["reason"]) for one in record["dead"]] == [(4, "CHECKSUM_MISMATCH")]
    assert rig.acked == [0, 1]


def test_repeats_are_counted_per_batch() -> None:
    """A batch that comes twice covers the same sequence, and its halves are repeats the second time."""
    rig = Rig()
    for number in range(2):
        rig.take(value=numbered(number, *halves.opened(halves.key(1))))
    rig.producer.deliver(0)
    rig.tick()
    (one,) = rig.producer.coverage[0]["ranges"]
    assert (one["events"], one["repeats"]) == ([2, 2], [0, 2])


def test_ranges_are_cut_where_sequences_are() -> None:
    """Holes, other epochs and other nodes begin a range of their own."""

    def batch(node: str, epoch: int, sequence: int) -> Batch:
        return Batch(0, Name("c", node, "b", epoch, 1, sequence), 3, 0, None)

    record = coverage.record(
        [batch("n", 1, 4), batch("n", 1, 3), batch("n", 1, 6), batch("n", 2, 7), batch("m", 1, 5)]
    )
    assert record is not None
    found = {
        (one["node"], one["producer_epoch"], one["first_sequence"], len(one["events"]))
        for one in record["ranges"]
    }
    assert found == {("n", 1, 3, 2), ("n", 1, 6, 1), ("n", 2, 7, 1), ("m", 1, 5, 1)}
    assert coverage.record([Batch(0, None, 0, 0, "NOT_AVRO_FRAMED")]) is None
