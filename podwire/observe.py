"""`podwire observe`: follows enriched flows on a terminal or as JSON lines, in the manner of `hubble observe`.

Pure but for `run`: filters and line formats are functions of one flow. Reading is `podwire.flows`' business.
"""

from __future__ import annotations

import json
import re
import signal
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from confluent_kafka import KafkaException

from podwire.flows import Flow, FlowReader
from schemas import registry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

SIDES = ("client", "server")
RECORD_TYPES = ("OPEN", "EXISTING", "CLOSE", "FAILED", "PROGRESS")
LAST_DEFAULT = 20
SECOND_US = 1_000_000
UNIT_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
COLOURS = {"OPEN": 32, "CLOSE": 36, "FAILED": 31, "EXISTING": 34, "PROGRESS": 90}
UNSURE = ("UNRESOLVED", "IP_AMBIGUOUS")


@dataclass(frozen=True)
class Filter:
    """Which flows to show: every field that is set must match; lists match when one of them does.

    Attributes:
        namespaces: of either side's pod, or of the Service.
        pods: "name" or "namespace/name" of either side's pod; a name matches as a prefix.
        workloads: "name" or "namespace/name" of either side's workload.
        ports: dialled, client's or server's port.
        types: record types.
    """

    namespaces: tuple[str, ...] = ()
    pods: tuple[str, ...] = ()
    workloads: tuple[str, ...] = ()
    ports: tuple[int, ...] = ()
    types: tuple[str, ...] = ()

    def matches(self, flow: Flow) -> bool:
        """Return whether the flow passes."""
        return (
            (not self.types or flow["record_type"] in self.types)
            and (not self.ports or bool({flow["dialed_port"], *_of(flow, "port")} & set(self.ports)))
            and (
                not self.namespaces
                or bool({flow["service_namespace"], *_of(flow, "namespace")} & set(self.namespaces))
            )
            and (not self.pods or _named(flow, "pod", self.pods, prefix=True))
            and (not self.workloads or _named(flow, "workload", self.workloads, prefix=False))
        )


def _of(flow: Flow, field: str) -> list[str | int | None]:
    return [flow[f"{side}_{field}"] for side in SIDES]


def _named(flow: Flow, field: str, wanted: tuple[str, ...], *, prefix: bool) -> bool:
    for side in SIDES:
        name = flow[f"{side}_{field}"]
        if name is None:
            continue
        for want in wanted:
            namespace, _, short = want.rpartition("/")
            if namespace not in ("", flow[f"{side}_namespace"]):
                continue
            if name == short or (prefix and name.startswith(short)):
                return True
    return False


def since(text: str, now_unix_ms: int, option: str = "--since") -> int:
    """Return Unix ms for "90s", "5m", "2h", "1d" ago or an ISO 8601 time (UTC where it names no zone).

    ValueError with a usable message otherwise.
    """
    if ago := re.fullmatch(r"(\d+)([smhd])", text):
        return now_unix_ms - int(ago[1]) * UNIT_SECONDS[ago[2]] * 1000
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(
            f"{option} {text!r}: give a span (90s, 5m, 2h, 1d) or a time such as 2026-01-31T12:00:00Z"
        ) from None
    return int((at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp() * 1000)


def compact(flow: Flow, *, colour: bool = False) -> str:
    """Return one line: time, type, client -> service -> server, outcome and figures."""
    parts = [
        datetime.fromtimestamp(flow["event_unix_us"] / 1e6, UTC).strftime("%H:%M:%S.%f")[:-3],
        _paint(f"{flow['record_type']:<6}", COLOURS.get(flow["record_type"], 0), on=colour),
        _side(flow, "client", colour=colour),
    ]
    if flow["service_name"]:
        via = f"{flow['service_namespace']}/{flow['service_name']}:{flow['dialed_port']}"
        parts += ["->", _paint(via, 35, on=colour)]
    if not (flow["service_name"] and flow["server_resolution"] == "SERVICE_ONLY"):
        parts += ["->", _side(flow, "server", colour=colour)]
    parts.append(" ".join(_figures(flow)))
    return " ".join(parts)


def _side(flow: Flow, side: str, *, colour: bool) -> str:
    resolution = flow[f"{side}_resolution"]
    port = flow[f"{side}_port"] or (flow["dialed_port"] if side == "server" else None)
    if flow[f"{side}_pod"]:
        name = f"{flow[f'{side}_namespace']}/{flow[f'{side}_pod']}"
    elif resolution == "NODE":
        name = f"node/{flow[f'{side}_node']}"
    else:
        name = flow[f"{side}_network"] or flow[f"{side}_address"] or "?"
        name = f"[{name}]" if ":" in name else name
    if port and side == "server":
        name += f":{port}"
    if resolution in UNSURE:
        name = _paint(f"{name}?{flow[f'{side}_reason'] or ''}", 33, on=colour)
    process = flow[f"{side}_process"]
    return f"{name} ({process})" if process else name


def _figures(flow: Flow) -> Iterator[str]:
    outcome = flow["outcome"]
    if flow["record_type"] not in ("OPEN", "EXISTING", "PROGRESS"):
        yield outcome + (f" by {flow['closed_by']}" if flow["closed_by"] not in (None, "UNKNOWN") else "")
    if flow["errno"]:
        yield f"errno={flow['errno']}"
    if flow["handshake_us"] is not None and flow["record_type"] == "OPEN":
        yield f"handshake={_span(flow['handshake_us'])}"
    if flow["duration_us"] is not None:
        yield f"after={_span(flow['duration_us'])}"
    sent = _first(flow["client_bytes_sent"], flow["server_bytes_received"])
    received = _first(flow["client_bytes_received"], flow["server_bytes_sent"])
    if sent is not None and received is not None:
        yield f"sent={sent}B received={received}B"
    if flow["observed_by"] != "BOTH":
        yield f"seen by {flow['observed_by'].lower()} only"
    if flow["revision"]:
        yield f"rev={flow['revision']}"


def _span(us: int) -> str:
    return f"{us / 1000:.1f}ms" if us < SECOND_US else f"{us / 1e6:.1f}s"


def _first(*values: int | None) -> int | None:
    return next((value for value in values if value is not None), None)


def wide(flow: Flow, *, colour: bool = False) -> str:
    """Return the compact line with addresses, workloads, pids, resolutions and the flow's id."""
    more = [f"flow={flow['flow_id']}", f"direction={flow['direction']}"]
    if flow["dialed_address"]:
        more.append(f"dialed={_endpoint(flow['dialed_address'], flow['dialed_port'])}")
    for side in SIDES:
        more += [
            f"{side}={_endpoint(flow[f'{side}_address'], flow[f'{side}_port'])}",
            f"{side}_by={flow[f'{side}_resolution']}",
        ]
        if flow[f"{side}_workload"]:
            more.append(f"{side}_workload={flow[f'{side}_workload_kind']}/{flow[f'{side}_workload']}")
        if flow[f"{side}_pid"] is not None:
            more.append(f"{side}_pid={flow[f'{side}_pid']}")
    return compact(flow, colour=colour) + " " + _paint(" ".join(more), 90, on=colour)


def _endpoint(address: str | None, port: int | None) -> str:
    host = f"[{address}]" if address and ":" in address else address or "?"
    return f"{host}:{port}" if port else host


def as_json(flow: Flow, *, colour: bool = False) -> str:  # noqa: ARG001 (one signature for all formats)
    """Return the flow as one line of JSON; times as ISO 8601 text."""
    return json.dumps(flow, default=lambda value: value.isoformat(), separators=(",", ":"))


def _paint(text: str, code: int, *, on: bool) -> str:
    return f"\x1b[{code}m{text}\x1b[0m" if on and code else text


FORMATS: dict[str, Callable[..., str]] = {"compact": compact, "wide": wide, "json": as_json}


def run(
    *,
    bootstrap: str,
    registry_url: str | None,
    wanted: Filter,
    output: str,
    since_text: str | None,
    last: int | None,
    follow: bool,
) -> int:
    """Print flows as asked until the end of the topic, or with `follow` until interrupted; return the exit status."""
    line = FORMATS[output]
    colour = sys.stdout.isatty() and output != "json"
    stop = _Stop()
    reader = FlowReader(bootstrap, registry.connect(registry_url or "", _unreachable))
    try:
        end = {partition: high for partition, (_, high) in reader.bounds().items()}
        if since_text is not None:
            since_ms = since(since_text, int(time.time() * 1000))
            span = reader.span(reader.offsets_at(since_ms), end)
            past = [
                flow for flow in span if flow["event_unix_us"] >= since_ms * 1000 and wanted.matches(flow)
            ]
            past.sort(key=lambda flow: int(flow["event_unix_us"]))
            shown = past if last is None else past[-last:]
        else:
            count = last if last is not None else (0 if follow else LAST_DEFAULT)
            shown = reader.last(count, wanted.matches, end) if count else []
        for flow in shown:
            print(line(flow, colour=colour))
        if follow:
            for new in reader.read(end, stop.asked):
                if new is not None and wanted.matches(new):
                    print(line(new, colour=colour), flush=True)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output left; there is nobody to tell
        return 0
    except KafkaException as error:
        sys.stderr.write(
            f"podwire observe: {error.args[0].str()}. Is Kafka at {bootstrap}, with its topics?\n"
        )
        return 1
    finally:
        reader.close()
    if reader.unreadable:
        sys.stderr.write(f"podwire observe: {reader.unreadable} messages could not be decoded.\n")
    return 0


def _unreachable(what: str) -> None:
    raise ValueError(f"{what} does not answer")


class _Stop:
    """Remembers that SIGINT or SIGTERM came."""

    def __init__(self) -> None:
        self._asked = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)

    def _ask(self, _number: int, _frame: FrameType | None) -> None:
        self._asked = True

    def asked(self) -> bool:
        """Return whether to stop."""
        return self._asked
