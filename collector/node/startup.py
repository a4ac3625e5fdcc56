"""Waits in the background for what others provide: schema ids and topics. Says once what it waits for.

Owns one thread, so that the ring is read, and the spool written, while Kafka is away. Never touches the collector's
state: the loop asks. Called by `node.run`.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

from collector import kafka
from collector.errors import FatalError, SchemaIdError
from schemas import catalog, registry

if TYPE_CHECKING:
    from collections.abc import Callable

    from collector.node.settings import Settings

DELAY_SECONDS_MIN, DELAY_SECONDS_MAX = 0.1, 2.0

log = structlog.get_logger()


class StoppedError(Exception):
    """The process was asked to end while it waited."""


class Wait:
    """Called with what is missing before each new attempt: says it once, then sleeps longer each time."""

    def __init__(self, stop: threading.Event) -> None:
        self._stop = stop
        self._said: set[str] = set()
        self._delay_s = DELAY_SECONDS_MIN

    def __call__(self, what: str) -> None:
        """Log and sleep; StoppedError when the process is to end."""
        if what not in self._said:
            self._said.add(what)
            log.info("waiting", **{"for": what})
        if self._stop.wait(self._delay_s):
            raise StoppedError
        self._delay_s = min(2 * self._delay_s, DELAY_SECONDS_MAX)


@dataclass(frozen=True)
class SchemaIds:
    """Ids in the Confluent prefix, of RawBatch and of CollectorReport."""

    raw: int
    report: int


class StartUp:
    """What has become known so far; filled by the thread, read by the loop.

    Attributes:
        ids: the schema ids, None while they are not known.
        topics_ready: True once both topics exist and the raw topic has the expected partitions.
        error: why it never will be, None while there is hope.
    """

    def __init__(self, settings: Settings, stop: threading.Event) -> None:
        self._settings, self._stop = settings, stop
        self.ids: SchemaIds | None = None
        self.topics_ready = False
        self.error: FatalError | None = None

    def start(self) -> None:
        """Begin to wait, in a thread that ends with the process."""
        threading.Thread(target=self._run, name="startup", daemon=True).start()

    def _run(self) -> None:
        try:
            self.ids = schema_ids(self._settings.registry_url, Wait(self._stop))
            bootstrap, wait = self._settings.bootstrap, Wait(self._stop)
            kafka.wait_for_topic(bootstrap, catalog.RAW, wait=wait, partitions=self._settings.partitions)
            kafka.wait_for_topic(bootstrap, catalog.COLLECTOR, wait=wait)
            self.topics_ready = True
            log.info("topics_found", partitions=self._settings.partitions)
        except StoppedError:
            return
        except FatalError as error:
            self.error = error


def schema_ids(registry_url: str, wait: Callable[[str], None]) -> SchemaIds:
    """Return the ids, waiting for the registry to answer; SchemaIdError when it does not know our schemas."""
    known = registry.connect(registry_url, wait)
    try:
        return SchemaIds(known.id_of(catalog.RAW), known.id_of(catalog.COLLECTOR))
    except registry.UnknownSchemaError as error:
        raise SchemaIdError(f"{error}.", "register the schemas, then start again") from error
