"""Kafka's own brake for one client: a quota on the bytes per second that it may produce.

The broker takes a request that exceeds it, answers, and then reads nothing more of that connection until the rate has
fallen below the quota. Speaks the request AlterClientQuotas (KIP-546, version 0), which confluent-kafka lacks.
"""

from __future__ import annotations

import socket
import struct
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

ALTER_CLIENT_QUOTAS = 49


@contextmanager
def slowed(bootstrap: str, client_id: str, bytes_per_second: int) -> Iterator[None]:
    """Let a client produce this much and no more for the time of the `with`."""
    _alter(bootstrap, client_id, bytes_per_second, remove=False)
    try:
        yield
    finally:
        _alter(bootstrap, client_id, 0, remove=True)


def _alter(bootstrap: str, client_id: str, bytes_per_second: int, *, remove: bool) -> None:
    entity = _array(_text("client-id") + _text(client_id))
    change = _array(_text("producer_byte_rate") + struct.pack(">d?", bytes_per_second, remove))
    body = _array(entity + change) + struct.pack(">?", False)
    request = struct.pack(">hhi", ALTER_CLIENT_QUOTAS, 0, 1) + _text("tests") + body
    host, _, port = bootstrap.split(",", maxsplit=1)[0].rpartition(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(struct.pack(">i", len(request)) + request)
        answer = connection.makefile("rb")
        (size,) = struct.unpack(">i", answer.read(4))
        _correlation, _throttle, entries, error = struct.unpack(">iiih", answer.read(size)[:14])
    assert (entries, error) == (1, 0), f"the broker refused the quota: error code {error}"


def _text(text: str) -> bytes:
    return struct.pack(">h", len(text)) + text.encode()


def _array(element: bytes) -> bytes:
    return struct.pack(">i", 1) + element
