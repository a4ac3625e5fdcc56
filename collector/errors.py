"""Fatal causes of both collectors, each with an exit code of its own, and how they are reported.

Raised anywhere in the collectors, turned into an exit code by `collector.__main__` alone. Codes from 10 to 22 are for
what no restart mends, higher ones for what one may mend.
"""

from __future__ import annotations


class FatalError(Exception):
    """The process can't do its work; `action` tells the operator what to do.

    Attributes:
        exit_code: the process's exit status.
        action: what the operator can do about it, one sentence.
    """

    exit_code = 1

    def __init__(self, message: str, action: str) -> None:
        super().__init__(f"{message} Operator action: {action}")
        self.action = action


class CapabilityError(FatalError):
    """The process may not load or attach probes."""

    exit_code = 10


class NoBtfError(FatalError):
    """The kernel carries no type information for CO-RE."""

    exit_code = 11


class VerifierError(FatalError):
    """The kernel refused a program."""

    exit_code = 12


class MemlockError(FatalError):
    """The kernel refused memory for maps."""

    exit_code = 13


class AbiError(FatalError):
    """The BPF object and this Python code disagree about the ring-buffer ABI."""

    exit_code = 14


class ObjectMissingError(FatalError):
    """The BPF object has not been built or is not where the settings say."""

    exit_code = 15


class BccError(FatalError):
    """BCC can't serve: its package, the kernel's headers or BPF ring buffers are missing, or it does not compile."""

    exit_code = 16


class SettingsError(FatalError):
    """A setting is missing or wrong, or the secret can't be read."""

    exit_code = 20


class TopicError(FatalError):
    """A topic exists with other properties than the collector relies on."""

    exit_code = 21


class SchemaIdError(FatalError):
    """The registry does not know our schemas."""

    exit_code = 22


class KafkaFatalError(FatalError):
    """Kafka refused us for good: fenced, not authorised, or the idempotent producer broke."""

    exit_code = 23
