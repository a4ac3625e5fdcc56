"""The benchmarks of `make bench` still run; what they measure is for people to read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pipeline import need_root_and_btf

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "words",
    [
        ["collector", "--runs", "1", "--seconds", "1", "--rates", "1000"],
        ["corrections", "--small"],
        ["enricher", "--small"],
        ["latency", "--runs", "1", "--connections", "10"],
    ],
    ids=lambda words: words[0],
)
def test_benchmark_runs(words: list[str]) -> None:
    """Its shortest form ends well, with a JSON line that names the machine; `tests/kernel` runs that of the probes."""
    if words[0] in {"collector", "latency"}:
        need_root_and_btf()
    command = [sys.executable, "-m", f"bench.{words[0]}", *words[1:]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["bench"] == words[0]
    assert "Linux" in said["machine"]
