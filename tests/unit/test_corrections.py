"""Records that went out unsettled: written ahead, corrected, expired, given up, and taken over by a successor."""

from __future__ import annotations

from typing import Any

import pytest

from enricher import avro, corrections, raw, run
from enricher.engine import RawMessage
from enricher.errors import PartitionsError
from enricher.metadata import Change
from enricher.pair import Pair
from schemas import catalog, codec
from schemas.registry import CatalogIds
from tests import halves
from tests.lives import CORRECTION_MS, NOW_MS, WAIT_MS, Life, Log, node, pod, watermark

FLOWS, CHANGELOG = catalog.FLOWS, catalog.CORRECTIONS
ADDRESS = "10.0.0.200"


def unsettled(number: int = 1, **limits: int) -> Life:
    """Return a worker that has sent connection `number` with both sides unresolved."""
    life = Life(Log(), **limits)
    life.take(*halves.opened(halves.key(number)))
    life.later(WAIT_MS)
    life.settle()
    return life


def shown(flow: dict[str, Any]) -> tuple[Any, ...]:
    """Return what the tests look at."""
    return (flow["revision"], flow["client_pod"], flow["server_pod"], flow["server_reason"])


UNKNOWN = (0, None, None, "UNKNOWN_POD_UID")
NAMED = (1, "pod-1", "pod-2", None)


def test_identity_that_arrives_in_time_is_followed_by_a_corrected_record() -> None:
    """The same record comes again, revision 1, named; its changelog entry is gone and its input long acknowledged."""
    life = unsettled()
    assert (life.log.committed, life.engine.corrections.pending, len(life.log.live())) == (1, 1, 1)
    life.publish(pod(1), pod(2))
    life.later(corrections.ROUND_INTERVAL_MS)
    life.settle()
    first, second = life.log.flows()
    assert (shown(first), shown(second)) == (UNKNOWN, NAMED)
    same = ("flow_id", "record_type", "observed_by", "progress_seq", "event_unix_us", "client_observer")
    assert [first[name] for name in same] == [second[name] for name in same]
    assert (life.log.live(), life.engine.corrections.pending) == ({}, 0)
    assert life.engine.counts.corrections == {"corrected": 1}
    assert life.engine.counts.flows == 1


def test_flow_is_sent_only_after_its_changelog_entry_was_delivered() -> None:
    """Until the entry is in Kafka nobody sees the flow; after both comes Coverage, then the acknowledgement."""
    life = Life(Log())
    life.take(*halves.opened(halves.key(1)))
    life.later(WAIT_MS)
    assert [sent.topic for sent in life.on_the_way] == [CHANGELOG.name]
    life.deliver(CHANGELOG)
    assert life.log.committed == 0
    life.later()
    assert [sent.topic for sent in life.on_the_way] == [FLOWS.name]
    assert life.log.committed == 0
    life.deliver(FLOWS)
    life.later()
    assert [sent.topic for sent in life.on_the_way] == [catalog.COVERAGE.name]
    assert life.log.committed == 0
    life.deliver(catalog.COVERAGE)
    life.later()
    assert life.log.committed == 1


def test_correction_is_not_taken_off_the_changelog_before_it_was_delivered() -> None:
    """A worker that dies between correction and tombstone leaves the entry, and its successor corrects again."""
    life = unsettled()
    life.publish(pod(1), pod(2))
    life.later(corrections.ROUND_INTERVAL_MS)
    assert [sent.topic for sent in life.on_the_way] == [FLOWS.name]
    successor = Life(life.log)
    successor.later(corrections.ROUND_INTERVAL_MS)
    successor.settle()
    assert [shown(flow) for flow in life.log.flows()] == [UNKNOWN, NAMED]
    assert life.log.live() == {}


@pytest.mark.parametrize("away_ms", [0, CORRECTION_MS, 3_600_000], ids=["at_once", "a_minute", "an_hour"])
def test_successor_makes_the_correction_of_a_killed_worker(away_ms: int) -> None:
    """The identity came while nobody ran; the successor corrects, also when the time passed meanwhile."""
    log = unsettled().log
    log.metadata += [pod(1), pod(2)]
    successor = Life(log, NOW_MS + away_ms)
    successor.later(corrections.ROUND_INTERVAL_MS)
    successor.settle()
    assert [shown(flow) for flow in log.flows()] == [UNKNOWN, NAMED]
    assert log.live() == {}


def test_entry_that_metadata_has_outlived_is_dropped() -> None:
    """A day later pods may be forgotten, and an answer would be worse than the one that went out."""
    log = unsettled().log
    log.metadata += [pod(1), pod(2)]
    successor = Life(log, NOW_MS + CORRECTION_MS + WAIT_MS + corrections.LEFT_BEHIND_MS + 1)
    successor.later(corrections.ROUND_INTERVAL_MS)
    successor.settle()
    assert (len(log.flows()), log.live()) == (1, {})
    assert successor.engine.counts.corrections == {"expired": 1}


def test_another_groups_entry_is_left_alone() -> None:
    """Enrichers of another group, as in a replay, have entries of their own in the same topic."""
    log = unsettled().log
    life = Life(Log())
    found, unreadable = life.engine.corrections.unpack(log.live())
    assert (len(found), unreadable) == (1, 0)
    (value,) = log.live().values()
    assert corrections.decode(b"k", value, "another") is None


def test_unreadable_entry_is_counted_and_harms_no_other() -> None:
    """An entry of an unknown schema, or broken, is passed over."""
    life = unsettled()
    live = {
        b"a": b"junk",
        b"b": b"\x00\x00\x00\x00\x0a\x02",
        b"c": b"\x00\x00\x00\x10\x00",
        **life.log.live(),
    }
    found, unreadable = life.engine.corrections.unpack(live)
    assert (len(found), unreadable) == (1, 3)


def test_nothing_follows_when_no_identity_comes() -> None:
    """After its time the record stands as it is, its entry is removed, and that is counted."""
    life = unsettled()
    life.later(CORRECTION_MS - 1)
    assert life.engine.corrections.pending == 1
    life.later(corrections.ROUND_INTERVAL_MS)
    life.settle()
    life.publish(pod(1), pod(2))
    life.later(corrections.ROUND_INTERVAL_MS)
    life.settle()
    assert [shown(flow) for flow in life.log.flows()] == [UNKNOWN]
    assert (life.log.live(), life.engine.counts.corrections) == ({}, {"expired": 1})


def test_record_that_has_waited_long_is_asked_for_more_rarely() -> None:
    """After a look in vain 40 s on, the next one comes a fourth of that later."""
    life = unsettled()
    life.publish(watermark())
    life.later(40_000)
    life.publish(pod(1), pod(2))
    life.later(9_000)
    assert not life.on_the_way
    life.later(1_000)
    assert [sent.topic for sent in life.on_the_way] == [FLOWS.name]


def test_half_an_answer_waits_for_the_other_until_the_time_is_up() -> None:
    """One correction per record: when both sides are settled, else at the end with what is known by then."""
    life = unsettled()
    life.publish(pod(1))
    life.later(corrections.ROUND_INTERVAL_MS)
    assert not life.on_the_way
    life.later(CORRECTION_MS)
    life.settle()
    assert [shown(flow) for flow in life.log.flows()] == [UNKNOWN, (1, "pod-1", None, "UNKNOWN_POD_UID")]
    assert life.log.live() == {}


def test_address_whose_owner_the_api_showed_late_is_corrected() -> None:
    """A Pod record after the watermark reaches back before it: nobody had the address becomes a candidate."""
    life = Life(Log())
    life.publish(pod(1), node())
    life.publish(watermark())
    life.take(halves.failed(halves.key(1), remote_address=halves.ip(ADDRESS)))
    life.settle()
    (first,) = life.log.flows()
    assert (first["server_resolution"], first["server_reason"]) == ("UNRESOLVED", "NO_OWNER_AT_TIME")
    life.publish(pod(3, ADDRESS))
    life.later(corrections.ROUND_INTERVAL_MS)
    life.settle()
    _, second = life.log.flows()
    assert (second["revision"], second["server_pod"]) == (1, "pod-3")


def test_container_that_the_api_shows_late_gets_its_name() -> None:
    """A container talks before its id is in the pod's status: the pod is named at once, the container follows."""
    life = Life(Log())
    starting = halves.pod_record(1, containers=[])
    life.publish(Change("pods", starting["uid"], starting), pod(2))
    life.take(*halves.opened(halves.key(1)))
    life.settle()
    life.publish(pod(1))
    life.later(corrections.ROUND_INTERVAL_MS)
    life.settle()
    first, second = life.log.flows()
    assert (first["client_pod"], first["client_container"], first["client_resolution"]) == (
        "pod-1",
        None,
        "SOCKET",
    )
    assert (second["client_pod"], second["client_container"], second["revision"]) == ("pod-1", "main", 1)


@pytest.mark.parametrize("sides", ["both", "client", "server"])
def test_entry_is_what_fastavro_reads_and_writes(sides: str) -> None:
    """An entry's bytes are those of a stock encoder, and give back the halves that they were made of."""
    value = halves.batch(halves.opened(halves.key(1)), sequence=7)
    client, server = raw.cut(value, 0, CatalogIds(), catalog.RAW.schema_id)
    pair = Pair(client if sides != "server" else None, server if sides != "client" else None)
    one = corrections.Pending(b"key", pair, NOW_MS, (0, 2))
    encoded = corrections.encode(one, avro.text("group"), CHANGELOG.schema_id)
    record = codec.decode(CHANGELOG.schema, encoded)
    assert codec.encode(CHANGELOG.schema, record, CHANGELOG.schema_id) == encoded
    back = corrections.decode(b"key", encoded, "group")
    assert back is not None
    assert (back.pair, back.expires_ms, back.grades) == (pair, NOW_MS, (0, 2))


def test_changelog_with_fewer_partitions_than_the_raw_topic_is_refused() -> None:
    """A changelog made for another partition count has its own exit code; more partitions do no harm."""
    run._check_partitions({catalog.RAW.name: 4, CHANGELOG.name: 8})
    with pytest.raises(PartitionsError, match="has 2 partitions") as caught:
        run._check_partitions({catalog.RAW.name: 4, CHANGELOG.name: 2})
    assert caught.value.exit_code == 21


def test_settled_record_is_neither_held_nor_written_ahead() -> None:
    """What is named at once costs no changelog entry."""
    life = Life(Log())
    life.publish(pod(1), pod(2))
    life.take(*halves.opened(halves.key(1)))
    assert [sent.topic for sent in life.on_the_way] == [FLOWS.name]
    assert life.engine.corrections.pending == 0


def test_record_without_room_goes_out_without_a_correction_to_come() -> None:
    """The number pending is bounded; who is in the changelog keeps its place, and the rest is counted."""
    life = Life(Log(), pending_max=2)
    life.take(*(event for number in range(5) for event in halves.opened(halves.key(number))))
    life.later(WAIT_MS)
    life.settle()
    assert (len(life.log.flows()), len(life.log.live()), life.log.committed) == (5, 2, 1)
    assert life.engine.counts.corrections == {"no_room": 3}
    life.publish(pod(1), pod(2))
    life.later(corrections.ROUND_INTERVAL_MS)
    life.settle()
    assert sorted(flow["revision"] for flow in life.log.flows()) == [0] * 5 + [1] * 2


def test_successor_without_room_gives_up_what_does_not_fit() -> None:
    """Two workers' entries may be more than one can hold: the rest is removed and counted."""
    life = Life(Log())
    life.take(*(event for number in range(5) for event in halves.opened(halves.key(number))))
    life.later(WAIT_MS)
    life.settle()
    successor = Life(life.log, pending_max=3)
    successor.settle()
    assert (successor.engine.corrections.pending, len(life.log.live())) == (3, 3)
    assert successor.engine.counts.corrections == {"no_room": 2}


def test_switched_off_corrections_write_nothing() -> None:
    """With 0 ms a record goes out unresolved at once, and no entry is written."""
    life = unsettled(correction_ms=0)
    assert [sent.topic for sent in life.log.delivered] == [FLOWS.name, catalog.COVERAGE.name]
    assert life.engine.counts.corrections == {}


def test_repeated_input_of_a_pending_record_is_not_written_ahead_twice() -> None:
    """A killed worker's unacknowledged message is read again: the record repeats, its entry stands."""
    log = Log()
    life = Life(log)
    life.take(*halves.opened(halves.key(1)))
    life.later(WAIT_MS)
    life.deliver(CHANGELOG)
    successor = Life(log)
    successor.take_next()
    successor.later(WAIT_MS)
    assert [sent.topic for sent in successor.on_the_way] == [FLOWS.name]
    successor.settle()
    assert (successor.engine.corrections.pending, log.committed) == (1, 1)


def test_revoked_partition_corrects_nothing_more() -> None:
    """What another worker has from the changelog is no longer ours to send or to remove."""
    life = unsettled()
    life.engine.revoke(0)
    life.publish(pod(1), pod(2))
    life.later(CORRECTION_MS)
    assert (list(life.on_the_way), life.engine.corrections.pending) == ([], 0)
    assert len(life.log.live()) == 1


def test_neither_wait_holds_up_other_partitions() -> None:
    """While records of partition 0 wait for metadata, then for a correction, partition 1 is sent and acknowledged."""
    life = Life(Log())
    life.engine.closing = True  # Coverage is told without delay
    other = life.engine.assign(1, 0)
    life.publish(node())
    acked: list[int] = []

    def take_other(number: int) -> None:
        events = [
            event | {"pod_uid": bytes(16), "local_address": halves.ip("192.168.7.1")}
            for event in halves.opened(halves.key(number, partition=1))
        ]
        body = halves.batch(events, partition=1)
        message = RawMessage(number, NOW_MS, None, body)
        life.engine.take(other, message, lambda: acked.append(number), life.now_ms)
        for topic in (FLOWS, catalog.COVERAGE):
            assert life.deliver(topic)
            life.later()

    life.take(*halves.opened(halves.key(1)))
    take_other(0)
    assert (acked, life.log.committed, life.engine.waiting_metadata) == ([0], 0, 1)
    life.later(WAIT_MS)
    take_other(1)
    assert (acked, life.log.committed) == ([0, 1], 0)
    life.settle()
    assert (life.log.committed, life.engine.corrections.pending) == (1, 1)
    take_other(2)
    assert acked == [0, 1, 2]
