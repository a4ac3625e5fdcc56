"""`python -m collector node`: opens the probes, waits for registry and topics, turns the loop, ends in order.

Owns the process: settings, signals, the order of opening and closing. The probes come first, so that nothing is
missed while Kafka is away. Never encodes and never decides what is sent. Called by `collector.__main__`.
"""

from __future__ import annotations

import fcntl
import os
import signal
import threading
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from collector import health, kafka
from collector.errors import FatalError, SettingsError
from collector.node.batches import Batcher
from collector.node.collect import NodeCollector, Pace, Reporter
from collector.node.columns import Origin
from collector.node.keys import read_secret
from collector.node.memory import keep_freed_memory
from collector.node.metrics import Metrics
from collector.node.probes import Probes
from collector.node.publish import Publisher
from collector.node.settings import Settings, parse
from collector.node.spool import Spool
from collector.node.startup import StartUp

if TYPE_CHECKING:
    from http.server import ThreadingHTTPServer

    from collector.node.publish import Producer

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

log = structlog.get_logger()


def run(arguments: list[str]) -> int:
    """Collect until SIGTERM or SIGINT, then publish the rest; return 0. FatalError for what an operator must mend."""
    settings = parse(arguments)
    keep_freed_memory()
    origin = Origin(
        cluster=settings.cluster,
        node=settings.node,
        boot_id=BOOT_ID.read_text(encoding="ascii").strip(),
        producer_epoch=time.time_ns() // 1000,
        secret=read_secret(settings.key_file),
        key_id=settings.key_id,
    )
    spool = open_spool(settings, origin)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    probes = Probes.open(settings.probe_options(settings.state_dir, settings.pin_dir))
    try:
        collect(settings, origin, probes, spool, stop)
    finally:
        probes.close(detach=False)  # detached already where they shall not go on
    log.info("stopped")
    return 0


def open_spool(settings: Settings, origin: Origin) -> Spool:
    """Return the spool in the state folder, which stays locked until the process ends.

    SettingsError when the folder can't be used or another collector uses it.
    """
    folder = settings.state_dir
    try:
        spool = Spool(
            folder / "spool",
            settings.spool_bytes_max,
            origin.boot_id,
            origin.producer_epoch,
            settings.partitions,
        )
        fcntl.flock(os.open(folder, os.O_RDONLY | os.O_DIRECTORY), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise SettingsError(
            f"Another collector uses the state folder {folder}.",
            "stop it, or give this one a PODWIRE_STATE_DIR of its own",
        ) from error
    except OSError as error:
        raise SettingsError(
            f"The state folder {folder} can't be used: {error.strerror}.",
            "set PODWIRE_STATE_DIR to a folder that this process may write",
        ) from error
    return spool


def collect(settings: Settings, origin: Origin, probes: Probes, spool: Spool, stop: threading.Event) -> None:
    """Turn the loop until `stop` is set, then drain. FatalError when Kafka or a topic refuses us for good."""
    producer: Producer = kafka.producer(
        settings.bootstrap, f"podwire-node-{settings.node}", queue_bytes_max=settings.queue_bytes_max
    )
    publisher = Publisher(producer, probes.events, spool, settings.spool_after_ms / 1000)
    metrics = Metrics(probes.tier, package_version(), probes.refused)
    pace = Pace(settings.flush_interval_ms / 1000, settings.report_interval_s)
    collector = NodeCollector(probes, publisher, spool, metrics, pace)
    server = serve(settings, metrics, collector)
    log.info(
        "started",
        tier=probes.tier,
        refused=probes.refused,
        reused_probes=probes.reused,
        node=origin.node,
        producer_epoch=origin.producer_epoch,
        http=f"{settings.http_host}:{server.server_port}",
        spooled_events=spool.waiting_events,
    )
    start_up = StartUp(settings, stop)
    start_up.start()

    def take_up() -> None:
        if start_up.ids is not None and not collector.is_reading():
            batcher = Batcher(origin, settings.partitions, start_up.ids.raw)
            collector.start_reading(batcher, Reporter(producer, origin, probes.tier, start_up.ids.report))
        publisher.is_open = start_up.topics_ready

    try:
        while not stop.is_set():
            if start_up.error is not None:
                raise start_up.error
            take_up()
            turn_and_wait(collector, publisher, stop)
        take_up()  # what became known in the last turn
        if not (probes.pinned and (settings.keep_probes or not collector.is_reading())):
            probes.detach()
        collector.finish(time.monotonic() + settings.drain_timeout_s, publisher.poll)
    except FatalError:
        if publisher.is_open:  # else the topics may be other ones than the batches were made for
            publisher.finish()
        if not probes.pinned:  # what is in a pinned ring waits for the next process
            probes.detach()
        raise
    finally:
        server.shutdown()


def turn_and_wait(collector: NodeCollector, publisher: Publisher, stop: threading.Event) -> None:
    """Do one turn, then take in acknowledgements until the next one is due."""
    due_s = time.monotonic() + collector.turn(time.monotonic())
    while not stop.is_set() and (left_s := due_s - time.monotonic()) > 0:
        publisher.poll(left_s)


def serve(settings: Settings, metrics: Metrics, collector: NodeCollector) -> ThreadingHTTPServer:
    """Serve metrics and health; SettingsError when the port is taken."""
    try:
        return health.serve(settings.http_host, settings.http_port, metrics.registry, collector.unhealthy)
    except OSError as error:
        raise SettingsError(
            f"{settings.http_host}:{settings.http_port} can't be listened on: {error.strerror}.",
            "set PODWIRE_HTTP_HOST and PODWIRE_HTTP_PORT to a free address; port 0 takes any",
        ) from error


def package_version() -> str:
    """Return the installed version, "checkout" when run from a checkout."""
    try:
        return version("podwire")
    except PackageNotFoundError:
        return "checkout"
