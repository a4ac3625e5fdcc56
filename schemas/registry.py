"""Schema ids: from a Confluent-compatible registry where one is configured, else fixed in the catalog.

Services only look ids up, once at start; registering is a deployment step. The one module here that
talks to the network.
"""

from __future__ import annotations

import json
import socket
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

import fastavro

from schemas import catalog, codec

if TYPE_CHECKING:
    from collections.abc import Callable

    from schemas.catalog import Topic

CONNECT_SECONDS_MAX = 5.0


class UnknownSchemaError(LookupError):
    """No schema is known under that id or subject."""


class SchemaIds(Protocol):
    """What a service asks of a registry."""

    def id_of(self, topic: Topic) -> int:
        """Return the id under which the topic's value schema is known; UnknownSchemaError when it is not."""

    def writer_schema(self, schema_id: int) -> Any:
        """Return the parsed schema of an id; UnknownSchemaError when there is none."""


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
        raise UnknownSchemaError(f"the catalog has no schema id {schema_id}")


class RegistryIds:
    """Ids from a registry that speaks Confluent's API, subjects named `<topic>-value`."""

    def __init__(self, url: str) -> None:
        from confluent_kafka.schema_registry import SchemaRegistryClient  # noqa: PLC0415 (heavy, optional)

        self._client = SchemaRegistryClient({"url": url})

    def id_of(self, topic: Topic) -> int:
        """Return the id of the topic's own `.avsc` under its subject."""
        from confluent_kafka.schema_registry import Schema, SchemaRegistryError  # noqa: PLC0415

        subject = f"{topic.name}-value"
        try:
            return int(
                self._client.lookup_schema(subject, Schema(codec.text(topic.schema), "AVRO")).schema_id
            )
        except SchemaRegistryError as error:
            raise UnknownSchemaError(
                f"the registry does not have this version of {topic.schema} under {subject}: {error}. "
                "Operator action: register the schemas before starting the services."
            ) from error

    @cache  # noqa: B019 (one registry per process)
    def writer_schema(self, schema_id: int) -> Any:
        """Return the registry's schema of an id."""
        from confluent_kafka.schema_registry import SchemaRegistryError  # noqa: PLC0415

        try:
            schema = self._client.get_schema(schema_id)
        except SchemaRegistryError as error:
            raise UnknownSchemaError(f"the registry has no schema id {schema_id}: {error}") from error
        return fastavro.parse_schema(json.loads(schema.schema_str))


def connect(url: str, wait: Callable[[str], None]) -> SchemaIds:
    """Return the ids of the registry at `url`, or the catalog's when it is empty.

    While the registry does not answer, `wait` is called with what is missing; it decides how long to sleep and what to
    say, and may raise to give up.
    """
    if not url:
        return CatalogIds()
    while not _answers(url):
        wait(f"the schema registry at {url}")
    return RegistryIds(url)


def _answers(url: str) -> bool:
    """Return whether something accepts connections at the URL's host and port."""
    parts = urlsplit(url)
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((parts.hostname or "", port), CONNECT_SECONDS_MAX).close()
    except OSError:
        return False
    return True
