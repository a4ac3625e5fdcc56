"""`python -m collector node|cluster`: starts one of the two collectors and turns fatal causes into exit codes."""

from __future__ import annotations

import sys

import structlog

from collector.errors import FatalError

USAGE = "usage: python -m collector {node,cluster} [options]; --help after either lists its options"


def main(arguments: list[str]) -> int:
    """Run the collector named first in `arguments`; return the process's exit status."""
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.dev.ConsoleRenderer() if sys.stderr.isatty() else structlog.processors.JSONRenderer(),
        ],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    try:
        match arguments[:1]:
            case ["node"] if "--print" in arguments:
                from collector.node.print import run  # noqa: PLC0415 (without Kafka's library)

                arguments.remove("--print")
            case ["node"] if "--doctor" in arguments:
                from collector.node.doctor import run  # noqa: PLC0415

                arguments.remove("--doctor")
            case ["node"]:
                from collector.node.run import run  # noqa: PLC0415 (the other service's libraries stay out)
            case ["cluster"]:
                from collector.cluster.run import run  # noqa: PLC0415
            case _:
                sys.stderr.write(USAGE + "\n")
                return 2
        return run(arguments[1:])
    except FatalError as error:
        structlog.get_logger().error("fatal", cause=type(error).__name__, message=str(error))
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
