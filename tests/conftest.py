"""What all tests share: one real broker for the whole run.

`PODWIRE_TEST_BOOTSTRAP` names a broker that runs already; else testcontainers starts Kafka where a Docker
engine answers and has the image; else the jars of `make kafka` do.
"""

from __future__ import annotations

import os
import re
import subprocess
from typing import TYPE_CHECKING, Protocol

import pytest

from podwire.demo.broker import Broker

if TYPE_CHECKING:
    from collections.abc import Iterator

KAFKA_IMAGE = "apache/kafka:4.1.1"


EXPECTED_SKIPS = re.compile(
    r"kernel has (no )?(kprobes|headers)|kernel refused to load|tier \w+ refused|is not possible|needs a kernel before"
)
"""What CI's own kernel can't do; the guests run these. Any other skip means that CI lacks something."""


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Let CI fail on a skip that it did not expect."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    reasons = {report.longrepr[2] for report in reporter.stats.get("skipped", [])}
    unexpected = sorted(reason for reason in reasons if not EXPECTED_SKIPS.search(reason))
    if os.environ.get("CI") and exitstatus == 0 and unexpected:
        reporter.write_line(f"\nCI did not expect these skips: {unexpected}", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


class RunningBroker(Protocol):
    """A broker that answers."""

    bootstrap: str


class _Given:
    def __init__(self, bootstrap: str) -> None:
        self.bootstrap = bootstrap


def docker_has_kafka() -> bool:
    """Return whether a Docker engine answers and has Kafka's image."""
    try:
        done = subprocess.run(["docker", "image", "inspect", KAFKA_IMAGE], capture_output=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


@pytest.fixture(scope="session")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningBroker]:
    """A real Kafka, shared by all tests of the run; each test makes its own topics or keys."""
    if bootstrap := os.environ.get("PODWIRE_TEST_BOOTSTRAP"):
        yield _Given(bootstrap)
        return
    if docker_has_kafka():
        from testcontainers.kafka import KafkaContainer

        with KafkaContainer(KAFKA_IMAGE) as container:
            yield _Given(container.get_bootstrap_server())
        return
    jars = Broker(tmp_path_factory.mktemp("kafka"))
    jars.start()
    yield jars
    jars.stop()
