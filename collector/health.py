"""Serves `/metrics` (Prometheus) and `/healthz` of a collector over HTTP.

Owns the web thread; never decides what healthy means: the service hands in a function. Called by the two
services' `run`.
"""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

if TYPE_CHECKING:
    from collections.abc import Callable

    from prometheus_client import CollectorRegistry


def serve(
    host: str, port: int, registry: CollectorRegistry, unhealthy: Callable[[], str | None]
) -> ThreadingHTTPServer:
    """Serve in a daemon thread until `shutdown()`; port 0 takes any free one (`server_port` tells which).

    `unhealthy` returns None when all is well, else one sentence; `/healthz` answers 200 or 503 with it.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/metrics":
                self._answer(200, CONTENT_TYPE_LATEST, generate_latest(registry))
            elif self.path == "/healthz":
                reason = unhealthy()
                status, body = (200, "ok") if reason is None else (503, reason)
                self._answer(status, "text/plain; charset=utf-8", body.encode() + b"\n")
            else:
                self._answer(404, "text/plain", b"try /metrics or /healthz\n")

        def _answer(self, status: int, content_type: str, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the base class's name)
            """Say nothing per request."""

    server = ThreadingHTTPServer((host, port), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, name="health", daemon=True).start()
    return server
