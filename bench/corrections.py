"""Measures what unsettled records cost the enricher: written ahead, asked again, corrected; in time, bytes and memory.

Run as `python -m bench.corrections`; `--small` makes one short run. No broker: the producer delivers at once and costs
next to nothing, so add 2 x 2-3 us for handing two more messages per record to the real one.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from bench.machine import show
from enricher import corrections
from enricher.engine import Engine, Limits, Partition, RawMessage
from enricher.flow import FlowBuilder
from enricher.history import History
from enricher.metadata import Change
from enricher.networks import Networks
from enricher.output import Output
from enricher.resolve import Resolver
from schemas import catalog
from schemas.registry import CatalogIds
from tests import halves
from tests.delivering import Delivering

NOW_MS = halves.NOW_US // 1000
BATCH = 200


class Counting(Delivering):
    """Counts the changelog's entries and their bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = self.entry_bytes = 0

    def took(self, topic: str, key: bytes, value: bytes | None) -> None:
        """Count one message."""
        if topic == catalog.CORRECTIONS.name and value is not None:
            self.entries += 1
            self.entry_bytes += len(key) + len(value)


def resident_bytes() -> int:
    """Return the process's resident memory."""
    with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123
        return int(file.read().split()[1]) * 4096


def engine(correction_ms: int, records: int) -> tuple[Engine, Partition, Counting]:
    """Return an engine that knows no pod and waits for none."""
    history, networks, producer = History(), Networks({}), Counting()
    ids = CatalogIds()
    builder = FlowBuilder(
        halves.CLUSTER, catalog.FLOWS.schema_id, history, networks, Resolver(history, networks)
    )
    limits = Limits(5000, 500, 0, 0, "bench", corrections.Limits(correction_ms, records))
    made = Engine(limits, ids, history, builder, Output(producer))
    return made, made.assign(0, 0), producer


def spent(work: Any, records: int) -> float:
    """Return us of CPU per record that some work takes."""
    began = time.process_time()
    work()
    return (time.process_time() - began) * 1e6 / records


def go_out(made: Engine, partition: Partition, messages: list[bytes]) -> None:
    """Take all messages, and the deliveries of each before the next."""
    for offset, value in enumerate(messages):
        made.take(partition, RawMessage(offset, NOW_MS, None, value), lambda: None, NOW_MS)
        made.tick([], NOW_MS)
        made.tick([], NOW_MS)


def round_of(made: Engine, now_ms: int, records: int) -> None:
    """Look at all that is pending once."""
    for _ in range(records // corrections.ROUND_SLICE + 1):
        made.tick([], now_ms)


def run(records: int) -> dict[str, float]:
    """Return one run's figures."""
    messages = [
        halves.batch([half for n in range(first, first + BATCH) for half in halves.opened(halves.key(n))])
        for first in range(0, records, BATCH)
    ]
    figures = {}
    made, partition, _ = engine(0, records)
    figures["off_us_per_record"] = spent(lambda: go_out(made, partition, messages), records)
    made, partition, producer = engine(60_000, records)
    before = resident_bytes()
    figures["written_ahead_us_per_record"] = spent(lambda: go_out(made, partition, messages), records)
    figures["pending_bytes_per_record"] = (resident_bytes() - before) / records
    figures["entry_bytes"] = producer.entry_bytes / producer.entries
    assert made.corrections.pending == records
    round_of(made, NOW_MS, records)
    figures["round_us_per_record"] = spent(lambda: round_of(made, NOW_MS + 2000, records), records)
    made.tick([Change("pods", "", None, 1)], NOW_MS + 2000)
    figures["round_after_change_us_per_record"] = spent(
        lambda: round_of(made, NOW_MS + 4000, records), records
    )
    pods = [halves.pod_record(number) for number in (1, 2)]
    made.tick([Change("pods", pod["uid"], pod) for pod in pods], NOW_MS + 4000)
    figures["corrected_us_per_record"] = spent(lambda: round_of(made, NOW_MS + 6000, records), records)
    made.tick([], NOW_MS + 6000)
    assert made.counts.corrections["corrected"] == records
    assert made.corrections.pending == 0
    return figures


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description="measure what corrections cost")
    parser.add_argument("--runs", type=int, default=5, help="runs per figure; the median counts")
    parser.add_argument("--small", action="store_true", help="one short run")
    arguments = parser.parse_args()
    runs = 1 if arguments.small else arguments.runs
    results = [run(2_000 if arguments.small else 50_000) for _ in range(runs)]
    show("corrections", runs, {name: [result[name] for result in results] for name in results[0]})


if __name__ == "__main__":
    main()
