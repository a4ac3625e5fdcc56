"""What all tests share: one real broker for the whole run.

`PODWIRE_TEST_BOOTSTRAP` names a broker that runs already; else testcontainers starts Kafka where a Docker
engine has the image or gets it in a minute; else the jars of `make kafka` do.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Protocol

import pytest

from podwire.demo import compose
from podwire.demo.broker import Broker, answers, free_port
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from testcontainers.core.container import DockerContainer

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


def composed_kafka(port: int) -> tuple[str, dict[str, str]]:
    """Return image and environment of the `kafka` service of docker-compose.yml, for a port on loopback."""
    import yaml  # here: a guest, which has no Kafka either, lacks it

    text = re.sub(r"\$\{PODWIRE_KAFKA_PORT[^}]*\}", str(port), compose.FILE.read_text(encoding="utf-8"))
    service = yaml.safe_load(text)["services"]["kafka"]
    return service["image"], {name: str(value) for name, value in service["environment"].items()}


def kafka_container() -> tuple[DockerContainer, str]:
    """Return the `kafka` service as a container that is not started, and its bootstrap."""
    from testcontainers.core.config import testcontainers_config
    from testcontainers.core.container import DockerContainer

    testcontainers_config.ryuk_disabled = True  # the reaper is a second image, which this engine may not have
    port = free_port()
    image, environment = composed_kafka(port)
    container = DockerContainer(image, env=environment)
    container.ports[str(port)] = ("127.0.0.1", port)
    return container, f"127.0.0.1:{port}"


def kafka_runs(container: DockerContainer, bootstrap: str) -> bool:
    """Return whether the container's Kafka answers yet; fail when the container has ended."""
    container.reload()
    assert container.status == "running", (
        f"Kafka's container is {container.status}:\n{end_of_logs(container)}"
    )
    return answers(bootstrap)


def end_of_logs(container: DockerContainer) -> str:
    """Return what the container said last, and how the tests do without it."""
    said = "\n".join(part.decode(errors="replace")[-2000:] for part in container.get_logs())
    return f"{said}\nPODWIRE_TEST_BOOTSTRAP=host:port names another Kafka for the tests."


@pytest.fixture(scope="session")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningBroker]:
    """A real Kafka, shared by all tests of the run; each test makes its own topics or keys."""
    if bootstrap := os.environ.get("PODWIRE_TEST_BOOTSTRAP"):
        yield _Given(bootstrap)
        return
    if compose.image_available():
        container, bootstrap = kafka_container()
        with container:
            until(
                lambda: kafka_runs(container, bootstrap),
                f"Kafka in the container answers on {bootstrap}",
                compose.START_SECONDS_MAX,
                lambda: end_of_logs(container),
            )
            yield _Given(bootstrap)
        return
    jars = Broker(tmp_path_factory.mktemp("kafka"))
    jars.start()
    yield jars
    jars.stop()
