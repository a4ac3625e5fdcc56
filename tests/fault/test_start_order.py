"""Start order does not matter: each process waits for what it needs, says so once, and goes on."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from podwire import topics
from podwire.demo.lab import Port
from tests.pipeline import Pipeline, need_root_and_btf, program, said_by, serve
from tests.waiting import until

if TYPE_CHECKING:
    from pathlib import Path

PORT = 8080
OPEN_AND_CLOSE = {("OPEN", "BOTH"), ("CLOSE", "BOTH")}


def waiting_lines(log: Path) -> list[str]:
    """Return what a service said that it waits for, line by line."""
    lines = log.read_text().splitlines() if log.exists() else []
    return [line for line in lines if '"waiting"' in line]


def wait_until_said(pipeline: Pipeline) -> None:
    """Return once every service has said that it waits."""
    processes = pipeline.services.processes.values()
    until(
        lambda: all(waiting_lines(one.command.log) for one in processes), "every service says that it waits"
    )


def test_everything_starts_before_kafka_and_manifests(tmp_path: Path) -> None:
    """Services first, connections second, Kafka third, topics fourth, manifests last: the flows come out right."""
    need_root_and_btf()
    with Pipeline("order", tmp_path, broker_from_start=False) as pipeline:
        client, server = pipeline.lab.pod("web", "shop"), pipeline.lab.pod("api", "shop")
        address = pipeline.lab.service("api", [server], (Port(80, PORT),), namespace="shop")
        serve(server, "api", PORT)
        pipeline.manifests.unlink()
        pipeline.services.start()
        wait_until_said(pipeline)
        said = said_by(client, program("talk", "web", 80, address=address, count=20))
        pipeline.broker.start()
        topics.create(pipeline.broker.bootstrap)
        pipeline.write_manifests()
        found = pipeline.settled(client, said, OPEN_AND_CLOSE, 120)
        for flows in found.values():
            for flow in flows:
                assert flow["client_pod"] == "web"
                assert flow["server_pod"] == "api"
                assert flow["service_name"] == "api"
        pipeline.services.wait_healthy()
        for process in pipeline.services.processes.values():
            assert process.restarts == 0
            reasons = [json.loads(line)["for"] for line in waiting_lines(process.command.log)]
            assert len(reasons) == len(set(reasons)), f"{process.command.name} repeats itself: {reasons}"


@pytest.mark.parametrize("missing", ["PODWIRE_KEY_FILE", "PODWIRE_CLUSTER"])
def test_missing_setting_ends_the_collector_with_a_remedy(tmp_path: Path, missing: str) -> None:
    """A wrong set-up is an exit code of its own and a sentence that names the setting, before the kernel is touched."""
    import os
    import subprocess
    import sys

    key = tmp_path / "key"
    key.write_text("00" * 16)
    environment = {
        **os.environ,
        "PODWIRE_CLUSTER": "c",
        "PODWIRE_NODE": "n",
        "PODWIRE_BOOTSTRAP": "127.0.0.1:1",
        "PODWIRE_KEY_FILE": str(key),
        "PODWIRE_STATE_DIR": str(tmp_path),
    }
    del environment[missing]
    done = subprocess.run(
        [sys.executable, "-m", "collector", "node"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 20
    assert missing.removeprefix("PODWIRE_").lower() in done.stderr.lower()
    assert "Operator action" in done.stderr
