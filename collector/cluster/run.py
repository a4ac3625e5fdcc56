"""`python -m collector cluster`: waits for Kafka, takes over from earlier watchers, follows the source, publishes.

Owns the loop and the process's health; decides nothing about records. Called by `collector.__main__`.
"""

from __future__ import annotations

import time
from contextlib import closing
from typing import TYPE_CHECKING, Protocol

import structlog

from collector import health, kafka
from collector.cluster import settings as settings_
from collector.cluster.manifests import Manifests
from collector.cluster.metrics import Metrics
from collector.cluster.publish import Publisher, restore
from collector.cluster.records import KINDS
from collector.cluster.state import TOPICS, Complete, State
from collector.cluster.stop import Stop, StopRequested
from collector.errors import SchemaIdError
from schemas import catalog, registry

if TYPE_CHECKING:
    from collector.cluster.records import Kind
    from collector.cluster.settings import Settings
    from collector.cluster.state import Observation

log = structlog.get_logger()

RETRY_SECONDS_MAX = 5.0
RETRY_SECONDS_FIRST = 0.2
STALE_SECONDS = 60.0


class Source(Protocol):
    """Where objects come from."""

    name: str

    def poll(self, wait_seconds: float) -> list[Observation]:
        """Return what was observed next, in order, waiting at most `wait_seconds` for it."""

    def unhealthy(self) -> str | None:
        """Return why reading fails at present, None when it works."""

    def close(self) -> None:
        """Stop reading."""


class Waiting:
    """What the process waits for before it can start: said once, then tried again and again.

    Attributes:
        what: what it waits for at present, None when for nothing.
    """

    def __init__(self, stop: Stop) -> None:
        self._stop = stop
        self._said: set[str] = set()
        self._seconds = RETRY_SECONDS_FIRST
        self.what: str | None = None

    def __call__(self, what: str) -> None:
        """Say what is missing and sleep; StopRequested when asked to stop meanwhile."""
        self.what = what
        subject = what.partition(" (")[0]
        if subject not in self._said:
            self._said.add(subject)
            log.info("waiting", **{"for": what})
        if self._stop.wait(self._seconds):
            raise StopRequested
        self._seconds = min(self._seconds * 2, RETRY_SECONDS_MAX)

    def over(self) -> None:
        """Note that it waits for nothing any more."""
        self.what = None


class Watcher:
    """The loop: observe, work out what changed, publish.

    Attributes:
        caught_up: kinds whose whole present state has been published by this process.
    """

    def __init__(
        self, settings: Settings, stop: Stop, metrics: Metrics, state: State, publisher: Publisher
    ) -> None:
        self._interval_seconds = settings.watermark_interval_ms / 1000
        self._stop = stop
        self._metrics = metrics
        self._state = state
        self._publisher = publisher
        self._published_at = time.monotonic()
        self._due = 0.0
        self._complete: set[Kind] = set()
        self.caught_up = False

    def serve(self, source: Source) -> None:
        """Work until stopped, observing on while a broker is away; at the end publish what is known."""
        self._publisher.meanwhile = lambda: self._take_in(source.poll(0))
        while not self._stop.requested:
            wait_seconds = max(0.0, self._due - time.monotonic())
            self._take_in(source.poll(wait_seconds))
            if (self._state.changes or time.monotonic() >= self._due) and not self._publish():
                self._stop.wait(RETRY_SECONDS_FIRST)
        if self._state.changes:
            self._publish()

    def unhealthy(self) -> str | None:
        """Return what is wrong, None when the topics are complete and up to date."""
        if not self.caught_up:
            return "the first complete state has not been published yet"
        silent_seconds = time.monotonic() - self._published_at
        return f"nothing published for {silent_seconds:.0f} s" if silent_seconds > STALE_SECONDS else None

    def _take_in(self, observations: list[Observation]) -> None:
        for observation in observations:
            self._state.apply(observation)
            if isinstance(observation, Complete):
                self._complete.add(observation.kind)
        for kind, count in self._state.unencodable.items():
            self._metrics.dropped.labels(kind, "unencodable").inc(count)
        self._state.unencodable.clear()
        self._state.expire(now_us())
        self._metrics.unsent.set(len(self._state.changes))
        for kind in KINDS:
            self._metrics.present.labels(kind).set(self._state.present_count(kind))
            self._metrics.history.labels(kind).set(self._state.history_count(kind))

    def _publish(self) -> bool:
        unsent, complete = self._state.changes, set(self._complete)
        changes = dict(unsent)
        if not self._publisher.publish(changes, dict(self._state.complete_until_us)):
            return False
        for key, value in changes.items():
            (self._metrics.tombstones if value is None else self._metrics.written).labels(key[0]).inc()
            if unsent[key] is value:  # else it changed again meanwhile
                del unsent[key]
        self._metrics.unsent.set(len(unsent))
        self._published_at = time.monotonic()
        self._due = self._published_at + self._interval_seconds
        for kind in KINDS:
            self._metrics.complete_until.labels(kind).set(
                self._publisher.complete_until_us.get(kind, 0) / 1e6
            )
        if not self.caught_up and len(complete) == len(KINDS):
            self.caught_up = True
            log.info("caught_up", **{kind: self._state.present_count(kind) for kind in KINDS})
        return True


def now_us() -> int:
    """Return Unix time in us on this machine's clock."""
    return time.time_ns() // 1000


def run(arguments: list[str]) -> int:
    """Run the cluster watcher until SIGTERM or SIGINT; return the exit status. FatalError for what ends it."""
    settings = settings_.parse(arguments)
    stop, metrics = Stop(), Metrics()
    waiting = Waiting(stop)
    parts: list[Watcher | Source] = []

    def unhealthy() -> str | None:
        if waiting.what is not None or not parts:
            return f"waiting for {waiting.what or 'the start'}"
        return "; ".join(filter(None, (part.unhealthy() for part in parts))) or None

    with stop.on_signals():
        web = health.serve(settings.http_host, settings.http_port, metrics.registry, unhealthy)
        try:
            ids = _schema_ids(settings, waiting)
            source = _source(settings, stop, metrics)
            with closing(source):
                publisher, state = _publisher(settings, source.name, ids, stop, metrics)
                _take_over(settings, publisher, state, ids, waiting)
                watcher = Watcher(settings, stop, metrics, state, publisher)
                waiting.over()
                parts += [watcher, source]
                log.info("started", cluster=settings.cluster, source=source.name, http_port=web.server_port)
                watcher.serve(source)
        except StopRequested:
            log.info("stopped_while_waiting")
        finally:
            web.shutdown()
    log.info("stopped")
    return 0


def _schema_ids(settings: Settings, waiting: Waiting) -> registry.SchemaIds:
    """Return the registry, or the catalog in its place; SchemaIdError when it does not have our schemas."""
    ids = registry.connect(settings.registry_url, waiting)
    try:
        for topic in (*catalog.METADATA, catalog.WATERMARKS):
            ids.id_of(topic)
    except registry.UnknownSchemaError as error:
        raise SchemaIdError(f"Schema ids are missing: {error}.", "register the schemas first") from error
    return ids


def _source(settings: Settings, stop: Stop, metrics: Metrics) -> Source:
    """Return the source that the settings name; SettingsError without a way to the Kubernetes API."""
    cluster, labels = settings.cluster, settings.labels
    if settings.manifests is not None:
        return Manifests(
            settings.manifests,
            cluster=cluster,
            labels=labels,
            stop=stop,
            now_ns=time.time_ns,
            metrics=metrics,
        )
    from collector.cluster import follow, source  # noqa: PLC0415 (the Kubernetes client: 50 MB that manifests don't need)

    return follow.Following(
        source.Api(lambda: source.connect(settings.kubeconfig)),
        cluster=cluster,
        labels=labels,
        interval_seconds=settings.watermark_interval_ms / 1000,
        quiet_us=settings.watch_quiet_ms * 1000,
        now_us=now_us,
        metrics=metrics,
    )


def _publisher(
    settings: Settings, source: str, ids: registry.SchemaIds, stop: Stop, metrics: Metrics
) -> tuple[Publisher, State]:
    """Return the publisher and the empty state; nothing is sent yet."""
    transactional_id = f"podwire-watcher-{settings.cluster}"
    publisher = Publisher(
        kafka.producer(settings.bootstrap, transactional_id, transactional_id=transactional_id),
        cluster=settings.cluster,
        source=source,
        watermark_schema_id=ids.id_of(catalog.WATERMARKS),
        status_lag_us=settings.status_lag_us,
        stop=stop,
        metrics=metrics,
    )
    schema_ids = {kind: ids.id_of(topic) for kind, topic in TOPICS.items()}
    return publisher, State(settings.cluster, schema_ids, settings.status_lag_us, settings.retention_us)


def _take_over(
    settings: Settings, publisher: Publisher, state: State, ids: registry.SchemaIds, waiting: Waiting
) -> None:
    """Wait for Kafka and the topics, fence earlier watchers, and only then read what they have written."""
    for topic in (*catalog.METADATA, catalog.WATERMARKS):
        kafka.wait_for_topic(settings.bootstrap, topic, wait=waiting, partitions=topic.partitions)
    publisher.take_over(waiting)
    for topic in (*catalog.METADATA, catalog.WATERMARKS):
        restore(
            settings.bootstrap,
            topic,
            settings.cluster,
            state=state,
            publisher=publisher,
            ids=ids,
            wait=waiting,
        )
