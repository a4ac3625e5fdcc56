"""What is kept of one API object: owners, containers, addresses, times."""

from __future__ import annotations

from typing import Any

import pytest

from collector.cluster.records import MalformedError, Seen, owner, seen, unix_us
from schemas import codec
from tests.objects import CLUSTER, CREATED, CREATED_US, SECOND_US, container, node, pod, service


def seen_pod(**changes: Any) -> Seen:
    """Return what is kept of a sample pod."""
    return seen("pods", pod(**changes), CLUSTER, ("app", "absent"))


@pytest.mark.parametrize(
    ("kind", "name", "hash_", "expected"),
    [
        ("ReplicaSet", "api-7d4b9c6f5d", "7d4b9c6f5d", ("Deployment", "api")),
        ("ReplicaSet", "my-api-7d4b9c6f5d", "7d4b9c6f5d", ("Deployment", "my-api")),
        ("ReplicaSet", "api-7d4b9c6f5d", None, ("ReplicaSet", "api-7d4b9c6f5d")),
        ("ReplicaSet", "api-other", "7d4b9c6f5d", ("ReplicaSet", "api-other")),
        ("ReplicaSet", "-7d4b9c6f5d", "7d4b9c6f5d", ("ReplicaSet", "-7d4b9c6f5d")),
        ("StatefulSet", "db", None, ("StatefulSet", "db")),
        ("DaemonSet", "agent", None, ("DaemonSet", "agent")),
        ("Job", "backup-29922240", None, ("CronJob", "backup")),
        ("Job", "backup-1795334400", None, ("CronJob", "backup")),
        ("Job", "import-20261122", None, ("Job", "import-20261122")),
        ("Job", "backup-29999999", None, ("Job", "backup-29999999")),
        ("Job", "backup", None, ("Job", "backup")),
        ("Node", "node-1", None, ("Node", "node-1")),
    ],
)
def test_owner_is_folded_by_name(kind: str, name: str, hash_: str | None, expected: tuple[str, str]) -> None:
    """ReplicaSets fold into Deployments and Jobs into CronJobs only where the name proves it."""
    meta = {
        "creationTimestamp": CREATED,
        "ownerReferences": [{"kind": "Other", "name": "x"}, {"kind": kind, "name": name, "controller": True}],
    }
    assert owner(meta, {"pod-template-hash": hash_} if hash_ else {}) == expected


@pytest.mark.parametrize("references", [None, [], [{"kind": "ReplicaSet", "name": "x", "controller": False}]])
def test_owner_of_a_bare_pod_is_none(references: Any) -> None:
    """Without a controlling owner there is no workload."""
    assert owner({"ownerReferences": references}, {}) == (None, None)


def test_pod_record_keeps_allowed_labels_only() -> None:
    """A label that is not on the list never leaves the API server."""
    assert seen_pod().record["labels"] == {"app": "api"}


def test_pod_record_encodes_and_says_who_and_where() -> None:
    """The record has every field of the schema that does not depend on history."""
    record = seen_pod(spec={"hostNetwork": True}).record
    rest = {"addresses": [], "valid_from_us": 1, "valid_to_us": None, "observed_unix_us": 2, "former": []}
    assert codec.decode("Pod", codec.encode("Pod", record | rest, 3)) == record | rest
    assert (record["node"], record["service_account"], record["host_network"]) == ("node-1", "api", True)
    assert (record["workload_kind"], record["workload"], record["phase"]) == ("Deployment", "api", "Running")


def test_pod_containers_of_all_kinds_are_listed_with_bare_ids() -> None:
    """Init and ephemeral containers have status lists of their own; one that waits has no id."""
    item = pod(
        spec={
            "containers": [{"name": "main", "image": "a"}, {"name": "late", "image": "b"}],
            "initContainers": [{"name": "setup", "image": "c"}],
        },
        status={
            "initContainerStatuses": [container("setup", 2)],
            "ephemeralContainerStatuses": [container("debug", 3) | {"containerID": "cri-o://" + "d" * 64}],
        },
    )
    found = seen("pods", item, CLUSTER).record["containers"]
    assert [(one["name"], one["kind"], one["container_id"]) for one in found] == [
        ("main", "REGULAR", f"{1:064x}"),
        ("late", "REGULAR", ""),
        ("setup", "INIT", f"{2:064x}"),
        ("debug", "EPHEMERAL", "d" * 64),
    ]


def test_pod_container_before_its_last_restart_is_listed() -> None:
    """Events of the incarnation before a restart carry its id."""
    status = container() | {"lastState": {"terminated": {"containerID": f"containerd://{9:064x}"}}}
    found = seen_pod(statuses=[status]).record["containers"]
    assert [one["container_id"] for one in found] == [f"{1:064x}", f"{9:064x}"]


def test_static_pod_carries_its_config_hash() -> None:
    """The hash stands in the cgroup's path in place of the uid."""
    annotated = seen_pod(meta={"annotations": {"kubernetes.io/config.hash": "a" * 32}})
    assert annotated.record["config_hash"] == "a" * 32
    assert seen_pod().record["config_hash"] is None


def test_pod_addresses_are_distinct_and_in_usual_form() -> None:
    """Both families appear once each, IPv6 compressed, and nonsense not at all."""
    times = seen_pod(ips=["10.1.0.5", "fd00:0:0::5", "10.1.0.5", "", "None"]).pod
    assert times is not None
    assert times.addresses == ("10.1.0.5", "fd00::5")


def test_pod_termination_counts_from_the_request() -> None:
    """The deletion time is the end of the grace; the address may go from the request on."""
    times = seen_pod(meta={"deletionTimestamp": "2026-11-22T08:01:00Z", "deletionGracePeriodSeconds": 30}).pod
    assert times is not None
    assert times.terminating_us == CREATED_US + 30 * SECOND_US


@pytest.mark.parametrize(
    ("phase", "states", "finished_s"),
    [
        ("Succeeded", [("08:00:20", "08:00:30"), ("08:00:21", "08:00:40")], 40),
        ("Failed", [("08:00:20", "08:00:30"), (None, None)], None),
        ("Failed", [], None),
        ("Running", [("08:00:20", "08:00:30")], None),
    ],
    ids=["containers", "lost", "evicted", "running"],
)
def test_pod_completion_time_is_the_last_containers(phase: str, states: Any, finished_s: int | None) -> None:
    """A completed pod ended with its last container; nobody knows when one of them does not say."""
    statuses = [
        container(str(i), i, {"terminated": {"exitCode": 137, **_span(start, end)}})
        for i, (start, end) in enumerate(states)
    ]
    times = seen_pod(phase=phase, statuses=statuses).pod
    assert times is not None
    assert times.finished_us == (None if finished_s is None else CREATED_US + finished_s * SECOND_US)


def _span(start: str | None, end: str | None) -> dict[str, str | None]:
    day = "2026-11-22T"
    return {"startedAt": start and f"{day}{start}Z", "finishedAt": end and f"{day}{end}Z"}


@pytest.mark.parametrize(
    ("states", "started_s"),
    [
        ([{"running": _span("08:00:20", None)}, {"running": _span("08:00:10", None)}], 10),
        ([{"terminated": _span("08:00:05", "08:00:06")}, {"running": _span("08:00:20", None)}], 20),
        (
            [{"terminated": _span("08:00:05", "08:00:06")}, {"terminated": _span("08:00:09", "08:00:10")}],
            None,
        ),
        ([{"waiting": {"reason": "ContainerCreating"}}], None),
    ],
    ids=["running", "restarted_sandbox", "ended", "waiting"],
)
def test_container_that_may_be_of_an_earlier_sandbox_proves_no_address(
    states: list[dict[str, Any]], started_s: int | None
) -> None:
    """A new sandbox has a new address: only what runs, or what started last, surely started in it."""
    times = seen_pod(statuses=[container(str(i), i, state) for i, state in enumerate(states)]).pod
    assert times is not None
    expected = None if started_s is None else CREATED_US + started_s * SECOND_US
    assert times.container_started_us == expected


def test_completed_pods_last_container_ran_in_its_last_sandbox() -> None:
    """Nothing of a completed pod runs: what started last started with the address that is shown."""
    states = [{"terminated": _span("08:00:05", "08:00:06")}, {"terminated": _span("08:00:09", "08:00:10")}]
    statuses = [container(str(i), i, state) for i, state in enumerate(states)]
    times = seen_pod(phase="Succeeded", statuses=statuses).pod
    assert times is not None
    assert times.container_started_us == CREATED_US + 9 * SECOND_US


def test_pending_pod_is_kept_without_node_and_address() -> None:
    """A pod that is not scheduled yet is a record too."""
    item = {
        "kind": "Pod",
        "metadata": {"name": "p", "namespace": "n", "uid": "u"},
        "status": {"phase": "Pending"},
    }
    found = seen("pods", item, CLUSTER)
    assert found.pod is not None
    assert (found.record["node"], found.pod.addresses, found.created_us) == (None, (), None)
    assert found.record["resource_version"] == ""


def test_service_record_has_all_its_addresses_and_ports() -> None:
    """Cluster, external and load balancer addresses are told apart; target ports stay names."""
    item = service(
        spec={
            "type": "LoadBalancer",
            "clusterIPs": ["10.96.0.7", "fd00:10::7"],
            "externalIPs": ["198.51.100.1"],
            "ports": [
                {"port": 80, "targetPort": 8080, "nodePort": 30080},
                {"name": "d", "port": 53, "protocol": "UDP"},
            ],
        },
        status={"loadBalancer": {"ingress": [{"ip": "203.0.113.9"}, {"hostname": "lb.example"}]}},
    )
    record = seen("services", item, CLUSTER).record
    assert record["cluster_ips"] == ["10.96.0.7", "fd00:10::7"]
    assert record["external_ips"] == ["198.51.100.1", "203.0.113.9"]
    assert record["ports"] == [
        {"name": "", "protocol": "TCP", "port": 80, "target_port": "8080", "node_port": 30080},
        {"name": "d", "protocol": "UDP", "port": 53, "target_port": "53", "node_port": None},
    ]
    rest = {"valid_from_us": 1, "valid_to_us": None, "observed_unix_us": 2}
    assert codec.decode("Service", codec.encode("Service", record | rest, 4)) == record | rest


def test_headless_and_external_services_have_no_cluster_address() -> None:
    """The clusterIP "None" is no address."""
    record = seen("services", service(spec={"clusterIP": "None", "clusterIPs": ["None"]}), CLUSTER).record
    assert record["cluster_ips"] == []
    item = service(
        spec={"type": "ExternalName", "externalName": "db.example", "clusterIP": "", "clusterIPs": None}
    )
    record = seen("services", item, CLUSTER).record
    assert (record["cluster_ips"], record["external_name"]) == ([], "db.example")


def test_node_record_has_addresses_and_zone() -> None:
    """Host names are no addresses; the zone comes from either label."""
    record = seen("nodes", node(), CLUSTER).record
    assert (record["addresses"], record["pod_cidrs"], record["zone"]) == (
        ["192.168.0.1"],
        ["10.1.0.0/24"],
        "z1",
    )
    old = seen("nodes", node(labels={"failure-domain.beta.kubernetes.io/zone": "z2"}), CLUSTER).record
    assert old["zone"] == "z2"
    assert seen("nodes", node(labels={}), CLUSTER).record["zone"] is None


@pytest.mark.parametrize(
    "item",
    [
        {},
        {"metadata": {"name": "a", "namespace": "b"}},
        {"metadata": None},
        pod(meta={"creationTimestamp": "yesterday"}),
        pod(status={"containerStatuses": "many"}),
        pod(meta={"ownerReferences": [{"controller": True}]}),
    ],
    ids=["empty", "no_uid", "no_metadata", "bad_time", "bad_list", "bad_owner"],
)
def test_unusable_object_is_malformed(item: Any) -> None:
    """What lacks what every object has is one kind of error, whatever it lacks."""
    with pytest.raises(MalformedError):
        seen("pods", item, CLUSTER)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (CREATED, CREATED_US),
        ("2026-11-22T08:00:00.25Z", CREATED_US + 250_000),
        ("2026-11-22T09:00:00+01:00", CREATED_US),
        ("2026-11-22T08:00:00", CREATED_US),
        ("", None),
        (None, None),
    ],
)
def test_times_become_microseconds(text: str | None, expected: int | None) -> None:
    """RFC 3339 with or without fraction and offset; none stays none."""
    assert unix_us(text) == expected
