"""Makes kernel events, owners and producers for the tests and benchmarks of the node collector."""

from __future__ import annotations

import uuid
from collections import deque
from typing import TYPE_CHECKING, Any

import numpy as np

from collector.node.abi import EVENT
from collector.node.columns import Origin, Owners
from collector.node.keys import Secret

if TYPE_CHECKING:
    from collections.abc import Callable

ORIGIN = Origin("test", "node-1", "b0071d", 1_790_000_000_000_000, Secret.from_bytes(bytes(range(16))), 1)
DEFAULTS = {
    "time_ns": 5_000_000_000,
    "start_ns": 4_000_000_000,
    "established_ns": 4_000_250_000,
    "socket_cookie": 77,
    "cgroup_id": 42,
    "netns_ino": 4026531840,
    "tgid": 1234,
    "uid": 1000,
    "remote_port": 443,
    "local_port": 40000,
    "type": 1,
    "role": 1,
    "owner": 2,
}


def events(count: int = 1, comm: bytes = b"curl", **columns: Any) -> np.ndarray:
    """Return `count` events: a client's CONNECT by default, each column replaceable by a value or an array."""
    made = np.zeros(count, EVENT)
    for name, value in {**DEFAULTS, **columns}.items():
        made[name] = value
    made["comm"] = np.frombuffer(comm.ljust(16, b"\0"), np.uint8)
    if "client_isn" not in columns:
        made["client_isn"] = np.arange(count) + 1
        made["server_isn"] = np.arange(count) + 1_000_001
    return made


def no_owners(count: int) -> Owners:
    """Return owners that are not known."""
    return Owners(np.zeros((count, 16), np.uint8), np.zeros((count, 32), np.uint8), np.zeros(count, np.bool_))


class FakeError:
    """A delivery error as librdkafka gives it to the callback."""

    def __init__(self, code: int, *, fatal: bool = False) -> None:
        self._code, self._fatal = code, fatal

    def code(self) -> int:
        """Return the error's number."""
        return self._code

    def fatal(self) -> bool:
        """Return whether the producer is broken for good."""
        return self._fatal

    def str(self) -> str:
        """Return a text."""
        return f"error {self._code}"


class FakeProducer:
    """A producer whose queue holds `room` messages until the test answers them.

    Attributes:
        queue: (topic, partition, value, callback) in order, not answered yet.
        purged: whether `purge` was called.
    """

    def __init__(self, room: int = 1000) -> None:
        self.room = room
        self.queue: deque[tuple[str, int, bytes, Callable[[Any, Any], None]]] = deque()
        self.delivered: list[tuple[str, int, bytes]] = []
        self.purged = False

    def produce(
        self,
        topic: str,
        *,
        value: bytes,
        partition: int,
        on_delivery: Callable[[Any, Any], None],
        key: bytes | None = None,
    ) -> None:
        """Queue a message or raise BufferError."""
        if len(self.queue) >= self.room:
            raise BufferError
        self.queue.append((topic, partition, value, on_delivery))

    def answer(self, count: int = 1_000_000, error: FakeError | None = None) -> None:
        """Deliver, or fail, the `count` oldest messages."""
        for _ in range(min(count, len(self.queue))):
            topic, partition, value, on_delivery = self.queue.popleft()
            if error is None:
                self.delivered.append((topic, partition, value))
            on_delivery(error, None)

    def poll(self, timeout: float) -> int:
        """Do nothing: the test calls `answer`."""
        return 0

    def purge(self) -> None:
        """Drop everything."""
        self.purged = True
        self.queue.clear()


RING_RECORD_BYTES = EVENT.itemsize + 8


class SyntheticRing:
    """The events ring without a kernel: bytes are counted, not stored."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.read_position = self.produced = self.released = 0

    def producer_position(self) -> int:
        """Return the end of what was fed."""
        return self.produced

    def used_bytes(self) -> int:
        """Return what was fed and not released."""
        return self.produced - self.released

    def release(self, position: int) -> None:
        """Free the space up to `position`."""
        assert self.released <= position <= self.read_position
        self.released = position


class SyntheticProbes:
    """Probes that hand over what `feed` got; what the ring has no room for is counted as lost, as the kernel does."""

    def __init__(self, ring_bytes: int = 1 << 24) -> None:
        self.life = uuid.uuid4().hex
        self.events = SyntheticRing(ring_bytes)
        self._waiting: deque[np.ndarray] = deque()
        self.attempted = self.lost = 0

    @property
    def cgroups(self) -> SyntheticProbes:
        """The same object: nobody owns anything."""
        return self

    @property
    def told_again(self) -> int:
        """Nothing is told."""
        return 0

    def owners_of(self, made: np.ndarray) -> Owners:
        """Return owners that are not known."""
        return no_owners(len(made))

    def feed(self, made: np.ndarray) -> None:
        """Put events into the ring as far as there is room."""
        room = (self.events.size_bytes - self.events.used_bytes()) // RING_RECORD_BYTES
        self.attempted += len(made)
        self.lost += max(0, len(made) - room)
        if len(taken := made[:room]):
            self._waiting.append(taken)
            self.events.produced += len(taken) * RING_RECORD_BYTES

    def read(self, records_max: int) -> np.ndarray:
        """Return the next events, at most `records_max`."""
        taken = np.empty(min(records_max, sum(map(len, self._waiting))), EVENT)
        at = 0
        while at < len(taken):
            first = self._waiting.popleft()
            part = first[: len(taken) - at]
            taken[at : at + len(part)] = part
            at += len(part)
            if len(part) < len(first):
                self._waiting.appendleft(first[len(part) :])
        self.events.read_position += len(taken) * RING_RECORD_BYTES
        return taken

    def counters(self) -> dict[str, int]:
        """Return the kernel's counters."""
        return {"attempted": self.attempted, "lost_ring_full": self.lost, "untracked": 0, "skipped_runs": 0}

    def tend(self, _: float) -> int:
        """Have nothing to tell."""
        return 0
