"""The whole pipeline for tests: an own Kafka, a lab of pods, the three services, and the flows they make.

Called by the fixtures of tests/e2e and tests/fault. Real parts only.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter, defaultdict
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

import pytest

from podwire import topics
from podwire.demo import mounts
from podwire.demo.broker import Broker
from podwire.demo.lab import Lab
from podwire.demo.processes import Services
from podwire.demo.totals import identity
from podwire.flows import FlowReader
from schemas.registry import CatalogIds

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from podwire.flows import Flow
    from schemas.registry import SchemaIds

TRAFFIC = Path(__file__).with_name("traffic.py")
SEEN_SECONDS_MAX = 60.0


def need_root_and_btf() -> None:
    """Skip, saying what is missing, where probes can't be attached."""
    if os.geteuid() != 0:
        pytest.skip("needs root: probes are attached and network namespaces made")
    if not Path("/sys/kernel/btf/vmlinux").exists():
        pytest.skip("needs a kernel with BTF (/sys/kernel/btf/vmlinux)")


class Kafka(Protocol):
    """One broker or several."""

    bootstrap: str

    def start(self) -> None:
        """Start and return once it answers."""

    def stop(self) -> None:
        """End it."""


class Place(Protocol):
    """Where programs run, a pod or the node itself."""

    @property
    def ip(self) -> str:
        """Its address."""

    @property
    def ip6(self) -> str | None:
        """Its IPv6 address."""

    def run(self, command: Sequence[str], timeout: float) -> subprocess.CompletedProcess[str]:
        """Run a command there to its end."""

    def popen(self, command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
        """Start a command there."""


class Pipeline:
    """Broker, lab and services; use it in a `with`.

    Attributes:
        flows: distinct flow records seen so far, by identity.
        repeats: how often an identity came again.
        ids: what the flows' schema ids mean.
        replication: factor of the topics.
    """

    replication = 1

    def __init__(
        self,
        name: str,
        folder: Path,
        settings: Mapping[str, str] | None = None,
        *,
        restart: bool = True,
        broker_from_start: bool = True,
    ) -> None:
        self.name = name
        self.folder = folder
        self._settings = settings or {}
        self._restart = restart
        self._broker_from_start = broker_from_start
        self._stack = ExitStack()
        self.flows: dict[tuple[str, str, str, int, int], Flow] = {}
        self.repeats: Counter[tuple[str, str, str, int, int]] = Counter()
        self._next: dict[int, int] = {}
        self.ids: SchemaIds = CatalogIds()

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def make_broker(self) -> Kafka:
        """Return the pipeline's Kafka, not started yet."""
        return Broker(self.folder / "kafka")

    def _start(self) -> None:
        self.lab = self._stack.enter_context(Lab(self.name))
        self.broker = self.make_broker()
        self._stack.callback(self.broker.stop)
        if self._broker_from_start:
            self.broker.start()
            topics.create(self.broker.bootstrap, replication=self.replication)
        pins = self.folder / "pins"
        pins.mkdir()
        self._stack.enter_context(mounts.mounted("tracefs", mounts.TRACEFS))
        assert self._stack.enter_context(mounts.mounted("bpf", pins)), "bpffs could not be mounted"
        self.manifests = self.folder / "manifests.json"
        self.write_manifests()
        self.services = Services(
            self.folder / "services",
            bootstrap=self.broker.bootstrap,
            manifests=self.manifests,
            node=self.lab.node,
            cluster=self.name,
            pin_dir=pins,
            settings=self._settings,
            restart=self._restart,
        )
        self._stack.callback(self.services.close)

    def write_manifests(self) -> None:
        """Hand the lab's present objects to the watcher, in one step."""
        new = self.manifests.with_suffix(".new")
        new.write_text(json.dumps(self.lab.manifest()))
        new.rename(self.manifests)

    def run(self) -> None:
        """Start the services and return when all are healthy."""
        self.services.start()
        self.services.wait_healthy()

    def read(self) -> None:
        """Add the flow records that have come since the last call."""
        self.read_repeats()

    def read_repeats(self) -> list[tuple[tuple[str, str, str, int, int], Flow]]:
        """Add the flow records that have come since the last call; return those that repeat an identity, with it."""
        repeats = []
        reader = FlowReader(self.broker.bootstrap, self.ids)
        try:
            bounds = reader.bounds()
            start = {partition: self._next.get(partition, low) for partition, (low, _) in bounds.items()}
            end = {partition: high for partition, (_, high) in bounds.items()}
            for flow in reader.span(start, end):
                key = identity(flow)
                if key in self.flows:
                    self.repeats[key] += 1
                    repeats.append((key, flow))
                else:
                    self.flows[key] = flow
            assert reader.unreadable == 0
            self._next = end
        finally:
            reader.close()
        return repeats

    def wait_for(
        self, enough: Callable[[list[Flow]], bool], seconds_max: float = SEEN_SECONDS_MAX
    ) -> list[Flow]:
        """Return all flows as soon as `enough(flows)`; fail, showing what there is, after `seconds_max`."""
        deadline = time.monotonic() + seconds_max
        while True:
            self.read()
            flows = list(self.flows.values())
            if enough(flows):
                return flows
            if time.monotonic() > deadline:
                kinds = Counter(
                    (flow["record_type"], flow["observed_by"], flow["client_pod"]) for flow in flows
                )
                pytest.fail(f"not seen within {seconds_max:g} s; seen: {dict(kinds)}")
            time.sleep(0.2)  # the topic is polled: a consumer that stays would hide what a restart repeats

    def of(self, place: Place, said: list[dict[str, Any]]) -> dict[int, list[Flow]]:
        """Return the flow records of the connections that a program in `place` said it made, by client port."""
        made = {(one["pid"], one["port"]) for one in said}  # another program may have had the port before
        addresses = {place.ip, place.ip6, *(one.get("address") for one in said)}
        found: dict[int, list[Flow]] = defaultdict(list)
        for flow in self.flows.values():
            if flow["client_address"] in addresses and (flow["client_pid"], flow["client_port"]) in made:
                found[flow["client_port"]].append(flow)
        return found

    def settled(
        self,
        place: Place,
        said: list[dict[str, Any]],
        expected: set[tuple[str, str]],
        seconds_max: float = SEEN_SECONDS_MAX,
    ) -> dict[int, list[Flow]]:
        """Wait until each connection has the (record type, observed by) records that are expected, and return them."""

        def enough(_: list[Flow]) -> bool:
            found = self.of(place, said)
            return len(found) == len(said) and all(
                expected <= {(flow["record_type"], flow["observed_by"]) for flow in flows}
                for flows in found.values()
            )

        self.wait_for(enough, seconds_max)
        return self.of(place, said)


def program(part: str, name: str, port: int, **options: object) -> list[str]:
    """Return the command line of a program of tests/traffic.py."""
    more = [text for key, value in options.items() for text in (f"--{key.replace('_', '-')}", str(value))]
    return [sys.executable, str(TRAFFIC), part, "--name", name, "--port", str(port), *more]


def serve(
    place: Place, name: str, port: int, part: str = "serve", **options: object
) -> subprocess.Popen[bytes]:
    """Start a server there and return it once it listens."""
    server = place.popen(program(part, name, port, **options), stdout=subprocess.PIPE)
    assert server.stdout is not None
    assert server.stdout.readline() == b"listening\n"
    return server


def said_by(place: Place, argv: list[str], seconds_max: float = 120) -> list[dict[str, Any]]:
    """Run a client there to its end and return the connections it says it made."""
    done = place.run(argv, timeout=seconds_max)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]
