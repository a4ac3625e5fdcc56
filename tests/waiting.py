"""How tests wait for what tells nobody: a log that grows, an answer of /metrics, what others put into Kafka."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

DEADLINE_SECONDS = 60.0
LOOK_SECONDS = 0.02


def until(
    condition: Callable[[], Any],
    what: str = "what the test waits for",
    seconds_max: float = DEADLINE_SECONDS,
    said: Callable[[], str] = str,
) -> Any:
    """Return the condition's first true value; fail, with what `said` returns, when it never comes."""
    give_up = time.monotonic() + seconds_max
    while not (value := condition()):
        assert time.monotonic() < give_up, f"never happened: {what}\n{said()}"
        time.sleep(LOOK_SECONDS)  # what is awaited here has no event that a test could wait for
    return value
