"""Kafka by Docker: used where the engine has or gets the image, given up for the jars where not."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from podwire.demo import compose
from podwire.demo.errors import BrokerError
from tests.conftest import composed_kafka

if TYPE_CHECKING:
    from pathlib import Path

DOCKER = """#!/bin/sh
echo "$PODWIRE_KAFKA_PORT $*" >>"$(dirname "$0")/called"
for word in $FAILING; do case " $* " in *" $word "*) echo "no $word" >&2; exit 1;; esac; done
"""


@pytest.fixture
def called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for docker that notes its arguments in the file returned, and fails on words in FAILING."""
    docker = tmp_path / "docker"
    docker.write_text(DOCKER)
    docker.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path / "called"


@pytest.mark.parametrize(
    ("failing", "available"),
    [("", True), ("version", False), ("compose", False), ("image", True), ("image pull", False)],
    ids=["all works", "no engine", "no compose", "pulled", "no image"],
)
@pytest.mark.usefixtures("called")
def test_available_asks_for_engine_compose_and_image(
    failing: str, available: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The image may be there or be pulled; engine and compose must answer."""
    monkeypatch.setenv("FAILING", failing)
    assert compose.available() is available


def test_available_is_false_without_docker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Most machines have none, which is no error."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not compose.available()


def test_broker_starts_and_removes_the_composed_kafka_on_its_port(called: Path) -> None:
    """The port that clients are given is the one that compose publishes."""
    broker = compose.ComposeBroker()
    broker.start()
    broker.stop()
    up, down = called.read_text().splitlines()
    port = broker.bootstrap.partition(":")[2]
    prefix = f"{port} compose --project-name podwire-demo --file {compose.FILE}"
    assert up == f"{prefix} up --detach --wait --force-recreate --renew-anon-volumes kafka"
    assert down == f"{prefix} down --volumes --timeout 10"


def test_broker_that_does_not_come_up_is_removed_and_reported(
    called: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What docker says is in the error, and no container stays."""
    monkeypatch.setenv("FAILING", "up")
    with pytest.raises(BrokerError, match="no up"):
        compose.ComposeBroker().start()
    assert "down --volumes" in called.read_text()


def test_compose_file_publishes_the_same_image_on_loopback_only() -> None:
    """The file and the code name one image, and nothing listens on the network."""
    text = compose.FILE.read_text()
    assert f"image: {compose.IMAGE}\n" in text
    assert '"127.0.0.1:${PODWIRE_KAFKA_PORT:-29092}:${PODWIRE_KAFKA_PORT:-29092}"' in text


def test_tests_start_the_same_image_with_settings_for_their_port() -> None:
    """Clients of the tests' container are sent to the port on loopback that it publishes."""
    image, environment = composed_kafka(12345)
    assert image == compose.IMAGE
    assert environment["KAFKA_ADVERTISED_LISTENERS"] == "PLAINTEXT://127.0.0.1:12345"
    assert "PLAINTEXT://:12345" in environment["KAFKA_LISTENERS"]
    assert not any("$" in value for value in environment.values())


@pytest.mark.usefixtures("called")
def test_image_is_enough_for_the_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    """They start it by testcontainers, so an engine without the compose command will do."""
    monkeypatch.setenv("FAILING", "compose")
    assert compose.image_available()
    monkeypatch.setenv("FAILING", "version")
    assert not compose.image_available()
