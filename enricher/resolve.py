"""Names one side of a flow: which pod, node, Service or network it was, at the time of the event.

Pure: asks a `History` and the configured networks, never Kafka and never "now". Called by `flow`. An answer
that more metadata could better is marked `provisional`; `engine` decides how long it may wait.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from enricher.history import FOREVER_US
from enricher.networks import scope
from enricher.raw import CONTAINER_ID, LOCAL, OWNER_AT, POD_UID

if TYPE_CHECKING:
    from enricher.history import History, Ownership, Pod
    from enricher.networks import Networks
    from enricher.raw import Half

NO_POD = b"\x00" * 16
NO_CONTAINER = b"\x00" * 32
_OWNERS_KNOWN = frozenset((4, 6))  # PROCESS, CGROUP as they stand in the bytes
_CACHE = 100_000


@dataclass(frozen=True, eq=False)
class Resolution:
    """What is known of one side; equal arguments give the same object, so that it can key a cache.

    Attributes:
        kind: as in Flow's client_resolution.
        reason: as in Flow's client_reason.
        candidates: pods that may have owned the address; None unless IP_AMBIGUOUS.
        pod: the pod; None unless the kind names one.
        container_id: 32 bytes, zeros when the side's own kernel named none.
        node: node it runs on; None when it is not known to run in the cluster.
        provisional: whether metadata that is still to come could better the answer: worth waiting for.
        correctable: whether a later record could; wider than `provisional`, see `grade`.
    """

    kind: str
    reason: str | None
    candidates: int | None
    pod: Pod | None
    container_id: bytes
    node: str | None
    provisional: bool
    correctable: bool

    @property
    def grade(self) -> int:
        """Return how good the answer is: 0 provisional, 1 nobody or no container known so far, 2 settled.

        An address works before the API shows it, so a Pod record that comes after the watermark has passed may
        yet name an owner; but nothing says that one will come, so grade 1 is not worth waiting for.
        """
        return 2 - self.provisional - self.correctable

    @property
    def in_cluster(self) -> bool | None:
        """Whether the side runs in the cluster; None when that is not known."""
        if self.kind == "UNRESOLVED":
            return True if self.node else None
        return self.kind != "EXTERNAL"


@lru_cache(maxsize=_CACHE)
def resolution(
    kind: str,
    *,
    reason: str | None = None,
    candidates: int | None = None,
    pod: Pod | None = None,
    container_id: bytes = NO_CONTAINER,
    node: str | None = None,
    provisional: bool = False,
    correctable: bool = False,
) -> Resolution:
    """Return the one Resolution of these arguments; what is provisional is correctable too."""
    return Resolution(
        kind, reason, candidates, pod, container_id, node, provisional, provisional or correctable
    )


@lru_cache(maxsize=_CACHE)
def socket(pod: Pod, container_id: bytes) -> Resolution:
    """Return SOCKET for a container of a pod; what `resolution` gives, at less cost.

    A container talks before the API shows its id, so its name may come with a later record of the pod.
    """
    unnamed = container_id != NO_CONTAINER and container_id not in pod.containers
    return resolution("SOCKET", pod=pod, container_id=container_id, node=pod.node, correctable=unnamed)


EXTERNAL = resolution("EXTERNAL")
SERVICE_ONLY = resolution("SERVICE_ONLY")
LATE = resolution("UNRESOLVED", reason="METADATA_LATE", provisional=True)
NO_OWNER = resolution("UNRESOLVED", reason="NO_OWNER_AT_TIME", correctable=True)
NO_OTHER_HALF = resolution("UNRESOLVED", reason="NO_OTHER_HALF", correctable=True)
LOOPBACK = resolution("UNRESOLVED", reason="NO_OWNER_AT_TIME")
LOOPBACK_OTHER_HALF = resolution("UNRESOLVED", reason="NO_OTHER_HALF")
EXTERNAL_YET = resolution("EXTERNAL", provisional=True)
NO_OWNER_YET = resolution("UNRESOLVED", reason="NO_OWNER_AT_TIME", provisional=True)
NO_OTHER_HALF_YET = resolution("UNRESOLVED", reason="NO_OTHER_HALF", provisional=True)
_BY_ITS_HALF_ALONE = {
    NO_OWNER: NO_OTHER_HALF,
    NO_OWNER_YET: NO_OTHER_HALF_YET,
    LOOPBACK: LOOPBACK_OTHER_HALF,
}


class Resolver:
    """Answers for one cluster."""

    def __init__(self, known: History, networks: Networks) -> None:
        self._history = known
        self._networks = networks

    def own(self, half: Half) -> Resolution:
        """Return who the half's own side was: by its cgroup, else by its address, else a process of its node."""
        data = half.data
        identity = data[POD_UID]
        node = half.header.node
        if identity != NO_POD:
            return self._by_identity(identity, data[CONTAINER_ID], node, half.event_unix_us)
        as_of_us = half.as_of_us
        if data[OWNER_AT] in _OWNERS_KNOWN:
            # A process that entered a pod's network from outside, as with nsenter, talks from the pod's address.
            owners = self._history.owners(data[LOCAL], as_of_us)
            return self._among(owners, as_of_us) if owners else resolution("NODE", node=node)
        found = self.at(data[LOCAL], as_of_us)
        if found.kind in {"EXTERNAL", "UNRESOLVED"}:
            reason = found.reason or "NO_OWNER_AT_TIME"
            return resolution(
                "UNRESOLVED",
                reason=reason,
                node=node,
                provisional=found.provisional,
                correctable=found is not LOOPBACK,
            )
        return found

    def unobserved(self, address: bytes, time_us: int, *, answered: bool) -> Resolution:
        """Return who the side was whose half is not there; `answered` says that a connection came about.

        Then somebody had the address: where no owner is known, only the other half could have named the side.
        """
        found = self.at(address, time_us)
        return _BY_ITS_HALF_ALONE.get(found, found) if answered else found

    def _by_identity(self, identity: bytes, container_id: bytes, node: str, time_us: int) -> Resolution:
        pod = self._history.pod(identity, node, time_us)
        if pod is None:
            return resolution("UNRESOLVED", reason="UNKNOWN_POD_UID", node=node, provisional=True)
        if pod.node != node:
            return resolution("UNRESOLVED", reason="NODE_MISMATCH", provisional=pod.node is None)
        return socket(pod, container_id)

    def at(self, address: bytes, time_us: int) -> Resolution:
        """Return who had an address at a time, as far as metadata reaches.

        A pod that claims a node's address beats it: a node's object outlives its machine by minutes.
        """
        known = self._history
        node, owners = known.node(address, time_us), known.owners(address, time_us)
        if node is not None and not owners:
            return resolution("NODE", node=node)
        where, inside = scope(address), self._networks.in_cluster(address)
        if where in {"LOOPBACK", "LINK_LOCAL"} or inside is False:
            return LOOPBACK if where == "LOOPBACK" else EXTERNAL
        until_us = known.pods_complete_until_us
        if until_us is None or until_us < time_us or not known.is_complete("nodes", time_us):
            return LATE
        if owners:
            return self._among(owners, time_us)
        settled = known.is_settled(time_us)
        if inside or known.is_pod_address(address, time_us):
            return NO_OWNER if settled else NO_OWNER_YET
        # Where no range says what is a pod's, a private address may be that of a pod which the API doesn't show yet.
        return EXTERNAL if settled or where == "PUBLIC" else EXTERNAL_YET

    def _among(self, owners: list[Ownership], time_us: int) -> Resolution:
        """Return the one sure owner; else the doubt, which names no pod but counts those that come into question.

        A claim without an end is sure, and the others are all there are, as far as the lag of statuses allows.
        """
        settled = self._history.is_settled(time_us)
        sure = [
            owner.pod
            for owner in owners
            if owner.from_latest_us <= time_us < owner.to_earliest_us
            and (settled or owner.to_latest_us != FOREVER_US)
        ]
        if len(sure) == 1:
            return resolution("IP_AT_TIME", pod=sure[0], node=sure[0].node)
        reason = "UNCERTAIN_BAND" if len(owners) == 1 else "SEVERAL_OWNERS"
        return resolution("IP_AMBIGUOUS", reason=reason, candidates=len(owners), provisional=not settled)


def direction(client: Resolution, server: Resolution) -> str:
    """Return Flow's direction of two resolved sides.

    NODE_LOCAL is between processes of one node, outside pods; pods on one node talk INTERNAL.
    """
    client_inside, server_inside = client.in_cluster, server.in_cluster
    if client_inside is None or server_inside is None or not (client_inside or server_inside):
        return "UNKNOWN"
    if client_inside and server_inside:
        local = client.kind == server.kind == "NODE" and client.node == server.node
        return "NODE_LOCAL" if local else "INTERNAL"
    return "EGRESS" if client_inside else "INGRESS"
