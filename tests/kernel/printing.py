"""Runs `collector node --print` as a process, in a surrounding of the test's choice, and reads what it prints.

Owns the process. Called by the kernel tests of printing and of privileges.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.waiting import until

ROOT = Path(__file__).parents[2]
START_DEADLINE_S = 240
"""Python, numpy, the verifier and BCC's compiler take their time in an emulated guest."""


@dataclass(frozen=True)
class Surrounding:
    """Where a process runs.

    Attributes:
        setup: shell commands in its mount namespace, as root, before it loses privileges.
        unshare: further options of unshare(1).
        setpriv: options of setpriv(1).
    """

    setup: str = ""
    unshare: tuple[str, ...] = ()
    setpriv: tuple[str, ...] = ()

    def command(self, *words: str) -> list[str]:
        """Return the command line that runs `words` there; nothing but unshare's --fork comes between."""
        inner = shlex.join(["setpriv", *self.setpriv, "--", *words] if self.setpriv else words)
        memory = "ulimit -l unlimited 2>/dev/null || :"  # as runtimes set it; kernel 5.10 counts maps
        script = f"{memory}\nset -e\n{self.setup}\nexec {inner}"
        return ["unshare", "--mount", "--propagation", "private", *self.unshare, "--", "sh", "-c", script]


def environment() -> dict[str, str]:
    """Return this process's environment without settings of Podwire."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PODWIRE_")}
    return kept | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}


class Printing:
    """A collector that prints.

    Attributes:
        logs: its log lines so far.
        events: its events so far.
    """

    def __init__(self, surrounding: Surrounding, *options: str) -> None:
        self.logs: list[dict[str, Any]] = []
        self.events: list[dict[str, Any]] = []
        words = [sys.executable, "-m", "collector", "node", "--print", *options]
        self.process = subprocess.Popen(
            surrounding.command(*words),
            cwd="/",
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout
        assert self.process.stderr
        self._readers = [
            threading.Thread(target=self._read, args=(self.process.stdout, self.events)),
            threading.Thread(target=self._read, args=(self.process.stderr, self.logs)),
        ]
        for reader in self._readers:
            reader.start()

    @staticmethod
    def _read(stream: Any, into: list[dict[str, Any]]) -> None:
        for line in stream:
            said = json.loads(line) if line.startswith("{") else {"event": line.rstrip()}
            into.append(said)

    def log(self, event: str) -> dict[str, Any]:
        """Wait for a log line; fail with all lines when it never comes."""

        def found() -> dict[str, Any] | None:
            assert self.process.poll() is None or not any(reader.is_alive() for reader in self._readers)
            return next((line for line in self.logs if line["event"] == event), None)

        try:
            line: dict[str, Any] = until(found, event, START_DEADLINE_S)
        except AssertionError as error:
            raise AssertionError(f"no {event} in {self.logs}") from error
        return line

    def of(self, netns_ino: int, kind: str) -> dict[str, Any]:
        """Wait for the event of a type in a network namespace."""

        def found() -> dict[str, Any] | None:
            chosen = (
                one for one in list(self.events) if (one["netns_ino"], one["type"]) == (netns_ino, kind)
            )
            return next(chosen, None)

        event: dict[str, Any] = until(found, f"{kind} in {netns_ino}; logs: {self.logs}")
        return event

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal to the collector itself; return the exit status once everything was read."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        os.kill(int(children[0]) if children else self.process.pid, number)
        return self.wait()

    def wait(self) -> int:
        """Return the exit status once everything was read."""
        status = self.process.wait(START_DEADLINE_S)
        for reader in self._readers:
            reader.join()
        return status

    def stop(self) -> None:
        """End it in any case."""
        if self.process.poll() is None:
            self.end(signal.SIGKILL)
        self.wait()
