"""`python -m enricher replay`: one process of a replay, which enriches its share of the partitions once more.

Owns the order of reading: metadata to its end, then partition after partition. Belongs to no consumer group and
commits nothing. Says on stdout how far it is, one JSON object per line (`Report`). Called by `__main__`; `podwire
replay` starts as many as it likes.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import structlog

from enricher import kafka, metadata, replay
from enricher.errors import DeletedInputError, SchemaIdError, UnreachableError
from enricher.flow import FlowBuilder, Moment
from enricher.history import History
from enricher.networks import Networks
from enricher.output import Entry, Output
from enricher.resolve import Resolver
from enricher.settings import ReplaySettings, read
from schemas import catalog, registry

if TYPE_CHECKING:
    from collections.abc import Iterable

    from enricher.flow import Flow
    from schemas.registry import SchemaIds

RETRY_SECONDS = 0.2
REPORT_SECONDS = 1.0
log = structlog.get_logger()


@dataclass
class Report:
    """How far a process is.

    Attributes:
        messages, messages_all: raw messages read, and to be read.
        counts: `replay.Counts` so far.
        metadata_until_us: the pods topic is complete up to here, Unix time in us; None without a watermark.
        done: whether everything is delivered.
    """

    messages: int
    messages_all: int
    counts: replay.Counts
    metadata_until_us: int | None
    done: bool


class Patience:
    """Bounds how long Kafka may be silent."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.reset()

    def reset(self) -> None:
        """Note a sign of life."""
        self._until = time.monotonic() + self._seconds

    def check(self, what: str) -> None:
        """UnreachableError when the last sign of life is too long ago."""
        if time.monotonic() > self._until:
            raise UnreachableError(
                f"No answer for {self._seconds:g} s: {what}.", "look at Kafka, then repeat"
            )

    def wait(self, what: str) -> None:
        """Wait a moment before the caller asks again, as `check` allows."""
        self.check(what)
        time.sleep(RETRY_SECONDS)  # Kafka and registry tell nobody that they are back


def run(arguments: list[str]) -> int:
    """Replay a share of the partitions to its end and return 0; FatalError when it can't."""
    settings = read(ReplaySettings, "python -m enricher replay", arguments)
    patience = Patience(settings.stall_seconds)
    counts = kafka.wait_for_topics(settings.bootstrap, (catalog.RAW, *metadata.TOPICS), patience.wait)
    ids = registry.PatientIds(registry.connect(settings.registry_url, patience.wait), patience.wait)
    try:
        Share(settings, ids, patience).run(counts[catalog.RAW.name])
    except registry.UnknownSchemaError as error:
        raise SchemaIdError(f"{error}", "register the schemas, then repeat") from error
    except kafka.KafkaException as error:
        raise UnreachableError(f"Kafka: {error.args[0].str()}.", "look at Kafka, then repeat") from error
    return 0


class Share:
    """One process's part of a replay."""

    def __init__(self, settings: ReplaySettings, ids: SchemaIds, patience: Patience) -> None:
        self._settings = settings
        self._ids = ids
        self._patience = patience
        self._span = replay.Span(
            settings.from_us,
            settings.to_us,
            settings.early_ms,
            settings.late_ms,
            settings.window_ms,
            settings.now_ms - settings.idle_slack_ms,
        )
        self._reader = kafka.PartitionReader(settings.bootstrap, "podwire-replay", catalog.RAW.name)
        self._output = Output(kafka.producer(settings.bootstrap, f"podwire-replay-{os.getpid()}"))
        self._entry = Entry(self._output, None)
        self._history = History(settings.clock_skew_us)
        networks = Networks(settings.cidr_names, settings.cluster_cidrs)
        resolver = Resolver(self._history, networks)
        self._builder = FlowBuilder(
            settings.cluster, ids.id_of(catalog.FLOWS), self._history, networks, resolver
        )
        self._counts = replay.Counts()
        self._messages_all = 0
        self._reported = 0.0

    def run(self, partitions: int) -> None:
        """Read metadata to its end, then each partition's span, and return when all is delivered."""
        number, of = map(int, self._settings.share.split("/"))
        self._read_metadata()
        spans = {
            partition: self._reader.span(partition, self._span.first_ms, self._span.last_ms)
            for partition in replay.share(partitions, number, of)
        }
        # Asked after the offsets: what retention takes from here on shows as a gap.
        self._refuse_what_is_gone(partitions)
        self._messages_all = sum(end - first for first, end in spans.values())
        for partition, (first, end) in spans.items():
            self._replay(partition, first, end)
        self._flush()
        self._reader.close()
        self._report(done=True)

    def _refuse_what_is_gone(self, partitions: int) -> None:
        """DeletedInputError unless every partition reaches back to the span, whoever's share it is."""
        kept_ms = max(self._reader.kept_since_ms(partition) or 0 for partition in range(partitions))
        if kept_ms > self._span.first_ms:
            since_ms = self._settings.from_us // 1000 + kept_ms - self._span.first_ms
            since = datetime.fromtimestamp(since_ms / 1000, UTC).isoformat(timespec="milliseconds")
            raise DeletedInputError(
                f"The raw topic reaches back far enough for a span from {since} only.",
                "replay a later span, or keep the raw topic longer (retention.ms) for the next time",
            )

    def _read_metadata(self) -> None:
        """Read what is known now, and wait a bounded time for what must still become known of the span's end."""
        reader = metadata.MetadataReader(self._settings.bootstrap, self._ids, self._settings.cluster)
        reader.start()
        try:
            while not reader.ready.wait(RETRY_SECONDS):
                if self._take(reader):
                    self._patience.reset()
                self._patience.check("metadata to its end")
            self._take(reader)
            deadline = time.monotonic() + self._settings.metadata_wait_ms / 1000
            while not self._knows_the_span() and time.monotonic() < deadline:
                time.sleep(RETRY_SECONDS)  # changes come into a queue that is emptied, not awaited
                self._take(reader)
        finally:
            reader.stop()

    def _knows_the_span(self) -> bool:
        return self._history.is_settled(self._span.to_us)

    def _take(self, reader: metadata.MetadataReader) -> bool:
        changes = reader.drain()
        metadata.apply(self._history, changes)
        return bool(changes)

    def _replay(self, partition: int, first: int, end: int) -> None:
        one = replay.PartitionReplay(self._span, partition, self._ids, self._builder, self._counts)
        self._patience.reset()
        for record in self._reader.read(partition, first, end):
            if record is None:
                self._patience.check(f"partition {partition} at offset {first}")
                continue
            if record.offset != first:
                raise DeletedInputError(
                    f"Partition {partition} lacks offsets {first} to {record.offset - 1} by now.",
                    "keep the raw topic longer (retention.ms), or replay a later span",
                )
            first = record.offset + 1
            self._patience.reset()
            self._send(one.take(record.append_ms, record.value, self._moment()))
            self._report()
        self._send(one.end(self._moment()))

    def _moment(self) -> Moment:
        return Moment.at(time.time_ns() // 1_000_000, self._history.pods_complete_until_us)

    def _send(self, flows: Iterable[Flow]) -> None:
        for flow in flows:
            timestamp_ms = min(flow.event_ms, self._settings.now_ms)
            self._output.send(self._settings.topic, flow.key, flow.value, timestamp_ms, self._entry)
        self._output.poll()
        self._flush(self._settings.in_flight_max)

    def _flush(self, in_flight_max: int = 0) -> None:
        """Wait until no more than this is in flight."""
        self._patience.reset()
        while (before := self._output.in_flight) > in_flight_max:
            self._output.poll(RETRY_SECONDS)
            if self._output.in_flight < before:
                self._patience.reset()
            self._patience.check("delivery of records")

    def _report(self, *, done: bool = False) -> None:
        if not done and time.monotonic() - self._reported < REPORT_SECONDS:
            return
        self._reported = time.monotonic()
        report = Report(
            self._counts.messages,
            self._messages_all,
            self._counts,
            self._history.pods_complete_until_us,
            done,
        )
        sys.stdout.write(json.dumps(asdict(report)) + "\n")
        sys.stdout.flush()
