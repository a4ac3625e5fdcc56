"""`podwire observe`: what passes its filters and how a flow reads."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest

from podwire import observe
from podwire.cli import main
from podwire.observe import Filter
from schemas import codec


def flow(**changes: Any) -> dict[str, Any]:
    """Return a two-sided OPEN through a Service, with changes."""
    record: dict[str, Any] = {}
    for field in json.loads(codec.text("Flow"))["fields"]:
        kind = field["type"]
        record[field["name"]] = (
            None if isinstance(kind, list) else {"string": "", "int": 0, "long": 0}.get(str(kind), {})
        )
    record |= {
        "event_time": datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
        "event_unix_us": 1_767_323_045_123_456,
        "emitted_at": datetime(2026, 1, 2, 3, 4, 6, tzinfo=UTC),
        "record_type": "OPEN",
        "observed_by": "BOTH",
        "flow_id": "aabbccdd-0011223344556677",
        "direction": "INTERNAL",
        "outcome": "ESTABLISHED",
        "handshake_us": 1500,
        "dialed_address": "10.96.0.10",
        "dialed_port": 80,
        "service_namespace": "shop",
        "service_name": "api",
    }
    for side, pod, port in (("client", "web-1", 40000), ("server", "api-2", 8080)):
        record |= {
            f"{side}_namespace": "shop",
            f"{side}_pod": pod,
            f"{side}_workload_kind": "Deployment",
            f"{side}_workload": pod[:3],
            f"{side}_address": f"10.0.0.{port % 7}",
            f"{side}_port": port,
            f"{side}_process": pod[:3],
            f"{side}_resolution": "SOCKET",
            f"{side}_pid": 7,
        }
    return record | changes


@pytest.mark.parametrize(
    ("wanted", "passes"),
    [
        (Filter(), True),
        (Filter(namespaces=("shop",)), True),
        (Filter(namespaces=("bank", "shop")), True),
        (Filter(namespaces=("bank",)), False),
        (Filter(pods=("web",)), True),
        (Filter(pods=("shop/api-2",)), True),
        (Filter(pods=("bank/api-2",)), False),
        (Filter(pods=("ap-2",)), False),
        (Filter(workloads=("api",)), True),
        (Filter(workloads=("ap",)), False),
        (Filter(ports=(80,)), True),
        (Filter(ports=(8080,)), True),
        (Filter(ports=(81,)), False),
        (Filter(types=("CLOSE",)), False),
        (Filter(namespaces=("shop",), ports=(81,)), False),
    ],
    ids=repr,
)
def test_filter_passes_what_matches_every_given_field(wanted: Filter, passes: bool) -> None:
    """Fields are joined by and, the values of one field by or."""
    assert wanted.matches(flow()) is passes


def test_compact_line_names_pods_service_and_processes() -> None:
    """One line tells who dialled which Service and which process of which pod answered."""
    line = observe.compact(flow())
    assert line == (
        "03:04:05.123 OPEN   shop/web-1 (web) -> shop/api:80 -> shop/api-2:8080 (api) handshake=1.5ms"
    )


def test_compact_line_of_a_failure_tells_outcome_and_errno() -> None:
    """A failed connect shows why, and that one side saw it."""
    line = observe.compact(
        flow(
            record_type="FAILED",
            outcome="REFUSED",
            errno=111,
            observed_by="CLIENT",
            duration_us=2500,
            handshake_us=None,
            server_pod=None,
            server_process=None,
            server_resolution="SERVICE_ONLY",
            server_port=None,
        )
    )
    assert line.endswith("-> shop/api:80 REFUSED errno=111 after=2.5ms seen by client only")


def test_compact_line_marks_what_is_not_sure() -> None:
    """An address that could not be resolved is shown with the reason, never as a pod."""
    line = observe.compact(
        flow(
            server_pod=None,
            server_resolution="UNRESOLVED",
            server_reason="NO_OWNER_AT_TIME",
            server_process=None,
        )
    )
    assert "10.0.0.2:8080?NO_OWNER_AT_TIME" in line


@pytest.mark.parametrize("line", [observe.compact, observe.wide], ids=["compact", "wide"])
def test_corrected_record_is_recognisable(line: Any) -> None:
    """A record that was corrected says which revision it is; the first one says nothing."""
    assert " rev=1" in line(flow(revision=1))
    assert "rev=" not in line(flow())


def test_compact_line_is_coloured_only_when_asked() -> None:
    """No escape code reaches a file."""
    assert "\x1b" not in observe.compact(flow())
    assert "\x1b[32m" in observe.compact(flow(), colour=True)


def test_json_line_holds_every_field() -> None:
    """The JSON form loses nothing and times are ISO 8601."""
    parsed = json.loads(observe.as_json(flow()))
    assert set(parsed) == set(flow())
    assert parsed["event_time"] == "2026-01-02T03:04:05+00:00"


def test_wide_line_adds_addresses_and_resolutions() -> None:
    """The wide form shows the flow's id, addresses and how sure each side is."""
    line = observe.wide(flow(client_address="fd00::1"))
    assert "flow=aabbccdd-0011223344556677" in line
    assert "client=[fd00::1]:40000 client_by=SOCKET client_workload=Deployment/web" in line


def test_since_takes_spans_and_times() -> None:
    """Spans count back from now, times without a zone are UTC."""
    assert observe.since("90s", 1_000_000) == 910_000
    assert observe.since("1970-01-01T00:00:05", 0) == 5000
    assert observe.since("1970-01-01T02:00:05+02:00", 0) == 5000


def test_since_that_is_no_time_is_refused_with_a_usable_message(capsys: pytest.CaptureFixture[str]) -> None:
    """The command says which forms it takes before it talks to Kafka twice."""
    with pytest.raises(ValueError, match="give a span"):
        observe.since("yesterday", 0)
    with pytest.raises(SystemExit) as ended:
        main(["observe", "--last", "0"])
    assert ended.value.code == 2
    assert "from 1" in capsys.readouterr().err
