"""Names the machine that figures were measured on, as those of different machines do not compare, and shows figures."""

from __future__ import annotations

import json
import platform
import statistics
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def machine() -> str:
    """Return what this machine calls itself: CPUs, kernel."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(models)} x {models[0] if models else platform.machine()}, Linux {platform.release()}"


def show(bench: str, runs: int, figures: Mapping[str, Sequence[float]]) -> None:
    """Print each figure's median and spread as a table, and the same as a JSON line."""
    print(f"{bench} on {machine()}; {runs} runs")
    print(f"{'':42}{'median':>12}{'min':>12}{'max':>12}")
    summary = {}
    for name, values in figures.items():
        median, least, most = statistics.median(values), min(values), max(values)
        print(f"{name:42}{median:12.2f}{least:12.2f}{most:12.2f}")
        summary[name] = {"median": round(median, 3), "min": round(least, 3), "max": round(most, 3)}
    print(json.dumps({"bench": bench, "machine": machine(), "runs": runs, "figures": summary}))
