"""Spliced flows against fastavro: whatever the halves hold, the bytes are those of a stock encoder."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from enricher import raw
from enricher.flow import Flow, FlowBuilder, Moment
from enricher.history import History
from enricher.networks import Networks
from enricher.pair import Pair, alone
from enricher.resolve import Resolver
from schemas import catalog, codec
from schemas.registry import CatalogIds
from tests import halves
from tests.halves import NOW_US

LONG = st.integers(-(2**63), 2**63 - 1)
COUNT = st.integers(0, 2**53)
INT = st.integers(-(2**31), 2**31 - 1)
PORT = st.integers(1, 65535)
ADDRESS = st.one_of(
    st.sampled_from([halves.ip(f"10.0.0.{n}") for n in range(1, 5)] + [halves.ip("192.168.7.1")]),
    st.binary(min_size=16, max_size=16),
    st.binary(min_size=4, max_size=4).map(lambda tail: bytes(10) + b"\xff\xff" + tail),
)


@st.composite
def half_records(draw: st.DrawFn, type_: str, role: str) -> dict[str, Any]:
    """Draw a TcpEvent of a type and role, with anything allowed in every other field."""
    return {
        "tcp_key": b"\x04" + b"\x07" * 7,
        "type": type_,
        "role": role,
        "outcome": draw(st.sampled_from(["UNKNOWN", "ESTABLISHED", "REFUSED", "CLOSED", "RESET", "OTHER"])),
        "closed_by": draw(st.sampled_from(["UNKNOWN", "NONE", "LOCAL", "REMOTE", "BOTH", "TIMER"])),
        "owner_source": draw(st.sampled_from(["UNKNOWN", "NONE", "PROCESS", "CGROUP", "NAMESPACE"])),
        "event_unix_us": draw(st.integers(2**48, 2**55 - 1)),
        "pod_uid": draw(st.sampled_from([bytes(16), *(halves.uid(n).bytes for n in range(5))])),
        "container_id": draw(st.sampled_from([bytes(32), halves.container_id(1), halves.container_id(9)])),
        "local_address": draw(ADDRESS),
        "remote_address": draw(st.one_of(ADDRESS, st.just(halves.ip("10.96.0.10")))),
        "comm": draw(st.binary(max_size=15)),
        "progress_seq": draw(st.integers(0, 2**31 - 1)) if type_ == "PROGRESS" else 0,
        "remote_port": draw(st.one_of(PORT, st.just(80))),
        "errno": draw(st.integers(0, 200)),
        **{name: draw(st.none() | INT) for name in ("port", "pid")},
        **{name: draw(st.none() | COUNT) for name in ("handshake_us", "duration_us", "uid", "netns_ino")},
        **{name: draw(st.none() | LONG) for name in ("cgroup_id", "socket_cookie", "established_unix_us")},
        **{
            name: draw(st.none() | COUNT)
            for name in ("bytes_sent", "bytes_received", "segments_sent", "segments_received", "retransmits")
        },
        **{name: draw(st.none() | COUNT) for name in ("rtt_us", "rtt_min_us")},
    }


@st.composite
def events(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Draw one side or both sides of one life-cycle event."""
    client, server = draw(
        st.sampled_from(
            [("CONNECT", "ACCEPT"), ("CLOSE", "CLOSE"), ("EXISTING", "EXISTING"), ("PROGRESS", "PROGRESS")]
        )
    )
    both = [draw(half_records(client, "CLIENT")), draw(half_records(server, "SERVER"))]
    one = [both[:1], both[1:]]
    return draw(st.sampled_from(one if client == "PROGRESS" else [both, *one]))


def builder() -> FlowBuilder:
    """Return a builder that knows pods 1 to 3, a Service and a node."""
    known = History()
    known.put_pod("1", halves.pod_record(1, "10.0.0.1"))
    known.put_pod("2", halves.pod_record(2, "10.0.0.2", labels={}, workload=None, workload_kind=None))
    known.put_pod("3", halves.pod_record(3, "10.0.0.3", node="node-2", namespace="größe"))
    known.put_service("service-1", halves.service_record())
    known.put_node("node-1-uid", halves.node_record())
    known.complete_until("pods", 2**55)
    networks = Networks({"office": ["10.0.0.4/32"]})
    return FlowBuilder(halves.CLUSTER, catalog.FLOWS.schema_id, known, networks, Resolver(known, networks))


BUILDER = builder()
MOMENT = Moment.at(NOW_US // 1000, NOW_US - 5_000)


def build(records: list[dict[str, Any]]) -> Flow:
    """Return the flow of one or two halves."""
    cut = raw.cut(halves.batch(records, sequence=3), 0, CatalogIds(), catalog.RAW.schema_id)
    assert isinstance(cut, list)
    flow = BUILDER.build(Pair(cut[0], cut[1]) if len(cut) == 2 else alone(cut[0]), MOMENT, final=True)
    assert flow is not None
    return flow


@settings(max_examples=200, deadline=None)
@given(events())
def test_flow_is_byte_identical_to_fastavro(records: list[dict[str, Any]]) -> None:
    """Decoding a spliced flow and encoding it again with fastavro gives the same bytes."""
    flow = build(records)
    decoded = codec.decode("Flow", flow.value)
    assert codec.encode("Flow", decoded, catalog.FLOWS.schema_id) == flow.value
    assert decoded["flow_id"].encode() == flow.key
    assert decoded["event_unix_us"] // 1000 == flow.event_ms


@settings(max_examples=100, deadline=None)
@given(events())
def test_flow_carries_each_side_as_its_half_told_it(records: list[dict[str, Any]]) -> None:
    """What a kernel measured arrives under its own side's names, and the other side's stay null."""
    decoded = codec.decode("Flow", build(records).value)
    sides = {record["role"].lower(): record for record in records}
    names = (
        "port",
        "pid",
        "uid",
        "netns_ino",
        "cgroup_id",
        "socket_cookie",
        "established_unix_us",
        "bytes_sent",
    )
    names += ("bytes_received", "segments_sent", "segments_received", "retransmits", "rtt_us", "rtt_min_us")
    for side in ("client", "server"):
        record = sides.get(side, dict.fromkeys((*names, "event_unix_us", "owner_source")))
        for name in (*names, "event_unix_us", "owner_source"):
            assert decoded[f"{side}_{name}"] == record[name], name
        assert decoded[f"{side}_observer"] == ("node-1" if side in sides else None)
    first = sides.get("client") or sides["server"]
    shared = ("errno", "handshake_us", "duration_us", "progress_seq")
    assert [decoded[name] for name in shared] == [first[name] for name in shared]
