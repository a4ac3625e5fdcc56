"""What the node collector costs: CPU per event from the ring's array to Kafka's acknowledgement, and encoding alone.

Runs the collector's own loop over synthetic events, against a real broker on this machine. CPU time is that of this
process with all its threads (librdkafka's included), minus what making the events cost; the broker is not in it.
Prints a table and, as the last line, one JSON object. Called by `make bench`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import structlog

from bench.machine import machine
from collector import kafka
from collector.node.batches import Batcher
from collector.node.clock import measure
from collector.node.collect import NodeCollector, Pace, Reporter
from collector.node.columns import tcp_event_columns, tcp_keys
from collector.node.encode import encode_events
from collector.node.memory import keep_freed_memory
from collector.node.metrics import Metrics
from collector.node.publish import Publisher
from collector.node.spool import Spool
from podwire import topics
from podwire.demo.broker import Broker
from schemas import catalog
from tests.node_events import ORIGIN, SyntheticProbes, events, no_owners

RATES_PER_SECOND = (1_000, 100_000, 300_000)
FEED_SECONDS = 0.01
PARTITIONS = 4


def traffic(count: int, seed: int) -> np.ndarray:
    """Return events as a busy node has them: half opens, half closes, few processes and cgroups."""
    random = np.random.default_rng(seed)
    made = events(count, socket_cookie=np.arange(count) + seed * count)
    made["type"] = random.choice([1, 3, 4, 4], count)
    made["role"] = np.where(made["type"] == 3, 2, random.integers(1, 3, count))
    made["client_isn"], made["server_isn"] = random.integers(0, 2**32, (2, count), dtype=np.uint32)
    made["time_ns"] += random.integers(0, 10**8, count, dtype=np.uint64)
    made["cgroup_id"] = random.integers(1, 60, count)
    made["tgid"] = random.integers(1, 4_000_000, count)
    made["local_address"], made["remote_address"] = random.integers(0, 256, (2, count, 16), dtype=np.uint8)
    made["bytes_sent"], made["bytes_received"] = random.integers(0, 2**20, (2, count))
    made["segments_sent"], made["segments_received"] = random.integers(1, 500, (2, count))
    made["rtt_us"], made["rtt_min_us"] = random.integers(20, 5000, (2, count))
    made["closed_by"] = random.integers(2, 5, count)
    return made


def run_once(bootstrap: str, folder: Path, rate: int, seconds: float, number: int) -> dict[str, float]:
    """Feed `rate` events/s for `seconds`; return CPU us per event, share of a core, and events lost."""
    probes = SyntheticProbes()
    origin = replace(ORIGIN, producer_epoch=time.time_ns() // 1000)
    producer = kafka.producer(bootstrap, "bench")
    spool = Spool(folder / f"spool-{rate}-{number}", 1 << 30, "boot", origin.producer_epoch, PARTITIONS)
    publisher = Publisher(producer, probes.events, spool, 2.0)
    metrics = Metrics("none", "bench")
    collector = NodeCollector(probes, publisher, spool, metrics, Pace(0.1, 10.0))
    collector.start_reading(
        Batcher(origin, PARTITIONS, catalog.RAW.schema_id),
        Reporter(producer, origin, "none", catalog.COLLECTOR.schema_id),
    )
    publisher.is_open = True
    per_feed = max(1, int(rate * FEED_SECONDS))
    pool = [traffic(per_feed, seed) for seed in range(16)]
    cpu_from, started_s = time.process_time(), time.monotonic()
    feeding_cpu_s = 0.0
    fed = due_turn = 0
    feeds = int(seconds / FEED_SECONDS)
    while fed < feeds:
        before = time.process_time()
        while fed < feeds and time.monotonic() >= started_s + fed * FEED_SECONDS:
            probes.feed(pool[fed % len(pool)])
            fed += 1
        feeding_cpu_s += time.process_time() - before
        now_s = time.monotonic()
        if now_s >= due_turn:
            due_turn = now_s + collector.turn(now_s)
        next_s = min(due_turn, started_s + fed * FEED_SECONDS)
        publisher.poll(max(0.0, next_s - time.monotonic()))
    left = collector.finish(time.monotonic() + 30, publisher.poll)
    elapsed_s = time.monotonic() - started_s
    cpu_s = time.process_time() - cpu_from - feeding_cpu_s
    assert left == 0
    assert publisher.totals.published == collector.received
    return {
        "cpu_us": cpu_s / collector.received * 1e6,
        "core_percent": 100 * cpu_s / elapsed_s,
        "lost": probes.lost,
        "spooled": publisher.totals.spool_written,
    }


def encode_once(count: int) -> float:
    """Return the us per event of keys, columns and Avro for `count` events at a time."""
    made, clock, owners, order = traffic(count, 1), measure(), no_owners(count), np.arange(count)
    rounds = max(1, 20_000 // count)
    before = time.process_time()
    for _ in range(rounds):
        encode_events(tcp_event_columns(made, tcp_keys(made, ORIGIN), owners, clock), order)
    return (time.process_time() - before) / rounds / count * 1e6


def spread(values: list[float]) -> dict[str, float]:
    """Return median, minimum and maximum."""
    return {
        "median": round(statistics.median(values), 3),
        "min": round(min(values), 3),
        "max": round(max(values), 3),
    }


def parse(arguments: list[str]) -> argparse.Namespace:
    """Return the command line's choices."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5, help="runs per rate (default 5)")
    parser.add_argument("--seconds", type=float, default=3.0, help="seconds per run (default 3)")
    parser.add_argument("--rates", type=int, nargs="*", default=RATES_PER_SECOND, help="events per second")
    parser.add_argument("--bootstrap", default="", help="a broker that runs already; else one is started")
    return parser.parse_args(arguments)


def measure_all(choices: argparse.Namespace, bootstrap: str, folder: Path) -> dict[str, Any]:
    """Return all figures."""
    topics.create(bootstrap, partitions=PARTITIONS)
    figures: dict[str, Any] = {"bench": "collector", "machine": machine(), "runs": choices.runs}
    figures["encode_us"] = {
        str(count): spread([encode_once(count) for _ in range(choices.runs)])
        for count in (10, 100, 1000, 8000)
    }
    figures["ring_to_kafka"] = {}
    for rate in choices.rates:
        runs = [run_once(bootstrap, folder, rate, choices.seconds, number) for number in range(choices.runs)]
        figures["ring_to_kafka"][str(rate)] = {
            name: spread([run[name] for run in runs])
            for name in ("cpu_us", "core_percent", "lost", "spooled")
        }
    return figures


def print_table(figures: dict[str, Any]) -> None:
    """Print the figures for people."""
    print(f"machine: {figures['machine']}; medians of {figures['runs']} runs, [min-max]")
    for count, us in figures["encode_us"].items():
        print(f"encode {count:>6} at a time  {us['median']:7.2f} us/event  [{us['min']:.2f}-{us['max']:.2f}]")
    for rate, result in figures["ring_to_kafka"].items():
        us, core = result["cpu_us"], result["core_percent"]
        lost, spooled = result["lost"]["max"], result["spooled"]["max"]
        print(
            f"{int(rate):>7,} events/s     {us['median']:7.2f} us/event  [{us['min']:.2f}-{us['max']:.2f}]  "
            f"{core['median']:.1f} % of a core, lost {lost:.0f}, spooled {spooled:.0f}"
        )


def main(arguments: list[str]) -> int:
    """Run the benchmark and print what came out; return the exit status."""
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    choices = parse(arguments)
    keep_freed_memory()
    with tempfile.TemporaryDirectory(prefix="podwire-bench-") as name:
        folder = Path(name)
        broker = None if choices.bootstrap else Broker(folder / "kafka")
        if broker:
            broker.start()
        try:
            figures = measure_all(choices, choices.bootstrap or broker.bootstrap, folder)
        finally:
            if broker:
                broker.stop()
    print_table(figures)
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
