"""The benchmark of the probes still runs; what it measures is for people to read."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernel.printing import ROOT, environment

STATISTICS = Path("/proc/sys/kernel/bpf_stats_enabled")


def test_benchmark_of_the_probes_runs() -> None:
    """One short round of every load; the last line is JSON, and the kernel's setting is as before."""
    if shutil.which("clang") is None:
        pytest.skip("needs clang")
    before = STATISTICS.read_text()
    words = [sys.executable, "-P", str(ROOT / "bench/kernel.py"), "--small"]
    said = subprocess.run(words, env=environment(), cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    tiers = json.loads(said.stdout.splitlines()[-1])["tiers"]
    assert "tp_btf" in tiers
    for figures in tiers.values():
        assert figures["kernel_time"]["transitions_per_connection"] >= 9
        assert set(figures) == {"kernel_time", "connect", "request", "bulk"}
        assert all(
            ratio > 0 for load in ("connect", "request", "bulk") for ratio in figures[load]["wall_ratio"]
        )
    assert STATISTICS.read_text() == before
