"""Following the Kubernetes API through everything that it does to its clients."""

from __future__ import annotations

import random
import time
from itertools import islice
from typing import TYPE_CHECKING, Any

import pytest
from kubernetes import client

from collector.cluster.follow import Following, delays
from collector.cluster.metrics import Metrics
from collector.cluster.records import KINDS, Kind, Record
from collector.cluster.source import Api
from collector.cluster.state import TOPICS, Complete, State
from schemas import codec
from tests.apiserver import ApiServer
from tests.objects import CLUSTER, CREATED_US, SECOND_US, node, pod, service

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DEADLINE_SECONDS = 20.0


class Watcher:
    """A source on the test's API server, and the state that it leads to."""

    def __init__(self, server: ApiServer, **options: Any) -> None:
        self.server = server
        self.connections = 0
        self.metrics = Metrics()
        self.complete: list[Complete] = []
        silence_seconds = options.pop("watch_silence_seconds", 15.0)
        settings = {"interval_seconds": 0.05, "quiet_us": 0, "backoff_seconds_first": 0.05} | options
        self.source = Following(
            Api(self.connect, silence_seconds),
            cluster=CLUSTER,
            labels=(),
            now_us=lambda: time.time_ns() // 1000,
            metrics=self.metrics,
            **settings,
        )
        ids: dict[Kind, int] = {kind: topic.schema_id for kind, topic in TOPICS.items()}
        self.state = State(CLUSTER, ids, 10 * SECOND_US, 10**15)
        self.records: dict[str, Record] = {}

    def connect(self) -> Any:
        """Return a client with a token of its own."""
        self.connections += 1
        settings = client.Configuration(host=self.server.url)
        settings.api_key["BearerToken"] = f"Bearer token-{self.connections}"
        settings.retries = False
        return client.CoreV1Api(client.ApiClient(settings))

    def until(self, condition: Callable[[], Any]) -> None:
        """Take in what the source brings until a condition holds; fail after a while."""
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not condition():
            assert time.monotonic() < deadline, (
                self.names(),
                self.source.unhealthy(),
                self.server.requests[-5:],
            )
            for observation in self.source.poll(0.02):
                self.state.apply(observation)
                if isinstance(observation, Complete):
                    self.complete.append(observation)
            for (kind, _), value in self.state.changes.items():
                assert value is not None
                record = codec.decode(TOPICS[kind].schema, value)
                self.records[record["uid"]] = record
            self.state.changes.clear()

    def names(self) -> set[str]:
        """Return the names of what is there."""
        return {record["name"] for record in self.records.values() if record["valid_to_us"] is None}

    def errors(self, kind: str, reason: str) -> float:
        """Return how often reading failed for a reason."""
        labels = {"kind": kind, "reason": reason}
        return self.metrics.registry.get_sample_value("podwire_watcher_source_errors_total", labels) or 0.0

    def watching(self) -> bool:
        """Return whether all kinds are being watched."""
        return all(
            self.server.count(kind, watch="true") + self.server.count(kind, watch="True") for kind in KINDS
        )

    def complete_since(self, kind: Kind, since_us: int) -> bool:
        """Return whether a kind is complete up to a time."""
        return any(one.kind == kind and one.until_us >= since_us for one in self.complete)


@pytest.fixture
def server() -> Iterator[ApiServer]:
    """An API server with five pods, a service and a node."""
    server = ApiServer()
    for item in (*(pod(f"p{i}", ip=f"10.1.0.{i + 1}") for i in range(5)), service("s"), node("n")):
        server.put(item)
    yield server
    server.close()


@pytest.fixture
def watcher(server: ApiServer) -> Iterator[Watcher]:
    """A watcher that has listed everything and watches."""
    watcher = Watcher(server)
    watcher.until(lambda: len(watcher.names()) == 7 and watcher.watching())
    yield watcher
    watcher.source.close()


def test_list_comes_in_pages_and_is_complete_since_its_start(server: ApiServer) -> None:
    """Three pages make one list; completeness counts from before the first."""
    watcher, before_us = Watcher(server), time.time_ns() // 1000
    watcher.until(lambda: all(watcher.complete_since(kind, before_us) for kind in KINDS))
    assert watcher.names() == {"p0", "p1", "p2", "p3", "p4", "s", "n"}
    assert sum("continue" in query for kind, query, _ in server.requests if kind == "pods") == 2
    watcher.source.close()


def test_watch_brings_changes(server: ApiServer, watcher: Watcher) -> None:
    """Added, changed and deleted objects arrive without another list."""
    server.put(pod("new"))
    server.put(pod("p0", ip="10.1.0.99"))
    server.delete("pods", "uid-p1")
    watcher.until(lambda: "new" in watcher.names() and "p1" not in watcher.names())
    watcher.until(lambda: watcher.records["uid-p0"]["addresses"][-1]["address"] == "10.1.0.99")
    assert watcher.records["uid-p1"]["addresses"][0]["to_latest_us"] is not None
    assert server.count("pods", limit="500") == 3


def test_last_state_of_a_deleted_pod_counts(server: ApiServer, watcher: Watcher) -> None:
    """The DELETED event says since when the pod was ending."""
    meta = {"deletionTimestamp": "2026-11-22T08:02:10Z", "deletionGracePeriodSeconds": 30}
    server.delete("pods", "uid-p1", **meta)
    watcher.until(lambda: watcher.records["uid-p1"]["valid_to_us"] is not None)
    assert watcher.records["uid-p1"]["addresses"][0]["to_earliest_us"] == CREATED_US + 100 * SECOND_US


@pytest.mark.parametrize("form", ["http", "event"])
def test_expired_watch_lists_again_and_finds_the_difference(
    server: ApiServer, watcher: Watcher, form: str
) -> None:
    """After a 410, as a status or as an event, what changed unseen is found, a recreated pod as another one."""
    server.gone_as = form
    with server.changed:
        server.delete("pods", "uid-p0")
        server.delete("pods", "uid-p1")
        server.put(pod("p1", uid="second", ip="10.1.0.2"))
        server.forget()
    watcher.until(lambda: "p0" not in watcher.names() and "second" in watcher.records)
    watcher.until(lambda: watcher.records["uid-p1"]["valid_to_us"] is not None)
    assert watcher.names() == {"p1", "p2", "p3", "p4", "s", "n"}
    watcher.until(lambda: watcher.errors("pods", "expired") >= 1)


def test_list_that_expires_between_pages_begins_again(server: ApiServer) -> None:
    """The third form of 410: a continue token that is too old."""
    watcher, serve_page, expired = Watcher(server), server.page, []

    def page(kind: str, query: dict[str, str]) -> Any:
        if kind == "pods" and "continue" in query and not expired:
            expired.append(query)
            server.delete("pods", "uid-p0")
            server.forget()
        return serve_page(kind, query)

    server.page = page  # type: ignore[method-assign]
    watcher.until(lambda: watcher.complete_since("pods", 1))
    assert expired
    assert watcher.names() >= {"p1", "p2", "p3", "p4"}
    assert "p0" not in watcher.names()
    watcher.source.close()


def test_bookmark_makes_a_quiet_kind_complete(server: ApiServer, watcher: Watcher) -> None:
    """Other kinds move the store's version on; only a bookmark tells that there is nothing between."""
    server.put(node("n2"))
    moved_us = time.time_ns() // 1000
    asked = server.count("pods", limit="1")
    watcher.until(lambda: server.count("pods", limit="1") > asked + 1)
    assert not watcher.complete_since("pods", moved_us)
    server.bookmark("pods")
    watcher.until(lambda: watcher.complete_since("pods", moved_us))


def test_quiet_watch_is_complete_without_bookmarks(server: ApiServer) -> None:
    """Where the quiet time is allowed to count, watermarks go on in a quiet kind."""
    watcher = Watcher(server, quiet_us=100_000)
    watcher.until(watcher.watching)
    server.put(node("n2"))
    moved_us = time.time_ns() // 1000
    watcher.until(lambda: watcher.complete_since("services", moved_us))
    watcher.source.close()


def test_stalled_watch_is_given_up_and_goes_on_where_it_was(server: ApiServer) -> None:
    """A server that says nothing, not even at the watch's end, is not waited for for ever."""
    watcher = Watcher(server, watch_seconds=(1, 1), watch_silence_seconds=0.2)
    watcher.until(watcher.watching)
    server.stalled = True
    server.put(pod("new"))
    watcher.until(lambda: watcher.errors("pods", "unreachable") >= 1)
    server.stalled = False
    watcher.until(lambda: "new" in watcher.names())
    assert server.count("pods", limit="500") == 3
    watcher.source.close()


def test_missing_permission_is_named_and_waited_out(server: ApiServer) -> None:
    """A 403 is tried again like any other error, and health says which permission is missing."""
    server.failing["pods"].extend([403] * 1000)
    watcher = Watcher(server)
    watcher.until(lambda: watcher.names() == {"s", "n"} and watcher.errors("pods", "forbidden") >= 2)
    assert 'cannot list resource "pods"' in (watcher.source.unhealthy() or "")
    server.failing["pods"].clear()
    watcher.until(lambda: len(watcher.names()) == 7 and watcher.source.unhealthy() is None)
    watcher.source.close()


def test_refused_token_is_read_again(server: ApiServer) -> None:
    """After a 401 the credentials are read anew and used."""
    server.failing["nodes"].append(401)
    watcher = Watcher(server)
    watcher.until(lambda: len(watcher.names()) == 7)
    assert watcher.errors("nodes", "unauthorized") == 1
    assert watcher.connections == 2
    assert "Bearer token-2" in {token for _, _, token in server.requests}
    watcher.source.close()


@pytest.mark.parametrize("status", [429, 500, 503])
def test_server_errors_are_retried(server: ApiServer, status: int) -> None:
    """An overloaded or restarting server is asked again."""
    for failing in server.failing.values():
        failing.extend([status] * 2)
    watcher = Watcher(server)
    watcher.until(lambda: len(watcher.names()) == 7)
    assert watcher.errors("pods", "refused") == 2
    watcher.source.close()


def test_server_that_is_away_is_waited_for() -> None:
    """The watcher may start before the API server answers."""
    away = ApiServer()
    away.close()
    watcher = Watcher(away)
    watcher.until(lambda: watcher.errors("nodes", "unreachable") >= 2)
    assert watcher.source.unhealthy() is not None
    watcher.source.close()


@pytest.mark.parametrize(
    "line",
    [
        '{"type": "ADDED", "object',
        '{"type":"ADDED"}',
        '{"type":"ERROR","object":{"code":500,"message":"x"}}',
        "[]",
    ],
    ids=["cut", "no_object", "error_event", "array"],
)
def test_unreadable_event_reconnects(server: ApiServer, watcher: Watcher, line: str) -> None:
    """What can't be understood ends the watch; the next one goes on from the last good version."""
    before = server.count("pods", limit="500")
    server.raw("pods", line)
    watcher.until(lambda: watcher.errors("pods", "unreadable") + watcher.errors("pods", "refused") >= 1)
    server.put(pod("new"))
    watcher.until(lambda: "new" in watcher.names())
    assert server.count("pods", limit="500") == before


def test_unusable_object_is_counted(server: ApiServer, watcher: Watcher) -> None:
    """An object without what every object has is left out, and the watch goes on."""
    server.put({"kind": "Pod", "metadata": {"uid": "broken"}})
    server.put(pod("new"))
    watcher.until(lambda: "new" in watcher.names())
    labels = {"kind": "pods", "reason": "malformed"}
    assert watcher.metrics.registry.get_sample_value("podwire_watcher_dropped_objects_total", labels) == 1


def test_close_ends_threads_that_wait_for_events(server: ApiServer, watcher: Watcher) -> None:
    """Nothing is left behind: a watch that waits is woken."""
    watcher.source.close()
    assert not any(thread.is_alive() for thread in watcher.source._threads)


def test_delays_double_with_jitter_up_to_a_bound() -> None:
    """Each wait is between half and all of 0.5, 1, 2, ... 30 s."""
    for index, seconds in enumerate(islice(delays(0.5, random.Random(1)), 40)):
        full = min(0.5 * 2**index, 30.0)
        assert full / 2 <= seconds <= full
