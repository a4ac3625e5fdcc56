"""Follows the Kubernetes API and never gives up: one thread per kind lists and watches, one asks for versions.

All fill one bounded queue, which `run` empties by `poll`: while Kafka is slow the watches wait, and one that waited
too long gets 410 and lists again. Keeps no objects: `state` finds out what a new list changed, by uid. Never
imports the client library (`source` does). Called by `run` as one of the two sources.
"""

from __future__ import annotations

import itertools
import queue
import random
import threading
import time
from typing import TYPE_CHECKING, Any

import structlog

from collector.cluster.completeness import Completeness
from collector.cluster.records import KINDS, MalformedError, seen
from collector.cluster.source import ApiError, ExpiredError
from collector.cluster.state import Complete, Gone, ListBegins, ListEnds, Present

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    from collector.cluster.metrics import Metrics
    from collector.cluster.records import Kind, Seen
    from collector.cluster.source import Api, Watch
    from collector.cluster.state import Observation

log = structlog.get_logger()

QUEUE_OBSERVATIONS_MAX = 1000
POLL_OBSERVATIONS_MAX = 5000
WATCH_SECONDS_MIN, WATCH_SECONDS_MAX = 240, 480
BACKOFF_SECONDS_FIRST, BACKOFF_SECONDS_MAX = 0.5, 30.0
LIVELY_SECONDS = 5.0
CLOSE_SECONDS_MAX = 2.0


class StoppedError(Exception):
    """The source is being closed."""


def delays(first_seconds: float, random_: random.Random) -> Iterator[float]:
    """Yield waits in seconds: doubling up to 30 s, each shortened at random by up to a half."""
    for attempt in itertools.count():
        full = min(first_seconds * 2 ** min(attempt, 16), BACKOFF_SECONDS_MAX)
        yield full * random_.uniform(0.5, 1.0)


class Following:
    """The source that follows the API; its threads start with the first `poll`."""

    name = "kubernetes"

    def __init__(
        self,
        api: Api,
        *,
        cluster: str,
        labels: Collection[str],
        interval_seconds: float,
        quiet_us: int,
        now_us: Callable[[], int],
        metrics: Metrics,
        backoff_seconds_first: float = BACKOFF_SECONDS_FIRST,
        watch_seconds: tuple[int, int] = (WATCH_SECONDS_MIN, WATCH_SECONDS_MAX),
    ) -> None:
        self.api = api
        self.cluster = cluster
        self.labels = labels
        self.interval_seconds = interval_seconds
        self.now_us = now_us
        self.metrics = metrics
        self.backoff_seconds_first = backoff_seconds_first
        self.watch_seconds = watch_seconds
        self.stopping = threading.Event()
        self._queue: queue.Queue[Observation] = queue.Queue(QUEUE_OBSERVATIONS_MAX)
        self._troubles: dict[str, str] = {}
        self._followers = {kind: _Follower(self, kind, Completeness(quiet_us)) for kind in KINDS}
        self._threads = [
            *(
                threading.Thread(target=one.follow, name=f"watch-{kind}", daemon=True)
                for kind, one in self._followers.items()
            ),
            threading.Thread(target=self._ask_versions, name="ask-versions", daemon=True),
        ]
        self._started = False

    def poll(self, wait_seconds: float) -> list[Observation]:
        """Return what the threads handed over, waiting at most `wait_seconds` for the first."""
        if not self._started:
            self._started = True
            for thread in self._threads:
                thread.start()
        assert all(thread.is_alive() for thread in self._threads), "a thread of the source died"
        found: list[Observation] = []
        try:
            found.append(self._queue.get(timeout=wait_seconds))
            while len(found) < POLL_OBSERVATIONS_MAX:
                found.append(self._queue.get_nowait())
        except queue.Empty:
            pass
        return found

    def unhealthy(self) -> str | None:
        """Return which reads fail at present, None when none does."""
        return "; ".join(f"{what}: {trouble}" for what, trouble in sorted(self._troubles.items())) or None

    def close(self) -> None:
        """End the watches and the threads; a read under way is given up after 2 s."""
        self.stopping.set()
        for follower in self._followers.values():
            follower.cancel()
        deadline = time.monotonic() + CLOSE_SECONDS_MAX
        for thread in self._threads if self._started else ():
            thread.join(max(0.0, deadline - time.monotonic()))

    def put(self, observation: Observation) -> None:
        """Hand over an observation, waiting for room; StoppedError when the source is closed meanwhile."""
        while not self.stopping.is_set():
            try:
                self._queue.put(observation, timeout=1.0)
            except queue.Full:
                continue
            return
        raise StoppedError

    def trouble(self, what: str, error: ApiError) -> None:
        """Count a failed request, and say it once until it changes or goes away."""
        said, self._troubles[what] = self._troubles.get(what), str(error)
        self.metrics.source_errors.labels(what, error.reason).inc()
        if said != str(error) and not self.stopping.is_set():
            log.warning("kubernetes_request_failed", kind=what, reason=error.reason, error=str(error))

    def fine(self, what: str) -> None:
        """Note that requests work."""
        if self._troubles.pop(what, None) is not None:
            log.info("kubernetes_request_works_again", kind=what)

    def backoff(self) -> Iterator[float]:
        """Return fresh delays."""
        return delays(self.backoff_seconds_first, random.Random())  # noqa: S311 (jitter)

    def _ask_versions(self) -> None:
        """Ask for the store's version of each kind that has been listed, again and again."""
        backoff, wait_seconds = self.backoff(), self.interval_seconds
        while not self.stopping.wait(wait_seconds):
            try:
                for follower in self._followers.values():
                    follower.ask_version()
                self.fine("versions")
                backoff, wait_seconds = self.backoff(), self.interval_seconds
            except StoppedError:
                return
            except ExpiredError:
                continue
            except ApiError as error:
                self.trouble("versions", error)
                wait_seconds = max(self.interval_seconds, next(backoff))


class _Follower:
    """One kind's list and watch."""

    def __init__(self, source: Following, kind: Kind, completeness: Completeness) -> None:
        self._source = source
        self._kind: Kind = kind
        self._completeness = completeness
        self._lock = threading.Lock()
        self._version: str | None = None
        self._watch: Watch | None = None
        self._brought = 0

    def follow(self) -> None:
        """List and watch until the source is closed; what fails is tried again, later and later."""
        source, backoff = self._source, self._source.backoff()
        while not source.stopping.is_set():
            started, self._brought = time.monotonic(), 0
            try:
                if self._version is None:
                    self._version = self._list()
                self._follow_watch(self._version)
            except StoppedError:
                return
            except ExpiredError:
                log.info("watch_expired", kind=self._kind)
                source.metrics.source_errors.labels(self._kind, "expired").inc()
                self._version, backoff = None, source.backoff()
            except ApiError as error:
                source.trouble(self._kind, error)
            if self._brought or time.monotonic() - started > LIVELY_SECONDS:
                backoff = source.backoff()
            source.stopping.wait(next(backoff))

    def ask_version(self) -> None:
        """Ask for the store's version and note it, if a list has been read."""
        if self._version is None:
            return
        asked_us = self._source.now_us()
        version = self._source.api.version(self._kind)
        with self._lock:
            self._completeness.asked(version, asked_us)
        self._advance()

    def cancel(self) -> None:
        """End a watch that waits."""
        watch = self._watch
        if watch is not None:
            watch.cancel()

    def _list(self) -> str:
        """Hand over all objects and return the version that they show."""
        kind, put, asked_us = self._kind, self._source.put, self._source.now_us()
        put(ListBegins(kind))
        read_us, version = asked_us, ""
        for items, page_version in self._source.api.pages(kind):
            read_us, version = self._source.now_us(), page_version
            put(Present(kind, tuple(self._usable(items)), read_us))
        put(ListEnds(kind, read_us))
        put(Complete(kind, asked_us))
        self._reached(version)
        self._source.fine(kind)
        return version

    def _follow_watch(self, version: str) -> None:
        """Hand over a watch's events until it ends."""
        timeout_seconds = random.randint(*self._source.watch_seconds)  # noqa: S311 (spreads reconnects)
        with self._source.api.watch(self._kind, version, timeout_seconds) as watch:
            self._watch = watch
            if self._source.stopping.is_set():
                raise StoppedError
            try:
                with self._lock:
                    self._completeness.opened(self._source.now_us())
                for change, item in watch.events():
                    self._hand_over(change, item)
                    self._version = item["metadata"]["resourceVersion"]
                    self._brought += 1
                    self._source.fine(self._kind)
                    self._reached(self._version)
                    self._advance()
            finally:
                self._watch = None
                with self._lock:
                    self._completeness.closed()

    def _hand_over(self, change: str, item: Any) -> None:
        """Put one event; a deleted object's last state goes first, for it says when the end began."""
        if change == "BOOKMARK":
            return
        now_us = self._source.now_us()
        if usable := self._usable([item]):
            self._source.put(Present(self._kind, tuple(usable), now_us))
        if change == "DELETED" and item["metadata"].get("uid"):
            self._source.put(Gone(self._kind, item["metadata"]["uid"], now_us))

    def _usable(self, items: list[Any]) -> list[Seen]:
        """Return what we keep of the objects; those that can't be used are counted."""
        found = []
        for item in items:
            try:
                found.append(seen(self._kind, item, self._source.cluster, self._source.labels))
            except MalformedError:
                self._source.metrics.malformed(self._kind)
        return found

    def _reached(self, version: str) -> None:
        with self._lock:
            self._completeness.reached(version, self._source.now_us())

    def _advance(self) -> None:
        with self._lock:
            until_us = self._completeness.until_us(self._source.now_us())
        if until_us is not None:
            self._source.put(Complete(self._kind, until_us))
