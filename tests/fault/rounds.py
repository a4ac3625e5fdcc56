"""One round of the fault suite: traffic, a fault in its middle, and what became of every connection afterwards.

Owns the worlds that faults happen in (real Kafka, real services, real connections between pods of a lab) and the
verdict. Never decides what goes wrong: that is `faults`. Called by `__main__`.
"""

from __future__ import annotations

import contextlib
import json
import random
import subprocess
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from uuid import UUID

from confluent_kafka import KafkaException

from collector.errors import KafkaFatalError
from podwire.audit import EXIT_COMPLETE, EXIT_MISSING, ask
from podwire.demo.lab import Port
from podwire.demo.processes import HEALTHY_SECONDS_MAX
from podwire.demo.totals import pending
from schemas import catalog, codec
from schemas.registry import connect
from tests.fault import clock
from tests.fault.books import Books, TopicReader, halves_of
from tests.fault.brokers import Brokers
from tests.fault.verdicts import Row, audit_complaints, difference, latest, leaves_open, names_wrongly
from tests.pipeline import Pipeline, program, serve
from tests.registry import Registered

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from podwire.audit import Answer
    from podwire.demo.broker import Broker
    from podwire.flows import Flow
    from tests.fault.verdicts import Loses

PORT = 8080
SERVER = "api"
HALVES_PER_CONNECTION = 4  # CONNECT, ACCEPT and two CLOSE
BEFORE, AFTER = (50, 150), 100
"""Connections made before the fault begins, between two numbers, and after it is over."""
LASTING_US = 1_000_000
"""More than a connection of the traffic's takes from begin to end."""
SETTLE_SECONDS_MAX = 180.0


@dataclass(frozen=True)
class Setting:
    """What a world is made of.

    Attributes:
        name: as in the table.
        brokers: 1 or 3.
        services: settings of all three services.
        node: settings of the node collector alone.
        pinned: whether probes outlive their collector.
        spool_bytes: size of the file system that holds the collector's state; 0 takes a plain folder.
        collector: module that is run as the node collector.
        second_node: whether the server's pod is on a node of its own, whose collector's clock can be stepped.
        registry: whether the services take schema ids from a registry.
    """

    name: str
    brokers: int = 1
    services: Mapping[str, str] = field(default_factory=dict)
    node: Mapping[str, str] = field(default_factory=dict)
    pinned: bool = True
    spool_bytes: int = 0
    collector: tuple[str, ...] = ("collector", "node")
    second_node: bool = False
    registry: bool = False


class World(Pipeline):
    """A client and a server behind a Service, and services that stay dead until a fault starts them again.

    Attributes:
        books: of all that has happened in this world.
        dice: what chance decides in the next round.
        contradictions: repeats that say something else than what they repeat.
        registry: the registry, None where the ids are the catalog's.
    """

    def __init__(self, setting: Setting, folder: Path) -> None:
        self.registry = Registered(folder / "registry") if setting.registry else None
        url = self.registry.url if self.registry else ""
        settings = {"PODWIRE_REPORT_INTERVAL_S": "1", "PODWIRE_REGISTRY_URL": url, **setting.services}
        super().__init__("fault", folder, settings, restart=False)
        self.setting = setting
        self.replication = setting.brokers
        self.books = Books(pinned=setting.pinned)
        self.dice = random.Random(0)
        self.contradictions: list[str] = []

    def flows_of(self, said: list[dict[str, Any]]) -> list[Flow]:
        """Return the flow records of the connections that the client said it made, the server's own too."""
        ids = {flow["flow_id"] for flows in self.of(self.client, said).values() for flow in flows}
        return [flow for flow in self.flows.values() if flow["flow_id"] in ids]

    def ended(self) -> list[str]:
        """Return which services have ended although no fault wants them to, with their last words.

        A watcher whose transaction the broker gave up while away ends and begins anew, as an orchestrator has it.
        """
        watcher = self.services.processes["cluster"]
        if watcher.pid is None and watcher.exit_code == KafkaFatalError.exit_code:
            restart(self, "cluster")
        return [
            f"{name} ended with status {process.exit_code}: {process.last_words()}"
            for name, process in self.services.processes.items()
            if process.pid is None and process.exit_code != 0
        ]

    def accounted(self) -> int:
        """Return how many halves the books say are in no flow, by their reasons."""
        return sum(self.books.lost.values()) + self.books.dead_lettered if self.books.reports else 0

    def complaints(self) -> list[str]:
        """Return what is wrong in this world, whatever happened in it."""
        return [*self.books.complaints(), *self.contradictions[:1], *self.ended()]

    def read(self) -> None:
        """Add the flow records that have come, and note where a repeat contradicts what it repeats."""
        for key, flow in self.read_repeats():
            if fields := difference(self.flows[key], flow):
                self.contradictions.append(f"repeats of {key} differ in {sorted(fields)}")

    def open(self) -> None:
        """Start everything."""
        self.__enter__()

    def close(self) -> None:
        """End everything and leave nothing."""
        self._stack.close()

    def write_manifests(self, more_pods: int = 0) -> None:
        """Hand the lab's objects to the watcher, and as many pods that nobody talks to."""
        document = self.lab.manifest()
        pods = [item for item in document["items"] if item["kind"] == "Pod"]
        if self.setting.second_node:
            clock.move_to_second_node(document["items"], SERVER, self.nodes[1])
        document["items"] += [_another(pods[0], number) for number in range(more_pods)]
        new = self.manifests.with_suffix(".new")
        new.write_text(json.dumps(document))
        new.rename(self.manifests)

    def make_broker(self) -> Broker | Brokers:
        """Return what the world's Kafka is."""
        return super().make_broker() if self.setting.brokers == 1 else Brokers(self.folder / "kafka")

    def _start(self) -> None:
        if self.registry is not None:
            self._stack.callback(self.registry.stop)
            self.registry.start()
            self.ids = connect(self.registry.url)
        super()._start()
        self.client = self.lab.pod("web", "shop")
        self.server = self.lab.pod(SERVER, "shop")
        self.address = self.lab.service("api", [self.server], (Port(80, PORT),), namespace="shop")
        serve(self.server, "api", PORT)
        self.write_manifests()
        self._readers = {
            topic.name: TopicReader(self.broker.bootstrap, topic)
            for topic in (catalog.RAW, catalog.COLLECTOR, catalog.DEADLETTER)
        }
        self._add_collectors()
        self.run()

    def _add_collectors(self) -> None:
        """Put the node collectors in place that the setting asks for: they follow the lab's pods alone."""
        netns = [str(self.client.netns_ino), str(self.server.netns_ino)]
        if self.setting.second_node:
            settings = {"PODWIRE_ONLY_NETNS": netns.pop(), "PODWIRE_NODE": self.nodes[1]}
            settings |= {"PODWIRE_PIN_DIR": str(self.folder / "pins" / "second")}
            self.clock = clock.Clock(self.folder)
            self.services.add("second-node", *self.setting.collector, settings=settings | self.clock.settings)
        settings = {"PODWIRE_ONLY_NETNS": ",".join(netns), **self.setting.node}
        if not self.setting.pinned:
            settings["PODWIRE_PIN_DIR"] = ""
        state = self.folder / "services" / "node-state"
        if self.setting.spool_bytes:
            options = ["-t", "tmpfs", "-o", f"size={self.setting.spool_bytes}", "podwire-fault", str(state)]
            subprocess.run(["mount", *options], check=True)
            self._stack.callback(subprocess.run, ["umount", "--lazy", str(state)], check=True)
        self.services.add("node", *self.setting.collector, settings=settings)

    @property
    def nodes(self) -> tuple[str, ...]:
        """Names of the nodes that have a collector."""
        return (self.lab.node, f"{self.lab.node}-b")[: 1 + self.setting.second_node]

    def read_books(self) -> None:
        """Take in what has come to raw topic, reports and flows, as far as Kafka lets itself be read now."""
        with contextlib.suppress(KafkaException):  # it is back, but its partitions have no leaders yet
            self._read_books()

    def _read_books(self) -> None:
        for message in self._readers[catalog.RAW.name].read():
            self.books.add_raw(message)
        for message in self._readers[catalog.COLLECTOR.name].read():
            self.books.add_report(codec.decode("CollectorReport", message.value))
        for message in self._readers[catalog.DEADLETTER.name].read():
            self.books.add_dead_letter(codec.decode("DeadLetter", message.value))
        self.read()
        self.books.add_flows(self.flows.values())
        self.books.pending = sum(
            int(pending(process.metrics()))
            for name, process in self.services.processes.items()
            if name.endswith("enricher") and process.pid is not None and process.unhealthy() is None
        )


class Traffic:
    """A client that makes connections until it is told to stop, and says which."""

    def __init__(self, world: World) -> None:
        self._world = world
        argv = program("keep-talking", "web", 80, address=world.address)
        self._process = world.client.popen(argv, stdout=subprocess.PIPE, stdin=subprocess.PIPE)
        self.said: list[dict[str, Any]] = []

    def more(self, count: int) -> None:
        """Return when `count` more connections have been made."""
        assert self._process.stdout is not None
        for _ in range(count):
            self.said.append(json.loads(self._process.stdout.readline()))

    def until(self, enough: Callable[[], bool]) -> None:
        """Go on until that holds; fail when a service ends that should not."""
        while not enough():
            assert not (ended := self._world.ended()), ended
            self.more(10)

    def lasting(self, seconds: float) -> None:
        """Go on for so long: the length of an outage is a part of the fault."""
        deadline = time.monotonic() + seconds
        self.until(lambda: time.monotonic() >= deadline)

    def end(self) -> list[dict[str, Any]]:
        """Stop the client and return all connections that it made."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self.said += [json.loads(line) for line in self._process.stdout]
        assert self._process.wait() == 0
        return self.said


def _another(pod: dict[str, Any], number: int) -> dict[str, Any]:
    """Return a pod like that one, with name, UID and address of its own."""
    address = f"10.250.{number // 250}.{number % 250 + 1}"
    uid = str(UUID(int=2**100 + number))
    status = pod["status"] | {"podIP": address, "podIPs": [{"ip": address}], "containerStatuses": []}
    metadata = pod["metadata"] | {"name": f"other-{number}", "uid": uid}
    return pod | {"metadata": metadata, "status": status}


def play(
    world: World,
    name: str,
    fault: Callable[[World, Traffic], None],
    *,
    loses: Loses = "nothing",
    settle_seconds_max: float = SETTLE_SECONDS_MAX,
) -> Row:
    """Make connections before, during and after the fault, wait until all is told, and judge."""
    begun_ms = time.time_ns() // 1_000_000
    repeats, accounted = sum(world.repeats.values()), world.accounted()
    traffic = Traffic(world)
    traffic.more(world.dice.randint(*BEFORE))
    fault(world, traffic)
    over, made_until = time.monotonic(), len(traffic.said)
    traffic.more(AFTER)
    said = traffic.end()
    deadline = over + settle_seconds_max
    uncounted = loses == "gap"
    if uncounted:
        recovered = _await_quiet(world, deadline)
    else:
        recovered = _await_told(world, said[:made_until], accounted, deadline)
        _await_told(world, said, accounted, deadline)
        _await_quiet(world, deadline)
    flows = world.flows_of(said)
    missing = HALVES_PER_CONNECTION * len(said) - len({half for flow in flows for half in halves_of(flow)})
    lost = world.accounted() - accounted
    complaints = world.complaints()
    status = EXIT_COMPLETE if loses == "nothing" else EXIT_MISSING
    answer = audit_until(world, begun_ms, status, deadline)
    complaints += audit_complaints(answer, loses, lost)
    if uncounted:
        lost = missing - _missing_outside(world, said, answer)
    if (lost > 0) != (loses != "nothing"):
        complaints.append(
            f"{lost} halves were lost, where {'none' if loses == 'nothing' else 'some'} should be"
        )
    return Row(
        fault=name,
        made=len(said),
        flows=len(flows),
        repeats=sum(world.repeats.values()) - repeats,
        lost=lost,
        unaccounted=missing - lost,
        wrong=sum(map(names_wrongly, flows)),
        unresolved=sum(map(leaves_open, latest(flows))),
        recover_s=recovered - over,
        complaints=complaints,
        audit=answer.exit_code,
        sums=[str(one) for one in world.books.sums()],
    )


def _missing_outside(world: World, said: list[dict[str, Any]], answer: Answer) -> int:
    """Return the halves of connections that are not told although they were not made near a gap that was said."""
    missing = 0
    for one in said:
        at_us = one["begin_unix_ns"] // 1000
        if not any(gap.from_unix_us - LASTING_US <= at_us <= gap.to_unix_us for gap in answer.findings):
            halves = {half for flow in world.flows_of([one]) for half in halves_of(flow)}
            missing += HALVES_PER_CONNECTION - len(halves)
    return missing


def audit_until(world: World, from_ms: int, status: int, deadline: float | None = None) -> Answer:
    """Return what `podwire audit` answers of the time from then on until now, at the monotonic deadline at the latest.

    Earlier when it has this exit status and nothing of the time is left unknown.
    """
    deadline = time.monotonic() + SETTLE_SECONDS_MAX if deadline is None else deadline
    to_ms = time.time_ns() // 1_000_000
    while True:
        answer, unreadable = ask(world.broker.bootstrap, world.ids, from_ms, to_ms, world.nodes, world.name)
        assert unreadable == 0
        decided = all(finding.missing for finding in answer.findings)
        if (answer.exit_code == status and decided) or time.monotonic() >= deadline:
            return answer
        time.sleep(0.2)  # a worker tells nobody when it has written what the answer waits for


def _read_until(world: World, enough: Callable[[], bool], deadline: float) -> None:
    """Read the books again and again until that holds, or until the monotonic deadline.

    Before a report was read, as where Kafka has just come back, nothing holds.
    """
    world.read_books()
    while not (world.books.reports and enough()) and time.monotonic() < deadline:
        time.sleep(0.2)  # topics are polled: a consumer that stays would hide what a restart repeats
        world.read_books()


def _await_told(world: World, said: list[dict[str, Any]], accounted: int, deadline: float) -> float:
    """Return the monotonic time when each connection was told in full but for what the books say was lost.

    `accounted` halves were so before these connections.
    """

    def told() -> bool:
        halves = {half for flow in world.flows_of(said) for half in halves_of(flow)}
        return len(halves) + world.accounted() - accounted >= HALVES_PER_CONNECTION * len(said)

    _read_until(world, told, deadline)
    return time.monotonic()


def _await_quiet(world: World, deadline: float) -> float:
    """Return the monotonic time when a report speaks of the time after now, and all sums hold, or it is too late."""
    asked_us = time.time_ns() // 1000

    def quiet() -> bool:
        return world.books.reported_since(asked_us) >= set(world.nodes) and not world.complaints()

    _read_until(world, quiet, deadline)
    return time.monotonic()


def restart(world: World, name: str) -> None:
    """Start a service that a fault has ended, and wait until it works."""
    process = world.services.processes[name]
    process.start()
    process.wait_healthy(HEALTHY_SECONDS_MAX)
