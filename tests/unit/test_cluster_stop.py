"""Waiting that a wish to stop cuts short."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from collector.cluster.run import Waiting
from collector.cluster.stop import Stop, StopRequested


@pytest.mark.parametrize("one", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_a_wait(one: signal.Signals) -> None:
    """A signal that arrives during a wait of an hour ends it; outside, the old handlers are back."""
    stop, before = Stop(), signal.getsignal(one)
    with stop.on_signals():
        threading.Timer(0.01, os.kill, (os.getpid(), one)).start()
        assert stop.wait(3600)
    assert stop.requested
    assert signal.getsignal(one) is before


def test_every_later_wait_ends_at_once() -> None:
    """The wish is not used up by the first that notices it."""
    stop = Stop()
    assert not stop.wait(0)
    stop.request()
    assert all(stop.wait(3600) for _ in range(3))


def test_waiting_for_something_is_given_up_on_stop() -> None:
    """What a start waits for is known to /healthz while it waits."""
    stop = Stop()
    stop.request()
    waiting = Waiting(stop)
    with pytest.raises(StopRequested):
        waiting("Kafka at nowhere")
    assert waiting.what == "Kafka at nowhere"
