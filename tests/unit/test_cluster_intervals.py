"""Address bands and validity from successive states of one object."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from collector.cluster import intervals
from collector.cluster.intervals import Moment
from collector.cluster.records import Record, seen
from tests.objects import CLUSTER, CREATED_US, SECOND_US, container, node, pod, service

LAG_US = 10 * SECOND_US
RETENTION_US = 3600 * SECOND_US
STARTED_US = CREATED_US + SECOND_US
RUNNING_US = CREATED_US + 4 * SECOND_US


def at(seconds: float, known: float | None = None) -> Moment:
    """Return a moment so many seconds after the sample's creation, all known up to a second earlier."""
    observed_us = CREATED_US + int(seconds * SECOND_US)
    known_us = observed_us - SECOND_US if known is None else CREATED_US + int(known * SECOND_US)
    return Moment(observed_us, known_us, LAG_US, RETENTION_US)


def after(previous: Record | None, moment: Moment, **changes: Any) -> Record:
    """Return the record after the sample pod was seen with changes."""
    return intervals.advance(previous, seen("pods", pod(**changes), CLUSTER), moment)


def bands(record: Record) -> list[tuple[str, float, float, float | None, float | None]]:
    """Return the record's bands, in seconds after the sample's creation."""

    def seconds(time_us: int | None) -> float | None:
        return None if time_us is None else (time_us - CREATED_US) / SECOND_US

    names = ("from_earliest_us", "from_latest_us", "to_earliest_us", "to_latest_us")
    return [(band["address"], *(seconds(band[name]) for name in names)) for band in record["addresses"]]  # type: ignore[misc]


def test_first_address_is_possible_from_start_and_sure_from_the_first_container() -> None:
    """The kubelet takes a pod up, gives it an address, starts containers; whole seconds are rounded down."""
    record = after(None, at(60))
    assert bands(record) == [("10.1.0.5", 1, 5, None, None)]
    assert (record["valid_from_us"], record["valid_to_us"]) == (CREATED_US, None)


def test_first_address_is_sure_at_the_latest_when_seen() -> None:
    """A status that shows the address before any container started proves it, too."""
    assert bands(after(None, at(3), statuses=[])) == [("10.1.0.5", 1, 3, None, None)]


def test_first_address_of_a_watched_pod_may_predate_the_api() -> None:
    """That an earlier status showed no address doesn't mean that there was none."""
    pending = after(None, at(2), ips=[], statuses=[], phase="Pending")
    assert bands(pending) == []
    assert bands(after(pending, at(9))) == [("10.1.0.5", 1, 5, None, None)]


def test_both_families_have_their_own_band() -> None:
    """A dual-stack pod has two open bands."""
    record = after(None, at(60), ips=["10.1.0.5", "fd00::5"])
    assert [band[0] for band in bands(record)] == ["10.1.0.5", "fd00::5"]


def test_unchanged_state_says_nothing_new() -> None:
    """A new version or a later look alone is not worth a record."""
    first = after(None, at(60))
    assert not intervals.differs(first, after(first, at(90), version="7"))
    assert intervals.differs(first, after(first, at(90), phase="Unknown"))
    assert intervals.differs(None, first)


def test_changed_address_ends_the_old_and_begins_the_new_within_the_lag() -> None:
    """The change happened after the old one was last known, less the status's lag, and before it was seen."""
    first = after(None, at(60))
    second = after(first, at(100, known=99), ip="10.1.0.9")
    assert bands(second) == [("10.1.0.5", 1, 5, 89, 100), ("10.1.0.9", 89, 100, None, None)]


def test_address_that_comes_back_gets_a_second_band_after_the_first() -> None:
    """Bands of one address never overlap."""
    record = after(after(after(None, at(60)), at(61), ip="10.1.0.9"), at(62), ip="10.1.0.5")
    assert bands(record) == [
        ("10.1.0.5", 1, 5, 50, 61),
        ("10.1.0.9", 50, 61, 51, 62),
        ("10.1.0.5", 61, 62, None, None),
    ]


def test_address_that_goes_away_ends() -> None:
    """A pod whose sandbox is being replaced has no address for a while."""
    record = after(after(None, at(60)), at(80), ips=[])
    assert bands(record) == [("10.1.0.5", 1, 5, 69, 80)]
    assert record["valid_to_us"] is None


def test_terminating_pod_may_have_ended_since_the_request() -> None:
    """The earliest end is there as soon as the request is seen, the latest when it's gone."""
    meta = {"deletionTimestamp": "2026-11-22T08:02:10Z", "deletionGracePeriodSeconds": 30}
    terminating = after(after(None, at(60)), at(101), meta=meta)
    assert bands(terminating) == [("10.1.0.5", 1, 5, 100, None)]
    gone = intervals.close("pods", terminating, at(120))
    assert bands(gone) == [("10.1.0.5", 1, 5, 100, 120)]
    assert gone["valid_to_us"] == CREATED_US + 120 * SECOND_US


def test_vanished_pod_ends_between_last_known_and_seen_gone() -> None:
    """Without any word of a deletion, what the last complete look knew is all there is."""
    gone = intervals.close("pods", after(None, at(60)), at(500, known=200))
    assert bands(gone) == [("10.1.0.5", 1, 5, 190, 500)]


def test_pod_vanished_while_its_deletion_was_asked_for_had_its_address_until_then() -> None:
    """The request is an earlier bound than the last complete look."""
    meta = {"deletionTimestamp": "2026-11-22T08:02:10Z", "deletionGracePeriodSeconds": 30}
    terminating = after(after(None, at(60)), at(101), meta=meta)
    assert bands(intervals.close("pods", terminating, at(500, known=200))) == [("10.1.0.5", 1, 5, 100, 500)]


def test_state_read_late_says_nothing_of_how_long_it_held() -> None:
    """A watch that stalled hands over two states at once: the second began somewhere in the stall."""
    first = after(None, at(60))
    stalled = after(first, at(100, known=59), phase="Unknown")
    assert bands(after(stalled, at(100, known=59), ip="10.1.0.9")) == [
        ("10.1.0.5", 1, 5, 49, 100),
        ("10.1.0.9", 49, 100, None, None),
    ]


def test_completed_pod_ends_with_its_last_container() -> None:
    """Whether seen live or long after, the end is the same, so that a reused address names its new owner."""
    state = {"terminated": {"startedAt": "2026-11-22T08:00:04Z", "finishedAt": "2026-11-22T08:01:40Z"}}
    ended = {"phase": "Succeeded", "statuses": [container(state=state)]}
    live, late = after(after(None, at(60)), at(103), **ended), after(None, at(9000), **ended)
    assert bands(live) == [("10.1.0.5", 1, 5, 100, 111)]
    assert live["valid_to_us"] == late["valid_to_us"] == CREATED_US + 100 * SECOND_US
    assert bands(late) == []  # older than the retention of this test
    assert bands(after(None, at(900), **ended)) == bands(live)


def test_completed_pod_stays_as_it_ended() -> None:
    """Neither a further state nor its deletion moves the end."""
    state = {"terminated": {"startedAt": "2026-11-22T08:00:04Z", "finishedAt": "2026-11-22T08:01:40Z"}}
    ended = {"phase": "Succeeded", "statuses": [container(state=state)]}
    first = after(None, at(103), **ended)
    assert not intervals.differs(first, after(first, at(200), version="9", **ended))
    assert not intervals.differs(first, intervals.close("pods", first, at(300)))


def test_address_that_came_back_unseen_before_the_end_is_not_forgotten() -> None:
    """A pod lost its address, and when it's seen again it has it once more and is completed."""
    state = {"terminated": {"startedAt": "2026-11-22T08:01:30Z", "finishedAt": "2026-11-22T08:01:40Z"}}
    without = after(after(None, at(60)), at(80), ips=[])
    ended = after(without, at(103, known=80), phase="Succeeded", statuses=[container(state=state)])
    assert bands(ended) == [("10.1.0.5", 1, 5, 69, 80), ("10.1.0.5", 80, 103, 100, 111)]


def test_completed_pods_end_says_nothing_of_an_address_that_it_had_before() -> None:
    """Its last containers ran with another address; when that one came nobody saw."""
    state = {"terminated": {"startedAt": "2026-11-22T08:01:30Z", "finishedAt": "2026-11-22T08:01:40Z"}}
    ended = {"phase": "Succeeded", "statuses": [container(state=state)]}
    record = after(after(None, at(60)), at(103, known=80), ip="10.1.0.9", **ended)
    assert bands(record) == [("10.1.0.5", 1, 5, 70, 113), ("10.1.0.9", 70, 103, 100, 111)]


def test_evicted_pod_ends_between_last_known_and_seen() -> None:
    """Without container statuses the end is known by observation only, and stays where it was put."""
    evicted = {"phase": "Failed", "statuses": []}
    first = after(after(None, at(60)), at(103), **evicted)
    assert bands(first) == [("10.1.0.5", 1, 5, 92, 113)]
    assert first["valid_to_us"] == CREATED_US + 103 * SECOND_US
    assert after(first, at(200), **evicted)["valid_to_us"] == first["valid_to_us"]


def test_pod_first_seen_evicted_was_sure_of_nothing() -> None:
    """Nobody knows when it ended, so it has a possible band and no sure one."""
    record = after(None, at(103), phase="Failed", statuses=[])
    assert bands(record) == [("10.1.0.5", 1, 103, 1, 113)]


def test_job_shorter_than_a_second_has_no_sure_time() -> None:
    """Start and end within the clock's resolution leave a possible band only."""
    state = {"terminated": {"startedAt": "2026-11-22T08:00:04Z", "finishedAt": "2026-11-22T08:00:04Z"}}
    record = after(None, at(60), phase="Succeeded", statuses=[container(state=state)])
    assert bands(record) == [("10.1.0.5", 1, 5, 4, 15)]


def test_pod_that_reappears_opens_a_new_band() -> None:
    """A manifest may lose a pod and get it back; the gap stays a gap."""
    gone = intervals.close("pods", after(None, at(60)), at(100))
    back = after(gone, at(200))
    assert bands(back) == [("10.1.0.5", 1, 5, 89, 100), ("10.1.0.5", 189, 200, None, None)]
    assert back["valid_to_us"] is None


def test_old_bands_are_dropped_after_the_retention() -> None:
    """A pod that lives for long does not collect addresses for ever."""
    changed = after(after(None, at(60)), at(100), ip="10.1.0.9")
    assert len(after(changed, at(3699), ip="10.1.0.9")["addresses"]) == 2
    assert bands(after(changed, at(3701), ip="10.1.0.9")) == [("10.1.0.9", 89, 100, None, None)]


def test_former_containers_are_kept_and_bounded() -> None:
    """A restart changes the id, and a replay still asks for the old one."""
    record = after(None, at(60))
    for number in range(2, 30):
        record = after(record, at(60 + number), statuses=[container(number=number)])
    ids = [int(one["container_id"], 16) for one in record["containers"]]
    assert ids == list(range(29, 18, -1))


def relabelled(previous: Record | None, moment: Moment, **labels: str) -> Record:
    """Return the record after the sample pod was seen with these labels."""
    one = seen("pods", pod(), CLUSTER)
    return intervals.advance(previous, replace(one, record=one.record | {"labels": labels}), moment)


def test_former_labels_hold_for_a_minute_more_and_are_kept_as_long_as_bands() -> None:
    """Whoever makes flows has a minute to hear of a change; a replay finds what held before."""
    first = relabelled(None, at(60), app="a")
    assert first["former"] == []
    second = relabelled(first, at(100), app="b")
    (former,) = second["former"]
    assert (former["labels"], former["until_us"]) == ({"app": "a"}, CREATED_US + 160 * SECOND_US)
    assert former["workload"] == first["workload"]
    assert relabelled(second, at(3759), app="b")["former"] == [former]
    assert relabelled(second, at(3760), app="b")["former"] == []


def test_former_labels_are_bounded() -> None:
    """A pod that is labelled again and again keeps the last ten changes."""
    record = relabelled(None, at(60), app="0")
    for number in range(1, 15):
        record = relabelled(record, at(60 + number), app=str(number))
    assert [one["labels"]["app"] for one in record["former"]] == [str(number) for number in range(4, 14)]


@pytest.mark.parametrize("kind", ["services", "nodes"])
def test_other_kinds_have_validity_only(kind: Any) -> None:
    """A service or node is valid from its creation until it was seen to be gone."""
    item = service() if kind == "services" else node()
    record = intervals.advance(None, seen(kind, item, CLUSTER), at(60))
    assert (record["valid_from_us"], record["valid_to_us"]) == (CREATED_US, None)
    gone = intervals.close(kind, record, at(90))
    assert gone["valid_to_us"] == CREATED_US + 90 * SECOND_US
    assert {**gone, "valid_to_us": None, "observed_unix_us": 0} == {**record, "observed_unix_us": 0}


def test_object_without_creation_time_is_valid_since_first_seen() -> None:
    """A hand-written manifest may lack the time; later looks don't move it."""
    bare = seen("nodes", {"metadata": {"name": "n", "uid": "u"}}, CLUSTER)
    first = intervals.advance(None, bare, at(60))
    assert (
        intervals.advance(first, bare, at(90))["valid_from_us"]
        == first["valid_from_us"]
        == at(60).observed_us
    )
