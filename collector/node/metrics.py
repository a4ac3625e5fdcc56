"""The node collector's Prometheus metrics: one table, read from a snapshot.

Owns names and help texts. The collecting thread stores a snapshot, the web thread reads it. Labels are small enums,
never a pod or an address; why a tier was refused is a sentence, one per tier and the same as long as the process lives.
Called by `node.collect` and `node.run`.
"""

from __future__ import annotations

from dataclasses import dataclass
from textwrap import shorten
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from prometheus_client import Metric

    from collector.node.report import Counts

REASON_CHARACTERS_MAX = 200
FLUSH_EVENTS_BUCKETS = (1, 10, 100, 500, 1000, 2000, 4000, 8000)


@dataclass(frozen=True)
class Snapshot:
    """The state of the collector at one moment.

    Attributes:
        counts: what happened so far, as in the report.
        spool_written: events written to the spool by this process.
        spool_unreadable: events whose spool file was damaged.
        spool_unreadable_files: spool files set aside.
        spool_used_bytes: size of the spool's files.
        retries: batches that had to be sent again.
        names_told_again: cgroup names that the kernel had forgotten to have told.
        ring_use_ratio: share of the events ring that is not given back to the kernel, 0 to 1.
        clock_error_us: bound of the clock's reading error.
    """

    counts: Counts
    spool_written: int
    spool_unreadable: int
    spool_unreadable_files: int
    spool_used_bytes: int
    retries: int
    names_told_again: int
    ring_use_ratio: float
    clock_error_us: int


_COUNTERS: tuple[tuple[str, str, Callable[[Snapshot], int]], ...] = (
    (
        "attempted_events",
        "events that the probes tried to hand over since they were loaded",
        lambda s: s.counts.kernel["attempted"],
    ),
    ("received_events", "events read from the ring", lambda s: s.counts.received),
    ("published_events", "events that Kafka acknowledged", lambda s: s.counts.published),
    ("spool_written_events", "events written to the spool", lambda s: s.spool_written),
    (
        "untracked_closes",
        "closes of sockets that the probes did not know: open before and not found, or not remembered",
        lambda s: s.counts.kernel["untracked"],
    ),
    (
        "skipped_runs",
        "probe runs that the kernel left out, which bounds the transitions that were not shown",
        lambda s: s.counts.kernel.get("skipped_runs", 0),
    ),
    (
        "repeated_names",
        "cgroup names told again, because the probes' memory of told ones dropped them: raise PODWIRE_CGROUPS_MAX",
        lambda s: s.names_told_again,
    ),
    (
        "forgotten_connects",
        "calls of connect() under way that the probes gave up for others: raise PODWIRE_CONNECTS_MAX",
        lambda s: s.counts.kernel.get("forgotten_connects", 0),
    ),
    ("retried_batches", "batches that were sent again after a failed delivery", lambda s: s.retries),
    ("spool_set_aside_files", "spool files that could not be used", lambda s: s.spool_unreadable_files),
)
_GAUGES: tuple[tuple[str, str, Callable[[Snapshot], float]], ...] = (
    ("spool_waiting_events", "events in the spool now", lambda s: s.counts.spooled),
    (
        "in_flight_events",
        "events read that neither Kafka has acknowledged nor the spool holds",
        lambda s: s.counts.in_flight,
    ),
    ("spool_used_bytes", "size of the spool's files", lambda s: s.spool_used_bytes),
    (
        "ring_use_ratio",
        "share of the events ring not yet given back to the kernel",
        lambda s: s.ring_use_ratio,
    ),
    ("clock_error_microseconds", "bound of the clock measurement's error", lambda s: s.clock_error_us),
)


class Metrics(Collector):
    """The table, as Prometheus collects it.

    Attributes:
        registry: what `/metrics` shows.
        flush_events: histogram of events per reading of the ring.
    """

    def __init__(self, tier: str, version: str, refused: Mapping[str, str] | None = None) -> None:
        self.registry = CollectorRegistry()
        self.flush_events = Histogram(
            "podwire_node_flush_events",
            "events per reading of the ring",
            buckets=FLUSH_EVENTS_BUCKETS,
            registry=self.registry,
        )
        self._build = {"tier": tier, "version": version}
        self._refused = dict(refused or {})
        self._snapshot: Snapshot | None = None
        self.registry.register(self)

    def update(self, snapshot: Snapshot) -> None:
        """Show this state from now on."""
        self._snapshot = snapshot

    def collect(self) -> Iterator[Metric]:
        """Yield the metric families of the last snapshot."""
        yield InfoMetricFamily("podwire_node_build", "version and probe tier in use", value=self._build)
        refused = GaugeMetricFamily(
            "podwire_node_refused",
            "1 for each better tier, or pinning, that is not in use, with the reason that the log gives",
            labels=["what", "reason"],
        )
        for what, reason in self._refused.items():
            refused.add_metric([what, shorten(reason, REASON_CHARACTERS_MAX)], 1)
        yield refused
        snapshot = self._snapshot
        if snapshot is None:
            return
        for name, text, count in _COUNTERS:
            yield CounterMetricFamily(f"podwire_node_{name}", text, value=count(snapshot))
        for name, text, value in _GAUGES:
            yield GaugeMetricFamily(f"podwire_node_{name}", text, value=value(snapshot))
        lost = CounterMetricFamily("podwire_node_lost_events", "events lost, by reason", labels=["reason"])
        for reason, count_lost in {
            **snapshot.counts.lost(),
            "spool_unreadable": snapshot.spool_unreadable,
        }.items():
            lost.add_metric([reason], count_lost)
        yield lost
