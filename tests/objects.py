"""Sample objects of the Kubernetes API, as `kubectl get -o json` shows them, for the cluster watcher's tests."""

from __future__ import annotations

from typing import Any

CLUSTER = "testing"
CREATED = "2026-11-22T08:00:00Z"
CREATED_US = 1_795_334_400_000_000
STARTED = "2026-11-22T08:00:01Z"
RUNNING = "2026-11-22T08:00:04Z"
SECOND_US = 1_000_000


def container(name: str = "main", number: int = 1, state: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return a container's status."""
    return {
        "name": name,
        "image": f"shop/{name}:1",
        "containerID": f"containerd://{number:064x}",
        "state": state or {"running": {"startedAt": RUNNING}},
    }


def pod(name: str = "api-7d4b9c6f5d-abcde", **changes: Any) -> dict[str, Any]:
    """Return a running pod; `changes` replace uid, version, ip, ips, phase, statuses, meta, spec or status entries."""
    ip = changes.get("ip", "10.1.0.5")
    ips = changes.get("ips", [ip] if ip else [])
    meta = {
        "name": name,
        "namespace": "shop",
        "uid": changes.get("uid", f"uid-{name}"),
        "creationTimestamp": CREATED,
        "resourceVersion": changes.get("version", "1"),
        "labels": {"app": "api", "secret": "x", "pod-template-hash": "7d4b9c6f5d"},
        "ownerReferences": [{"kind": "ReplicaSet", "name": "api-7d4b9c6f5d", "controller": True}],
    }
    spec = {
        "nodeName": "node-1",
        "serviceAccountName": "api",
        "containers": [{"name": "main", "image": "shop/main:1"}],
    }
    status = {
        "phase": changes.get("phase", "Running"),
        "startTime": STARTED,
        "podIPs": [{"ip": one} for one in ips],
        "containerStatuses": changes.get("statuses", [container()]),
    }
    if ips:
        status["podIP"] = ips[0]
    return {
        "kind": "Pod",
        "metadata": meta | changes.get("meta", {}),
        "spec": spec | changes.get("spec", {}),
        "status": status | changes.get("status", {}),
    }


def service(name: str = "api", **changes: Any) -> dict[str, Any]:
    """Return a ClusterIP Service with one named port; `changes` replace uid, version, spec or status entries."""
    meta = {
        "name": name,
        "namespace": "shop",
        "uid": changes.get("uid", f"uid-svc-{name}"),
        "creationTimestamp": CREATED,
        "resourceVersion": changes.get("version", "1"),
    }
    spec = {
        "type": "ClusterIP",
        "clusterIP": "10.96.0.7",
        "clusterIPs": ["10.96.0.7"],
        "ports": [{"name": "http", "protocol": "TCP", "port": 80, "targetPort": "web"}],
        "selector": {"app": "api"},
    }
    return {
        "kind": "Service",
        "metadata": meta,
        "spec": spec | changes.get("spec", {}),
        "status": changes.get("status", {"loadBalancer": {}}),
    }


def node(name: str = "node-1", **changes: Any) -> dict[str, Any]:
    """Return a node with one internal address; `changes` replace uid, version or labels."""
    return {
        "kind": "Node",
        "metadata": {
            "name": name,
            "uid": changes.get("uid", f"uid-node-{name}"),
            "creationTimestamp": CREATED,
            "resourceVersion": changes.get("version", "1"),
            "labels": changes.get("labels", {"topology.kubernetes.io/zone": "z1"}),
        },
        "spec": {"podCIDR": "10.1.0.0/24", "podCIDRs": ["10.1.0.0/24"]},
        "status": {
            "addresses": [
                {"type": "InternalIP", "address": "192.168.0.1"},
                {"type": "Hostname", "address": name},
            ]
        },
    }


def listing(*items: dict[str, Any]) -> dict[str, Any]:
    """Return a List as kubectl prints it."""
    return {"kind": "List", "apiVersion": "v1", "items": list(items)}
