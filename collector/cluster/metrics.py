"""The cluster watcher's metrics, one table.

Owns names and labels; labels are small enums, never an object's name. Called by the sources, `publish` and `run`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge

if TYPE_CHECKING:
    from collector.cluster.records import Kind


class Metrics:
    """Counters and gauges in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.present = self._gauge("objects", "Objects that are there now.", ["kind"])
        self.history = self._gauge("history_objects", "Deleted objects that are kept for replays.", ["kind"])
        self.unsent = self._gauge("unsent_records", "Changed records that Kafka doesn't have yet.")
        self.complete_until = self._gauge(
            "complete_until_seconds", "Unix time up to which the kind's topic is complete.", ["kind"]
        )
        self.written = self._counter("records_written", "Records written and committed.", ["kind"])
        self.tombstones = self._counter("tombstones_written", "Tombstones written and committed.", ["kind"])
        self.transactions = self._counter("transactions", "Transactions by result.", ["result"])
        self.dropped = self._counter(
            "dropped_objects", "Objects that were not published, by reason.", ["kind", "reason"]
        )
        self.source_errors = self._counter(
            "source_errors", "Failed reads of the source, by reason.", ["kind", "reason"]
        )

    def malformed(self, kind: Kind) -> None:
        """Count an object that lacks what every object has."""
        self.dropped.labels(kind, "malformed").inc()

    def _gauge(self, name: str, text: str, labels: list[str] | None = None) -> Gauge:
        return Gauge(f"podwire_watcher_{name}", text, labels or [], registry=self.registry)

    def _counter(self, name: str, text: str, labels: list[str] | None = None) -> Counter:
        return Counter(f"podwire_watcher_{name}", text, labels or [], registry=self.registry)
