"""The registry's answers, watched: says once when one is owed that work waits for, and once when it has come.

Owns what `/metrics` and the watchdog know of it. Never waits: whoever asks does. Made by `run`, asked from any thread.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import structlog

from schemas.registry import RegistryAwayError, UnknownSchemaError

if TYPE_CHECKING:
    from collections.abc import Callable

    from schemas.catalog import Topic
    from schemas.registry import SchemaIds

RETRY_SECONDS = 1.0
"""How long to wait before the same question."""
FORGOTTEN_SECONDS = 15.0
"""A question that nobody repeats for so long is waited for no more: its partition is another worker's."""
log = structlog.get_logger()


class WatchedIds:
    """A registry's or the catalog's ids."""

    def __init__(self, ids: SchemaIds, clock: Callable[[], float] = time.monotonic) -> None:
        self._ids = ids
        self._clock = clock
        self._owed: dict[int, float] = {}

    @property
    def waited_for(self) -> bool:
        """Whether somebody waits for the schema of an id."""
        since = self._clock() - FORGOTTEN_SECONDS
        return any(asked > since for asked in list(self._owed.values()))

    def id_of(self, topic: Topic) -> int:
        """Return the id under which the topic's value schema is known."""
        return self._ids.id_of(topic)

    def writer_schema(self, schema_id: int) -> Any:
        """Return the parsed schema of an id; the errors are those of `SchemaIds`."""
        try:
            schema = self._ids.writer_schema(schema_id)
        except RegistryAwayError as error:
            if not self.waited_for:
                log.warning("waiting", **{"for": str(error)}, schema_id=schema_id)
            self._owed[schema_id] = self._clock()
            raise
        except UnknownSchemaError:
            self._answered(schema_id)
            raise
        self._answered(schema_id)
        return schema

    def _answered(self, schema_id: int) -> None:
        if self._owed.pop(schema_id, None) is not None and not self.waited_for:
            log.info("registry_answers", schema_id=schema_id)
