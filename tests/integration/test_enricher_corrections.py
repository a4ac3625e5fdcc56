"""Corrected records across real processes: unresolved, kill -9, the identity, a successor, revision 1."""

from __future__ import annotations

import urllib.request
from typing import Any

import pytest

from enricher.kafka import PartitionReader
from podwire.demo.broker import free_port
from schemas import catalog
from tests.integration.test_enricher_worker import PARTITIONS, Bench
from tests.waiting import until

pytestmark = pytest.mark.timeout(240)
SETTINGS = {"PODWIRE_METADATA_WAIT_MS": "200", "PODWIRE_CORRECTION_MS": "120000"}


def live(bench: Bench) -> int:
    """Return how many entries of the test's group the changelog holds for its flows.

    The worker reads two windows back, and may find halves there that another test left alone.
    """
    reader = PartitionReader(bench.bootstrap, bench.group, catalog.CORRECTIONS.name)
    try:
        keys = [key for partition in range(PARTITIONS) for key in reader.live(partition, lambda: False)]
    finally:
        reader.close()
    mine = tuple(f"{bench.group}/{flow['flow_id']}/".encode() for flow in bench.flows)
    return sum(key.startswith(mine) for key in keys)


def metrics(port: int) -> str:
    """Return what the worker exports, nothing while it does not answer."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            return str(answer.read().decode())
    except OSError:
        return ""


def shown(flow: dict[str, Any]) -> tuple[Any, ...]:
    """Return what the tests look at."""
    return (flow["revision"], flow["client_reason"], flow["client_pod"], flow["server_pod"])


UNKNOWN = (0, "UNKNOWN_POD_UID", None, None)
NAMED = (1, None, "pod-1", "pod-2")


def test_killed_workers_correction_is_made_by_its_successor(bench: Bench) -> None:
    """What the killed worker sent unresolved, and had acknowledged, is corrected by the next one, once."""
    process = bench.start("killed", **SETTINGS)
    try:
        for number in range(3):
            bench.send(bench.opened(number, number), number)
        bench.read_until(lambda: len(bench.flows) == 3)
        raw = PartitionReader(bench.bootstrap, bench.group, catalog.RAW.name)
        until(lambda: raw.committed(range(3)) == {n: raw.bounds(n)[1] for n in range(3)}, said=bench.logs)
        raw.close()
        assert live(bench) == 3
        process.kill()
        process.wait()
        bench.publish_pods()
        port = free_port()
        with bench.enricher("successor", PODWIRE_HTTP_PORT=str(port), **SETTINGS):
            bench.read_until(lambda: len(bench.flows) == 6)
            until(lambda: 'corrections_total{outcome="corrected"} 3.0' in metrics(port), said=bench.logs)
            until(lambda: live(bench) == 0, said=bench.logs)
    finally:
        process.kill()
        process.wait()
    for number in range(3):
        first, second = bench.of(number, number)
        assert (shown(first), shown(second)) == (UNKNOWN, NAMED)
        assert first["flow_id"] == second["flow_id"]
    with bench.enricher("third", **SETTINGS):
        bench.send(bench.opened(9))
        bench.read_until(lambda: len(bench.of(9)) == 1)
    assert len(bench.flows) == 7


def test_running_worker_corrects_when_the_identity_arrives(bench: Bench) -> None:
    """Without a kill the same: unresolved first, then named, and the changelog is empty again."""
    with bench.enricher(**SETTINGS):
        bench.send(bench.opened(1))
        bench.read_until(lambda: len(bench.of(1)) == 1)
        bench.publish_pods()
        bench.read_until(lambda: len(bench.of(1)) == 2)
        until(lambda: live(bench) == 0, said=bench.logs)
    assert [shown(flow) for flow in bench.of(1)] == [UNKNOWN, NAMED]
