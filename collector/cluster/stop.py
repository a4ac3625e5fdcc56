"""The wish to stop, and waiting that this wish cuts short.

Owns the handlers of SIGTERM and SIGINT while the watcher runs. Called by `run`; the sources wait through it.
"""

from __future__ import annotations

import queue
import signal
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


class StopRequested(Exception):  # noqa: N818 (a wish, no error)
    """The process was asked to stop while it waited for something."""


class Stop:
    """Set once, from a signal handler or another thread; SimpleQueue.put is safe in both, unlike Event.set."""

    def __init__(self) -> None:
        self.requested = False
        self._wake: queue.SimpleQueue[None] = queue.SimpleQueue()

    def request(self) -> None:
        """Ask to stop."""
        self.requested = True
        self._wake.put(None)

    def wait(self, seconds: float) -> bool:
        """Wait until stop is requested, at most `seconds`; return whether it is."""
        if not self.requested:
            try:
                self._wake.get(timeout=max(seconds, 0))
            except queue.Empty:
                return self.requested
        self._wake.put(None)  # for others that wait
        return True

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Let SIGTERM and SIGINT request the stop, inside this context; only in the main thread."""
        previous = {
            one: signal.signal(one, lambda *_: self.request()) for one in (signal.SIGTERM, signal.SIGINT)
        }
        try:
            yield
        finally:
            for one, handler in previous.items():
                signal.signal(one, handler)
