"""Who a side was, as of the time of the event."""

from __future__ import annotations

from typing import Any

import pytest

from enricher import history as history_module
from enricher import raw, resolve
from enricher.history import History
from enricher.networks import Networks, packed, scope
from enricher.resolve import Resolver, direction, resolution
from schemas import catalog
from schemas.registry import CatalogIds
from tests import halves
from tests.halves import NOW_US

SECOND_US = 1_000_000


def half(**changes: Any) -> raw.Half:
    """Return the CONNECT half of pod 1 with changes."""
    value = halves.batch([halves.event("CONNECT", "CLIENT", halves.key(1), **changes)])
    found = raw.cut(value, 0, CatalogIds(), catalog.RAW.schema_id)
    assert isinstance(found, list)
    return found[0]


def history(*pods: dict[str, Any], complete: bool = True) -> History:
    """Return a history of these pods, Service shop/api and node-1."""
    known = History()
    for pod in pods:
        known.put_pod(pod["uid"], pod)
    known.put_service("service-1", halves.service_record())
    known.put_node("node-1-uid", halves.node_record())
    if complete:
        known.complete_until("pods", NOW_US + SECOND_US)
    return known


def resolver(known: History, cluster: tuple[str, ...] = ()) -> Resolver:
    """Return a resolver with these cluster ranges."""
    return Resolver(known, Networks({}, cluster))


def band(pod: int, address: str, *edges: int | None) -> dict[str, Any]:
    """Return a pod whose ownership of an address has these four edges, in seconds from now."""
    names = ("from_earliest_us", "from_latest_us", "to_earliest_us", "to_latest_us")
    times = {
        name: None if edge is None else NOW_US + edge * SECOND_US
        for name, edge in zip(names, edges, strict=True)
    }
    return halves.pod_record(pod) | {"addresses": [{"address": address, **times}]}


def test_own_cgroup_names_the_pod_and_container() -> None:
    """A pod UID from the side's own cgroup beats everything else."""
    found = resolver(history(halves.pod_record(1, "10.0.0.1"))).own(half())
    assert (found.kind, found.pod and found.pod.name, found.node) == ("SOCKET", "pod-1", "node-1")
    assert found.container_id == halves.container_id(1)


def test_unknown_pod_uid_is_provisional_and_not_looked_up_by_address() -> None:
    """A pod that metadata does not know yet is worth waiting for; its address's owner would be another pod."""
    found = resolver(history(halves.pod_record(9, "10.0.0.1"))).own(half())
    assert (found.kind, found.reason, found.provisional) == ("UNRESOLVED", "UNKNOWN_POD_UID", True)


@pytest.mark.parametrize(
    ("node", "provisional"), [("node-2", False), (None, True)], ids=["other", "unscheduled"]
)
def test_pod_of_another_node_is_a_mismatch(node: str | None, provisional: bool) -> None:
    """A node's word about a pod that is not scheduled on it does not count."""
    found = resolver(history(halves.pod_record(1, node=node))).own(half())
    assert (found.kind, found.reason, found.node) == ("UNRESOLVED", "NODE_MISMATCH", None)
    assert found.provisional is provisional


def test_static_pod_is_found_by_its_config_hash_on_its_node() -> None:
    """A static pod's cgroup carries the config hash, which stands for the pod of that node only."""
    hash_ = "a0" + "0" * 29 + "1"
    there = halves.pod_record(5, config_hash=hash_, node="node-2")
    here = halves.pod_record(6, config_hash=hash_)
    found = resolver(history(there, here)).own(half(pod_uid=bytes.fromhex(hash_)))
    assert (found.kind, found.pod and found.pod.name) == ("SOCKET", "pod-6")


def test_static_pod_is_the_object_of_its_time() -> None:
    """A static pod's object in the API may be made anew under the same hash: each event goes to its own."""
    hash_ = "a0" + "0" * 29 + "1"
    first = halves.pod_record(5, config_hash=hash_)
    later = halves.pod_record(6, config_hash=hash_, valid_from_us=NOW_US + SECOND_US)
    for pods in ((first, later), (later, first)):
        known = resolver(history(*pods))
        for event_us, name in (
            (NOW_US, "pod-5"),
            (NOW_US + SECOND_US, "pod-6"),
            (NOW_US - 7200 * SECOND_US, "pod-5"),
        ):
            found = known.own(half(pod_uid=bytes.fromhex(hash_), event_unix_us=event_us))
            assert found.pod is not None
            assert found.pod.name == name


def test_labels_and_workload_are_those_of_the_time() -> None:
    """A pod that was labelled anew shows what it was before for earlier events, by its cgroup and by its address."""
    before = [
        {"until_us": NOW_US - 1, "labels": {"app": "a"}, "workload_kind": None, "workload": None},
        {"until_us": NOW_US + 1, "labels": {"app": "b"}, "workload_kind": "Job", "workload": "b"},
    ]
    known = history(halves.pod_record(1, "10.0.0.1") | {"former": before})
    for event_us, app, workload in ((-2, "a", None), (0, "b", "b"), (1, "app-1", "app-1")):
        own = resolver(known).own(half(event_unix_us=NOW_US + event_us))
        by_address = resolver(known).at(halves.ip("10.0.0.1"), NOW_US + event_us)
        for found in (own, by_address):
            assert found.pod is not None
            assert (found.pod.labels, found.pod.workload) == ({"app": app}, workload)


def test_container_that_the_api_has_not_told_yet_is_correctable() -> None:
    """The pod is sure at once; the container's name may follow, and then nothing more can come."""
    record = halves.pod_record(1)
    early = resolver(history(record | {"containers": []})).own(half())
    assert (early.kind, early.provisional, early.correctable) == ("SOCKET", False, True)
    assert not resolver(history(record)).own(half()).correctable
    assert not resolver(history(record)).own(half(container_id=resolve.NO_CONTAINER)).correctable


def test_address_is_a_pods_from_its_first_claim_on_only() -> None:
    """What an address was outside the cluster stays so when a pod, or a node's pod range, gets it later."""
    known = history(band(1, "10.77.0.1", 10, 11, None, None))
    known.put_node(
        "later", halves.node_record(pod_cidrs=["10.78.0.0/16"], valid_from_us=NOW_US + 10 * SECOND_US)
    )
    known.complete_until("pods", NOW_US + 100 * SECOND_US)
    for address in ("10.77.0.1", "10.78.0.1"):
        assert resolver(known).at(halves.ip(address), NOW_US).kind == "EXTERNAL"
    found = resolver(known).at(halves.ip("10.78.0.1"), NOW_US + 10 * SECOND_US)
    assert (found.kind, found.reason) == ("UNRESOLVED", "NO_OWNER_AT_TIME")


def test_process_that_entered_a_pods_network_is_named_by_address() -> None:
    """A process of the node that talks from a pod's address, as with nsenter, is shown under that pod."""
    found = resolver(history(halves.pod_record(1, "10.0.0.1"))).own(half(pod_uid=resolve.NO_POD))
    assert (found.kind, found.pod and found.pod.name) == ("IP_AT_TIME", "pod-1")


def test_process_outside_pods_is_its_node() -> None:
    """A known owner in no pod, on an address of no pod, is a process of the node."""
    found = resolver(history()).own(half(pod_uid=resolve.NO_POD))
    assert (found.kind, found.node) == ("NODE", "node-1")


def test_side_without_owner_is_resolved_by_its_address() -> None:
    """Without an owner the socket's own address decides."""
    found = resolver(history(halves.pod_record(1, "10.0.0.1"))).own(
        half(pod_uid=resolve.NO_POD, owner_source="NONE")
    )
    assert (found.kind, found.pod and found.pod.name) == ("IP_AT_TIME", "pod-1")


def test_observed_side_is_never_external() -> None:
    """A side whose own node saw it runs on that node, even when nothing else is known."""
    found = resolver(history()).own(
        half(pod_uid=resolve.NO_POD, owner_source="NONE", local_address=halves.ip("8.8.8.8"))
    )
    assert (found.kind, found.reason, found.node) == ("UNRESOLVED", "NO_OWNER_AT_TIME", "node-1")


BANDS = [
    (-9, "IP_AMBIGUOUS", "UNCERTAIN_BAND", None),
    (0, "IP_AT_TIME", None, "pod-1"),
    (11, "IP_AMBIGUOUS", "UNCERTAIN_BAND", None),
    (13, "IP_AMBIGUOUS", "SEVERAL_OWNERS", None),
    (15, "IP_AT_TIME", None, "pod-2"),
]


@pytest.mark.parametrize(("second", "kind", "reason", "name"), BANDS, ids=str)
def test_reused_address_names_its_owner_at_that_time(
    second: int, kind: str, reason: str | None, name: str | None
) -> None:
    """An address that goes from pod 1 to pod 2 names each in its time, and doubt in between."""
    known = history(band(1, "10.0.0.7", -10, -5, 10, 14), band(2, "10.0.0.7", 12, 15, 30, 32))
    known.complete_until("pods", NOW_US + 100 * SECOND_US)
    found = resolver(known).at(halves.ip("10.0.0.7"), NOW_US + second * SECOND_US)
    assert (found.kind, found.reason, found.pod and found.pod.name) == (kind, reason, name)


def test_address_of_no_pod_at_that_time_is_unresolved() -> None:
    """An address that belonged to a pod before is not external, it has no owner now."""
    found = resolver(history(band(1, "172.16.0.7", -100, -99, -50, -49))).at(halves.ip("172.16.0.7"), NOW_US)
    assert (found.kind, found.reason, found.provisional) == ("UNRESOLVED", "NO_OWNER_AT_TIME", False)


@pytest.mark.parametrize(
    ("address", "answered", "reason", "grade"),
    [
        ("10.0.0.77", True, "NO_OTHER_HALF", 1),
        ("10.0.0.77", False, "NO_OWNER_AT_TIME", 1),
        ("127.0.0.1", True, "NO_OTHER_HALF", 2),
        ("127.0.0.1", False, "NO_OWNER_AT_TIME", 2),
        ("8.8.8.8", True, None, 2),
    ],
)
def test_unobserved_side_without_an_owner_lacks_its_half(
    address: str, answered: bool, reason: str | None, grade: int
) -> None:
    """Somebody answered whom only the other half could name; nobody owns loopback, whatever comes later."""
    found = resolver(history()).unobserved(halves.ip(address), NOW_US, answered=answered)
    assert (found.reason, found.grade, found.provisional) == (reason, grade, False)


def test_provisional_answer_is_worth_waiting_for_and_correcting() -> None:
    """Late metadata has grade 0, below nobody known (1) and settled (2)."""
    assert (resolve.LATE.grade, resolve.NO_OWNER.grade, resolve.EXTERNAL.grade) == (0, 1, 2)
    assert resolve.LATE.correctable


def test_host_network_pod_never_owns_its_address() -> None:
    """The address of a hostNetwork pod is its node's and names the node."""
    pod = halves.pod_record(1, "192.168.7.1", host_network=True)
    assert resolver(history(pod)).at(halves.ip("192.168.7.1"), NOW_US).kind == "NODE"


def test_address_before_the_watermark_waits() -> None:
    """Until the pods topic is complete up to the event, nobody can say who owned an address."""
    known = history(halves.pod_record(1, "10.0.0.1"), complete=False)
    found = resolver(known).at(halves.ip("10.0.0.1"), NOW_US)
    assert (found.reason, found.provisional) == ("METADATA_LATE", True)
    known.complete_until("pods", NOW_US)
    assert resolver(known).at(halves.ip("10.0.0.1"), NOW_US).kind == "IP_AT_TIME"


def test_address_outside_the_cluster_ranges_is_external_without_metadata() -> None:
    """With cluster ranges set, an address outside them needs no watermark."""
    found = resolver(history(complete=False), cluster=("10.0.0.0/8",)).at(halves.ip("8.8.8.8"), NOW_US)
    assert found.kind == "EXTERNAL"


def test_tombstone_forgets_a_pod() -> None:
    """After a pod's tombstone neither its UID nor its address names it."""
    known = history(halves.pod_record(1, "172.16.0.1"))
    known.put_pod(str(halves.uid(1)), None)
    assert resolver(known).own(half()).reason == "UNKNOWN_POD_UID"
    assert resolver(known).at(halves.ip("172.16.0.1"), NOW_US).kind == "EXTERNAL"
    assert known.pods == 0


def test_changed_pod_replaces_its_addresses() -> None:
    """A new state of a pod takes the place of the old one in every index."""
    known = history(halves.pod_record(1, "10.0.0.1"))
    known.put_pod(str(halves.uid(1)), halves.pod_record(1, "10.0.0.9"))
    assert resolver(known).at(halves.ip("10.0.0.9"), NOW_US).kind == "IP_AT_TIME"
    assert resolver(known).at(halves.ip("10.0.0.1"), NOW_US).kind == "UNRESOLVED"


@pytest.mark.parametrize(
    ("address", "port", "via"),
    [
        ("10.96.0.10", 80, "CLUSTER_IP"),
        ("192.168.7.1", 30080, "NODE_PORT"),
        ("203.0.113.5", 80, "EXTERNAL_IP"),
    ],
)
def test_service_is_found_by_each_kind_of_address(address: str, port: int, via: str) -> None:
    """Cluster IP, external IP and node port lead to the same Service."""
    known = history()
    known.put_service("service-1", halves.service_record(external_ips=["203.0.113.5", "lb.example"]))
    found = known.service(halves.ip(address), port, NOW_US)
    assert found is not None
    assert (found.namespace, found.service, found.port_name, found.via) == ("shop", "api", "http", via)


def test_service_is_asked_as_of_the_event() -> None:
    """Another port is no answer, nor a Service deleted longer ago than the nodes' proxies take to know."""
    known = history()
    assert known.service(halves.ip("10.96.0.10"), 81, NOW_US) is None
    assert known.service(halves.ip("8.8.8.8"), 30080, NOW_US) is None
    known.put_service("service-1", halves.service_record(valid_to_us=NOW_US))
    assert known.service(halves.ip("10.96.0.10"), 80, NOW_US - 1) is not None
    grace_us = history_module.SERVICE_GRACE_US
    assert known.service(halves.ip("10.96.0.10"), 80, NOW_US + grace_us - 1) is not None
    assert known.service(halves.ip("10.96.0.10"), 80, NOW_US + grace_us) is None


def test_longest_named_range_wins() -> None:
    """The most specific configured range names an address, IPv4 and IPv6 alike."""
    networks = Networks(
        {"all": ["0.0.0.0/0", "::/0"], "office": ["203.0.113.0/24"], "vpn": ["203.0.113.64/26"]}
    )
    assert networks.name(halves.ip("203.0.113.70")) == "vpn"
    assert networks.name(halves.ip("203.0.113.1")) == "office"
    assert networks.name(halves.ip("198.51.100.1")) == "all"
    assert networks.name(bytes.fromhex("20010db8" + "0" * 24)) == "all"
    assert Networks({}).name(halves.ip("203.0.113.1")) is None


INSIDE = resolution("SOCKET", node="node-1")
NODE = resolution("NODE", node="node-1")
OTHER_NODE = resolution("NODE", node="node-2")
UNKNOWN = resolution("UNRESOLVED", reason="METADATA_LATE")


@pytest.mark.parametrize(
    ("client", "server", "expected"),
    [
        (INSIDE, resolve.SERVICE_ONLY, "INTERNAL"),
        (INSIDE, resolve.EXTERNAL, "EGRESS"),
        (resolve.EXTERNAL, INSIDE, "INGRESS"),
        (NODE, NODE, "NODE_LOCAL"),
        (NODE, OTHER_NODE, "INTERNAL"),
        (NODE, INSIDE, "INTERNAL"),
        (INSIDE, UNKNOWN, "UNKNOWN"),
        (resolve.EXTERNAL, resolve.EXTERNAL, "UNKNOWN"),
    ],
)
def test_direction_is_seen_from_the_cluster(
    client: resolve.Resolution, server: resolve.Resolution, expected: str
) -> None:
    """Direction follows from which ends run in the cluster."""
    assert direction(client, server) == expected


LAG_US = 10 * SECOND_US


def lagging(*pods: dict[str, Any], until_us: int) -> History:
    """Return a history that is complete up to a time, with statuses that may be 10 s late."""
    known = history(*pods, complete=False)
    known.complete_until("pods", until_us, LAG_US)
    return known


def test_claim_without_an_end_is_sure_only_as_far_as_statuses_go() -> None:
    """The pod may have ended, and another one have its address, with both statuses still under way."""
    pod = halves.pod_record(1, "10.0.0.1")
    early = resolver(lagging(pod, until_us=NOW_US + LAG_US - 1)).at(halves.ip("10.0.0.1"), NOW_US)
    assert (early.kind, early.reason, early.candidates) == ("IP_AMBIGUOUS", "UNCERTAIN_BAND", 1)
    assert (early.pod, early.provisional) == (None, True)
    late = resolver(lagging(pod, until_us=NOW_US + LAG_US)).at(halves.ip("10.0.0.1"), NOW_US)
    assert (late.kind, late.pod and late.pod.name) == ("IP_AT_TIME", "pod-1")


def test_claim_with_an_end_needs_no_later_status() -> None:
    """What a pod surely had until it ended, no news can take away."""
    known = lagging(band(1, "10.0.0.7", -10, -5, 2, 4), until_us=NOW_US + 1)
    assert resolver(known).at(halves.ip("10.0.0.7"), NOW_US).kind == "IP_AT_TIME"


@pytest.mark.parametrize(
    ("seconds", "kind", "candidates"),
    [
        (-13, "EXTERNAL", None),
        (-12, "IP_AMBIGUOUS", 1),
        (-4, "IP_AMBIGUOUS", 1),
        (-3, "IP_AT_TIME", None),
        (-1, "IP_AT_TIME", None),
        (0, "IP_AMBIGUOUS", 1),
        (5, "IP_AMBIGUOUS", 1),
        (6, "UNRESOLVED", None),
    ],
)
def test_bands_are_wider_by_the_skew_of_clocks(seconds: int, kind: str, candidates: int | None) -> None:
    """A node whose clock is 2 s off asks for a time 2 s off; near an edge that could be another pod's."""
    known = History(2 * SECOND_US)
    one = band(1, "10.0.0.7", -10, -5, 2, 4)
    known.put_pod(one["uid"], one)
    known.complete_until("pods", NOW_US + 60 * SECOND_US)
    found = resolver(known).at(halves.ip("10.0.0.7"), NOW_US + seconds * SECOND_US)
    assert (found.kind, found.candidates) == (kind, candidates)


def test_skew_of_clocks_is_waited_for() -> None:
    """An event of a node that is behind may have come about after the watermark that its own time has passed."""
    known = History(2 * SECOND_US)
    pod = halves.pod_record(1, "10.0.0.1")
    known.put_pod(pod["uid"], pod)
    known.complete_until("pods", NOW_US + 2 * SECOND_US - 1)
    assert resolver(known).at(halves.ip("10.0.0.1"), NOW_US).provisional
    known.complete_until("pods", NOW_US + 2 * SECOND_US)
    assert resolver(known).at(halves.ip("10.0.0.1"), NOW_US).kind == "IP_AT_TIME"


@pytest.mark.parametrize(
    ("address", "cluster", "kind", "provisional"),
    [
        ("10.0.0.9", (), "UNRESOLVED", True),
        ("172.16.0.9", (), "EXTERNAL", True),
        ("172.16.0.9", ("10.0.0.0/8",), "EXTERNAL", False),
        ("8.8.8.8", (), "EXTERNAL", False),
    ],
    ids=["pod_range", "private", "private_outside", "public"],
)
def test_nobody_is_final_once_statuses_can_bring_no_one(
    address: str, cluster: tuple[str, ...], kind: str, provisional: bool
) -> None:
    """An address that a pod may have got is not given to nobody before its status must be there."""
    early = resolver(lagging(until_us=NOW_US), cluster).at(halves.ip(address), NOW_US)
    assert (early.kind, early.provisional) == (kind, provisional)
    late = resolver(lagging(until_us=NOW_US + LAG_US), cluster).at(halves.ip(address), NOW_US)
    assert (late.kind, late.provisional) == (kind, False)


def test_pod_that_claims_a_nodes_address_beats_the_node() -> None:
    """Where nodes and pods share a network, a node's object outlives its machine, and a pod gets its address."""
    found = resolver(history(halves.pod_record(1, "192.168.7.1"))).at(halves.ip("192.168.7.1"), NOW_US)
    assert (found.kind, found.pod and found.pod.name) == ("IP_AT_TIME", "pod-1")


def test_new_node_is_waited_for() -> None:
    """An address that is nobody's may be that of a node which the nodes topic doesn't have yet."""
    known = history()
    known.complete_until("nodes", NOW_US - 1)
    assert resolver(known).at(halves.ip("192.168.7.9"), NOW_US).reason == "METADATA_LATE"
    known.put_node("node-9-uid", halves.node_record(name="node-9", addresses=["192.168.7.9"]))
    known.complete_until("nodes", NOW_US)
    assert resolver(known).at(halves.ip("192.168.7.9"), NOW_US).node == "node-9"


def test_youngest_service_of_a_reused_address_counts() -> None:
    """A cluster IP is given out again before the API's watch tells that its former Service is gone."""
    known = history()
    ended = {"valid_from_us": NOW_US - 2, "valid_to_us": None, "name": "next", "uid": "service-2"}
    known.put_service("service-2", halves.service_record(**ended))
    found = known.service(halves.ip("10.96.0.10"), 80, NOW_US)
    assert found is not None
    assert found.service == "next"
    before = known.service(halves.ip("10.96.0.10"), 80, NOW_US - 3)
    assert before is not None
    assert before.service == "api"


@pytest.mark.parametrize("address", ["169.254.169.254", "fd00:ec2::254"])
def test_cloud_metadata_service_is_outside_and_named(address: str) -> None:
    """It is external at once, also where cluster ranges hold its address; settings may name it otherwise."""
    where = packed(address)
    networks = Networks({}, ("fd00::/8", "169.254.0.0/16"))
    assert networks.name(where) == "cloud-metadata"
    assert Resolver(history(complete=False), networks).at(where, NOW_US).kind == "EXTERNAL"
    assert Networks({"imds": [address]}).name(where) == "imds"
    assert Networks({"all": ["0.0.0.0/0", "::/0"]}).name(where) == "cloud-metadata"
    assert Networks({"cloud-metadata": []}).name(where) is None


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("10.1.2.3", "PRIVATE"),
        ("172.31.255.255", "PRIVATE"),
        ("172.32.0.0", "PUBLIC"),
        ("192.168.0.1", "PRIVATE"),
        ("100.64.0.1", "PRIVATE"),
        ("100.128.0.1", "PUBLIC"),
        ("fd12:3456::1", "PRIVATE"),
        ("2600::1", "PUBLIC"),
        ("169.254.169.254", "LINK_LOCAL"),
        ("fe80::1", "LINK_LOCAL"),
        ("127.0.0.1", "LOOPBACK"),
        ("::1", "LOOPBACK"),
        ("8.8.8.8", "PUBLIC"),
    ],
)
def test_scope_follows_the_ranges_of_the_rfcs(address: str, expected: str) -> None:
    """RFC 1918, RFC 6598 and RFC 4193 are private, their neighbours are not."""
    assert scope(packed(address)) == expected
