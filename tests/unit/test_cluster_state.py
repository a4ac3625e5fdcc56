"""What has to be written after each observation."""

from __future__ import annotations

from typing import Any

import pytest

from collector.cluster.records import Kind, Record, seen
from collector.cluster.state import TOPICS, Complete, Gone, ListBegins, ListEnds, Present, State
from schemas import codec
from tests.objects import CLUSTER, CREATED_US, SECOND_US, node, pod, service

MINUTE_US = 60 * SECOND_US
LAG_US = 10 * SECOND_US
RETENTION_US = 60 * MINUTE_US
NOW_US = CREATED_US + 10 * MINUTE_US
IDS: dict[Kind, int] = {kind: topic.schema_id for kind, topic in TOPICS.items()}


def empty() -> State:
    """Return a state that knows nothing."""
    return State(CLUSTER, IDS, LAG_US, RETENTION_US)


def see(state: State, kind: Kind, *items: dict[str, Any], at_us: int = NOW_US) -> None:
    """Let the source hand over objects."""
    state.apply(Present(kind, tuple(seen(kind, item, CLUSTER) for item in items), at_us))


def see_all(state: State, kind: Kind, *items: dict[str, Any], at_us: int = NOW_US) -> None:
    """Let the source hand over all objects of a kind."""
    state.apply(ListBegins(kind))
    see(state, kind, *items, at_us=at_us)
    state.apply(ListEnds(kind, at_us))


def taken(state: State) -> dict[tuple[Kind, str], Record | None]:
    """Return the changes, decoded, and take them as written."""
    found = {
        (kind, uid): None if value is None else codec.decode(TOPICS[kind].schema, value)
        for (kind, uid), value in state.changes.items()
    }
    state.changes.clear()
    return found


def test_only_changed_records_are_written() -> None:
    """A second look at the same objects writes nothing; one changed pod is one record."""
    state = empty()
    see_all(state, "pods", pod("a"), pod("b"))
    assert set(taken(state)) == {("pods", "uid-a"), ("pods", "uid-b")}
    see_all(state, "pods", pod("a"), pod("b"))
    see_all(state, "pods", pod("a", version="2"), pod("b", version="2"))
    assert taken(state) == {}
    see_all(state, "pods", pod("a", version="3", phase="Unknown"), pod("b", version="2"))
    assert set(taken(state)) == {("pods", "uid-a")}


@pytest.mark.parametrize("version", ["", "1"], ids=["none", "same"])
def test_objects_are_compared_by_content(version: str) -> None:
    """Manifests edited by hand have no resourceVersion, or keep the one that they had."""
    state = empty()
    see_all(state, "services", service(version=version))
    taken(state)
    see_all(
        state,
        "services",
        service(version=version, spec={"clusterIP": "10.96.0.8", "clusterIPs": ["10.96.0.8"]}),
    )
    assert set(taken(state)) == {("services", "uid-svc-api")}


def test_heartbeats_of_nodes_write_nothing() -> None:
    """A node's version grows with every heartbeat."""
    state = empty()
    see(state, "nodes", node())
    taken(state)
    see(state, "nodes", node(version="2"))
    assert taken(state) == {}


def test_vanished_object_is_closed_once() -> None:
    """What a full list doesn't show is gone, since it was last known completely."""
    state = empty()
    see_all(state, "pods", pod("a"), pod("b"))
    state.apply(Complete("pods", NOW_US))
    taken(state)
    see_all(state, "pods", pod("b"), at_us=NOW_US + MINUTE_US)
    closed = taken(state)["pods", "uid-a"]
    assert closed is not None
    assert closed["valid_to_us"] == NOW_US + MINUTE_US
    band = closed["addresses"][0]
    assert (band["to_earliest_us"], band["to_latest_us"]) == (NOW_US - LAG_US, NOW_US + MINUTE_US)
    see_all(state, "pods", pod("b"), at_us=NOW_US + 2 * MINUTE_US)
    assert taken(state) == {}
    assert (state.present_count("pods"), state.history_count("pods")) == (1, 1)


def test_recreated_pod_is_another_pod() -> None:
    """Same name, other uid: the old one ends and the new one begins, in one change set."""
    state = empty()
    see_all(state, "pods", pod("a", uid="old"))
    taken(state)
    see_all(state, "pods", pod("a", uid="new", ip="10.1.0.6"), at_us=NOW_US + MINUTE_US)
    changes = taken(state)
    old, new = changes["pods", "old"], changes["pods", "new"]
    assert old is not None
    assert new is not None
    assert (old["valid_to_us"], new["valid_to_us"]) == (NOW_US + MINUTE_US, None)


def test_deletion_seen_by_a_watch_closes() -> None:
    """A DELETED event closes; one for an object that nobody knows is no news."""
    state = empty()
    see(state, "pods", pod("a"))
    taken(state)
    state.apply(Gone("pods", "uid-a", NOW_US + MINUTE_US))
    state.apply(Gone("pods", "uid-stranger", NOW_US + MINUTE_US))
    state.apply(Gone("pods", "uid-a", NOW_US + 2 * MINUTE_US))
    changes = taken(state)
    assert set(changes) == {("pods", "uid-a")}
    closed = changes["pods", "uid-a"]
    assert closed is not None
    assert closed["valid_to_us"] == NOW_US + MINUTE_US


def test_list_that_was_given_up_closes_nothing() -> None:
    """A list cut off in the middle (410) begins again; only a whole one tells what is gone."""
    state = empty()
    see_all(state, "pods", pod("a"), pod("b"))
    taken(state)
    state.apply(ListBegins("pods"))
    see(state, "pods", pod("a"))
    see_all(state, "pods", pod("b"))
    assert set(taken(state)) == {("pods", "uid-a")}


def test_gone_objects_become_tombstones_after_the_retention() -> None:
    """History stays as long as the longest replay, and not longer."""
    state = empty()
    see_all(state, "pods", pod("a"), pod("b"))
    see_all(state, "pods", pod("b"), at_us=NOW_US + MINUTE_US)
    taken(state)
    state.expire(NOW_US + MINUTE_US + RETENTION_US)
    assert taken(state) == {}
    state.expire(NOW_US + MINUTE_US + RETENTION_US + 1)
    assert taken(state) == {("pods", "uid-a"): None}
    assert state.history_count("pods") == 0


def test_object_that_came_back_is_not_expired() -> None:
    """A pod that a manifest lost for a while lives on."""
    state = empty()
    for items in ([pod("a")], [], [pod("a")]):
        see_all(state, "pods", *items)
    taken(state)
    state.expire(NOW_US + 10 * RETENTION_US)
    assert taken(state) == {}


def test_completed_pod_is_not_expired_while_it_is_there() -> None:
    """The API may keep a completed Job's pod longer than our retention; forgetting it would write it anew."""
    state = empty()
    see_all(state, "pods", pod("a", phase="Succeeded"))
    taken(state)
    state.expire(NOW_US + 10 * RETENTION_US)
    assert taken(state) == {}
    see_all(state, "pods")
    state.expire(NOW_US + 10 * RETENTION_US)
    assert taken(state) == {("pods", "uid-a"): None}


def test_restored_state_goes_on_as_if_never_stopped() -> None:
    """A new process knows what was published, closes what vanished meanwhile and repeats nothing."""
    before = empty()
    see_all(before, "pods", pod("a"), pod("b"), pod("gone"))
    see_all(before, "pods", pod("a"), pod("b"))
    after = empty()
    for record in taken(before).values():
        assert record is not None
        after.restore("pods", record)
    after.complete_until_us["pods"] = NOW_US
    assert (after.present_count("pods"), after.history_count("pods")) == (2, 1)
    see_all(after, "pods", pod("a"), at_us=NOW_US + MINUTE_US)
    changes = taken(after)
    assert set(changes) == {("pods", "uid-b")}
    closed = changes["pods", "uid-b"]
    assert closed is not None
    assert closed["addresses"][0]["to_earliest_us"] == NOW_US - LAG_US
    after.expire(NOW_US + RETENTION_US + 1)
    assert taken(after) == {("pods", "uid-gone"): None}


def test_restore_takes_the_last_word_on_an_object() -> None:
    """A topic that isn't compacted yet holds earlier states and tombstoned objects."""
    before, after = empty(), empty()
    see_all(before, "pods", pod("a"))
    alive = taken(before)["pods", "uid-a"]
    see_all(before, "pods")
    ended = taken(before)["pods", "uid-a"]
    assert alive is not None
    assert ended is not None
    for record in (alive, ended, alive):
        after.restore("pods", record)
    assert (after.present_count("pods"), after.history_count("pods")) == (1, 0)
    after.forget("pods", "uid-a")
    assert (after.present_count("pods"), after.history_count("pods")) == (0, 0)


def test_restore_ignores_other_clusters() -> None:
    """Another cluster's watcher may write to the same topics; its pods are not ours to close."""
    before, after = empty(), empty()
    see_all(before, "pods", pod("a"))
    record = taken(before)["pods", "uid-a"]
    assert record is not None
    after.restore("pods", record | {"cluster": "other"})
    see_all(after, "pods")
    assert taken(after) == {}


def test_completeness_never_goes_back() -> None:
    """A later, lower claim (a clock set back) does not undo an earlier one."""
    state = empty()
    state.apply(Complete("pods", NOW_US))
    state.apply(Complete("pods", NOW_US - 1))
    assert state.complete_until_us == {"pods": NOW_US}


def test_state_that_the_schema_does_not_take_is_counted_and_left_out() -> None:
    """A hand-made manifest may hold anything; one bad object stops nothing."""
    state = empty()
    see_all(state, "services", service("bad", spec={"type": 7}), service("good"))
    assert set(taken(state)) == {("services", "uid-svc-good")}
    assert state.unencodable == {"services": 1}
