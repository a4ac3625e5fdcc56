"""The benchmark of the probes still runs; what it measures is for people to read."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.kernel.printing import ROOT, environment

STATISTICS = Path("/proc/sys/kernel/bpf_stats_enabled")


def bench(*options: str) -> Any:
    """Run the benchmark and return the tiers' figures, its last line."""
    if shutil.which("clang") is None:
        pytest.skip("needs clang")
    words = [sys.executable, "-P", str(ROOT / "bench/kernel.py"), *options]
    said = subprocess.run(words, env=environment(), cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(said.stdout.splitlines()[-1])["tiers"]


def test_benchmark_of_the_probes_runs() -> None:
    """One short round of every load; the last line is JSON, and the kernel's setting is as before."""
    before = STATISTICS.read_text()
    tiers = bench("--small")
    assert "tp_btf" in tiers
    for figures in tiers.values():
        assert figures["kernel_time"]["transitions_per_connection"] >= 9
        assert set(figures) == {"opening", "kernel_time", "connect", "request", "bulk"}
        assert all(
            ratio > 0 for load in ("connect", "request", "bulk") for ratio in figures[load]["wall_ratio"]
        )
    assert STATISTICS.read_text() == before


def test_benchmark_measures_bcc() -> None:
    """Its state programs are of another type; its compiler is a process of its own."""
    if not Path("/usr/lib/python3/dist-packages/bcc").is_dir():
        pytest.skip("python3-bpfcc is not installed")
    figures = bench("--tier", "bcc", "--rounds", "0")["bcc"]
    assert figures["kernel_time"]["transitions_per_connection"] >= 9
    assert figures["opening"]["compiler_mbytes"] > 0
