"""The allocator's setting."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

TURNS = 50
PROGRAM = f"""
import resource, sys
import numpy as np
from collector.node.memory import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
def turn():
    np.zeros(1 << 20, np.uint8) + np.uint8(1)
turn()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range({TURNS}):
    turn()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_kept_memory_is_not_faulted_in_again() -> None:
    """Allocating the same megabytes in every turn touches new pages once, not each time."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, "kept"], capture_output=True, text=True, check=True)
    assert int(done.stdout) < TURNS  # without the setting about ten a turn
