"""Names the machine that figures were measured on: figures of different machines do not compare."""

from __future__ import annotations

import platform
from pathlib import Path


def machine() -> str:
    """Return what this machine calls itself: CPUs, kernel."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(models)} x {models[0] if models else platform.machine()}, Linux {platform.release()}"
