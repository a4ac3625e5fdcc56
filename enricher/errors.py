"""Fatal causes of the enricher, each with an exit code of its own.

Raised anywhere in the enricher, turned into an exit code by `enricher.__main__` and by `app`'s fail-stop. Codes from 10
to 22 are for what no restart mends, higher ones for what one may mend.
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


class SettingsError(FatalError):
    """A setting is missing or wrong."""

    exit_code = 20


class PartitionsError(FatalError):
    """A topic has fewer partitions than the raw topic that it must match."""

    exit_code = 21


class SchemaIdError(FatalError):
    """The registry does not know our schemas."""

    exit_code = 22


class StalledError(FatalError):
    """Messages wait in a partition and nothing of it got done for too long: a restart helps where we are stuck."""

    exit_code = 30


class ProcessingError(FatalError):
    """Processing or delivery failed; nothing of it was acknowledged, a restart repeats it."""

    exit_code = 31


class UnreachableError(FatalError):
    """Kafka did not answer for too long in a replay; a repeat of it does no harm."""

    exit_code = 32


class DeletedInputError(FatalError):
    """Raw messages that a replay still had to read were deleted by the topic's retention."""

    exit_code = 33
