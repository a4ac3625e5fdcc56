"""A small Kubernetes API server for tests: lists in pages, watches from a version, and fails on demand.

Speaks plain HTTP/1.1 on loopback with chunked watches, as the real one does. Versions count all kinds together.
"""

from __future__ import annotations

import json
import threading
from collections import Counter, deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlparse

WATCHED_SECONDS_MAX = 20.0


class ApiServer:
    """Objects, their history, and what goes wrong next.

    Attributes:
        page_objects: objects per page, whatever the client's limit.
        gone_as: how a version that is too old is refused: "http" or "event".
        failing: statuses that the next requests of a kind get instead of an answer.
        stalled: watches stay silent, also at their end.
        requests: (kind, query, Authorization) of every request so far.
    """

    def __init__(self) -> None:
        self.page_objects = 2
        self.gone_as = "http"
        self.failing: dict[str, deque[int]] = {"pods": deque(), "services": deque(), "nodes": deque()}
        self.stalled = False
        self.requests: list[tuple[str, dict[str, str], str | None]] = []
        self.changed = threading.Condition()
        self._version = 10
        self._floor = 0
        self._closing = False
        self._epoch = 0
        self._watching: Counter[str] = Counter()
        self._objects: dict[str, dict[str, dict[str, Any]]] = {"pods": {}, "services": {}, "nodes": {}}
        self._events: list[tuple[int, str, str]] = []
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"api": self}))
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        """End all watches and stop."""
        with self.changed:
            self._closing = True
            self.changed.notify_all()
        self._http.shutdown()
        self._http.server_close()

    def put(self, item: dict[str, Any], change: str = "") -> str:
        """Add or change an object; return its version."""
        kind = f"{item['kind'].lower()}s"
        with self.changed:
            known = item["metadata"]["uid"] in self._objects[kind]
            stamped = self._stamp(item)
            self._objects[kind][item["metadata"]["uid"]] = stamped
            self._tell(kind, change or ("MODIFIED" if known else "ADDED"), stamped)
            return str(self._version)

    def delete(self, kind: str, uid: str, **meta: Any) -> None:
        """Delete an object; `meta` is added to its last state."""
        with self.changed:
            item = self._objects[kind].pop(uid)
            self._tell(kind, "DELETED", self._stamp(item | {"metadata": item["metadata"] | meta}))

    def bookmark(self, kind: str) -> None:
        """Send a bookmark of the store's version to the watches of a kind."""
        self.raw(
            kind,
            json.dumps({"type": "BOOKMARK", "object": {"metadata": {"resourceVersion": str(self._version)}}}),
        )

    def raw(self, kind: str, line: str) -> None:
        """Send any line to the watches of a kind that are open; waits for one if there is none."""
        with self.changed:
            assert self.changed.wait_for(lambda: self._watching[kind], WATCHED_SECONDS_MAX), (
                f"no watch of {kind}"
            )
            self._events.append((0, kind, line))
            self.changed.notify_all()

    def forget(self) -> None:
        """Compact: versions up to now are too old, and all watches end."""
        with self.changed:
            self._version += 1
            self._floor = self._version
            self._epoch += 1
            self.changed.notify_all()

    def count(self, kind: str, **query: str) -> int:
        """Return how many requests of a kind had all of these parameters."""
        return sum(one == kind and query.items() <= had.items() for one, had, _ in list(self.requests))

    def _stamp(self, item: dict[str, Any]) -> dict[str, Any]:
        self._version += 1
        return item | {"metadata": item["metadata"] | {"resourceVersion": str(self._version)}}

    def _tell(self, kind: str, change: str, item: dict[str, Any]) -> None:
        self._events.append((self._version, kind, json.dumps({"type": change, "object": item})))
        self.changed.notify_all()

    def page(self, kind: str, query: dict[str, str]) -> tuple[int, dict[str, Any]]:
        """Return status and body of a list request."""
        with self.changed:
            version, _, start = query.get("continue", f"{self._version}:0").partition(":")
            if int(version) < self._floor:
                return 410, gone()
            items = list(self._objects[kind].values())
            size = min(self.page_objects, int(query.get("limit", "500")))
            end = int(start) + size
            meta = {"resourceVersion": version, "continue": f"{version}:{end}" if end < len(items) else ""}
            return 200, {"kind": "List", "metadata": meta, "items": items[int(start) : end]}

    def is_gone(self, query: dict[str, str]) -> bool:
        """Return whether a watch asks for a version that is too old."""
        return int(query["resourceVersion"]) < self._floor

    def stream(self, kind: str, query: dict[str, str], send: Any) -> None:
        """Send a watch's events until it ends."""
        with self.changed:
            epoch, opened = self._epoch, len(self._events)
            self._watching[kind] += 1
            self.changed.notify_all()
        try:
            self._send_events(kind, int(query["resourceVersion"]), (epoch, opened), send)
        finally:
            with self.changed:
                self._watching[kind] -= 1

    def _send_events(self, kind: str, start: int, opened_at: tuple[int, int], send: Any) -> None:
        epoch, opened = opened_at
        position = 0
        while True:
            with self.changed:
                if self._closing or self._epoch != epoch:
                    return
                due = [] if self.stalled else list(enumerate(self._events))[position:]
                if not due:
                    self.changed.wait(0.2)
                    continue
                position += len(due)
            for index, (version, of, line) in due:
                if of == kind and (version > start if version else index >= opened):
                    send(line.encode() + b"\n")


class Handler(BaseHTTPRequestHandler):
    """Answers one connection of a server's clients."""

    api: ApiServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Answer a list or a watch."""
        url = urlparse(self.path)
        kind = url.path.rpartition("/")[2]
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        self.api.requests.append((kind, query, self.headers.get("Authorization")))
        failing = self.api.failing[kind]
        if failing:
            self._answer(failing.popleft(), denied(kind))
        elif query.get("watch", "").lower() == "true":
            self._watch(kind, query)
        else:
            self._answer(*self.api.page(kind, query))

    def _watch(self, kind: str, query: dict[str, str]) -> None:
        if self.api.is_gone(query) and self.api.gone_as == "http":
            self._answer(410, gone())
            return
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            if self.api.is_gone(query):
                self._chunk(json.dumps({"type": "ERROR", "object": gone()}).encode() + b"\n")
            else:
                self.api.stream(kind, query, self._chunk)
            self._chunk(b"")
        except OSError:
            self.close_connection = True

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def _answer(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the base class's name)
        """Say nothing."""


def gone() -> dict[str, Any]:
    """Return the Status of an expired version."""
    return {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old resource version"}


def denied(kind: str) -> dict[str, Any]:
    """Return the Status of a refused request."""
    return {"kind": "Status", "message": f'{kind} is forbidden: User "w" cannot list resource "{kind}"'}
