"""The demo as a user runs it: it ends well, says what it counted, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from podwire.demo import cgroup, leftovers, mounts
from podwire.demo.errors import EXIT_INTERRUPTED, LabBusyError
from podwire.demo.preflight import BTF
from tests.waiting import until

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="only root attaches probes"),
    pytest.mark.skipif(not BTF.exists(), reason="the kernel has no BTF"),
]

ROOT = Path(__file__).parents[2]
ENDED_SECONDS_MAX = 120


def start(*arguments: str) -> subprocess.Popen[str]:
    """Start `podwire demo` in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "podwire", "demo", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def result(demo: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Return (exit status, stdout, stderr) of a demo that ends by itself; skip where another one runs."""
    out, err = demo.communicate(timeout=ENDED_SECONDS_MAX)
    if demo.returncode == LabBusyError.exit_code:
        # A demo's names are the machine's: two can't run, and a user's own is no failure. CI fails on this skip.
        pytest.skip("another demo runs on this machine")
    return demo.returncode, out, err


def await_line(demo: subprocess.Popen[str], wanted: str) -> None:
    """Read the demo's output up to a line that holds `wanted`; skip where another demo runs."""
    assert demo.stdout is not None
    for line in demo.stdout:
        if wanted in line:
            return
    result(demo)
    pytest.fail(f"the demo ended before it printed {wanted!r}")


def left_behind() -> list[str]:
    """Return what a demo makes and is still there, under any of its names."""
    tables = subprocess.run(["nft", "list", "tables"], capture_output=True, text=True, check=True).stdout
    return [
        *(str(path) for path in Path("/run/netns").glob("podwire-demo-*")),
        *(str(mount / "podwire-demo") for mount in cgroup.hierarchies() if (mount / "podwire-demo").exists()),
        *(str(point) for point in mounts.of(leftovers.OWNER)),
        *(f"process {pid}" for pid in leftovers.processes()),
        *(line for line in tables.splitlines() if "podwire" in line),
    ]


def test_demo_shows_flows_through_the_service_and_leaves_nothing_behind() -> None:
    """A short run ends with status 0 and one JSON line whose counts fit each other."""
    status, out, err = result(start("--seconds", "5"))
    assert status == 0, err
    counts = json.loads(out.splitlines()[-1])
    assert list(counts) == ["flows", "both_sided", "unresolved", "raw_events", "lost", "duplicates"]
    assert 10 <= counts["both_sided"] <= counts["flows"]
    assert counts["raw_events"] == counts["flows"] + counts["both_sided"]
    assert (counts["lost"], counts["duplicates"]) == (0, 0)
    assert "(shop-web) -> shop/api:80 -> shop/api-" in out
    assert "REFUSED errno=111" in out
    assert left_behind() == []


def test_demo_refuses_to_run_twice_and_ends_in_order_when_interrupted() -> None:
    """A second demo says what is in its way; Ctrl-C in the middle of the first still gives its totals."""
    demo = start()
    await_line(demo, "(shop-web) -> shop/api:80 ->")
    second = subprocess.run(
        [sys.executable, "-m", "podwire", "demo"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert second.returncode == LabBusyError.exit_code
    assert "runs already on this machine" in second.stderr
    os.killpg(demo.pid, signal.SIGINT)  # as a terminal would: to the whole foreground group
    status, out, err = result(demo)
    assert status == 0, err
    assert json.loads(out.splitlines()[-1])["both_sided"] > 0
    assert left_behind() == []


def test_demo_interrupted_while_it_starts_leaves_nothing_behind() -> None:
    """SIGTERM in the middle of the start undoes what was done so far."""
    demo = start()
    await_line(demo, "[1/4]")
    demo.send_signal(signal.SIGTERM)
    status, _, err = result(demo)
    assert (status, err) == (EXIT_INTERRUPTED, "podwire demo: interrupted before everything ran.\n")
    assert left_behind() == []


def test_killed_demo_is_cleared_away_by_the_next_one() -> None:
    """After SIGKILL nobody cleans up; the next demo does, before it begins."""
    demo = start()
    await_line(demo, "[2/4]")
    demo.kill()
    demo.communicate()
    assert left_behind() != []
    follower = start()
    await_line(follower, "[1/4]")
    follower.send_signal(signal.SIGINT)
    status, _, err = result(follower)
    assert status == EXIT_INTERRUPTED, err
    until(lambda: not left_behind(), "nothing is left behind", ENDED_SECONDS_MAX, lambda: str(left_behind()))
