"""Why the demo can't run here, each cause with the exit status of `podwire demo`.

Raised by the demo's parts with one usable sentence, turned into an exit status by `podwire.demo.run` alone.
Statuses 10 to 22 mean what they mean in the collector.
"""

from __future__ import annotations

EXIT_NOT_SHOWN = 40
EXIT_INTERRUPTED = 130


class DemoError(RuntimeError):
    """Some part did not start.

    Attributes:
        exit_code: exit status of `podwire demo`.
    """

    exit_code = 42


class CapabilityError(DemoError):
    """Not root, or a root without the capabilities."""

    exit_code = 10


class NoBtfError(DemoError):
    """The kernel carries no BTF."""

    exit_code = 11


class ObjectMissingError(DemoError):
    """The BPF object has not been built."""

    exit_code = 15


class ToolMissingError(DemoError):
    """A program that the demo calls is not installed."""

    exit_code = 43


class LabError(DemoError):
    """The pods could not be made; the message says which command failed and how."""


class LabBusyError(LabError):
    """A lab of the same name is open already."""

    exit_code = 41


class CgroupError(LabError):
    """No mounted cgroup hierarchy takes a folder of ours, or one could not be removed."""


class BrokerError(DemoError):
    """Kafka did not start; the message ends with what its log says."""


class ServiceError(DemoError):
    """A service did not come up; the message says what it said, and the status is the service's own."""

    def __init__(self, message: str, exit_code: int | None = None) -> None:
        super().__init__(message)
        self.exit_code = exit_code or DemoError.exit_code
