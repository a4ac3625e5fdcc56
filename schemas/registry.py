"""Schema ids: from a Confluent-compatible registry where one is configured, else fixed in the catalog.

Services look up the ids that they write with once, at start, and the schema of a foreign id when it first comes;
registering is a deployment step. "Unknown" is only what a registry says: one that does not answer is away, and asked
again. The one module here that talks to the network.
"""

from __future__ import annotations

import json
import re
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

import fastavro
from fastavro.schema import SchemaParseException

from schemas import catalog, codec

if TYPE_CHECKING:
    from collections.abc import Callable

    from schemas.catalog import Topic

ANSWER_SECONDS_MAX = 5.0
NOT_FOUND = range(40400, 40500)
"""Confluent's error codes for a subject, version, schema or id that the registry does not have."""


class UnknownSchemaError(LookupError):
    """No schema is known under that id or subject: the registry says so."""


class RegistryAwayError(ConnectionError):
    """The registry gave no answer; the same question may get one later. Names the registry."""


class SchemaIds(Protocol):
    """What a service asks of a registry."""

    def id_of(self, topic: Topic) -> int:
        """Return the id under which the topic's value schema is known; UnknownSchemaError when it is not."""

    def writer_schema(self, schema_id: int) -> Any:
        """Return the parsed schema of an id; UnknownSchemaError when there is none, RegistryAwayError for now."""


class CatalogIds:
    """The ids fixed in the catalog, for set-ups without a registry."""

    def id_of(self, topic: Topic) -> int:
        """Return the catalog's id."""
        return topic.schema_id

    def writer_schema(self, schema_id: int) -> Any:
        """Return the schema that the catalog gives this id."""
        for topic in catalog.TOPICS:
            if topic.schema_id == schema_id:
                return codec.parsed(topic.schema)
        if schema_id in catalog.EARLIER:
            topic, absent = catalog.EARLIER[schema_id]
            return codec.parsed_without(topic.schema, frozenset(absent))
        raise UnknownSchemaError(f"the catalog has no schema id {schema_id}")


class RegistryIds:
    """Ids from a registry that speaks Confluent's API, subjects named `<topic>-value`."""

    def __init__(self, url: str, wait: Callable[[str], None] | None) -> None:
        from confluent_kafka.schema_registry import SchemaRegistryClient  # noqa: PLC0415 (heavy, optional)

        # Whoever asks decides about asking again, and says so; the client would retry in silence.
        self._client = SchemaRegistryClient({"url": url, "timeout": ANSWER_SECONDS_MAX, "max.retries": 0})
        self._name = f"the schema registry at {re.sub('//[^/@]*@', '//', url)}"  # without user and password
        self._wait = wait

    @cache  # noqa: B019 (one registry per process)
    def id_of(self, topic: Topic) -> int:
        """Return the id of the topic's own `.avsc` under its subject; waits while the registry is away."""
        from confluent_kafka.schema_registry import Schema  # noqa: PLC0415

        subject, schema = f"{topic.name}-value", Schema(codec.text(topic.schema), "AVRO")
        while True:
            try:
                return int(self._ask(lambda: self._client.lookup_schema(subject, schema)).schema_id)
            except RegistryAwayError as error:
                if self._wait is None:
                    raise
                self._wait(str(error))
            except UnknownSchemaError as error:
                raise UnknownSchemaError(
                    f"the registry does not have this version of {topic.schema} under {subject}: {error}"
                ) from error

    @cache  # noqa: B019 (one registry per process)
    def writer_schema(self, schema_id: int) -> Any:
        """Return the registry's schema of an id; asks once and never waits."""
        schema = self._ask(lambda: self._client.get_schema(schema_id))
        try:
            return fastavro.parse_schema(json.loads(schema.schema_str))
        except (ValueError, LookupError, TypeError, SchemaParseException) as error:
            raise UnknownSchemaError(f"schema id {schema_id} is no Avro schema: {error}") from error

    def _ask(self, question: Callable[[], Any]) -> Any:
        """Return the answer; UnknownSchemaError when it is "not found", RegistryAwayError when there is none."""
        from confluent_kafka.schema_registry import SchemaRegistryError  # noqa: PLC0415

        try:
            return question()
        except SchemaRegistryError as error:
            if error.error_code in NOT_FOUND:
                raise UnknownSchemaError(f"{error}") from error
            # Overload, a proxy's page, a refused login: no word about the schema.
            raise RegistryAwayError(f"{self._name} (HTTP status {error.http_status_code})") from error
        # The client's HTTP library, which differs between its versions, has no common base of errors.
        except Exception as error:
            raise RegistryAwayError(self._name) from error


class PatientIds:
    """The same ids for callers with nothing else to do: `writer_schema` calls `wait` while the registry is away."""

    def __init__(self, ids: SchemaIds, wait: Callable[[str], None]) -> None:
        self._ids = ids
        self._wait = wait

    def id_of(self, topic: Topic) -> int:
        """Return the id under which the topic's value schema is known."""
        return self._ids.id_of(topic)

    def writer_schema(self, schema_id: int) -> Any:
        """Return the parsed schema of an id; UnknownSchemaError when there is none."""
        while True:
            try:
                return self._ids.writer_schema(schema_id)
            except RegistryAwayError as error:
                self._wait(str(error))


def connect(url: str, wait: Callable[[str], None] | None = None) -> SchemaIds:
    """Return the ids of the registry at `url`, or the catalog's when it is empty; asks nothing yet.

    While the registry does not answer what `id_of` asks, `wait` is called with what is missing; it decides how long to
    sleep and what to say, and may raise to give up. Without `wait`, `id_of` raises RegistryAwayError.
    """
    return RegistryIds(url, wait) if url else CatalogIds()
