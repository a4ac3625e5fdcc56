"""The enricher's metrics: plain counters on the hot path, and one table that Prometheus reads them through.

Owns names and help texts. Never a label with a pod, an address or a node. Called by `engine` and `run`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from enricher.pair import PairCounts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from prometheus_client.metrics_core import Metric


@dataclass
class Counts:
    """What the engine has done since it started."""

    batches: int = 0
    foreign_batches: int = 0
    flows: int = 0
    pairs: PairCounts = field(default_factory=PairCounts)
    dead_letters: Counter[str] = field(default_factory=Counter)
    resolutions: Counter[str] = field(default_factory=Counter)
    metadata_waits: Counter[str] = field(default_factory=Counter)
    corrections: Counter[str] = field(default_factory=Counter)
    intervals: Counter[str] = field(default_factory=Counter)


COUNTERS: dict[str, tuple[str, Callable[[Counts], int]]] = {
    "raw_batches": ("raw messages processed", lambda counts: counts.batches),
    "foreign_batches": (
        "raw messages of another cluster that shares the topic, left to its enricher",
        lambda counts: counts.foreign_batches,
    ),
    "raw_events": ("halves cut from raw messages", lambda counts: counts.pairs.halves),
    "pairs": ("records made of both halves", lambda counts: counts.pairs.paired),
    "one_sided": ("records made of one half", lambda counts: counts.pairs.one_sided),
    "key_collisions": (
        "one-sided records of halves whose key was another connection's within the window",
        lambda counts: counts.pairs.collisions,
    ),
    "pairs_after_one_sided": (
        "pairs one half of which had gone out one-sided on a quiet partition",
        lambda counts: counts.pairs.told_then_paired,
    ),
    "flows": ("flow records sent, corrected ones aside", lambda counts: counts.flows),
}
LABELLED: dict[str, tuple[str, str, Callable[[Counts], Mapping[str, int]]]] = {
    "repeats_dropped": (
        "halves dropped since the same half had come before, by what became of that",
        "before",
        lambda counts: {"waiting": counts.pairs.repeats_waiting, "paired": counts.pairs.repeats_paired},
    ),
    "dead_letters": ("raw messages set aside, by reason", "reason", lambda counts: counts.dead_letters),
    "resolutions": ("sides of flows, by how they were resolved", "kind", lambda counts: counts.resolutions),
    "metadata_waits": (
        "records that waited for metadata before they went out, by how it ended: resolved, timed_out, no_room",
        "outcome",
        lambda counts: counts.metadata_waits,
    ),
    "corrections": (
        "records that went out unsettled, by what followed: corrected, expired (no identity in time), no_room",
        "outcome",
        lambda counts: counts.corrections,
    ),
    "completeness_records": (
        "completeness records sent by this worker, by outcome",
        "outcome",
        lambda counts: counts.intervals,
    ),
}
GAUGES = {
    "waiting_halves": "halves that wait for their other half",
    "waiting_metadata": "records that wait for metadata before they go out",
    "pending_corrections": "records that went out unsettled and may yet be corrected",
    "in_flight": "records sent and not acknowledged by Kafka",
    "unacknowledged_batches": "raw messages processed and not acknowledged",
    "uncovered_batches": "raw messages processed whose coverage was not sent: halves of them may still wait",
    "undecided_intervals": "intervals of nodes not known to be complete, in the worker that joins coverage and reports",
    "assigned_partitions": "partitions of the raw topic that this worker has",
    "pods": "pods known, the ended ones included",
    "metadata_undecodable": "metadata records that could not be read, since the start",
    "registry_awaited": "1 while something waits for the schema registry, which is away; else 0",
    "metadata_age_seconds": "age of the pods' watermark; absent before the first",
}


class Exporter(Collector):
    """Hands the counts to Prometheus when it asks; `gauges` returns the present value of each known gauge."""

    def __init__(self, counts: Counts, gauges: Callable[[], Mapping[str, float | None]]) -> None:
        self._counts = counts
        self._gauges = gauges

    def collect(self) -> Iterator[Metric]:
        """Yield every metric of the tables."""
        for name, (text, value) in COUNTERS.items():
            yield CounterMetricFamily(f"podwire_enricher_{name}", text, value=value(self._counts))
        for name, (text, label, values) in LABELLED.items():
            family = CounterMetricFamily(f"podwire_enricher_{name}", text, labels=[label])
            for key, count in dict(values(self._counts)).items():
                family.add_metric([key], count)
            yield family
        present = self._gauges()
        for name, text in GAUGES.items():
            gauge = present.get(name)
            if gauge is not None:
                yield GaugeMetricFamily(f"podwire_enricher_{name}", text, value=gauge)
