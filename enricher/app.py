"""The Faust worker: membership, assignment and offsets of the raw topic, and the loop that drives the engine.

The one importer of `faust`. Takes raw bytes with manual acknowledgement (Faust's own would acknowledge what
failed), ends the process on any error, and decides nothing about flows: that is `engine`. Called by `run`.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from typing import TYPE_CHECKING, Any

import faust
import structlog

from enricher.engine import RawMessage
from enricher.kafka import KafkaException
from enricher.schema_ids import RETRY_SECONDS
from schemas import catalog
from schemas.registry import RegistryAwayError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from enricher.corrections import Pending
    from enricher.engine import Engine, Partition
    from enricher.kafka import PartitionReader
    from enricher.metadata import MetadataReader
    from enricher.raw import Half, Rejected
    from enricher.settings import Settings

TICK_SECONDS = 0.01
IDLE_CHECK_SECONDS = 0.2
WARM_UP_RETRY_SECONDS = 1.0
POLL_RECORDS_MAX = 500
BUFFERED_MESSAGES_MAX = 256
COMMIT_SECONDS = 0.5
FLUSH_SECONDS = 5.0
log = structlog.get_logger()


def wall_ms() -> int:
    """Return Unix time in ms."""
    return time.time_ns() // 1_000_000


class _App(faust.App):  # type: ignore[misc]
    """A Faust application that leaves the disk alone."""

    def _create_directories(self) -> None:
        """Make no `<group>-data` in the current directory: it is for tables, and there are none."""


class Worker:
    """One Faust worker around an engine.

    Attributes:
        app: the Faust application.
        stopping: set once an orderly end began.
    """

    def __init__(
        self,
        settings: Settings,
        engine: Engine,
        metadata: MetadataReader,
        reader: PartitionReader,
        changelog: PartitionReader | None,
        fail: Callable[[BaseException], None],
    ) -> None:
        self._settings = settings
        self._engine = engine
        self._metadata = metadata
        self._reader = reader
        self._changelog = changelog
        self._fail = fail
        self._warm: dict[Partition, asyncio.Task[None]] = {}
        self._room = asyncio.Event()
        self.stopping = threading.Event()
        self.app = self._faust_app()

    def run(self) -> None:
        """Run until SIGTERM, SIGINT or a crash of Faust; leaves by SystemExit with Faust's own status."""
        worker = faust.Worker(
            self.app, quiet=True, override_logging=False, redirect_stdouts=False, loglevel="WARNING"
        )
        worker.spinner = None
        worker.execute_from_commandline()

    def _faust_app(self) -> Any:
        settings = self._settings
        app = _App(
            settings.group_id,
            broker=";".join(f"aiokafka://{address.strip()}" for address in settings.bootstrap.split(",")),
            autodiscover=False,
            broker_commit_interval=COMMIT_SECONDS,
            broker_heartbeat_interval=settings.session_timeout_ms / 4000,
            broker_max_poll_records=POLL_RECORDS_MAX,
            broker_request_timeout=max(20.0, settings.session_timeout_ms / 1000),
            broker_session_timeout=settings.session_timeout_ms / 1000,
            consumer_auto_offset_reset="earliest",
            store="memory://",
            stream_buffer_maxsize=BUFFERED_MESSAGES_MAX,
            stream_wait_empty=False,
            topic_allow_declare=False,
            topic_disable_leader=True,
            web_enabled=False,
        )
        topic = app.topic(
            catalog.RAW.name, value_type=bytes, value_serializer="raw", key_type=bytes, key_serializer="raw"
        )
        app.agent(topic, name="enricher")(self._process)
        app.task(self._drive)
        app.task(self._idle)
        app.on_partitions_assigned.connect(self._on_assigned, weak=False)
        app.on_partitions_revoked.connect(self._on_revoked, weak=False)
        app.on_before_shutdown.connect(self._on_before_shutdown, weak=False)
        return app

    async def _guard(self, work: Coroutine[Any, Any, None]) -> None:
        """Run one of the worker's outermost loops; the process ends on any error, nothing acknowledged."""
        try:
            await work
        except Exception as error:  # noqa: BLE001 (the service's outermost loops)
            self._fail(error)

    async def _process(self, stream: Any) -> None:
        await self._guard(self._take_all(stream))

    async def _drive(self) -> None:
        await self._guard(self._tick_all())

    async def _idle(self) -> None:
        await self._guard(self._close_idle_windows())

    async def _take_all(self, stream: Any) -> None:
        async for event in stream.noack().events():
            await self._take(event)

    async def _take(self, event: Any) -> None:
        message = event.message
        partition = self._engine.partitions.get(message.partition)
        if partition is None or partition.position not in {None, message.offset}:
            partition = self._begin(message.partition, message.offset)
        await self._warm[partition]
        halves = (
            await self._cut(partition, message.value)
            if self._engine.may_ask_registry(message.value)
            else None
        )
        if partition.dropped or self.stopping.is_set():
            return
        taken = RawMessage(message.offset, round(message.timestamp * 1000), message.key, message.value)
        self._engine.take(partition, taken, event.ack, wall_ms(), halves)
        while self.is_full:
            self._room.clear()
            await self._room.wait()

    async def _cut(self, partition: Partition, value: bytes | None) -> list[Half] | Rejected | None:
        """Return what `take` would cut a message of another schema into; the stream waits while the registry is away.

        None when the partition was revoked meanwhile, or the end has begun.
        """
        while not partition.dropped and not self.stopping.is_set():
            try:
                return await asyncio.to_thread(self._engine.cut, partition.number, value)
            except RegistryAwayError:
                await asyncio.sleep(RETRY_SECONDS)  # the registry tells nobody that it is back
        return None

    @property
    def is_full(self) -> bool:
        """Whether input pauses until some of what is on its way is delivered."""
        engine, settings = self._engine, self._settings
        return (
            engine.output.in_flight > settings.in_flight_max or engine.waiting_metadata > settings.waiting_max
        )

    async def _tick_all(self) -> None:
        """Take metadata and delivery reports at every tick."""
        while not self.app.should_stop:
            self._engine.tick(self._metadata.drain(), wall_ms())
            if not self.is_full:
                self._room.set()
            await asyncio.sleep(TICK_SECONDS)

    async def _close_idle_windows(self) -> None:
        """Send the halves that wait on partitions which have nothing more to read, for as long as the worker runs."""
        while not self.app.should_stop:
            for partition in list(self._engine.partitions.values()):
                now_ms = wall_ms()
                if partition.dropped or not self._warm[partition].done():
                    continue  # revoked during the `await` below, or not rebuilt yet
                if not self._engine.has_idle_halves(partition, now_ms):
                    continue
                try:
                    _, end = await asyncio.to_thread(self._reader.bounds, partition.number)
                except KafkaException:
                    continue  # nobody knows the end while the broker is away; asked again at the next round
                if end == partition.position and not partition.dropped:
                    self._engine.tell_idle(partition, now_ms)
            await asyncio.sleep(IDLE_CHECK_SECONDS)

    def _begin(self, number: int, position: int | None) -> Partition:
        """Begin with a partition at an offset and rebuild its waiting halves in the background."""
        partition = self._engine.assign(number, position)
        self._warm = {known: task for known, task in self._warm.items() if not known.dropped}
        self._warm[partition] = asyncio.ensure_future(self._guard(self._warm_up(partition)))
        return partition

    async def _warm_up(self, partition: Partition) -> None:
        """Find where the partition begins and rebuild its waiting halves, as often as it takes."""
        number = partition.number
        resumes = partition.position is None  # else offsets may have been skipped, and those are not covered
        while not partition.dropped:
            try:
                if partition.position is None:
                    committed = await asyncio.to_thread(self._reader.committed, [number])
                    partition.position = committed[number]
                if partition.position is not None:
                    await asyncio.to_thread(self._rebuild, partition, partition.position, resumes)
                if self._changelog is not None:
                    await self._restore(partition, self._changelog)
            except KafkaException as error:
                log.warning("warm_up_failed", partition=number, error=str(error))
                await asyncio.sleep(WARM_UP_RETRY_SECONDS)
            except RegistryAwayError:
                await asyncio.sleep(RETRY_SECONDS)  # the registry tells nobody that it is back
            else:
                return

    async def _restore(self, partition: Partition, changelog: PartitionReader) -> None:
        """Take over the records whose correction the partition's earlier workers left to be done."""
        corrections = self._engine.corrections

        def read() -> tuple[list[Pending], int]:
            live = changelog.live(partition.number, lambda: partition.dropped or self.stopping.is_set())
            return corrections.unpack(live)

        found, unreadable = await asyncio.to_thread(read)
        if unreadable:
            log.warning("corrections_unreadable", partition=partition.number, entries=unreadable)
        if not partition.dropped and not self.stopping.is_set():  # else it was not read to its end
            corrections.restore(partition, found, wall_ms())

    def _rebuild(self, partition: Partition, position: int, acknowledged: bool) -> None:
        before = self._reader.before(
            partition.number,
            position,
            self._engine.warm_up_ms,
            lambda: partition.dropped or self.stopping.is_set(),
        )
        with contextlib.closing(before):
            self._engine.warm(partition, before, acknowledged=acknowledged)

    async def _on_assigned(self, _app: Any, assigned: set[Any], **_: Any) -> None:
        numbers = sorted(tp.partition for tp in assigned if tp.topic == catalog.RAW.name)
        log.info("partitions_assigned", partitions=numbers)
        for number in numbers:
            if number not in self._engine.partitions:
                self._begin(number, None)

    async def _on_revoked(self, _app: Any, revoked: set[Any], **_: Any) -> None:
        for tp in revoked:
            if tp.topic == catalog.RAW.name:
                self._engine.revoke(tp.partition)

    async def _on_before_shutdown(self, _app: Any, **_: Any) -> None:
        """Deliver what is in flight and acknowledge it, so that the next worker repeats little."""
        self.stopping.set()
        deadline = time.monotonic() + FLUSH_SECONDS
        self._engine.closing = True
        while (self._engine.output.in_flight or self._engine.unacknowledged) and time.monotonic() < deadline:
            await asyncio.sleep(TICK_SECONDS)
            self._engine.tick([], wall_ms())
        self._engine.tick([], wall_ms())
