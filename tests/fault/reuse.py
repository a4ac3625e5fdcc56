"""Addresses that pods hand on within seconds, by the thousand: whom does a flow to such an address name?

Real Kafka, watcher and worker; pods are entries of the manifest file, and connections to them are halves of a client
whose other half nobody sent, so that an address at a time is all that is known of the server. Called by `__main__`.
"""

from __future__ import annotations

import itertools
import json
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from confluent_kafka import Producer

from podwire import topics
from podwire.demo import manifest
from podwire.demo.broker import Broker
from podwire.demo.processes import Services
from podwire.flows import FlowReader
from schemas import catalog
from schemas.registry import CatalogIds
from tests import halves
from tests.fault.verdicts import Row

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from podwire.flows import Flow

NODE = "node-1"
GENERATIONS_OF_SLOW = 8
"""The slow addresses' pods live so many times longer than the fast ones': long enough to be surely known."""
SLOW, FAST = 10, 160
FLOWS_PER_GENERATION = 40
ANSWER_SECONDS_MAX = 120.0
SETTINGS = {
    "PODWIRE_WATERMARK_INTERVAL_MS": "200",
    # A manifest shows a pod at once, and there is one clock; by the defaults no pod here lives long enough to be sure.
    "PODWIRE_STATUS_LAG_MS": "500",
    "PODWIRE_CLOCK_SKEW_MS": "100",
}


@dataclass(frozen=True)
class Owner:
    """A pod that has an address."""

    name: str
    address: str
    created: str

    def manifest(self) -> dict[str, Any]:
        """Return it as the API shows it."""
        spec = manifest.PodSpec(
            name=self.name,
            namespace="churn",
            uid=manifest.uid_of("Pod", "churn", self.name),
            node=NODE,
            node_address="192.168.7.1",
            created=self.created,
            container="app",
            container_id=self.name.encode().hex().zfill(64),
            image="registry.example/app:1.0",
            addresses=(self.address,),
            deployment="",
            service_account="default",
            host_network=False,
            labels={},
        )
        return manifest.pod(spec)


class Churn:
    """The pods that there are, generation after generation, and who talked to whom."""

    def __init__(self, folder: Path, bootstrap: str) -> None:
        self._file = folder / "manifests.json"
        self._producer = Producer({"bootstrap.servers": bootstrap, "linger.ms": 0})
        self._owners: dict[str, Owner] = {}
        self._keys = itertools.count(1)
        self.pods = 0
        self.truth: dict[str, str] = {}

    def next_generation(self, number: int) -> None:
        """Replace each fast pod, and all slow ones now and then, by another one with the same address."""
        for place in range(SLOW + FAST):
            if place >= SLOW or number % GENERATIONS_OF_SLOW == 0:
                address = f"10.251.0.{place + 1}"
                created = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
                self._owners[address] = Owner(f"pod-{number}-{place}", address, created)
                self.pods += 1
        node = manifest.node(NODE, ["192.168.7.1"], "2026-01-01T00:00:00Z")
        document = manifest.items([node, *(owner.manifest() for owner in self._owners.values())])
        new = self._file.with_suffix(".new")
        new.write_text(json.dumps(document))
        new.rename(self._file)

    def talk(self) -> None:
        """Send halves of connections to some of the addresses, now."""
        owners = list(self._owners.values())
        chosen = owners[:SLOW] + owners[SLOW :: max(1, FAST // (FLOWS_PER_GENERATION - SLOW))]
        for owner in chosen:
            key = halves.key(next(self._keys))
            now_us = time.time_ns() // 1000
            event = halves.event(
                "CONNECT",
                "CLIENT",
                key,
                event_unix_us=now_us,
                established_unix_us=now_us,
                remote_address=halves.ip(owner.address),
                remote_port=8080,
            )
            self.truth[key.hex()] = owner.name
            self._producer.produce(catalog.RAW.name, halves.batch([event]), partition=0)
        assert self._producer.flush(30) == 0


def play(folder: Path, pods: int, seconds: float) -> Row:
    """Let so many pods share the addresses within that time, and judge every flow to them."""
    broker = Broker(folder / "kafka")
    broker.start()
    topics.create(broker.bootstrap)
    churn = Churn(folder, broker.bootstrap)
    churn.next_generation(0)
    services = Services(
        folder / "services",
        bootstrap=broker.bootstrap,
        manifests=folder / "manifests.json",
        node=NODE,
        cluster=halves.CLUSTER,
        settings=SETTINGS,
    )
    del services.processes["node"]
    try:
        services.start()
        services.wait_healthy()
        begun = time.monotonic()
        generations = -(-pods // (FAST + SLOW // GENERATIONS_OF_SLOW))
        for number in range(1, generations + 1):
            churn.talk()
            # How long a pod lives is what is tried; nothing else happens meanwhile.
            time.sleep(max(0.0, begun + seconds * number / generations - time.monotonic()))
            churn.talk()
            churn.next_generation(number)
        over = time.monotonic()
        flows = list(_flows(broker.bootstrap, len(churn.truth)))
        return _row(churn, flows, time.monotonic() - over)
    finally:
        services.close()
        broker.stop()


def _flows(bootstrap: str, count: int) -> Iterator[Flow]:
    """Yield the flows of that many connections."""
    reader = FlowReader(bootstrap, CatalogIds())
    deadline = time.monotonic() + ANSWER_SECONDS_MAX
    seen: set[str] = set()
    start = {partition: first for partition, (first, _) in reader.bounds().items()}
    try:
        for flow in reader.read(start, lambda: len(seen) >= count or time.monotonic() > deadline):
            if flow is not None:
                seen.add(flow["flow_id"])
                yield flow
    finally:
        reader.close()


def _row(churn: Churn, flows: list[Flow], recovered_s: float) -> Row:
    """Judge: a named pod must be the one that had the address; and some must be named."""
    named = [flow for flow in flows if flow["server_pod"] is not None]
    sure = [flow for flow in named if flow["server_resolution"] == "IP_AT_TIME"]
    missing = len(churn.truth.keys() - {flow["tcp_key"] for flow in flows})
    return Row(
        fault=f"{churn.pods} pods on {SLOW + FAST} addresses",
        made=len(churn.truth),
        flows=len(flows),
        repeats=0,
        lost=0,
        unaccounted=missing,
        wrong=sum(churn.truth[flow["tcp_key"]] != flow["server_pod"] for flow in named),
        recover_s=recovered_s,
        complaints=[] if sure else [f"none of {len(flows)} flows names a pod for sure"],
    )
