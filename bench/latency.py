"""How long after connect() a flow can be read: the whole pipeline on one machine, at a low and steady rate.

A client in a pod connects through a Service at scheduled times (open loop); a reader follows podwire.flows.v1. The
figure is the moment the OPEN record was read minus the moment connect() was called, on one clock. Root. Prints a
table and one JSON line: medians over runs with their spread.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from bench.machine import machine
from podwire.demo.lab import Port
from podwire.flows import FlowReader
from schemas.registry import CatalogIds
from tests.pipeline import Pipeline, program, serve

SECONDS_MAX = 30.0


def one_run(pipeline: Pipeline, address: str, connections: int, pause_ms: int) -> list[float]:
    """Return the latency in ms of each connection of one run, in no order."""
    reader = FlowReader(pipeline.broker.bootstrap, CatalogIds())
    seen: dict[tuple[int, int], int] = {}
    ended = threading.Event()
    start = {partition: high for partition, (_, high) in reader.bounds().items()}

    def follow() -> None:
        for flow in reader.read(start, ended.is_set):
            if flow is not None and flow["record_type"] == "OPEN":
                seen[(flow["client_pid"], flow["client_port"])] = time.time_ns()

    follower = threading.Thread(target=follow)
    follower.start()
    client = pipeline.lab._pods[0].popen(  # noqa: SLF001 (the first pod is the client)
        program("tick", "tick", 80, address=address, count=connections, pause_ms=pause_ms),
        stdout=subprocess.PIPE,
    )
    assert client.stdout is not None
    made = [json.loads(line) for line in client.stdout]
    deadline = time.monotonic() + SECONDS_MAX
    while len(seen) < len(made) and time.monotonic() < deadline:
        ended.wait(0.05)
    ended.set()
    follower.join()
    reader.close()
    missing = [one for one in made if (one["pid"], one["port"]) not in seen]
    assert not missing, f"{len(missing)} of {len(made)} connections did not come out, the first {missing[0]}"
    return [(seen[(one["pid"], one["port"])] - one["begin_unix_ns"]) / 1e6 for one in made]


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--connections", type=int, default=300)
    parser.add_argument(
        "--pause-ms", type=int, default=37, help="between two connections; no divisor of the flush"
    )
    parser.add_argument("--runs", type=int, default=5)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, Pipeline("bench", Path(folder)) as pipeline:
        pipeline.lab.pod("web", "bench")
        server = pipeline.lab.pod("api", "bench")
        address = pipeline.lab.service("api", [server], (Port(80, 8080),), namespace="bench")
        serve(server, "api", 8080)
        pipeline.write_manifests()
        pipeline.run()
        p50s, p99s = [], []
        for number in range(given.runs + 1):
            latencies = sorted(one_run(pipeline, address, given.connections, given.pause_ms))
            if number == 0:
                continue  # the first run warms up
            p50s.append(statistics.median(latencies))
            p99s.append(latencies[int(len(latencies) * 0.99)])
            print(f"run {number}: p50 {p50s[-1]:.0f} ms, p99 {p99s[-1]:.0f} ms", file=sys.stderr, flush=True)
    result = {
        "bench": "latency",
        "machine": machine(),
        "connections_per_run": given.connections,
        "runs": given.runs,
        "p50_ms": [round(f(p50s), 1) for f in (min, statistics.median, max)],
        "p99_ms": [round(f(p99s), 1) for f in (min, statistics.median, max)],
    }
    print(f"connect() to flow read, ms (min, median, max of {given.runs} runs)")
    print(f"  p50 {result['p50_ms']}\n  p99 {result['p99_ms']}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
