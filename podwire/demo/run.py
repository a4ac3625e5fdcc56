"""`podwire demo`: the whole pipeline on this machine, real but for Kubernetes, from nothing to nothing.

Owns the order of things and the cleaning up, whatever happens. Never decides what a good run is: that is
`totals`. Called by `podwire.cli`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from confluent_kafka import KafkaException

from podwire import observe, topics
from podwire.demo import compose, leftovers, mounts, preflight, totals, workload
from podwire.demo.broker import DEMO_PORT, Broker, free_port
from podwire.demo.errors import EXIT_INTERRUPTED, EXIT_NOT_SHOWN, BrokerError, DemoError, LabError
from podwire.demo.lab import Lab, Pod, Port
from podwire.demo.processes import ROOT, Process, Services
from podwire.flows import FlowReader
from schemas import registry

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import FrameType

RUN_FOLDER = ROOT / "build" / "demo"
NODE = "demo-node"
NAMESPACE = "shop"
SERVICE = "api"
PORT, TARGET_PORT, REFUSED_PORT = 80, 8080, 9090
ENRICHED_SECONDS_MAX = 30.0


class Kafka(Protocol):
    """A broker that the demo starts."""

    bootstrap: str

    def start(self) -> None:
        """Start it and return when it answers."""

    def stop(self) -> None:
        """Stop it."""


@dataclass(frozen=True)
class Running:
    """The demo's parts once all of them run."""

    kafka: Kafka
    services: Services
    servers: tuple[subprocess.Popen[bytes], ...]
    client: subprocess.Popen[bytes]


class Stop:
    """SIGINT and SIGTERM: the first one interrupts the start, later they only set `asked`.

    Attributes:
        asked: set once either signal has come.
        interrupting: whether the next signal raises KeyboardInterrupt.
    """

    def __init__(self) -> None:
        self.asked = threading.Event()
        self.interrupting = True
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._take)

    def _take(self, _number: int, _frame: FrameType | None) -> None:
        self.asked.set()
        if self.interrupting:
            self.interrupting = False
            raise KeyboardInterrupt


def run(arguments: Sequence[str]) -> int:
    """Run the demo; return its exit status: 0, or one of `podwire.demo.errors`."""
    options = _options(arguments)
    try:
        preflight.check()
        result, complaint = _demo(Stop(), options.seconds)
    except KeyboardInterrupt:
        return _fail("interrupted before everything ran.", EXIT_INTERRUPTED)
    except DemoError as error:
        return _fail(str(error), error.exit_code)
    except KafkaException as error:
        return _fail(f"Kafka failed: {error.args[0].str()}.", DemoError.exit_code)
    status = 0 if complaint is None else _fail(complaint, EXIT_NOT_SHOWN)
    print(json.dumps(result.as_dict()), flush=True)
    return status


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="podwire demo",
        description="Runs a real Kafka, three pods with a Service between them, and Podwire, on this machine.",
    )
    parser.add_argument(
        "--seconds",
        type=_seconds,
        default=os.environ.get("DEMO_SECONDS") or "0",
        help="end by itself after so many seconds of traffic; 0: at Ctrl-C (default: DEMO_SECONDS, else 0)",
    )
    return parser.parse_args(arguments)


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 <= seconds < threading.TIMEOUT_MAX:
        raise argparse.ArgumentTypeError(f"{text}: give seconds, or 0")
    return seconds


def _fail(sentence: str, status: int) -> int:
    sys.stdout.flush()
    sys.stderr.write(f"podwire demo: {sentence}\n")
    return status


@contextmanager
def _step(number: int, what: str) -> Iterator[None]:
    """Print what is being done, then how long it took."""
    begin = time.monotonic()
    print(f"[{number}/4] {what} ... ", end="", flush=True)
    try:
        yield
    except BaseException:
        print("failed", flush=True)
        raise
    print(f"{time.monotonic() - begin:.1f} s", flush=True)


def _demo(stop: Stop, seconds: float) -> tuple[totals.Totals, str | None]:
    """Start, show and end everything; nothing of it is left when this returns or raises."""
    with ExitStack() as stack:
        try:
            running = _start(stack)
        finally:
            stop.interrupting = False
        with _shown(running):
            stop.asked.wait(seconds or None)
            print(
                "\nEnding: pods, then collector, then enricher, so that nothing in flight is missed.\n",
                flush=True,
            )
            _drain(running)
        return totals.read(running.kafka.bootstrap, (NAMESPACE, SERVICE))


def _start(stack: ExitStack) -> Running:
    """Start one part after the other, each with its end on the stack."""
    with _step(1, "Three pods and a Service"):
        lab = Lab("demo", NODE)
        stack.callback(lab.close)
        leftovers.remove()
        leftovers.mark()
        shutil.rmtree(RUN_FOLDER, ignore_errors=True)
        (pins := RUN_FOLDER / "bpf").mkdir(parents=True)
        web, apis, address = _shop(lab)
        manifests = RUN_FOLDER / "manifests.json"
        manifests.write_text(json.dumps(lab.manifest(), indent=1) + "\n", encoding="utf-8")
    with _step(2, "Apache Kafka with Podwire's topics"):
        kafka = _kafka(stack)
        topics.create(kafka.bootstrap)
    with _step(3, "Collectors and enricher"):
        stack.enter_context(mounts.mounted("tracefs", mounts.TRACEFS, leftovers.OWNER))
        pinnable = stack.enter_context(mounts.mounted("bpf", pins, leftovers.OWNER))
        services = Services(
            RUN_FOLDER / "services",
            bootstrap=kafka.bootstrap,
            manifests=manifests,
            node=NODE,
            pin_dir=pins if pinnable else None,
            say=lambda line: print(f"\n-- {line}", flush=True),
        )
        stack.callback(services.close)
        services.start()
        services.wait_healthy()
    with _step(4, "Traffic"):
        servers = tuple(_serve(api) for api in apis)
        client = web.popen(_workload("ask", "shop-web", PORT, address), stderr=subprocess.DEVNULL)
    return Running(kafka, services, servers, client)


def _shop(lab: Lab) -> tuple[Pod, tuple[Pod, ...], str]:
    """Make the pods; return the client, the servers and the address of their Service."""
    apis = tuple(
        lab.pod(
            f"api-5b9c7d6f8-{suffix}", NAMESPACE, deployment="api", container="api", service_account="api"
        )
        for suffix in ("2m4nq", "t8w6z")
    )
    web = lab.pod("web-6d8f9c4b7-x7k2p", NAMESPACE, deployment="web", container="web", service_account="web")
    ports = (Port(PORT, TARGET_PORT, "http"), Port(REFUSED_PORT, name="metrics"))  # nobody listens there
    return web, apis, lab.service(SERVICE, apis, ports, namespace=NAMESPACE)


def _kafka(stack: ExitStack) -> Kafka:
    """Start Kafka by Docker where that works, else from the jars."""
    if compose.available():
        kafka: Kafka = compose.ComposeBroker()
        stack.callback(kafka.stop)
        try:
            kafka.start()
        except BrokerError as error:
            print(f"not by Docker ({error}) ... ", end="", flush=True)
        else:
            return kafka
    kafka = Broker(RUN_FOLDER / "kafka", free_port(DEMO_PORT))
    stack.callback(shutil.rmtree, RUN_FOLDER / "kafka" / "data", ignore_errors=True)
    stack.callback(kafka.stop)
    kafka.start()
    return kafka


def _workload(part: str, process_name: str, port: int, address: str = "") -> list[str]:
    command = [sys.executable, str(workload.__file__), part, "--process-name", process_name]
    command += ["--port", str(port)]
    return [*command, "--address", address, "--refused-port", str(REFUSED_PORT)] if address else command


def _serve(api: Pod) -> subprocess.Popen[bytes]:
    server = api.popen(_workload("serve", "shop-api", TARGET_PORT), stdout=subprocess.PIPE)
    assert server.stdout is not None
    if server.stdout.readline() != b"listening\n":
        raise LabError(f"the server in {api.name} did not come up")
    return server


@contextmanager
def _shown(running: Running) -> Iterator[None]:
    """Say where things are, and print flows as they come while the block runs."""
    services = running.services
    print(
        f"""
Kafka       {running.kafka.bootstrap}   (also: podwire observe --bootstrap {running.kafka.bootstrap} --follow)
Node        {NODE}, with all TCP connections of this machine but those to loopback addresses
Manifests   {RUN_FOLDER / "manifests.json"}   (add pods of your own: it is read again when it changes)
Key         {services.key_file}
Logs        {services.folder}/*.log

Live: client pod (process) -> Service -> backend pod (process); Ctrl-C ends.
""",
        flush=True,
    )
    ended = threading.Event()
    printer = threading.Thread(target=_print_flows, args=(running.kafka.bootstrap, ended), name="printer")
    printer.start()
    try:
        yield
    finally:
        ended.set()
        printer.join()


def _print_flows(bootstrap: str, ended: threading.Event) -> None:
    colour = sys.stdout.isatty()
    reader = FlowReader(bootstrap, registry.CatalogIds())
    try:
        start = {partition: first for partition, (first, _) in reader.bounds().items()}
        for flow in reader.read(start, ended.is_set):
            if flow is not None:
                print(observe.compact(flow, colour=colour), flush=True)
    except KafkaException as error:
        print(f"-- live view ended: {error.args[0].str()}", flush=True)
    finally:
        reader.close()


def _drain(running: Running) -> None:
    """End the traffic and let everything in flight arrive in the flows topic."""
    services, bootstrap = running.services, running.kafka.bootstrap
    for process in (running.client, *running.servers):
        process.terminate()
        process.wait()
    services.processes["node"].stop()
    enricher = services.processes["enricher"]
    if not (totals.enriched(bootstrap, services.group, ENRICHED_SECONDS_MAX) and _settled(enricher)):
        print(
            f"-- the enricher did not finish in {ENRICHED_SECONDS_MAX:g} s: the totals may lack flows",
            flush=True,
        )
    enricher.stop()


def _settled(enricher: Process) -> bool:
    """Return True once no half waits for its other half any more and all flows are in Kafka, False when late."""
    deadline = time.monotonic() + ENRICHED_SECONDS_MAX
    while time.monotonic() < deadline:
        try:
            pending = totals.pending(enricher.metrics())
        except OSError:
            pending = 1  # it is being started again
        if pending == 0:
            return True
        time.sleep(totals.POLL_SECONDS)  # a gauge can't be waited for
    return False
