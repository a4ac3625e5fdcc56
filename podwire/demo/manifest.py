"""Kubernetes objects in the form of `kubectl get pods,services,nodes -A -o json`.

Pure: values in, dicts out. Only the fields that a reader of the API relies on. Called by `podwire.demo.lab`.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_UIDS = uuid.UUID("5d0e7a8c-2f51-4f5f-9f06-8b8f0c1d2e3a")  # namespace of the uids that follow from a name


@dataclass(frozen=True)
class PodSpec:
    """What a pod's object says.

    Attributes:
        created: RFC 3339 time of creation, of one second's resolution as the API has it.
        deployment: name of the Deployment that owns it, empty for a bare pod.
        container_id: 64 hex digits.
        addresses: pod IPs, the first is the primary one.
    """

    name: str
    namespace: str
    uid: str
    node: str
    node_address: str
    created: str
    container: str
    container_id: str
    image: str
    addresses: tuple[str, ...]
    deployment: str = ""
    service_account: str = "default"
    host_network: bool = False
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Port:
    """A port of a Service; `target_port` 0 means the same as `port`, `node_port` 0 means none."""

    port: int
    target_port: int = 0
    name: str = ""
    node_port: int = 0

    @property
    def target(self) -> int:
        """Port on the pods."""
        return self.target_port or self.port


def uid_of(kind: str, namespace: str, name: str) -> str:
    """Return a uid that is the same for the same object in every run."""
    return str(uuid.uuid5(_UIDS, f"{kind}/{namespace}/{name}"))


def pod(spec: PodSpec) -> dict[str, Any]:
    """Return a running Pod with one container; with a Deployment, owned by its ReplicaSet."""
    labels, owners = dict(spec.labels), []
    if spec.deployment:
        replica_set = spec.name.rsplit("-", 1)[0]
        labels.setdefault("app", spec.deployment)
        labels["pod-template-hash"] = replica_set.removeprefix(f"{spec.deployment}-")
        owners = [_controller("ReplicaSet", replica_set, spec.namespace)]
    status = {
        "name": spec.container,
        "image": spec.image,
        "containerID": f"containerd://{spec.container_id}",
        "ready": True,
        "started": True,
        "restartCount": 0,
        "state": {"running": {"startedAt": spec.created}},
    }
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": spec.name,
            "namespace": spec.namespace,
            "uid": spec.uid,
            "creationTimestamp": spec.created,
            "labels": labels,
            "ownerReferences": owners,
        },
        "spec": {
            "nodeName": spec.node,
            "serviceAccountName": spec.service_account,
            "hostNetwork": spec.host_network,
            "containers": [{"name": spec.container, "image": spec.image}],
        },
        "status": {
            "phase": "Running",
            "conditions": [{"type": "Ready", "status": "True", "lastTransitionTime": spec.created}],
            "hostIP": spec.node_address,
            "podIP": spec.addresses[0],
            "podIPs": [{"ip": address} for address in spec.addresses],
            "startTime": spec.created,
            "qosClass": "Burstable",
            "containerStatuses": [status],
        },
    }


def _controller(kind: str, name: str, namespace: str) -> dict[str, Any]:
    return {
        "apiVersion": "apps/v1",
        "kind": kind,
        "name": name,
        "uid": uid_of(kind, namespace, name),
        "controller": True,
        "blockOwnerDeletion": True,
    }


def service(
    name: str,
    namespace: str,
    address: str,
    ports: Sequence[Port],
    *,
    selector: Mapping[str, str],
    created: str,
) -> dict[str, Any]:
    """Return a Service with one cluster IP; of type NodePort when a port has a node port."""
    node_ports = any(port.node_port for port in ports)
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {
            "name": name,
            "namespace": namespace,
            "uid": uid_of("Service", namespace, name),
            "creationTimestamp": created,
        },
        "spec": {
            "type": "NodePort" if node_ports else "ClusterIP",
            "clusterIP": address,
            "clusterIPs": [address],
            "ipFamilies": ["IPv6" if ":" in address else "IPv4"],
            "selector": dict(selector),
            "ports": [_service_port(port) for port in ports],
        },
        "status": {"loadBalancer": {}},
    }


def _service_port(port: Port) -> dict[str, Any]:
    shown: dict[str, Any] = {"protocol": "TCP", "port": port.port, "targetPort": port.target}
    if port.name:
        shown["name"] = port.name
    if port.node_port:
        shown["nodePort"] = port.node_port
    return shown


def node(name: str, addresses: Sequence[str], created: str) -> dict[str, Any]:
    """Return a ready Node with these internal addresses."""
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {
            "name": name,
            "uid": uid_of("Node", "", name),
            "creationTimestamp": created,
            "labels": {"kubernetes.io/hostname": name, "topology.kubernetes.io/zone": "demo-a"},
        },
        "spec": {},
        "status": {
            "addresses": [
                *({"type": "InternalIP", "address": address} for address in addresses),
                {"type": "Hostname", "address": name},
            ],
            "conditions": [{"type": "Ready", "status": "True", "lastTransitionTime": created}],
        },
    }


def items(objects: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the List that `kubectl get -o json` prints."""
    return {"apiVersion": "v1", "kind": "List", "metadata": {"resourceVersion": ""}, "items": list(objects)}
