"""Who owned what when: pods by UID, addresses by time, Services and nodes, as-of.

Owns the in-memory copy of the metadata topics. Never reads Kafka and never asks about "now": every address
question carries a time. Not thread-safe: filled and asked from one thread. Called by `engine` (changes)
and `resolve` (questions).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from enricher.networks import Prefixes, packed

if TYPE_CHECKING:
    from collections.abc import Iterable

FOREVER_US = 1 << 62
SERVICE_GRACE_US = 10_000_000
"""A deleted Service's address works until every node's proxy knows; and whoever asks may not know either yet."""
_HEX_32 = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, eq=False)
class Container:
    """A container of a pod."""

    name: str
    image: str


@dataclass(frozen=True, eq=False)
class Pod:
    """A pod as the metadata topic last told it; two objects are equal only when they are the same object.

    Attributes:
        identity: UID (static pods: config hash) as 16 bytes; empty when it isn't 32 hex digits.
        containers: by container id as 32 bytes.
        former: (until when, the pod as it was), oldest first.
        Others: as in schemas/Pod.avsc.
    """

    identity: bytes
    config_hash: bytes
    uid: str
    namespace: str
    name: str
    node: str | None
    host_network: bool
    workload_kind: str | None
    workload: str | None
    service_account: str | None
    labels: dict[str, str]
    containers: dict[bytes, Container]
    valid_from_us: int
    former: tuple[tuple[int, Pod], ...] = ()

    def as_of(self, time_us: int) -> Pod:
        """Return the pod with the labels and the workload that it had at a time."""
        return next((pod for until_us, pod in self.former if time_us < until_us), self)


class Ownership(NamedTuple):
    """A pod's claim on an address: sure from `from_latest_us` to `to_earliest_us`, possible in the wider band."""

    pod: Pod
    from_earliest_us: int
    from_latest_us: int
    to_earliest_us: int
    to_latest_us: int


@dataclass(frozen=True, eq=False)
class ServicePort:
    """One port of a Service under one of its kinds of address.

    Attributes:
        via: CLUSTER_IP, NODE_PORT or EXTERNAL_IP.
    """

    namespace: str
    service: str
    port_name: str | None
    via: str
    valid_from_us: int
    valid_to_us: int


@dataclass(frozen=True, eq=False)
class Node:
    """A node's name and life."""

    name: str
    valid_from_us: int
    valid_to_us: int


_Valid = TypeVar("_Valid", ServicePort, Node)


@dataclass
class _Claims:
    """What one metadata record put into the indexes, so that its successor can take it out."""

    addresses: list[tuple[bytes, Ownership]] = field(default_factory=list)
    service_ports: list[tuple[tuple[bytes, int], ServicePort]] = field(default_factory=list)
    node_ports: list[tuple[int, ServicePort]] = field(default_factory=list)
    nodes: list[tuple[bytes, Node]] = field(default_factory=list)
    pod_cidrs: list[tuple[str, tuple[str, int]]] = field(default_factory=list)


class History:
    """The metadata topics' content, indexed for as-of questions.

    Attributes:
        version: grows with every change, so that a caller knows when asking again may help.
        pods_complete_until_us: the pods topic is complete up to here; None before the first watermark.
        pods_settled_until_us: what nodes did to pods up to here is known: the same, less the lag of pod statuses and
            the skew of clocks.
    """

    def __init__(self, clock_skew_us: int = 0) -> None:
        """Begin empty; a time that is asked for may be off by up to `clock_skew_us` from the watcher's clock."""
        self._skew_us = clock_skew_us
        self.version = 0
        self.pods_complete_until_us: int | None = None
        self.pods_settled_until_us: int | None = None
        self._complete_until_us: dict[str, int] = {}
        self._pods: dict[str, Pod] = {}
        self._by_identity: dict[bytes, Pod] = {}
        self._by_config_hash: dict[tuple[bytes, str | None], list[Pod]] = {}
        self._owners: dict[bytes, list[Ownership]] = {}
        self._service_ports: dict[tuple[bytes, int], list[ServicePort]] = {}
        self._node_ports: dict[int, list[ServicePort]] = {}
        self._nodes: dict[bytes, list[Node]] = {}
        self._claims: dict[tuple[str, str], _Claims] = {}
        self._pod_cidrs: Prefixes[tuple[str, int]] = Prefixes()

    @property
    def pods(self) -> int:
        """Number of pods known, the ended ones included."""
        return len(self._pods)

    def complete_until(self, kind: str, until_us: int, status_lag_us: int = 0) -> None:
        """Take a watermark that holds for what was put in so far."""
        self.version += 1
        self._complete_until_us[kind] = until_us
        if kind == "pods":
            self.pods_complete_until_us = until_us
            self.pods_settled_until_us = until_us - status_lag_us - self._skew_us

    def is_complete(self, kind: str, time_us: int) -> bool:
        """Return whether a kind is known up to a time; one that nobody watches never says so, and holds nothing up."""
        until_us = self._complete_until_us.get(kind)
        return until_us is None or until_us >= time_us

    def is_settled(self, time_us: int) -> bool:
        """Return whether all that may have happened to pods up to a time is known."""
        return self.pods_settled_until_us is not None and self.pods_settled_until_us >= time_us

    def put_pod(self, uid: str, record: dict[str, Any] | None) -> None:
        """Take a Pod record; None is its tombstone."""
        old = self._pods.pop(uid, None)
        if old is not None:
            _remove_value(self._by_identity, old.identity, old)
            if old.config_hash:
                _remove(self._by_config_hash, (old.config_hash, old.node), old)
        claims = self._replace("pods", uid, record)
        if record is None:
            return
        pod = _pod(record)
        self._pods[uid] = pod
        if pod.identity:
            self._by_identity[pod.identity] = pod
        if pod.config_hash:
            self._by_config_hash.setdefault((pod.config_hash, pod.node), []).append(pod)
        if pod.host_network:
            return
        for address in record["addresses"]:
            ownership = Ownership(
                pod,
                address["from_earliest_us"] - self._skew_us,
                address["from_latest_us"] + self._skew_us,
                _or_forever(address["to_earliest_us"], -self._skew_us),
                _or_forever(address["to_latest_us"], self._skew_us),
            )
            for key in _packed_all([address["address"]]):
                claims.addresses.append((key, ownership))
                self._owners.setdefault(key, []).append(ownership)

    def put_service(self, uid: str, record: dict[str, Any] | None) -> None:
        """Take a Service record; None is its tombstone."""
        claims = self._replace("services", uid, record)
        if record is None:
            return
        life = (record["valid_from_us"], _or_forever(record["valid_to_us"]) + SERVICE_GRACE_US)
        for port in record["ports"]:
            if port["protocol"] != "TCP":
                continue
            named = (record["namespace"], record["name"], port["name"] or None)
            addresses = (("CLUSTER_IP", record["cluster_ips"]), ("EXTERNAL_IP", record["external_ips"]))
            for via, texts in addresses:
                for address in _packed_all(texts):
                    key = (address, port["port"])
                    claims.service_ports.append((key, ServicePort(*named, via, *life)))
            if port["node_port"] is not None:
                claims.node_ports.append((port["node_port"], ServicePort(*named, "NODE_PORT", *life)))
        for key, service in claims.service_ports:
            self._service_ports.setdefault(key, []).append(service)
        for node_port, service in claims.node_ports:
            self._node_ports.setdefault(node_port, []).append(service)

    def put_node(self, uid: str, record: dict[str, Any] | None) -> None:
        """Take a Node record; None is its tombstone."""
        claims = self._replace("nodes", uid, record)
        if record is None:
            return
        node = Node(record["name"], record["valid_from_us"], _or_forever(record["valid_to_us"]))
        claims.nodes = [(address, node) for address in _packed_all(record["addresses"])]
        for address, node_ in claims.nodes:
            self._nodes.setdefault(address, []).append(node_)
        for cidr in record["pod_cidrs"]:
            claims.pod_cidrs.append((cidr, (uid, node.valid_from_us)))
            self._pod_cidrs.add(*claims.pod_cidrs[-1])

    def pod(self, identity: bytes, node: str, time_us: int) -> Pod | None:
        """Return the pod of a UID, or the static pod of a config hash on that node.

        One config hash may stand for several objects in the API, one after the other, that show the same pod: then
        for the last one made before the time, else for the first.
        """
        found = self._by_identity.get(identity) or self._static_pod(identity, node, time_us)
        return found.as_of(time_us) if found and found.former else found

    def _static_pod(self, config_hash: bytes, node: str, time_us: int) -> Pod | None:
        pods = self._by_config_hash.get((config_hash, node))
        if pods is None:
            return None
        before = [pod for pod in pods if pod.valid_from_us <= time_us]
        if before:
            return max(before, key=lambda pod: (pod.valid_from_us, pod.uid))
        return min(pods, key=lambda pod: (pod.valid_from_us, pod.uid))

    def owners(self, address: bytes, time_us: int) -> list[Ownership]:
        """Return who may have owned an address at a time, in no order."""
        return [
            owner._replace(pod=owner.pod.as_of(time_us)) if owner.pod.former else owner
            for owner in self._owners.get(address, ())
            if owner.from_earliest_us <= time_us < owner.to_latest_us
        ]

    def is_pod_address(self, address: bytes, time_us: int) -> bool:
        """Return whether a pod may have had this address by then, or a pod range of a node that was there holds it."""
        return any(owner.from_earliest_us <= time_us for owner in self._owners.get(address, ())) or any(
            valid_from_us <= time_us for _, valid_from_us in self._pod_cidrs.holding(address)
        )

    def node(self, address: bytes, time_us: int) -> str | None:
        """Return the name of the node that had an address at a time."""
        found = _valid(self._nodes.get(address, ()), time_us)
        return found.name if found else None

    def service(self, address: bytes, port: int, time_us: int) -> ServicePort | None:
        """Return the Service port that an address and port belonged to at a time.

        A Service's own address wins over a node port on a node's address.
        """
        found = _valid(self._service_ports.get((address, port), ()), time_us)
        if found is None and port in self._node_ports and self.node(address, time_us) is not None:
            found = _valid(self._node_ports[port], time_us)
        return found

    def _replace(self, kind: str, uid: str, record: dict[str, Any] | None) -> _Claims:
        """Take an older record's claims out of the indexes and return the place for the new ones."""
        self.version += 1
        old = self._claims.pop((kind, uid), None)
        if old is not None:
            for key, ownership in old.addresses:
                _remove(self._owners, key, ownership)
            for address_port, service in old.service_ports:
                _remove(self._service_ports, address_port, service)
            for node_port, service in old.node_ports:
                _remove(self._node_ports, node_port, service)
            for address, node in old.nodes:
                _remove(self._nodes, address, node)
            for cidr, value in old.pod_cidrs:
                self._pod_cidrs.remove(cidr, value)
        claims = _Claims()
        if record is not None:
            self._claims[kind, uid] = claims
        return claims


def _pod(record: dict[str, Any]) -> Pod:
    present = Pod(
        identity=_sixteen(record["uid"]),
        config_hash=_sixteen(record["config_hash"] or ""),
        uid=record["uid"],
        namespace=record["namespace"],
        name=record["name"],
        node=record["node"],
        host_network=record["host_network"],
        workload_kind=record["workload_kind"],
        workload=record["workload"],
        service_account=record["service_account"],
        labels=record["labels"],
        containers={
            bytes.fromhex(container["container_id"]): Container(container["name"], container["image"])
            for container in record["containers"]
            if re.fullmatch(r"[0-9a-f]{64}", container["container_id"])
        },
        valid_from_us=record["valid_from_us"],
    )
    former = tuple(
        (
            one["until_us"],
            replace(
                present, labels=one["labels"], workload_kind=one["workload_kind"], workload=one["workload"]
            ),
        )
        for one in record["former"]
    )
    return replace(present, former=former) if former else present


def _sixteen(text: str) -> bytes:
    digits = text.replace("-", "").lower()
    return bytes.fromhex(digits) if _HEX_32.fullmatch(digits) else b""


def _packed_all(texts: Iterable[str]) -> list[bytes]:
    """Return the addresses among the texts; a load balancer may be given by name, which is none."""
    out = []
    for text in texts:
        try:
            out.append(packed(text))
        except ValueError:
            continue
    return out


def _or_forever(time_us: int | None, later_us: int = 0) -> int:
    return FOREVER_US if time_us is None else time_us + later_us


def _valid(objects: Iterable[_Valid], time_us: int) -> _Valid | None:
    """Return what was valid at a time; of several the youngest, for an address is free again before the API says so."""
    there = [one for one in objects if one.valid_from_us <= time_us < one.valid_to_us]
    return max(there, key=lambda one: one.valid_from_us, default=None)


def _remove(index: dict[Any, list[Any]], key: Any, value: Any) -> None:
    values = index[key]
    values.remove(value)
    if not values:
        del index[key]


def _remove_value(index: dict[Any, Any], key: Any, value: Any) -> None:
    if index.get(key) is value:
        del index[key]
