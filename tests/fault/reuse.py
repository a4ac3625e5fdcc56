"""Addresses that pods hand on within seconds, by the thousand: whom does a flow to such an address name?

Real Kafka, watcher and worker. A pod that is named, in whatever revision, must have had the address; and where the Pod
records say that it was surely one pod's at that time, the highest revision must name that one. Pods are entries of the
manifest file, and connections to them are halves of a client whose other half nobody sent, so that an address at a time
is all that is known of the server. Called by `__main__`.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import time
from collections import defaultdict
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple

from confluent_kafka import Producer

from collector.kafka import read_to_end
from podwire import topics
from podwire.demo import manifest
from podwire.demo.broker import Broker
from podwire.demo.processes import Services
from podwire.demo.totals import identity
from podwire.flows import FlowReader
from schemas import catalog, codec
from schemas.registry import CatalogIds
from tests import halves
from tests.fault.verdicts import Row, difference, latest
from tests.waiting import until

if TYPE_CHECKING:
    from pathlib import Path

    from podwire.flows import Flow

NODE = "node-1"
GENERATIONS_OF_SLOW = 8
"""The slow addresses' pods live so many times longer than the fast ones': long enough to be surely known."""
SLOW, FAST = 10, 160
FLOWS_PER_GENERATION = 40
SETTLE_SECONDS_MAX = 120.0
SKEW_MS = 100
SETTINGS = {
    "PODWIRE_WATERMARK_INTERVAL_MS": "200",
    # A manifest shows a pod at once, and there is one clock; by the defaults no pod here lives long enough to be sure.
    "PODWIRE_STATUS_LAG_MS": "500",
    "PODWIRE_CLOCK_SKEW_MS": str(SKEW_MS),
    "PODWIRE_CORRECTION_MS": "20000",
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

    def __init__(self, folder: Path, bootstrap: str, seed: int) -> None:
        self._file = folder / "manifests.json"
        self._producer = Producer({"bootstrap.servers": bootstrap, "linger.ms": 0})
        self._owners: dict[str, Owner] = {}
        self._keys = itertools.count(1)
        self.pods = 0
        self.truth: dict[str, Owner] = {}
        self._dice = random.Random(seed)

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
        chosen = owners[:SLOW] + self._dice.sample(owners[SLOW:], FLOWS_PER_GENERATION - SLOW)
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
            self.truth[key.hex()] = owner
            self._producer.produce(catalog.RAW.name, halves.batch([event]), partition=0)
        assert self._producer.flush(30) == 0


def play(folder: Path, pods: int, seconds: float, seed: int) -> Row:
    """Let so many pods share the addresses within that time, talk to some by chance, and judge every flow to them."""
    broker = Broker(folder / "kafka")
    broker.start()
    topics.create(broker.bootstrap)
    churn = Churn(folder, broker.bootstrap, seed)
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
        enricher = services.processes["enricher"]
        until(
            lambda: len({flow["tcp_key"] for flow in _flows(broker.bootstrap)}) == len(churn.truth),
            "a flow of each connection",
            SETTLE_SECONDS_MAX,
        )
        recovered_s = time.monotonic() - over
        until(
            lambda: "podwire_enricher_pending_corrections 0.0" in enricher.metrics(),
            "no record is to be corrected any more",
            SETTLE_SECONDS_MAX,
        )
        return _row(churn, _flows(broker.bootstrap), _sure(broker.bootstrap), recovered_s)
    finally:
        services.close()
        broker.stop()


def _flows(bootstrap: str) -> list[Flow]:
    """Return all flow records that there are."""
    reader = FlowReader(bootstrap, CatalogIds())
    try:
        bounds = reader.bounds()
        first = {partition: low for partition, (low, _) in bounds.items()}
        return list(reader.span(first, {partition: end for partition, (_, end) in bounds.items()}))
    finally:
        reader.close()


class Sure(NamedTuple):
    """From when to when an address was surely a pod's, by its record and for any clock, Unix times in us."""

    from_us: int
    to_us: float
    pod: str


def _sure(bootstrap: str) -> dict[str, list[Sure]]:
    """Return by address what the last records of all pods say of it."""
    records = {
        message.key(): codec.decode("Pod", value)
        for message in read_to_end(bootstrap, catalog.PODS)
        if (value := message.value()) is not None
    }
    found = defaultdict(list)
    for record in records.values():
        for one in record["addresses"]:
            end_us = one["to_earliest_us"]
            to_us = math.inf if end_us is None else end_us - SKEW_MS * 1000
            since_us = one["from_latest_us"] + SKEW_MS * 1000
            found[one["address"]].append(Sure(since_us, to_us, record["name"]))
    return found


def _row(churn: Churn, flows: list[Flow], sure: dict[str, list[Sure]], recovered_s: float) -> Row:
    """Judge all records: none names a wrong pod, and those of a sure time name it in their highest revision."""
    seen: dict[tuple[object, ...], Flow] = {}
    contradicting = 0
    for flow in flows:
        first = seen.setdefault(identity(flow), flow)
        contradicting += bool(difference(first, flow))
    distinct = list(seen.values())
    unresolved = named = 0
    for flow in latest(distinct):
        address, at_us = churn.truth[flow["tcp_key"]].address, flow["client_established_unix_us"]
        owners = [one.pod for one in sure[address] if one.from_us <= at_us < one.to_us]
        if len(owners) == 1:
            named += 1
            unresolved += (flow["server_resolution"], flow["server_pod"]) != ("IP_AT_TIME", owners[0])
    complaints = (
        [] if named else [f"no flow of {len(flows)} was at a time when its address was surely a pod's"]
    )
    if contradicting:
        complaints.append(f"{contradicting} repeats differ from what they repeat")
    return Row(
        fault=f"{churn.pods} pods on {SLOW + FAST} addresses",
        made=len(churn.truth),
        flows=len(distinct),
        repeats=len(flows) - len(distinct),
        lost=0,
        unaccounted=len(churn.truth.keys() - {flow["tcp_key"] for flow in flows}),
        wrong=sum(flow["server_pod"] not in {None, churn.truth[flow["tcp_key"]].name} for flow in distinct),
        unresolved=unresolved,
        recover_s=recovered_s,
        complaints=complaints,
    )
