"""Podwire's services as processes of this machine, kept running as Kubernetes would keep them.

Owns the processes and their settings by environment; restarts one that dies, with a growing pause. Never
reads what they publish. Called by `podwire.demo.run` and by the tests that kill and restart services.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING

from podwire.demo.broker import free_port
from podwire.demo.errors import ServiceError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

ROOT = Path(__file__).parents[2]
HEALTHY_SECONDS_MAX = 90.0
STOP_SECONDS_MAX = 30.0
PAUSE_SECONDS_MIN = 0.5
PAUSE_SECONDS_MAX = 30.0
RESTARTS_MAX = 3
_POLL_SECONDS = 0.1

PERMANENT = range(10, 23)
"""The services' exit codes for what no restart mends: their errors.py number such causes so."""


@dataclass(frozen=True)
class Command:
    """How a service is started.

    Attributes:
        argv: program and arguments.
        environment: set on top of this process's own.
        http_port: where it serves /metrics and /healthz on 127.0.0.1.
        log: file that its output is appended to.
    """

    name: str
    argv: tuple[str, ...]
    environment: Mapping[str, str]
    http_port: int
    log: Path


class Process:
    """One service: started, restarted when it dies (unless `restart` is false), stopped.

    Attributes:
        restarts: how often it was started again after it died.
        exit_code: exit status of its last end, None before the first one; -9 after SIGKILL.
    """

    def __init__(
        self, command: Command, *, restart: bool = True, say: Callable[[str], None] = lambda _: None
    ) -> None:
        self.command = command
        self.restarts = 0
        self.exit_code: int | None = None
        self._restart = restart
        self._say = say
        self._process: subprocess.Popen[bytes] | None = None
        self._started = threading.Event()
        self._stopping = threading.Event()
        self._keeper: threading.Thread | None = None

    @property
    def pid(self) -> int | None:
        """Process id, None when it does not run."""
        process = self._process
        return process.pid if process is not None and process.poll() is None else None

    def start(self) -> None:
        """Start it; returns when the process exists, which is before it is healthy."""
        assert self._keeper is None or not self._keeper.is_alive(), f"{self.command.name} runs already"
        self._stopping.clear()
        self._started.clear()
        self._keeper = threading.Thread(target=self._keep, name=f"keep-{self.command.name}", daemon=True)
        self._keeper.start()
        self._started.wait()

    def _keep(self) -> None:
        """Start and wait, again and again; in a thread that outlives each process, which dies with it."""
        pause_seconds = PAUSE_SECONDS_MIN
        while True:
            with self.command.log.open("ab") as log:
                self._process = subprocess.Popen(
                    ["setpriv", "--pdeathsig", "TERM", "--", *self.command.argv],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    cwd=ROOT,
                    env={**os.environ, **self.command.environment},
                    start_new_session=True,
                )
            self._started.set()
            if self._stopping.is_set():  # asked to stop in the pause before this start
                self._process.terminate()
            self.exit_code = self._process.wait()
            if self._stopping.is_set() or not self._restart or self.exit_code in PERMANENT:
                return
            self._say(
                f"{self.command.name} ended with status {self.exit_code}; starting it again in {pause_seconds:g} s"
            )
            if self._stopping.wait(pause_seconds):
                return
            pause_seconds = min(2 * pause_seconds, PAUSE_SECONDS_MAX)
            self.restarts += 1

    def kill(self) -> None:
        """Kill it with SIGKILL; it comes back unless it was made with `restart` false."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            if not self._restart and self._keeper is not None:
                self._keeper.join()

    def stop(self, seconds_max: float = STOP_SECONDS_MAX) -> int | None:
        """Ask it with SIGTERM to end, kill it after `seconds_max`; return its exit status, None if never started."""
        self._stopping.set()
        if self._keeper is None or self._process is None:
            return None
        self._process.send_signal(signal.SIGTERM)
        self._keeper.join(seconds_max)
        if self._keeper.is_alive():
            self._process.kill()
            self._keeper.join()
        return self.exit_code

    def unhealthy(self) -> str | None:
        """Return None when /healthz answers 200, else what it says or why it says nothing."""
        url = f"http://127.0.0.1:{self.command.http_port}/healthz"
        try:
            with urllib.request.urlopen(url, timeout=2):
                return None
        except urllib.error.HTTPError as error:
            return error.read().decode(errors="replace").strip()
        except (OSError, HTTPException) as error:
            return f"/healthz does not answer ({error})"

    def metrics(self) -> str:
        """Return the text of /metrics; OSError when it does not answer."""
        url = f"http://127.0.0.1:{self.command.http_port}/metrics"
        with urllib.request.urlopen(url, timeout=5) as answer:
            return str(answer.read().decode())

    def wait_healthy(self, seconds_max: float = HEALTHY_SECONDS_MAX) -> None:
        """Return once /healthz answers 200.

        ServiceError when the process has ended for good, dies again and again, or after `seconds_max`.
        """
        assert self._keeper is not None, "not started"
        deadline, restarts_before = time.monotonic() + seconds_max, self.restarts
        while (reason := self.unhealthy()) is not None:
            self._keeper.join(_POLL_SECONDS)
            if not self._keeper.is_alive() or self.restarts - restarts_before > RESTARTS_MAX:
                status = self.exit_code if self.exit_code in PERMANENT else None
                raise ServiceError(f"{self.command.name} does not start: {self.last_words()}", status)
            if time.monotonic() > deadline:
                raise ServiceError(f"{self.command.name} is not healthy after {seconds_max:g} s: {reason}")

    def last_words(self) -> str:
        """Return the message of the last fatal error in its log, else the log's last line."""
        lines = self.command.log.read_text(encoding="utf-8", errors="replace").split("\n")
        for line in reversed(lines):
            with contextlib.suppress(ValueError, KeyError, TypeError):
                if (said := json.loads(line))["event"] == "fatal":
                    return str(said["message"])
        return next((line for line in reversed(lines) if line.strip()), "it said nothing")


class Services:
    """The three services with settings for one broker; `processes` has them by name: node, cluster, enricher.

    Attributes:
        folder: holds `<name>.log`, `<name>-state/` and, unless given, the key file.
        group: the enricher's consumer group.
    """

    def __init__(
        self,
        folder: Path,
        *,
        bootstrap: str,
        manifests: Path,
        node: str,
        cluster: str = "demo",
        pin_dir: Path | None = None,
        settings: Mapping[str, str] | None = None,
        restart: bool = True,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.folder = folder
        self.group = f"podwire-enricher-{cluster}"
        self.key_file = folder / "key"
        self._restart = restart
        self._say = say
        folder.mkdir(parents=True, exist_ok=True)
        if not self.key_file.exists():
            self.key_file.touch(mode=0o600)
            self.key_file.write_text(secrets.token_hex(16) + "\n", encoding="ascii")
        self._settings = {
            "PODWIRE_CLUSTER": cluster,
            "PODWIRE_NODE": node,
            "PODWIRE_BOOTSTRAP": bootstrap,
            "PODWIRE_REGISTRY_URL": "",
            "PODWIRE_KEY_FILE": str(self.key_file),
            "PODWIRE_PIN_DIR": str(pin_dir or ""),
            "PODWIRE_HTTP_HOST": "127.0.0.1",
            "PODWIRE_GROUP": self.group,
            **(settings or {}),
        }
        self.processes: dict[str, Process] = {}
        self.add("cluster", "collector", "cluster", "--manifests", str(manifests))
        self.add("enricher", "enricher")
        self.add("node", "collector", "node")

    def add(self, name: str, *module: str, settings: Mapping[str, str] | None = None) -> Process:
        """Add a service, `python -m <module...>`, for example a second enricher; start it yourself."""
        state, port = self.folder / f"{name}-state", free_port()
        state.mkdir(exist_ok=True)
        environment = {
            **self._settings,
            "PODWIRE_STATE_DIR": str(state),
            "PODWIRE_HTTP_PORT": str(port),
            **(settings or {}),
        }
        argv = (sys.executable, "-m", *module)
        command = Command(name, argv, environment, port, self.folder / f"{name}.log")
        process = Process(command, restart=self._restart, say=self._say)
        self.processes[name] = process
        return process

    def start(self) -> None:
        """Start all that do not run, at once: their order does not matter."""
        for process in self.processes.values():
            if process.pid is None:
                process.start()

    def wait_healthy(self, seconds_max: float = HEALTHY_SECONDS_MAX) -> None:
        """Return when all are healthy; ServiceError otherwise."""
        for process in self.processes.values():
            process.wait_healthy(seconds_max)

    def close(self) -> None:
        """Stop all: first the node collector, so that the enricher still gets what it has."""
        for process in reversed(self.processes.values()):
            process.stop()
