"""Turns one object of the Kubernetes API into what Podwire keeps of it.

Pure: plain JSON objects in, values out; never compares with earlier states (that is `intervals`). Called by
`source` and `manifests`. Anything without a uid is a `MalformedError`, which the callers count.

Owners are folded by name, since ReplicaSets and Jobs are not watched (fewer objects, fewer permissions):
* a ReplicaSet whose name ends in `-` and the pod's label `pod-template-hash` belongs to the Deployment of the
  name before it (the deployment controller names them so);
* a Job whose name ends in `-` and the scheduled time (minutes since 1970 in 8 digits; before Kubernetes 1.21
  seconds in 10) within a week before and a day after the pod's creation belongs to the CronJob of the name
  before it (`getJobName` in the cronjob controller). A date like 20261122 is no such time, so `import-20261122`
  stays a Job.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

Kind = Literal["pods", "services", "nodes"]
KINDS: tuple[Kind, ...] = ("pods", "services", "nodes")
Record = dict[str, Any]

SECOND_US = 1_000_000
DAY_US = 86_400 * SECOND_US
SCHEDULED_BEFORE_US = 7 * DAY_US
SCHEDULED_AFTER_US = DAY_US
TERMINAL_PHASES = frozenset({"Succeeded", "Failed"})
CONFIG_HASH = "kubernetes.io/config.hash"
ZONES = ("topology.kubernetes.io/zone", "failure-domain.beta.kubernetes.io/zone")
_CRON_JOB = re.compile(r"(.+)-(\d{8}|\d{10})")


class MalformedError(ValueError):
    """An object that lacks what every object of the API has."""


@dataclass(frozen=True, slots=True)
class PodTimes:
    """What a pod's object says about its addresses and times, all in us of Unix time, of 1 s resolution.

    Attributes:
        addresses: addresses it has in this state, in its own order.
        started_us: when its node took it up (status.startTime), before it had any address.
        container_started_us: when a container of its present sandbox had started; it had its addresses by then.
        terminating_us: earliest time at which its end may have begun: the request to delete it.
        finished_us: when its last container ended; None while it runs, or when not every end is told.
        terminal: its phase is Succeeded or Failed.
    """

    addresses: tuple[str, ...]
    started_us: int | None
    container_started_us: int | None
    terminating_us: int | None
    finished_us: int | None
    terminal: bool


@dataclass(frozen=True, slots=True)
class Seen:
    """One object in one state.

    Attributes:
        kind: pods, services or nodes.
        uid: metadata.uid.
        created_us: metadata.creationTimestamp in us of Unix time; None when a manifest lacks it.
        record: the fields of its Avro record that don't depend on other states.
        pod: a pod's times; None for other kinds.
    """

    kind: Kind
    uid: str
    created_us: int | None
    record: Record
    pod: PodTimes | None = None


def seen(kind: Kind, item: Any, cluster: str, labels: Collection[str] = ()) -> Seen:
    """Return what we keep of an API object; `labels` are the pod labels to publish. MalformedError if unusable."""
    try:
        meta = item["metadata"]
        if not (isinstance(meta["uid"], str) and meta["uid"]):
            raise MalformedError("metadata.uid is no text")
        base = {"cluster": cluster, "uid": meta["uid"], "name": meta["name"]}
        base["resource_version"] = str(meta.get("resourceVersion") or "")
        created_us = unix_us(meta.get("creationTimestamp"))
        match kind:
            case "pods":
                record, times = _pod(item, meta, labels)
                return Seen(kind, meta["uid"], created_us, base | record, times)
            case "services":
                return Seen(kind, meta["uid"], created_us, base | _service(item, meta))
            case "nodes":
                return Seen(kind, meta["uid"], created_us, base | _node(item, meta))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise MalformedError(f"{type(error).__name__}: {error}") from error


def unix_us(text: str | None) -> int | None:
    """Return an RFC 3339 time as us of Unix time; None stays None."""
    if not text:
        return None
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return round(moment.timestamp() * SECOND_US)


def address(text: Any) -> str | None:
    """Return an IP address in its usual text form; None when it isn't one ("None", "", a host name)."""
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        return None


def _addresses(texts: Any) -> list[str]:
    """Return the distinct addresses among `texts`, in their order."""
    found = (address(text) for text in texts if text)
    return list(dict.fromkeys(one for one in found if one is not None))


def _pod(item: Any, meta: Any, labels: Collection[str]) -> tuple[Record, PodTimes]:
    spec, status = item.get("spec") or {}, item.get("status") or {}
    own_labels, annotations = meta.get("labels") or {}, meta.get("annotations") or {}
    kind, workload = owner(meta, own_labels)
    phase = status.get("phase") or "Unknown"
    record: Record = {
        "config_hash": annotations.get(CONFIG_HASH),
        "namespace": meta["namespace"],
        "node": spec.get("nodeName") or None,
        "host_network": bool(spec.get("hostNetwork")),
        "workload_kind": kind,
        "workload": workload,
        "service_account": spec.get("serviceAccountName") or spec.get("serviceAccount") or None,
        "labels": {name: own_labels[name] for name in labels if name in own_labels},
        "containers": list(_containers(spec, status)),
        "phase": phase,
    }
    terminal = phase in TERMINAL_PHASES
    times = PodTimes(
        addresses=tuple(
            _addresses([status.get("podIP"), *(one.get("ip") for one in status.get("podIPs") or ())])
        ),
        started_us=unix_us(status.get("startTime")),
        container_started_us=_container_started_us(status, terminal=terminal),
        terminating_us=_terminating_us(meta),
        finished_us=_finished_us(status) if terminal else None,
        terminal=terminal,
    )
    return record, times


def _statuses(status: Any) -> Iterator[Any]:
    for group in ("initContainerStatuses", "containerStatuses", "ephemeralContainerStatuses"):
        yield from status.get(group) or ()


def _terminating_us(meta: Any) -> int | None:
    """Return when deletion was asked for: deletionTimestamp is one grace later (apimachinery's ObjectMeta)."""
    ends_us = unix_us(meta.get("deletionTimestamp"))
    if ends_us is None:
        return None
    return ends_us - int(meta.get("deletionGracePeriodSeconds") or 0) * SECOND_US


def _times(status: Any, state: str, name: str) -> list[int | None]:
    """Return a time of each container that is in a state."""
    states = [(one.get("state") or {}).get(state) for one in _statuses(status)]
    return [unix_us(one.get(name)) for one in states if one]


def _container_started_us(status: Any, *, terminal: bool) -> int | None:
    """Return the first start among running containers, of a completed pod the last one among all.

    A container that has ended may have run in an earlier sandbox, with another address.
    """
    if terminal:
        return max((at for at in _times(status, "terminated", "startedAt") if at is not None), default=None)
    return min((at for at in _times(status, "running", "startedAt") if at is not None), default=None)


def _finished_us(status: Any) -> int | None:
    """Return the last container's end; None unless every one that ended says when (a lost one doesn't)."""
    ends = _times(status, "terminated", "finishedAt")
    told = [at for at in ends if at is not None]
    return max(told) if told and len(told) == len(ends) else None


def _containers(spec: Any, status: Any) -> Iterator[Record]:
    """Yield the containers of all kinds; those that have not started yet come without an id."""
    for kind, group, statuses in (
        ("REGULAR", "containers", "containerStatuses"),
        ("INIT", "initContainers", "initContainerStatuses"),
        ("EPHEMERAL", "ephemeralContainers", "ephemeralContainerStatuses"),
    ):
        known = {one["name"]: one for one in status.get(statuses) or ()}
        declared = {one["name"]: one for one in spec.get(group) or ()}
        for name in dict.fromkeys([*declared, *known]):
            one = known.get(name, {})
            image = one.get("image") or declared.get(name, {}).get("image") or ""
            base = {"name": name, "image": image, "kind": kind}
            yield base | {"container_id": _bare_id(one.get("containerID"))}
            former = _bare_id(((one.get("lastState") or {}).get("terminated") or {}).get("containerID"))
            if former and former != _bare_id(one.get("containerID")):
                yield base | {"container_id": former}


def _bare_id(container_id: str | None) -> str:
    """Return `containerd://<id>` without the runtime's prefix, empty for None."""
    return (container_id or "").rpartition("://")[2]


def owner(meta: Any, labels: Any) -> tuple[str | None, str | None]:
    """Return (kind, name) of the workload that controls a pod, folded by the rules above; (None, None) if bare."""
    for reference in meta.get("ownerReferences") or ():
        if reference.get("controller"):
            kind, name = reference["kind"], reference["name"]
            break
    else:
        return None, None
    if kind == "ReplicaSet":
        suffix = f"-{labels.get('pod-template-hash') or ' '}"
        if name.endswith(suffix) and name != suffix:
            return "Deployment", name.removesuffix(suffix)
    elif kind == "Job" and (match := _CRON_JOB.fullmatch(name)):
        scheduled_us = int(match[2]) * (60 if len(match[2]) == 8 else 1) * SECOND_US  # noqa: PLR2004
        created_us = unix_us(meta.get("creationTimestamp"))
        if created_us is not None and -SCHEDULED_AFTER_US <= created_us - scheduled_us <= SCHEDULED_BEFORE_US:
            return "CronJob", match[1]
    return kind, name


def _service(item: Any, meta: Any) -> Record:
    spec, status = item.get("spec") or {}, item.get("status") or {}
    ingress = (status.get("loadBalancer") or {}).get("ingress") or ()
    return {
        "namespace": meta["namespace"],
        "type": spec.get("type") or "ClusterIP",
        "cluster_ips": _addresses([spec.get("clusterIP"), *(spec.get("clusterIPs") or ())]),
        "external_ips": _addresses([*(spec.get("externalIPs") or ()), *(one.get("ip") for one in ingress)]),
        "external_name": spec.get("externalName") or None,
        "ports": [
            {
                "name": port.get("name") or "",
                "protocol": port.get("protocol") or "TCP",
                "port": int(port["port"]),
                "target_port": str(port.get("targetPort") or port["port"]),
                "node_port": port.get("nodePort") or None,
            }
            for port in spec.get("ports") or ()
        ],
        "selector": {str(name): str(value) for name, value in (spec.get("selector") or {}).items()},
    }


def _node(item: Any, meta: Any) -> Record:
    spec, status, labels = item.get("spec") or {}, item.get("status") or {}, meta.get("labels") or {}
    return {
        "addresses": _addresses(
            one.get("address")
            for one in status.get("addresses") or ()
            if one.get("type") in ("InternalIP", "ExternalIP")
        ),
        "pod_cidrs": list(spec.get("podCIDRs") or filter(None, [spec.get("podCIDR")])),
        "zone": next((labels[name] for name in ZONES if labels.get(name)), None),
    }
