"""The fault "registry away": nobody answers what schema an id stands for, while services run and while they start.

Called through the table in `faults`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from podwire.demo.processes import HEALTHY_SECONDS_MAX
from tests.fault.rounds import Setting

if TYPE_CHECKING:
    from tests.fault.rounds import Traffic, World

REGISTRY = Setting("a schema registry", registry=True)
MEANWHILE = 100
"""Connections made with services that run, and then with none that does its work."""


def registry_away(world: World, traffic: Traffic, seconds: float) -> None:
    """Kill the registry, then every service; all wait for it until it is back."""
    assert world.registry is not None
    world.registry.kill()
    traffic.more(MEANWHILE)
    processes = world.services.processes.values()
    for process in processes:
        process.kill()
        process.start()
    missing = f"the schema registry at {world.registry.url}"
    traffic.until(lambda: all(missing in process.command.log.read_text() for process in processes))
    traffic.more(MEANWHILE)
    traffic.lasting(seconds)
    world.registry.start()
    for process in processes:
        process.wait_healthy(HEALTHY_SECONDS_MAX)
