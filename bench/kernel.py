"""What the probes cost: ns per transition, and how much longer TCP work takes with them than without.

Three loads (kernel_load.c) between two network namespaces of its own, client and server on one CPU: a connect loop,
requests on one open connection, a bulk transfer. Each round takes one sample without probes, one with, and one more
without, in an order that rotates; the ratio is that of one round, the second one without gives the noise. The probes'
own time per run comes from the kernel's statistics (kernel.bpf_stats_enabled). Opening the probes is measured in a
process of its own. Root. Prints a table per tier and one JSON line; --small only proves that it runs, --rounds 0 leaves
the loads out.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import shutil
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.machine import machine
from collector.node import core
from collector.node.probes import ProbeOptions, Probes
from tests.kernel.node import Namespace, wire

if TYPE_CHECKING:
    from collections.abc import Iterator

STATISTICS = Path("/proc/sys/kernel/bpf_stats_enabled")
SERVER_ADDRESS = "10.91.9.2"
COUNTS = {"connect": 4000, "request": 20_000, "bulk": 16_000}  # about 0.2 s each
PROGRAM = Path(__file__).parents[1] / "build/bpf/kernel_load"
EMPTY = PROGRAM.with_name("kernel_empty.bpf.o")
"""Both stay there: a guest has no compiler."""
TYPES = {"2": "kprobe", "5": "tracepoint", "17": "raw tracepoint", "26": "tracing"}
"""enum bpf_prog_type, as fdinfo shows it."""
STATE_TYPES = {"17", "26"}
"""Of the programs on the state tracepoint: BCC's, the others'. No other program of these types runs as often."""
CLOCK_RUNS = 2000
OPENING = """
import json, os, resource, sys
from collector.node.probes import ProbeOptions, Probes
before = sum(os.times()[:4])
Probes.open(ProbeOptions(state_dir=None, tier=sys.argv[1])).close()
peaks = [resource.getrusage(who).ru_maxrss / 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
print(json.dumps({"cpu_s": sum(os.times()[:4]) - before, "own_mbytes": peaks[0], "compiler_mbytes": peaks[1]}))
"""
"""A process of its own, as a peak of memory is that of a process; tier bcc's compiler is its only child."""


@dataclass(frozen=True)
class Load:
    """How to run kernel_load: the program, the CPU, the two namespaces."""

    program: Path
    cpu: int
    client: Namespace
    server: Namespace

    def sample(self, mode: str, count: int) -> tuple[float, float]:
        """Return ns per operation: on the wall clock, of CPU time."""
        places = [self.client.path, self.server.path, SERVER_ADDRESS]
        words = [str(self.program), mode, str(count), str(self.cpu), *places]
        said = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout.split()
        return int(said[0]) / count, int(said[1]) / count


@contextlib.contextmanager
def attached(tier: str) -> Iterator[Probes]:
    """Attach probes of a tier, drain their ring at the end and detach them."""
    probes = Probes.open(ProbeOptions(state_dir=None, tier=tier))
    try:
        yield probes
        lost = probes.counters()["lost_ring_full"]
        assert lost == 0, f"{lost} events found no room: their cost is not the usual one"
    finally:
        probes.close()


@contextlib.contextmanager
def loaded(cpu: int) -> Iterator[Load]:
    """Build the load and its two namespaces, and remove them."""
    with contextlib.ExitStack() as stack:
        if shutil.which("clang"):
            here, strict = Path(__file__).parent, ("-O2", "-Wall", "-Werror")
            subprocess.run(["clang", *strict, "-o", PROGRAM, here / "kernel_load.c"], check=True)
            source = here / "kernel_empty.bpf.c"
            subprocess.run(["clang", *strict, "-target", "bpf", "-c", "-o", EMPTY, source], check=True)
        elif not (PROGRAM.exists() and EMPTY.exists()):
            sys.exit(
                "No clang, and no load built before: run `python -m bench.kernel --small` where clang is."
            )
        ends = []
        for name in ("bc", "bs"):
            ends.append(Namespace(name))
            stack.callback(ends[-1].remove)
        wire(ends[0], ends[1], 9)
        yield Load(PROGRAM, cpu, ends[0], ends[1])


def rounds(load: Load, tier: str, mode: str, count: int, number: int) -> dict[str, Any]:
    """Return the ratios with and without probes of one load, over several rounds."""
    taken = []
    for turn in range(number):
        sample: dict[str, tuple[float, float]] = {}
        kinds = ["off", "on", "again"]
        for kind in kinds[turn % 3 :] + kinds[: turn % 3]:
            with attached(tier) if kind == "on" else contextlib.nullcontext():
                sample[kind] = load.sample(mode, count)
        taken.append(sample)
    result: dict[str, Any] = {"off_ns": spread([one["off"][0] for one in taken])}
    for index, clock in enumerate(("wall", "cpu")):
        without = [(one["off"][index] + one["again"][index]) / 2 for one in taken]
        pairs = zip(taken, without, strict=True)
        result[f"{clock}_ratio"] = spread([one["on"][index] / base for one, base in pairs])
        result[f"{clock}_noise"] = spread([one["again"][index] / one["off"][index] for one in taken])
    return result


def spread(values: list[float]) -> list[float]:
    """Return median, first and third quartile."""
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return [round(value, 4) for value in (middle, low, high)]


def run_times() -> list[tuple[str, int, int, int]]:
    """Return (type, runs, ns, descriptor) of every BPF program that this process holds, from fdinfo."""
    found = {}
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the folder's own descriptor is closed by now
            if str(entry.readlink()).endswith("bpf-prog"):
                text = Path("/proc/self/fdinfo", entry.name).read_text()
                info = dict(line.split(":\t", 1) for line in text.splitlines())
                counts = int(info["run_cnt"]), int(info["run_time_ns"])
                found[info["prog_id"]] = (info["prog_type"], *counts, int(entry.name))
    return sorted(found.values(), reverse=True)


def clock_cost() -> float:
    """Return ns that the statistics, while they are on, show of a run of nothing: their own readings of the clock."""
    library = ctypes.CDLL("libbpf.so.1")
    for function in (library.bpf_object__open_file, library.bpf_object__next_program):
        function.restype = ctypes.c_void_p
    handle = ctypes.c_void_p(library.bpf_object__open_file(os.fsencode(EMPTY), None))
    assert library.bpf_object__load(handle) == 0
    descriptor = library.bpf_program__fd(ctypes.c_void_p(library.bpf_object__next_program(handle, None)))
    run = core.runner(descriptor)
    for _ in range(CLOCK_RUNS):
        run()
    runs, ns = next((runs, ns) for _, runs, ns, of in run_times() if of == descriptor)
    library.bpf_object__close(handle)
    return ns / runs


def opening(tier: str) -> dict[str, float]:
    """Return CPU seconds to open the probes, and peak MB of the process and of BCC's, 0 if there is none."""
    words = [sys.executable, "-c", OPENING, tier]
    said = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout
    figures: dict[str, float] = json.loads(said.splitlines()[-1])
    return {name: round(figure, 2) for name, figure in figures.items()}


def transitions(load: Load, tier: str, connections: int) -> dict[str, Any]:
    """Return what the kernel counted during a connect loop: runs and ns of each program, and sums less the clock's."""
    before = STATISTICS.read_text()
    with attached(tier):
        STATISTICS.write_text("1")
        try:
            load.sample("connect", connections)
            times = run_times()
            clock_ns = clock_cost()
        finally:
            STATISTICS.write_text(before)
    changes = max(runs for kind, runs, _, _ in times if kind in STATE_TYPES)
    total_ns = sum(ns - runs * clock_ns for _, runs, ns, _ in times)
    return {
        "clock_ns": round(clock_ns, 1),
        "transitions_per_connection": round(changes / connections, 2),
        "ns_per_transition": round(total_ns / changes, 1),
        "ns_per_connection": round(total_ns / connections, 1),
        "programs": [
            {"type": TYPES.get(kind, kind), "runs": runs} | {"ns_per_run": round(ns / max(runs, 1), 1)}
            for kind, runs, ns, _ in times
        ],
    }


def measure(load: Load, tier: str, *, small: bool, number: int) -> dict[str, Any]:
    """Return all figures of a tier, without ratios if there are no rounds, and print them."""
    counts = {mode: max(count // 400, 10) if small else count for mode, count in COUNTS.items()}
    found: dict[str, Any] = {
        "opening": opening(tier),
        "kernel_time": transitions(load, tier, counts["connect"]),
    }
    times, opened = found["kernel_time"], found["opening"]
    print(f"\ntier {tier}: {times['ns_per_transition']:.0f} ns per transition, ", end="")
    print(f"{times['ns_per_connection']:.0f} ns per connection (both ends)")
    print(f"  opened in {opened['cpu_s']} s of CPU, peak memory {opened['own_mbytes']:.0f} MB, ", end="")
    print(f"of the compiler {opened['compiler_mbytes']:.0f} MB")
    if not number:
        return found
    print(f"  {'load':8} {'ns without':>11}  {'with/without, wall':24} {'noise, wall':24} with/without, CPU")
    for mode, count in counts.items():
        figures = rounds(load, tier, mode, count, number)
        found[mode] = figures
        shown = [
            "{:.3f} ({:.3f} .. {:.3f})".format(*figures[name])
            for name in ("wall_ratio", "wall_noise", "cpu_ratio")
        ]
        print(f"  {mode:8} {figures['off_ns'][0]:11.0f}  {shown[0]:24} {shown[1]:24} {shown[2]}", flush=True)
    return found


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--tier", action="append", default=[], help="may be repeated; default: the best one and tp_btf"
    )
    parser.add_argument("--cpu", type=int, default=max(os.sched_getaffinity(0)), help="where the load runs")
    parser.add_argument("--small", action="store_true", help="one short round: proves that it runs")
    given = parser.parse_args()
    with attached("auto") as probes:
        tiers = given.tier or list(dict.fromkeys((probes.tier, "tp_btf")))
    number = 1 if given.small else given.rounds
    print(
        f"{machine()}; median (quartiles) of {number} rounds; CPU {given.cpu}; load {os.getloadavg()[0]:.1f}"
    )
    with loaded(given.cpu) as load:
        found = {tier: measure(load, tier, small=given.small, number=number) for tier in tiers}
    result = {
        "bench": "kernel",
        "machine": machine(),
        "load_average": os.getloadavg()[0],
        "rounds": number,
        "tiers": found,
    }
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
