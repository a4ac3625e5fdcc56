"""What a flow says of a connection: NAT, Service, who closed, names, times."""

from __future__ import annotations

import io
import json
from typing import Any

import avro.io
import avro.schema
import pytest

from enricher import raw
from enricher.flow import FlowBuilder, Moment, cluster_prefix
from enricher.history import History
from enricher.networks import Networks, scope
from enricher.pair import Pair, alone
from enricher.resolve import Resolver
from schemas import catalog, codec
from schemas.registry import CatalogIds
from tests import halves
from tests.halves import NOW_US

KEY = halves.key(1)


def flow_bytes(*records: dict[str, Any]) -> bytes:
    """Return the flow of one or two halves, client's first, framed."""
    known = History()
    for number in (1, 2):
        known.put_pod(str(number), halves.pod_record(number, f"10.0.0.{number}"))
    known.put_pod("3", halves.pod_record(3, namespace="bank"))
    known.put_service("service-1", halves.service_record(external_ips=["198.51.100.7"]))
    port = {"name": "https", "protocol": "TCP", "port": 443, "target_port": "6443", "node_port": None}
    server = {"namespace": "default", "name": "kubernetes", "cluster_ips": ["10.96.0.1"], "ports": [port]}
    known.put_service("service-2", halves.service_record(**server))
    known.put_node("node-1-uid", halves.node_record())
    known.complete_until("pods", NOW_US + 1_000_000)
    networks = Networks({"partner": ["203.0.113.0/24"]})
    builder = FlowBuilder(halves.CLUSTER, catalog.FLOWS.schema_id, known, networks, Resolver(known, networks))
    cut = raw.cut(halves.batch(list(records), sequence=8), 0, CatalogIds(), catalog.RAW.schema_id)
    assert isinstance(cut, list)
    pair = Pair(cut[0], cut[1]) if len(cut) == 2 else alone(cut[0])
    flow = builder.build(pair, Moment.at(NOW_US // 1000 + 250, NOW_US), final=True)
    assert flow is not None
    return flow.value


def flow(*records: dict[str, Any]) -> dict[str, Any]:
    """Return the decoded flow of one or two halves."""
    return codec.decode("Flow", flow_bytes(*records))


def close(role: str, **changes: Any) -> dict[str, Any]:
    """Return a CLOSE half."""
    return halves.event("CLOSE", role, KEY, **changes)


def test_flow_through_a_service_names_service_and_backend() -> None:
    """The dialled Service and the pod behind it stand in one record, each under its own name."""
    found = flow(*halves.opened(KEY))
    assert (found["service_namespace"], found["service_name"]) == ("shop", "api")
    assert (found["service_port_name"], found["service_via"]) == ("http", "CLUSTER_IP")
    assert (found["dialed_address"], found["dialed_port"]) == ("10.96.0.10", 80)
    assert (found["server_address"], found["server_port"], found["server_pod"]) == ("10.0.0.2", 8080, "pod-2")
    assert (found["source_nat_address"], found["source_nat_port"]) == (None, None)
    assert (found["client_labels"], found["client_workload_kind"]) == ({"app": "app-1"}, "Deployment")
    assert (found["client_sequence"], found["server_event_index"]) == (8, 1)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"remote_address": halves.ip("192.168.7.1"), "remote_port": 61000}, ("192.168.7.1", 61000)),
        ({"remote_port": 61000}, (None, 61000)),
        ({"remote_address": halves.ip("192.168.7.1")}, ("192.168.7.1", 40000)),
    ],
    ids=["masquerade", "port_only", "address_only"],
)
def test_source_nat_is_what_the_server_saw(changes: dict[str, Any], expected: tuple[Any, Any]) -> None:
    """Where the server saw another client address or port than the client has, the record says which."""
    client, server = halves.opened(KEY)
    found = flow(client, server | changes)
    assert (found["source_nat_address"], found["source_nat_port"]) == expected
    assert found["client_address"] == "10.0.0.1"


def test_client_half_alone_that_dialled_a_service_is_service_only() -> None:
    """Without the server's half nobody knows the backend: the dialled Service is all there is."""
    found = flow(halves.opened(KEY)[0])
    assert (found["observed_by"], found["server_resolution"]) == ("CLIENT", "SERVICE_ONLY")
    assert (found["server_address"], found["server_port"], found["server_pod"]) == ("10.96.0.10", None, None)
    assert found["direction"] == "INTERNAL"


def test_client_half_alone_to_the_outside_is_egress_to_a_named_network() -> None:
    """An address of nobody in the cluster is external, with the configured network's name."""
    found = flow(halves.event("CONNECT", "CLIENT", KEY, remote_address=halves.ip("203.0.113.9")))
    assert (found["server_resolution"], found["server_network"]) == ("EXTERNAL", "partner")
    assert (found["direction"], found["service_name"]) == ("EGRESS", None)


def test_server_half_alone_resolves_its_client_by_address() -> None:
    """The server's view of the client is an address, which had an owner at that time."""
    found = flow(halves.opened(KEY)[1])
    assert (found["observed_by"], found["client_resolution"]) == ("SERVER", "IP_AT_TIME")
    assert (found["client_pod"], found["client_port"], found["dialed_address"]) == ("pod-1", None, None)
    assert found["event_unix_us"] == NOW_US + 150


@pytest.mark.parametrize(
    ("client", "server", "expected"),
    [
        ("LOCAL", "REMOTE", "CLIENT"),
        ("REMOTE", "LOCAL", "SERVER"),
        ("LOCAL", "LOCAL", "BOTH"),
        ("UNKNOWN", "LOCAL", "SERVER"),
        ("BOTH", "BOTH", "BOTH"),
        ("TIMER", "UNKNOWN", "TIMER"),
        ("UNKNOWN", "UNKNOWN", "UNKNOWN"),
        (None, "REMOTE", "CLIENT"),
        ("REMOTE", None, "SERVER"),
    ],
)
def test_closer_is_told_from_both_views(client: str | None, server: str | None, expected: str) -> None:
    """LOCAL and REMOTE of each side become CLIENT and SERVER."""
    records = [close("CLIENT", closed_by=client)] if client else []
    records += [close("SERVER", closed_by=server)] if server else []
    assert flow(*records)["closed_by"] == expected


@pytest.mark.parametrize(
    ("client", "server", "expected"),
    [("CLOSED", "CLOSED", "CLOSED"), ("CLOSED", "RESET", "RESET"), ("RESET", "ABORTED", "RESET")],
)
def test_close_outcome_is_the_one_that_says_more(client: str, server: str, expected: str) -> None:
    """A reset that one side alone noticed is not hidden by the other's plain close."""
    assert flow(close("CLIENT", outcome=client), close("SERVER", outcome=server))["outcome"] == expected


@pytest.mark.parametrize(
    ("comm", "expected"),
    [(b"curl", "curl"), (b"\xff\xfeweb", "\\xff\\xfeweb"), ("größe".encode(), "größe"), (b"", None)],
    ids=["ascii", "not_utf8", "utf8", "none"],
)
def test_process_name_is_decoded_with_escapes(comm: bytes, expected: str | None) -> None:
    """Bytes that are not UTF-8 are escaped, so that one bad name can't break a record."""
    assert flow(halves.failed(KEY, comm=comm))["client_process"] == expected


def test_times_and_ids_are_those_of_the_contract() -> None:
    """flow_id, tcp_key, times and metadata age follow the schema's words."""
    found = flow(*halves.opened(KEY))
    assert found["tcp_key"] == KEY.hex()
    assert found["flow_id"] == f"{cluster_prefix(halves.CLUSTER)}-{KEY.hex()}"
    assert len(cluster_prefix(halves.CLUSTER)) == 8
    assert found["event_unix_us"] == NOW_US
    assert found["metadata_age_ms"] == 250
    assert (found["progress_seq"], found["revision"]) == (0, 0)


def test_flow_decodes_with_the_stock_avro_library() -> None:
    """Apache's own library reads a flow with the schema file alone."""
    schema = avro.schema.parse(json.dumps(json.loads(codec.text("Flow"))))
    value = flow_bytes(close("CLIENT"), close("SERVER"))
    decoder = avro.io.BinaryDecoder(io.BytesIO(value[5:]))
    found = avro.io.DatumReader(schema, schema).read(decoder)
    assert isinstance(found, dict)
    assert (found["record_type"], found["client_bytes_received"]) == ("CLOSE", 4096)


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        (halves.ip("127.0.0.1"), "LOOPBACK"),
        (bytes(15) + b"\x01", "LOOPBACK"),
        (halves.ip("169.254.169.254"), "LINK_LOCAL"),
        (halves.ip("10.1.2.3"), "PRIVATE"),
        (halves.ip("100.64.0.1"), "PRIVATE"),
        (bytes.fromhex("fd00" + "0" * 28), "PRIVATE"),
        (halves.ip("8.8.8.8"), "PUBLIC"),
        (bytes.fromhex("2606470047000000" + "0" * 15 + "1"), "PUBLIC"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.hex()[-8:],
)
def test_scope_is_that_of_the_address(address: bytes, expected: str) -> None:
    """IPv4 in its mapped form has the scope of IPv4."""
    assert scope(address) == expected


def test_address_is_asked_as_of_the_handshake() -> None:
    """A CLOSE comes long after its peer is gone and another pod has the address: it names whom it was open with."""
    minute_us = 60_000_000
    edges = ("from_earliest_us", "from_latest_us", "to_earliest_us", "to_latest_us")
    first = dict(zip(edges, (0, 0, NOW_US - 2 * minute_us, NOW_US - minute_us), strict=True))
    second = dict(zip(edges, (NOW_US - minute_us, NOW_US - minute_us, None, None), strict=True))
    known = History()
    for number, band in ((2, first), (3, second)):
        known.put_pod(str(number), halves.pod_record(number, addresses=[{"address": "10.0.0.2", **band}]))
    known.complete_until("pods", NOW_US + minute_us)
    networks = Networks({})
    builder = FlowBuilder(halves.CLUSTER, catalog.FLOWS.schema_id, known, networks, Resolver(known, networks))
    peer = {"remote_address": halves.ip("10.0.0.2"), "remote_port": 8080}
    old = NOW_US - 3 * minute_us
    ends = [
        close("CLIENT", established_unix_us=old, **peer),
        close("CLIENT", established_unix_us=None, **peer),
        halves.failed(KEY, **peer) | {"duration_us": 3 * minute_us},
    ]
    for record, pod in zip(ends, ("pod-2", "pod-3", "pod-2"), strict=True):
        cut = raw.cut(halves.batch([record]), 0, CatalogIds(), catalog.RAW.schema_id)
        assert isinstance(cut, list)
        built = builder.build(alone(cut[0]), Moment.at(NOW_US // 1000, NOW_US), final=True)
        assert built is not None
        assert codec.decode("Flow", built.value)["server_pod"] == pod


@pytest.mark.parametrize(
    ("changes", "sides", "expected"),
    [
        ({}, (0, 1), False),
        ({"pod_uid": halves.uid(3).bytes}, (0, 1), True),
        ({}, (0,), False),
        ({"remote_address": halves.ip("203.0.113.9")}, (0,), None),
    ],
    ids=["same", "other", "service_only", "external"],
)
def test_cross_namespace_compares_both_ends(
    changes: dict[str, Any], sides: tuple[int, ...], expected: bool | None
) -> None:
    """Pods of two namespaces cross; a dialled Service stands for its backend; the outside has no namespace."""
    client, server = halves.opened(KEY)
    both = (client | changes, server)
    assert flow(*(both[side] for side in sides))["cross_namespace"] is expected


@pytest.mark.parametrize(
    ("address", "port", "service", "via"),
    [
        ("10.96.0.1", 443, "kubernetes", "CLUSTER_IP"),
        ("192.168.7.1", 30080, "api", "NODE_PORT"),
        ("198.51.100.7", 80, "api", "EXTERNAL_IP"),
    ],
    ids=["api_server", "node_port", "load_balancer"],
)
def test_dialled_address_names_the_service(address: str, port: int, service: str, via: str) -> None:
    """Cluster IP, a node's port, and a load balancer's address lead to the Service; the API server is one of them."""
    found = flow(halves.event("CONNECT", "CLIENT", KEY, remote_address=halves.ip(address), remote_port=port))
    assert (found["service_name"], found["service_via"]) == (service, via)
    assert (found["server_resolution"], found["direction"]) == ("SERVICE_ONLY", "INTERNAL")


def test_metadata_service_is_named_where_the_network_leads_elsewhere() -> None:
    """A node's agent that answers for the cloud's metadata service does not hide that it was dialled."""
    client, server = halves.opened(KEY)
    client["remote_address"] = halves.ip("169.254.169.254")
    assert flow(client)["server_network"] == "cloud-metadata"
    assert flow(client)["direction"] == "EGRESS"
    both = flow(client, server)
    assert (both["server_network"], both["server_pod"]) == ("cloud-metadata", "pod-2")


def test_pair_through_nat_waits_for_a_service_that_is_not_known_yet() -> None:
    """A Service may be dialled before the watcher tells of it; a pair without NAT needs none."""
    known = History()
    for number in (1, 2):
        known.put_pod(str(number), halves.pod_record(number, f"10.0.0.{number}"))
    known.complete_until("pods", NOW_US + 1_000_000)
    known.complete_until("services", NOW_US - 1_000_000)
    networks = Networks({})
    builder = FlowBuilder(halves.CLUSTER, catalog.FLOWS.schema_id, known, networks, Resolver(known, networks))

    def build(*records: dict[str, Any]) -> dict[str, Any] | None:
        cut = raw.cut(halves.batch(list(records)), 0, CatalogIds(), catalog.RAW.schema_id)
        assert isinstance(cut, list)
        built = builder.build(Pair(cut[0], cut[1]), Moment.at(NOW_US // 1000, NOW_US), final=False)
        return None if built is None else codec.decode("Flow", built.value)

    client, server = halves.opened(KEY)
    assert build(client | {"remote_address": server["local_address"]}, server) is not None
    assert build(client, server) is None
    known.put_service("service-1", halves.service_record())
    found = build(client, server)
    assert found is not None
    assert found["service_name"] == "api"
