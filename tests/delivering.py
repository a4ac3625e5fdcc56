"""A Kafka producer for what asks no Kafka: everything is delivered. Called by property tests and bench."""

from __future__ import annotations

from typing import Any


class Delivering:
    """Reports everything as delivered at the next poll; a subclass keeps what it wants in `took`."""

    def __init__(self) -> None:
        self._reports: list[Any] = []

    def took(self, topic: str, key: bytes, value: bytes | None) -> None:
        """Be handed a message."""

    def produce(
        self,
        topic: str,
        value: bytes | None,
        key: bytes,
        partition: int = -1,
        *,
        timestamp: int,
        on_delivery: Any,
    ) -> None:
        """Take one message."""
        self._reports.append(on_delivery)
        self.took(topic, key, value)

    def forget(self) -> None:
        """Report no more of what was taken so far: whoever sent it is dead."""
        self._reports = []

    def poll(self, timeout: float) -> int:
        """Report what was taken since."""
        reports, self._reports = self._reports, []
        for report in reports:
            report(None, None)
        return len(reports)
