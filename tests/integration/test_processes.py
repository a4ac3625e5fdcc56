"""Services kept running: killed ones come back, wrongly set ones are reported, stopped ones stay down."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest

from podwire.demo.broker import free_port
from podwire.demo.errors import ServiceError
from podwire.demo.processes import Command, Process
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

HEALTHY = """
import http.server, os
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(int(os.environ["STATUS"]))
        self.end_headers()
        self.wfile.write(b"waiting for Kafka")
http.server.HTTPServer(("127.0.0.1", int(os.environ["PORT"])), Handler).serve_forever()
"""
FATAL = """
import json, sys
print(json.dumps({"event": "fatal", "message": "No BTF here. Operator action: boot another kernel"}))
sys.exit(11)
"""


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """Return a function that makes a process from Python source; it is stopped after the test."""
    made: list[Process] = []

    def make(
        source: str, *, status: int = 200, restart: bool = True, said: list[str] | None = None
    ) -> Process:
        port = free_port()
        environment = {"PORT": str(port), "STATUS": str(status)}
        command = Command("sample", (sys.executable, "-c", source), environment, port, tmp_path / "log")
        say = (lambda _: None) if said is None else said.append
        made.append(Process(command, restart=restart, say=say))
        return made[-1]

    yield make
    for process in made:
        process.stop()


def test_killed_process_is_started_again_and_that_is_said(make: Callable[..., Process]) -> None:
    """SIGKILL ends one process; another takes its place."""
    said: list[str] = []
    process = make(HEALTHY, said=said)
    process.start()
    process.wait_healthy()
    first = process.pid
    process.kill()
    until(lambda: process.pid not in (None, first))
    process.wait_healthy()
    assert process.restarts == 1
    assert said == ["sample ended with status -9; starting it again in 0.5 s"]


def test_killed_process_stays_down_without_restart_until_started(make: Callable[..., Process]) -> None:
    """A test decides itself when the process comes back."""
    process = make(HEALTHY, restart=False)
    process.start()
    process.wait_healthy()
    process.kill()
    assert (process.pid, process.exit_code) == (None, -9)
    process.start()
    process.wait_healthy()


def test_stopped_process_is_not_started_again(make: Callable[..., Process]) -> None:
    """An orderly stop is final, and returns the exit status."""
    process = make(HEALTHY)
    process.start()
    process.wait_healthy()
    assert process.stop() == -15
    assert (process.pid, process.restarts) == (None, 0)


def test_wait_healthy_reports_a_fatal_cause_with_its_status(make: Callable[..., Process]) -> None:
    """What no restart mends ends the waiting with the process's own words."""
    process = make(FATAL)
    process.start()
    with pytest.raises(ServiceError, match="boot another kernel") as raised:
        process.wait_healthy()
    assert (raised.value.exit_code, process.restarts) == (11, 0)


def test_wait_healthy_gives_up_on_a_process_that_keeps_dying(make: Callable[..., Process]) -> None:
    """A crash at every start is reported with the log's last line, without waiting for the deadline."""
    process = make("raise SystemExit('no such module')")
    process.start()
    with pytest.raises(ServiceError, match="does not start: no such module") as raised:
        process.wait_healthy()
    assert raised.value.exit_code == ServiceError("").exit_code


def test_wait_healthy_tells_what_the_process_waits_for(make: Callable[..., Process]) -> None:
    """At the deadline the reason is the one that /healthz gives."""
    process = make(HEALTHY, status=503)
    process.start()
    until(lambda: process.unhealthy() == "waiting for Kafka")
    with pytest.raises(ServiceError, match="not healthy after 0 s: waiting for Kafka"):
        process.wait_healthy(0)
