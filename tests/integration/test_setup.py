"""`make demo` where no set-up helps: said at once, before anything is installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from podwire.demo.errors import CapabilityError

ROOT = Path(__file__).parents[2]
WITHOUT_SYS_ADMIN = ["setpriv", "--bounding-set=-sys_admin", "--"] if os.geteuid() == 0 else []
"""Takes from root what any other user lacks anyway."""


@pytest.mark.parametrize(
    "command",
    [["make", "demo"], [sys.executable, "-m", "podwire", "demo"]],
    ids=["make", "podwire"],
)
def test_demo_says_first_what_the_user_may_not(command: list[str]) -> None:
    """One sentence with the remedy and a status of its own, which make can only show; nothing was begun."""
    done = subprocess.run([*WITHOUT_SYS_ADMIN, *command], cwd=ROOT, capture_output=True, text=True)
    status = CapabilityError.exit_code
    sentence, *others = done.stderr.splitlines()
    assert sentence.startswith("podwire demo: ")
    assert ("run `sudo make demo`" if not WITHOUT_SYS_ADMIN else "lacks CAP_SYS_ADMIN") in sentence
    assert done.stdout == ""
    if command[0] == "make":
        assert (done.returncode, len(others)) == (2, 1)
        assert others[0].endswith(f"Error {status}")
    else:
        assert (done.returncode, others) == (status, [])
