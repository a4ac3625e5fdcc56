"""Why a replay did not come to its end, each cause with the exit status of `podwire replay`.

Raised by the command's parts with one usable sentence, turned into an exit status by `podwire.replay.run` alone. A
failed process of the enricher gives its own status: 20, 22, 31, 32 and 33 mean what they mean there.
"""

from __future__ import annotations

EXIT_INTERRUPTED = 130


class ReplayError(RuntimeError):
    """Some process did not do its part; the message says what it said, and the status is the process's own.

    Attributes:
        exit_code: exit status of `podwire replay`.
    """

    exit_code = 1

    def __init__(self, message: str, exit_code: int | None = None) -> None:
        super().__init__(message)
        self.exit_code = exit_code or self.exit_code


class KafkaAwayError(ReplayError):
    """Kafka does not answer, or lacks Podwire's topics."""

    exit_code = 32


class SpanTooOldError(ReplayError):
    """The raw topic does not reach back to the span any more; the message says since when it does."""

    exit_code = 33


class EmptySpanError(ReplayError):
    """Nothing happened in the span, as far as the raw topic knows."""

    exit_code = 50


class TopicNotEmptyError(ReplayError):
    """The topic for the records holds some already, and --append was not given."""

    exit_code = 51
