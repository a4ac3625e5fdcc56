"""`python -m enricher [replay]`: starts the enricher or a part of a replay; turns fatal causes into exit codes."""

from __future__ import annotations

import logging
import sys

import structlog

from enricher import replay_run
from enricher.errors import FatalError
from enricher.run import leave, run


class Repeats(logging.Filter):
    """Lets a library's message through once per interval, since aiokafka says several a second without a broker.

    Messages count as the same when logger and text before its arguments are the same.
    """

    def __init__(self, interval_seconds: float = 30.0) -> None:
        super().__init__()
        self._interval_seconds = interval_seconds
        self._last: dict[tuple[str, str], float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the record is the first of its kind in this interval."""
        key = (record.name, str(record.msg))
        last = self._last.get(key)
        if last is not None and record.created - last < self._interval_seconds:
            return False
        self._last[key] = record.created
        return True


def main(arguments: list[str]) -> int:
    """Run the enricher; return the process's exit status."""
    _configure_logs()
    try:
        if arguments[:1] == ["replay"]:
            return replay_run.run(arguments[1:])
        return run(arguments)
    except FatalError as error:
        structlog.get_logger().error("fatal", cause=type(error).__name__, message=str(error))
        return error.exit_code


def _configure_logs() -> None:
    """One line per event on stderr, JSON unless it is a terminal, for our own events and the libraries' warnings."""
    shared: list[structlog.typing.Processor] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    renderer: structlog.typing.Processor = structlog.processors.JSONRenderer()
    if sys.stderr.isatty():
        renderer = structlog.dev.ConsoleRenderer()
    structlog.configure(
        processors=[*shared, structlog.processors.format_exc_info, renderer],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.add_logger_name, *shared],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.format_exc_info,
                renderer,
            ],
        )
    )
    handler.addFilter(Repeats())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
