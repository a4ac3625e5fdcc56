"""`python -m collector node --print`: the node's raw events as JSON lines on stdout, for debugging, without Kafka.

Owns the text form of a TcpEvent and its own short loop; the probes are its own too, beside those of a collector that
runs. Never publishes, pins or writes files. Called by `collector.__main__`.
"""

from __future__ import annotations

import json
import os
import secrets
import select
import signal
import sys
import time
import uuid
from dataclasses import dataclass
from functools import cache
from ipaddress import IPv6Address
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import structlog

from collector.node.clock import measure
from collector.node.columns import Origin, tcp_event_columns, tcp_keys
from collector.node.encode import Nullable, Text
from collector.node.keys import Secret, read_secret
from collector.node.probes import Probes
from collector.node.settings import parse_print
from schemas import codec

if TYPE_CHECKING:
    from collections.abc import Callable

    from collector.node.encode import Column
    from collector.node.settings import PrintSettings

RECORDS_MAX = 8192
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

log = structlog.get_logger()


def run(arguments: list[str]) -> int:
    """Print events until SIGINT, SIGTERM or the reader's end, then what is left; return 0.

    FatalError for what an operator must mend, the same as the collector's.
    """
    settings = parse_print(arguments)
    ended = end_by_signal()
    origin = origin_of(settings)
    probes = Probes.open(settings.probe_options())
    log.info("started", tier=probes.tier, refused=probes.refused)
    try:
        printed = print_events(probes, Printer(origin, sys.stdout), ended, settings.flush_interval_ms / 1000)
        log.info("finished", printed=printed, **probes.counters())
    except BrokenPipeError:  # `| head` has what it wanted; Python would complain again at its own end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        log.info("reader_gone")
    finally:
        probes.close()
    return 0


def end_by_signal() -> Callable[[float], bool]:
    """Take SIGINT and SIGTERM over; return what waits so many seconds for one and says whether it has come.

    The signal is a byte in a pipe: nothing is cut in two, and the wait ends at once. A second one kills, for a reader
    that takes nothing. (Blocking them and sigtimedwait would be shorter, but numpy's threads take signals too.)
    """
    pipe, into_pipe = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(into_pipe)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: signal.signal(number, signal.SIG_DFL))
    return lambda within_s: bool(select.select([pipe], [], [], within_s)[0])


def origin_of(settings: PrintSettings) -> Origin:
    """Return what tcp_key is made of; says so where the secret is a random one."""
    if settings.key_file is None:
        log.warning(
            "random_key",
            meaning="tcp_key joins halves of this run only; PODWIRE_KEY_FILE makes the cluster's",
        )
        secret = Secret.from_bytes(secrets.token_bytes(16))
    else:
        secret = read_secret(settings.key_file)
    return Origin(
        cluster=settings.cluster,
        node=settings.node,
        boot_id=BOOT_ID.read_text(encoding="ascii").strip(),
        producer_epoch=0,
        secret=secret,
        key_id=0,
    )


def print_events(probes: Probes, printer: Printer, ended: Callable[[float], bool], interval_s: float) -> int:
    """Print what comes until `ended`, which waits so many seconds; then detach, print the rest, return the number.

    BrokenPipeError when nobody reads any more.
    """
    printed, wait_s = 0, 0.0
    while not ended(wait_s):
        probes.tend(time.monotonic())
        count = printer.print_some(probes)
        wait_s = 0.0 if count == RECORDS_MAX else interval_s
        printed += count
    probes.detach()
    while count := printer.print_some(probes):
        printed += count
    return printed


@dataclass(frozen=True)
class Printer:
    """Where events go.

    Attributes:
        origin: what tcp_key is made of.
        out: gets one line per event.
    """

    origin: Origin
    out: TextIO

    def print_some(self, probes: Probes) -> int:
        """Print at most RECORDS_MAX events that are in the ring, and return how many."""
        events = probes.read(RECORDS_MAX)
        if len(events):
            owners = probes.cgroups.owners_of(events)
            columns = tcp_event_columns(events, tcp_keys(events, self.origin), owners, measure())
            paths = [probes.cgroups.path(int(cgroup)) for cgroup in events["cgroup_id"]]
            self.out.writelines(line + "\n" for line in lines(columns, paths))
            self.out.flush()
            probes.events.release(probes.events.read_position)
        return len(events)


# ---- text form ----


def lines(columns: dict[str, Column], cgroup_paths: list[str | None]) -> list[str]:
    r"""Return one JSON object per event: TcpEvent's fields in its order, then `cgroup_path`.

    Enums are their symbols, addresses their usual text (IPv4 without ::ffff:), keys and ids hex digits, pod_uid a UUID;
    null where there is none. Bytes of comm that are not UTF-8 become \xNN.
    """
    names = [field["name"] for field in _fields()]
    texts = [_texts(field["type"], columns[field["name"]]) for field in _fields()]
    rows = zip(*texts, cgroup_paths, strict=True)
    names.append("cgroup_path")
    return [json.dumps(dict(zip(names, row, strict=True)), ensure_ascii=True) for row in rows]


@cache
def _fields() -> list[dict[str, Any]]:
    """Return TcpEvent's fields, references to named types replaced by these."""
    batch = {field["name"]: field for field in json.loads(codec.text("RawBatch"))["fields"]}
    fields: list[dict[str, Any]] = batch["events"]["type"]["items"]["fields"]
    named = {
        f"podwire.v1.{kind['name']}": kind for kind in (field["type"] for field in fields) if "name" in kind
    }
    return [
        field | {"type": named.get(field["type"], field["type"])} if isinstance(field["type"], str) else field
        for field in fields
    ]


def _texts(avro: Any, column: Column) -> list[Any]:
    """Return one field of all events as JSON can hold it."""
    if isinstance(column, Nullable):
        return [
            value if valid else None
            for value, valid in zip(column.values.tolist(), column.valid.tolist(), strict=True)
        ]
    if isinstance(column, Text):
        rows = zip(column.rows, column.lengths.tolist(), strict=True)
        return [row[:length].tobytes().decode(errors="backslashreplace") for row, length in rows]
    match avro:
        case {"symbols": list(symbols)}:
            return [symbols[index] for index in column.tolist()]
        case {"type": "fixed", "name": str(name)}:
            text = {"Ip": _address, "PodUid": _uuid}.get(name, bytes.hex)
            return [text(row.tobytes()) if row.any() or name in {"Ip", "TcpKey"} else None for row in column]
    values: list[Any] = column.tolist()
    return values


def _address(raw: bytes) -> str:
    address = IPv6Address(raw)
    return str(address.ipv4_mapped or address)


def _uuid(raw: bytes) -> str:
    return str(uuid.UUID(bytes=raw))
