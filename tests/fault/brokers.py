"""Three brokers of one Kafka cluster, every topic on all three, for the faults that one broker can't show."""

from __future__ import annotations

from typing import TYPE_CHECKING

from podwire.demo.broker import Broker, free_port

if TYPE_CHECKING:
    from pathlib import Path

BROKERS = 3


class Brokers:
    """The cluster.

    Attributes:
        members: the brokers by number, from 1.
        bootstrap: all of them, separated by commas.
    """

    def __init__(self, folder: Path) -> None:
        controllers = {number: free_port() for number in range(1, BROKERS + 1)}
        self.members = {
            number: Broker(folder / str(number), heap_mbytes=384, number=number, controllers=controllers)
            for number in controllers
        }
        self.bootstrap = ",".join(broker.bootstrap for broker in self.members.values())

    def start(self) -> None:
        """Start all, and return once each answers."""
        for broker in self.members.values():
            broker.launch()
        for broker in self.members.values():
            broker.await_answer()

    def stop(self) -> None:
        """End all: at once, since the last two would wait for a quorum that is gone."""
        for broker in self.members.values():
            broker.kill()
