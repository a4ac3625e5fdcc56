"""What a registry's answers mean: unknown is only what it says is unknown; all else is asked again."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import TYPE_CHECKING, Any

import pytest
import structlog

from enricher import metadata
from enricher.schema_ids import FORGOTTEN_SECONDS, WatchedIds
from schemas import catalog, codec
from schemas.registry import PatientIds, RegistryAwayError, RegistryIds, UnknownSchemaError, connect
from tests import halves

if TYPE_CHECKING:
    from collections.abc import Iterator


class Answers(HTTPServer):
    """A registry that answers everything with one status and body."""

    status, body = 404, b'{"error_code": 40403, "message": "no"}'

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Answers

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(self.server.body)))
        self.end_headers()
        self.wfile.write(self.server.body)

    do_POST = do_GET  # noqa: N815 (the base class's name)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def answers() -> Iterator[Answers]:
    """A server in a thread."""
    with Answers() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_not_found_is_unknown(answers: Answers) -> None:
    """The registry's own "not found" is an answer, and names the subject where one was asked for."""
    ids = connect(answers.url, pytest.fail)
    with pytest.raises(UnknownSchemaError, match="SR code 40403"):
        ids.writer_schema(7)
    with pytest.raises(UnknownSchemaError, match=r"this version of Flow under podwire\.flows\.v1-value"):
        ids.id_of(catalog.FLOWS)


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (404, b"<html>no such page</html>"),
        (404, b'{"error_code": 404, "message": "HTTP 404 Not Found"}'),
        (401, b'{"error_code": 401, "message": "who are you"}'),
        (429, b""),
        (500, b'{"error_code": 50001, "message": "store"}'),
        (503, b"starting"),
        (200, b"<html>a proxy</html>"),
        (200, b"{"),
    ],
)
def test_any_other_answer_is_none(answers: Answers, status: int, body: bytes) -> None:
    """A proxy's page, a refused login, an overload: nothing is said about the schema."""
    answers.status, answers.body = status, body
    ids = RegistryIds(answers.url, None)
    with pytest.raises(RegistryAwayError, match=f"the schema registry at {answers.url}"):
        ids.writer_schema(7)
    with pytest.raises(RegistryAwayError):
        ids.id_of(catalog.FLOWS)


@pytest.mark.parametrize(
    "schema",
    [b'{\\"type\\": \\"object\\"}', b'syntax = \\"proto3\\";', b"5", b"{}", b'{\\"type\\": \\"record\\"}'],
)
def test_schema_that_is_no_avro_is_unknown(answers: Answers, schema: bytes) -> None:
    """An id of a JSON or Protobuf schema is an answer: no Avro."""
    answers.status, answers.body = 200, b'{"schema": "%s"}' % schema
    with pytest.raises(UnknownSchemaError, match="no Avro schema"):
        connect(answers.url).writer_schema(7)


def test_user_and_password_are_not_told() -> None:
    """What the URL holds beside the address stays out of logs."""
    with pytest.raises(RegistryAwayError) as raised:
        connect("http://me:secret@127.0.0.1:1/api").writer_schema(1)
    assert str(raised.value) == "the schema registry at http://127.0.0.1:1/api"


class Flaky:
    """Ids whose writer schemas are away until they are let out."""

    def __init__(self) -> None:
        self.away = True

    def id_of(self, topic: catalog.Topic) -> int:
        """Return the catalog's id."""
        return topic.schema_id

    def writer_schema(self, schema_id: int) -> Any:
        """Return Pod's schema, or be away."""
        if self.away:
            raise RegistryAwayError("the registry")
        return codec.parsed("Pod")


def test_outage_is_said_once_and_its_end_once() -> None:
    """However often and for however many ids it is asked."""
    flaky = Flaky()
    ids = WatchedIds(flaky, lambda: 1.0)
    with structlog.testing.capture_logs() as lines:
        for schema_id in (7, 8) * 3:
            with pytest.raises(RegistryAwayError):
                ids.writer_schema(schema_id)
        assert ids.waited_for
        flaky.away = False
        ids.writer_schema(7)
        assert ids.waited_for
        ids.writer_schema(8)
        ids.writer_schema(9)
    assert not ids.waited_for
    assert [line["event"] for line in lines] == ["waiting", "registry_answers"]
    assert lines[0]["for"] == "the registry"


def test_question_that_nobody_repeats_is_forgotten() -> None:
    """A partition that went to another worker leaves no wait behind."""
    now = 0.0
    ids = WatchedIds(Flaky(), lambda: now)
    with pytest.raises(RegistryAwayError):
        ids.writer_schema(7)
    assert ids.waited_for
    now = FORGOTTEN_SECONDS + 1
    assert not ids.waited_for


def test_metadata_waits_for_the_registry() -> None:
    """A record of a schema not seen before is no unreadable one while the registry is away."""
    flaky, waits = Flaky(), []

    def wait(what: str) -> None:
        waits.append(what)
        flaky.away = len(waits) < 3

    record = halves.pod_record(1)
    unpacker = metadata.Unpacker(PatientIds(flaky, wait), record["cluster"])
    (change,) = unpacker._change(catalog.PODS.name, _Message(codec.encode("Pod", record, 4711)))
    assert (change.kind, change.record, unpacker.undecodable, len(waits)) == ("pods", record, 0, 3)


class _Message:
    def __init__(self, value: bytes) -> None:
        self._value = value

    def key(self) -> bytes:
        return b"uid"

    def value(self) -> bytes:
        return self._value

    def offset(self) -> int:
        return 0
