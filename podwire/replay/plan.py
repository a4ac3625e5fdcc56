"""What a replay is asked for: times and names from the command line, checked.

Pure: the present time comes in. Called by `podwire.replay.run`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime

from podwire.observe import UNIT_SECONDS, since

TOPIC = "podwire.flows.replay.{}.v1"
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,200}")


@dataclass(frozen=True)
class Plan:
    """A replay.

    Attributes:
        from_ms, to_ms: event time of the records wanted, Unix time in ms; `to_ms` itself is not.
        early_ms, late_ms: how far before and after it happened a half may have come to Kafka.
        now_ms: when the command was given, Unix time in ms.
        name: what the topic for the records is called after.
    """

    from_ms: int
    to_ms: int
    early_ms: int
    late_ms: int
    now_ms: int
    name: str

    @property
    def topic(self) -> str:
        """Topic for the records."""
        return TOPIC.format(self.name)

    def __str__(self) -> str:
        """Return the span for people."""
        return f"{_iso(self.from_ms)} to {_iso(self.to_ms)}"


def plan(*, from_text: str, to_text: str, early: str, late: str, name: str | None, now_ms: int) -> Plan:
    """Return the plan; ValueError with a usable message when the texts make none."""
    from_ms, to_ms = since(from_text, now_ms, "--from"), since(to_text, now_ms, "--to")
    if from_ms >= to_ms:
        raise ValueError(f"--from {_iso(from_ms)} must be before --to {_iso(to_ms)}")
    if to_ms > now_ms:
        raise ValueError(f"--to {_iso(to_ms)} lies in the future; 0s is now")
    if from_ms < 0:
        raise ValueError(f"--from {_iso(from_ms)} lies before 1970")
    name = f"{_basic(from_ms)}-{_basic(to_ms)}" if name is None else name
    if not _NAME.fullmatch(name):
        raise ValueError(f"--name {name!r}: give up to 200 letters, digits, - and _")
    return Plan(from_ms, to_ms, span_ms(early, "--early"), span_ms(late, "--late"), now_ms, name)


def span_ms(text: str, option: str) -> int:
    """Return ms for "90s", "5m", "2h", "1d"; ValueError otherwise."""
    found = re.fullmatch(r"(\d+)([smhd])", text)
    if found is None:
        raise ValueError(f"{option} {text!r}: give a span such as 90s, 5m, 2h, 1d")
    return int(found[1]) * UNIT_SECONDS[found[2]] * 1000


def _iso(unix_ms: int) -> str:
    return (
        datetime.fromtimestamp(unix_ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    )


def _basic(unix_ms: int) -> str:
    """Return a time as a topic's name can hold it; ms only where there are some."""
    text = datetime.fromtimestamp(unix_ms // 1000, UTC).strftime("%Y%m%dT%H%M%S")
    return text + (f"_{unix_ms % 1000:03}" if unix_ms % 1000 else "") + "Z"
