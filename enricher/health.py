"""Serves `/metrics` (Prometheus) and `/healthz` of the enricher over HTTP, from before Kafka is there.

Owns the web thread; never decides what healthy means: `run` hands in a function.
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
    """Serve in a daemon thread; port 0 takes any free one (`server_port` tells which).

    `unhealthy` returns None when all is well, else one sentence; `/healthz` answers 200 or 503 with it.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/metrics":
                self._answer(200, CONTENT_TYPE_LATEST, generate_latest(registry))
                return
            if self.path != "/healthz":
                self._answer(404, "text/plain", b"try /metrics or /healthz\n")
                return
            reason = unhealthy()
            status = 200 if reason is None else 503
            self._answer(status, "text/plain; charset=utf-8", f"{reason or 'ok'}\n".encode())

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
