"""Apache Kafka from docker-compose.yml, where a Docker engine answers and has the image or gets it in a minute.

Owns the compose project `podwire-demo` while it runs. Never touches other containers or volumes. Called by
`podwire.demo.run`; `podwire.demo.broker` is the way without an engine. The tests start the same service by
testcontainers, which needs no compose command.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from podwire.demo.broker import DEMO_PORT, free_port
from podwire.demo.errors import BrokerError

FILE = Path(__file__).parents[2] / "docker-compose.yml"
PROJECT = "podwire-demo"
IMAGE = "apache/kafka:4.1.1"
"""The one that docker-compose.yml names."""

ANSWER_SECONDS_MAX = 10.0
PULL_SECONDS_MAX = 60.0
START_SECONDS_MAX = 120.0


def _docker(
    *arguments: str, seconds_max: float, port: int | None = None
) -> subprocess.CompletedProcess[str] | None:
    """Run docker; None when it is not installed or not done in time."""
    environment = {**os.environ, **({} if port is None else {"PODWIRE_KAFKA_PORT": str(port)})}
    try:
        return subprocess.run(
            ["docker", *arguments],
            capture_output=True,
            text=True,
            timeout=seconds_max,
            env=environment,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None


def _succeeds(*arguments: str, seconds_max: float) -> bool:
    done = _docker(*arguments, seconds_max=seconds_max)
    return done is not None and done.returncode == 0


def image_available() -> bool:
    """Return whether an engine answers, and the image is there or could be pulled in time."""
    return _succeeds("version", seconds_max=ANSWER_SECONDS_MAX) and (
        _succeeds("image", "inspect", IMAGE, seconds_max=ANSWER_SECONDS_MAX)
        or _succeeds("pull", "--quiet", IMAGE, seconds_max=PULL_SECONDS_MAX)
    )


def available() -> bool:
    """Return whether the engine's compose command answers, and the image is available."""
    return _succeeds("compose", "version", seconds_max=ANSWER_SECONDS_MAX) and image_available()


class ComposeBroker:
    """The `kafka` service of docker-compose.yml on a free port of loopback.

    Attributes:
        bootstrap: what clients connect to, "127.0.0.1:PORT".
    """

    def __init__(self) -> None:
        self._port = free_port(DEMO_PORT)
        self.bootstrap = f"127.0.0.1:{self._port}"

    def start(self) -> None:
        """Start it without old data and return when its health check passes; BrokerError when it does not."""
        done = self._compose("up", "--detach", "--wait", "--force-recreate", "--renew-anon-volumes", "kafka")
        if done is None or done.returncode != 0:
            said = "no answer in time" if done is None else done.stderr.strip()[-1000:]
            self.stop()
            raise BrokerError(f"`docker compose up` failed: {said}")

    def stop(self) -> None:
        """Remove the container with its data."""
        self._compose("down", "--volumes", "--timeout", "10")

    def _compose(self, *arguments: str) -> subprocess.CompletedProcess[str] | None:
        project = ("compose", "--project-name", PROJECT, "--file", str(FILE))
        return _docker(*project, *arguments, seconds_max=START_SECONDS_MAX, port=self._port)
