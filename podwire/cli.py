"""The command line of `podwire`: parses arguments and hands over to one module per subcommand."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING

from schemas import catalog

if TYPE_CHECKING:
    from collections.abc import Sequence

BOOTSTRAP_DEFAULT = "127.0.0.1:29092"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `podwire` with these arguments (default: the process's own); return the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["demo"]:
        from podwire.demo.run import run as run_demo  # noqa: PLC0415 (each command loads only what it needs)

        return run_demo(given[1:])
    options, others = _parser().parse_known_args(given)
    if options.command == "doctor":
        from podwire import doctor  # noqa: PLC0415

        return doctor.run(options.output, others)
    if options.command == "replay":
        return _replay(options, others)
    if others:
        _parser().parse_args(given)  # says which one is wrong, and leaves
    if options.command == "topics":
        return _topics(options)
    if options.command == "audit":
        return _audit(options)
    return _observe(options)


def _topics(options: argparse.Namespace) -> int:
    from confluent_kafka import KafkaException  # noqa: PLC0415

    from podwire import topics  # noqa: PLC0415

    try:
        if options.action == "create":
            return topics.run_create(options.bootstrap, options.partitions, options.replication)
        return topics.run_describe(options.bootstrap)
    except KafkaException as error:
        sys.stderr.write(f"podwire topics: {error.args[0].str()}. Is Kafka at {options.bootstrap}?\n")
        return 1


def _audit(options: argparse.Namespace) -> int:
    from podwire import audit  # noqa: PLC0415

    try:
        return audit.run(
            bootstrap=options.bootstrap,
            registry_url=options.registry_url,
            from_text=options.start,
            to_text=options.end,
            nodes=tuple(options.node),
            cluster=options.cluster,
            output=options.output,
        )
    except ValueError as error:
        sys.stderr.write(f"podwire audit: {error}\n")
        return 2


def _observe(options: argparse.Namespace) -> int:
    from podwire import observe  # noqa: PLC0415

    wanted = observe.Filter(
        namespaces=tuple(options.namespace),
        pods=tuple(options.pod),
        workloads=tuple(options.workload),
        ports=tuple(options.port),
        types=tuple(options.type),
    )
    try:
        return observe.run(
            bootstrap=options.bootstrap,
            topic=options.topic,
            registry_url=options.registry_url,
            wanted=wanted,
            output=options.output,
            since_text=options.since,
            last=options.last,
            follow=options.follow,
        )
    except ValueError as error:
        sys.stderr.write(f"podwire observe: {error}\n")
        return 2


def _replay(options: argparse.Namespace, others: Sequence[str]) -> int:
    from podwire.replay import run as replay  # noqa: PLC0415

    return replay.run(
        replay.Options(
            from_text=options.from_text,
            to_text=options.to_text,
            early=options.early,
            late=options.late,
            name=options.name,
            workers=options.workers,
            append=options.append,
            bootstrap=options.bootstrap,
            enricher=others,
        )
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="podwire", description="Who talked to whom in a Kubernetes cluster, down to the process."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("demo", help="run everything on this machine: real Kafka, three pods, live flows")
    doctor = commands.add_parser(
        "doctor",
        help="can it run on this node, and if not, why",
        epilog="Other options are the node collector's and go to it: --tier, --pin-dir, --object, ...",
    )
    doctor.add_argument("-o", "--output", choices=("text", "json"), default="text")
    topics = commands.add_parser("topics", help="create and describe the topics")
    actions = topics.add_subparsers(dest="action", required=True, metavar="ACTION")
    create = actions.add_parser("create", help="create what is missing; never change what exists")
    create.add_argument(
        "--partitions",
        type=_positive,
        default=catalog.PARTITIONS_DEFAULT,
        help="of the raw and flows topics, fixed for their life (default %(default)s)",
    )
    create.add_argument("--replication", type=_positive, default=1, help="factor (default %(default)s)")
    describe = actions.add_parser("describe", help="compare the broker's topics with the catalog")
    observe = commands.add_parser("observe", help="show enriched flows")
    _observe_options(observe)
    replay = commands.add_parser(
        "replay",
        help="enrich a past span again, into a topic of its own",
        epilog="Other options are the enricher's and go to it, as the first time: --cluster, --window-ms, ...",
    )
    _replay_options(replay)
    audit = commands.add_parser(
        "audit", help="prove that nothing is missing between two times, or say what is"
    )
    _audit_options(audit)
    for command in (observe, audit):
        command.add_argument(
            "--registry-url",
            default=os.environ.get("PODWIRE_REGISTRY_URL") or None,
            help="schema registry, also from PODWIRE_REGISTRY_URL (default: the ids of the catalog)",
        )
    for command in (create, describe, observe, audit, replay):
        command.add_argument(
            "--bootstrap",
            metavar="HOST:PORT",
            default=os.environ.get("PODWIRE_BOOTSTRAP", BOOTSTRAP_DEFAULT),
            help="Kafka, also from PODWIRE_BOOTSTRAP (default %(default)s)",
        )
    return parser


def _observe_options(observe: argparse.ArgumentParser) -> None:
    observe.add_argument("-f", "--follow", action="store_true", help="go on with new flows until Ctrl-C")
    observe.add_argument("--last", type=_positive, metavar="N", help="the last N flows that match")
    observe.add_argument("--since", metavar="TIME", help="from 90s, 5m, 2h, 1d ago, or from an ISO 8601 time")
    observe.add_argument("-o", "--output", choices=("compact", "wide", "json"), default="compact")
    for name, help_ in (
        ("namespace", "of either side or the Service"),
        ("pod", "NAME or NAMESPACE/NAME of either side; a prefix is enough"),
        ("workload", "NAME or NAMESPACE/NAME of either side"),
    ):
        observe.add_argument(f"--{name}", action="append", default=[], help=help_ + "; may be repeated")
    observe.add_argument(
        "--port", action="append", type=_positive, default=[], help="client's, server's or dialled"
    )
    observe.add_argument(
        "--type", action="append", default=[], choices=("OPEN", "EXISTING", "CLOSE", "FAILED", "PROGRESS")
    )
    observe.add_argument(
        "--topic",
        default=catalog.FLOWS.name,
        help="with flow records, such as one of a replay (default: %(default)s)",
    )


def _audit_options(audit: argparse.ArgumentParser) -> None:
    for name, target in (("from", "start"), ("to", "end")):
        audit.add_argument(
            f"--{name}",
            dest=target,
            required=True,
            metavar="TIME",
            help="90s, 5m, 2h, 1d ago, or an ISO 8601 time",
        )
    audit.add_argument(
        "--node",
        action="append",
        default=[],
        help="this node must be complete; may be repeated (default: all)",
    )
    audit.add_argument("--cluster", help="only this cluster's nodes (default: all that share the topic)")
    audit.add_argument("-o", "--output", choices=("text", "json"), default="text")


def _replay_options(replay: argparse.ArgumentParser) -> None:
    ago = "90s, 5m, 2h, 1d ago, or an ISO 8601 time"
    replay.add_argument(
        "--from", dest="from_text", required=True, metavar="TIME", help=f"events from then on: {ago}"
    )
    replay.add_argument(
        "--to", dest="to_text", required=True, metavar="TIME", help="events before then; 0s is now"
    )
    replay.add_argument("--name", help="for podwire.flows.replay.NAME.v1 (default: the span)")
    replay.add_argument("--append", action="store_true", help="write into that topic though it holds records")
    replay.add_argument("--workers", type=_positive, metavar="N", help="processes (default: one per CPU)")
    replay.add_argument(
        "--late",
        default="1h",
        metavar="SPAN",
        help="how long after it happened an event may have come to Kafka (default %(default)s)",
    )
    replay.add_argument(
        "--early",
        default="1m",
        metavar="SPAN",
        help="how far a node's clock may have run ahead (default %(default)s)",
    )


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: give a number from 1")
    return number
