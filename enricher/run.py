"""Starts the enricher: settings, schema ids, waiting for Kafka, metadata to its end, then the Faust worker.

Owns the order of starting and of ending. Called by `__main__`.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, NoReturn

import structlog
from prometheus_client import CollectorRegistry, ProcessCollector

from enricher import health, kafka, metadata, watchdog
from enricher.app import Worker, wall_ms
from enricher.corrections import Limits as CorrectionLimits
from enricher.engine import Engine, Limits
from enricher.errors import FatalError, PartitionsError, ProcessingError, SchemaIdError
from enricher.flow import FlowBuilder
from enricher.history import History
from enricher.joiner import Joiner
from enricher.metrics import Exporter
from enricher.networks import Networks
from enricher.output import Output
from enricher.resolve import Resolver
from enricher.schema_ids import WatchedIds
from enricher.settings import parse
from schemas import catalog, registry

if TYPE_CHECKING:
    from collections.abc import Mapping

    from enricher.settings import Settings

RETRY_SECONDS = 1.0
TOPICS = (
    catalog.RAW,
    catalog.FLOWS,
    catalog.DEADLETTER,
    catalog.CORRECTIONS,
    *metadata.TOPICS,
    catalog.COLLECTOR,
    catalog.COVERAGE,
    catalog.COMPLETENESS,
)
log = structlog.get_logger()


class Waiting:
    """Says once what start-up waits for, and keeps it for `/healthz`."""

    def __init__(self) -> None:
        self.what: str | None = "start"

    def say(self, what: str) -> None:
        """Note that `what` is missing; said once in the log."""
        if what != self.what:
            log.info("waiting", **{"for": what})
        self.what = what

    def __call__(self, what: str) -> None:
        """Note that `what` is missing, and wait a second before the caller looks again."""
        self.say(what)
        # Kafka and registry tell nobody that they are back; SIGTERM raises out of it.
        time.sleep(RETRY_SECONDS)


def run(arguments: list[str]) -> int:
    """Run until SIGTERM or SIGINT and return the exit status; FatalError when it can't."""
    settings = parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    waiting = Waiting()
    exporting = CollectorRegistry()
    ProcessCollector(registry=exporting)
    server = health.serve(settings.http_host, settings.http_port, exporting, lambda: _unhealthy(waiting))
    log.info("started", cluster=settings.cluster, group=settings.group_id, http_port=server.server_port)

    _check_partitions(kafka.wait_for_topics(settings.bootstrap, TOPICS, waiting))
    worker = _assemble(settings, _schema_ids(settings, waiting), exporting, waiting)
    try:
        worker.run()
    except SystemExit as ended:
        if ended.code not in {0, None}:
            raise ProcessingError(
                f"The Faust worker crashed (status {ended.code}).",
                "see the log lines before; a restart repeats it",
            ) from ended
    return 0


def _unhealthy(waiting: Waiting) -> str | None:
    return None if waiting.what is None else f"waiting for {waiting.what}"


def _check_partitions(counts: Mapping[str, int]) -> None:
    """Raise PartitionsError when the changelog has no partition for one of the raw topic."""
    raw, changelog = counts[catalog.RAW.name], counts[catalog.CORRECTIONS.name]
    if changelog < raw:
        raise PartitionsError(
            f"{catalog.CORRECTIONS.name} has {changelog} partitions, {catalog.RAW.name} has {raw}.",
            f"add partitions to {catalog.CORRECTIONS.name}, or delete it while no enricher runs and create it anew",
        )


def _schema_ids(settings: Settings, waiting: Waiting) -> WatchedIds:
    ids = registry.connect(settings.registry_url, waiting)
    try:
        for topic in TOPICS:
            ids.id_of(topic)
    except registry.UnknownSchemaError as error:
        raise SchemaIdError(f"{error}", "register the schemas, then start again") from error
    return WatchedIds(ids)


def _assemble(settings: Settings, ids: WatchedIds, exporting: CollectorRegistry, waiting: Waiting) -> Worker:
    history = History(settings.clock_skew_us)
    reader = metadata.MetadataReader(settings.bootstrap, ids, settings.cluster)
    reader.start()
    while not reader.ready.wait(RETRY_SECONDS):
        waiting.say("metadata to its end")
    metadata.apply(history, reader.drain())
    waiting.what = None
    log.info("metadata_read", pods=history.pods)

    networks = Networks(settings.cidr_names, settings.cluster_cidrs)
    resolver = Resolver(history, networks)
    builder = FlowBuilder(settings.cluster, ids.id_of(catalog.FLOWS), history, networks, resolver)
    output = Output(kafka.producer(settings.bootstrap, f"{settings.group_id}-{os.getpid()}"))
    limits = Limits(
        settings.window_ms,
        settings.idle_slack_ms,
        settings.metadata_wait_ms,
        settings.waiting_max,
        settings.group_id,
        CorrectionLimits(settings.correction_ms, settings.corrections_max),
    )
    engine = Engine(limits, ids, history, builder, output)
    joining = kafka.producer(settings.bootstrap, f"{settings.group_id}-completeness-{os.getpid()}")
    joiner = Joiner(
        settings.bootstrap, settings.group_id, settings.cluster, ids, joining, engine.counts.intervals
    )
    exporting.register(Exporter(engine.counts, lambda: _gauges(engine, reader, ids, joiner)))
    raw_reader = kafka.PartitionReader(settings.bootstrap, settings.group_id, catalog.RAW.name)
    changelog = None
    if settings.correction_ms:
        changelog = kafka.PartitionReader(settings.bootstrap, settings.group_id, catalog.CORRECTIONS.name)
    worker = Worker(settings, engine, reader, raw_reader, changelog, die)
    watchdog_reader = kafka.PartitionReader(settings.bootstrap, settings.group_id, catalog.RAW.name)
    watchdog.watch(
        watchdog_reader,
        settings.stall_seconds + settings.metadata_wait_ms / 1000,
        [lambda: _progress(worker, engine, ids), lambda: _joined(joiner, ids)],
        die,
    )
    joiner.start(lambda: 0 in engine.partitions and not worker.stopping.is_set(), die)
    _bound_the_end(worker, settings.stop_seconds)
    return worker


def _progress(worker: Worker, engine: Engine, ids: WatchedIds) -> watchdog.Progress:
    partitions = list(engine.partitions.items())
    heads = {watchdog.Place(catalog.RAW.name, number): partition.head for number, partition in partitions}
    excused = ids.waited_for or worker.stopping.is_set()
    return watchdog.Progress(heads, engine.read_again, worker.is_full, excused)


def _joined(joiner: Joiner, ids: WatchedIds) -> watchdog.Progress:
    heads = {watchdog.Place(topic, 0): head for topic, head in joiner.heads.items()}
    return watchdog.Progress(heads, shared=True, excused=ids.waited_for)


def _gauges(
    engine: Engine, reader: metadata.MetadataReader, ids: WatchedIds, joiner: Joiner
) -> Mapping[str, float | None]:
    partitions = list(engine.partitions.values())
    until_us = engine.history.pods_complete_until_us
    return {
        "waiting_halves": sum(partition.pairing.waiting for partition in partitions),
        "waiting_metadata": engine.waiting_metadata,
        "pending_corrections": engine.corrections.pending,
        "in_flight": engine.output.in_flight,
        "unacknowledged_batches": engine.unacknowledged,
        "uncovered_batches": engine.uncovered,
        "undecided_intervals": joiner.undecided,
        "assigned_partitions": len(partitions),
        "pods": engine.history.pods,
        "metadata_undecodable": reader.unpacker.undecodable,
        "registry_awaited": ids.waited_for,
        "metadata_age_seconds": None if until_us is None else wall_ms() / 1000 - until_us / 1_000_000,
    }


def _bound_the_end(worker: Worker, stop_seconds: float) -> None:
    """End the process `stop_seconds` after an orderly end began, should it not have ended by then."""

    def loop() -> None:
        worker.stopping.wait()
        # The deadline itself: the end that it bounds takes this daemon thread with it.
        time.sleep(stop_seconds)
        log.warning("end_forced", after_seconds=stop_seconds)
        leave(0)

    threading.Thread(target=loop, name="end", daemon=True).start()


def die(error: BaseException) -> None:
    """End the process at once, unacknowledged: what was not acknowledged will be processed again."""
    fatal = error if isinstance(error, FatalError) else None
    log.error("fatal", cause=type(error).__name__, message=str(error), exc_info=None if fatal else error)
    leave(fatal.exit_code if fatal else ProcessingError.exit_code)


def leave(status: int) -> NoReturn:
    """Leave without running anybody's handlers, so that nothing gets acknowledged on the way out."""
    sys.stderr.flush()
    sys.stdout.flush()
    os._exit(status)
