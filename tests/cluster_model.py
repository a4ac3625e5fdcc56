"""A model of a cluster: who truly had which address when, and what its API shows of that, and when.

Knows nothing of Podwire's code. A node gives addresses out and takes them back; pods wait until one is free. The
API hears of it by statuses, each up to `LAG_US` late, in whole seconds. A second sandbox has another address than the
first. Called by tests/property/test_identity_oracle.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

from tests import objects

SECOND_US = 1_000_000
BASE_US = 1_795_334_400_000_000
LAG_US = 10 * SECOND_US
NEVER_US = 1 << 61
GRACE_SECONDS = 30
NODE_ADDRESS = "192.168.0.1"
End = Literal["stays", "deleted", "completed", "evicted", "forced"]


@dataclass(frozen=True)
class Plan:
    """What a pod is to go through; all spans in us.

    Attributes:
        wait_us: after the creation of the pod before it.
        start_us, address_us, container_us: from creation to being taken up, to asking for addresses, and from having
            them to the first container's start.
        resandbox_us: time in its first sandbox, after which another one is made; None keeps the first.
        life_us: from the (last) container's start to the end or the request for it.
        stop_us: from the request for deletion to the last container's end.
        teardown_us: from the last container's end to the addresses' release.
        collected_us: from then to the object's removal; NEVER_US leaves it.
        tells_end: whether a deleted pod's last status tells its containers' ends.
        delays_us: how late its statuses are, in turn.
    """

    wait_us: int
    start_us: int
    address_us: int
    container_us: int
    resandbox_us: int | None
    life_us: int
    end: End
    stop_us: int
    teardown_us: int
    collected_us: int
    tells_end: bool
    host_network: bool
    delays_us: tuple[int, ...]


@dataclass(frozen=True)
class Holding:
    """A pod truly had an address in [from_us, to_us), in its first or second sandbox."""

    uid: str
    sandbox: int
    address: str
    from_us: int
    to_us: int


@dataclass(frozen=True)
class Shown:
    """From `at_us` on the API shows this object under a uid; None: it is gone."""

    at_us: int
    uid: str
    item: dict[str, Any] | None


@dataclass
class World:
    """The truth, and the API's log in order of time."""

    holdings: list[Holding] = field(default_factory=list)
    log: list[Shown] = field(default_factory=list)
    forced: set[str] = field(default_factory=set)

    def owner(self, address: str, time_us: int) -> Holding | None:
        """Return who truly had an address at a time: a look at every interval there is."""
        found = [
            one for one in self.holdings if one.address == address and one.from_us <= time_us < one.to_us
        ]
        assert len(found) <= 1
        return found[0] if found else None

    def snapshot(self, time_us: int) -> list[dict[str, Any]]:
        """Return the objects that the API shows at a time."""
        last = {one.uid: one.item for one in self.log if one.at_us <= time_us}
        return [item for item in last.values() if item is not None]


@dataclass
class _Pod:
    plan: Plan
    uid: str
    name: str
    created_us: int
    statuses: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    had: set[str] = field(default_factory=set)
    sandboxes: int = 0
    requested_us: int = NEVER_US
    gone_us: int = NEVER_US


def build(plans: list[Plan], pools: tuple[tuple[str, ...], ...]) -> World:
    """Return what happens when these pods share the pools, one address of each pool per pod."""
    world = World()
    free_us = [dict.fromkeys(pool, 0) for pool in pools]
    asking: list[tuple[int, int]] = []
    pods, now_us = [], BASE_US
    for number, plan in enumerate(plans):
        now_us += plan.wait_us
        pod = _Pod(plan, f"uid-{number}", f"pod-{number % 2}", now_us)
        pods.append(pod)
        heapq.heappush(asking, (now_us + plan.start_us + plan.address_us, number))
    while asking:
        asked_us, number = heapq.heappop(asking)
        pod = pods[number]
        if pod.plan.host_network:
            _live(pod, asked_us, (NODE_ADDRESS,))
            continue
        addresses = tuple(
            min((one for one in pool if one not in pod.had), key=lambda address: pool[address])
            for pool in free_us
        )
        pod.had.update(addresses)
        has_us = max([asked_us, *(pool[address] for pool, address in zip(free_us, addresses, strict=True))])
        if has_us >= NEVER_US:
            continue  # it waits for ever
        released_us, again = _live(pod, has_us, addresses)
        for pool, address in zip(free_us, addresses, strict=True):
            pool[address] = released_us
            world.holdings.append(Holding(pod.uid, pod.sandboxes, address, has_us, released_us))
        if again:
            heapq.heappush(asking, (released_us, number))
    for pod in pods:
        world.log += _shown(pod)
        if pod.plan.end == "forced":
            world.forced.add(pod.uid)
    world.log.sort(key=lambda one: one.at_us)
    return world


def _live(pod: _Pod, has_us: int, addresses: tuple[str, ...]) -> tuple[int, bool]:
    """Play one sandbox of a pod; return when its addresses are free again and whether another sandbox follows."""
    plan, told = pod.plan, pod.statuses
    pod.sandboxes += 1
    ran_us = has_us + plan.container_us
    base = {"phase": "Running", "ips": list(addresses), "sandbox": pod.sandboxes}
    if pod.sandboxes == 1:
        told.append((pod.created_us + plan.start_us, {"phase": "Pending", "ips": [], "statuses": []}))
    told.append((has_us, base | {"statuses": told[-1][1]["statuses"]}))
    told.append((ran_us, base | {"statuses": [_running(ran_us)]}))
    if plan.resandbox_us is not None and pod.sandboxes == 1:
        lost_us = ran_us + plan.resandbox_us
        told.append((lost_us, {"phase": "Running", "ips": [], "statuses": [_ended(ran_us, lost_us)]}))
        return lost_us, True
    ends_us = ran_us + plan.life_us
    if plan.end == "stays":
        return NEVER_US, False
    if plan.end == "forced":
        pod.gone_us = ends_us
        return ends_us + plan.teardown_us, False
    if plan.end == "deleted":
        pod.requested_us = ends_us
        ends_us += plan.stop_us
    released_us = ends_us + plan.teardown_us
    pod.gone_us = (
        min(released_us + plan.collected_us, NEVER_US)
        if plan.end != "deleted"
        else released_us + min(plan.collected_us, 5 * SECOND_US)
    )
    if plan.end == "evicted":
        told.append((ends_us, base | {"phase": "Failed", "statuses": []}))
    elif plan.end == "completed" or plan.tells_end:
        told.append((ends_us, base | {"phase": "Succeeded", "statuses": [_ended(ran_us, ends_us)]}))
    return released_us, False


def _shown(pod: _Pod) -> list[Shown]:
    """Return what the API shows of a pod: its statuses late, requests and removal at once."""
    plan = pod.plan
    meta = {"creationTimestamp": second(pod.created_us)}
    changes: list[tuple[int, dict[str, Any], dict[str, Any]]] = [(pod.created_us, {}, meta)]
    at_us = 0
    for number, (happened_us, status) in enumerate(pod.statuses):
        at_us = max(at_us, happened_us + plan.delays_us[number % len(plan.delays_us)])
        more = {"startTime": second(pod.created_us + plan.start_us), "sandbox": status.get("sandbox")}
        changes.append((at_us, status | {"status": more}, {}))
    if pod.requested_us < NEVER_US:
        deletion = second(pod.requested_us + GRACE_SECONDS * SECOND_US)
        asked = {"deletionTimestamp": deletion, "deletionGracePeriodSeconds": GRACE_SECONDS}
        changes.append((pod.requested_us, {}, asked))
    changes.sort(key=lambda one: one[0])
    status = {"phase": "Pending", "ips": [], "statuses": [], "status": {"startTime": None}}
    meta, log = {}, []
    for number, (changed_us, new_status, new_meta) in enumerate(changes):
        if changed_us >= pod.gone_us:
            break
        status, meta = status | new_status, meta | new_meta
        spec = {"hostNetwork": plan.host_network}
        item = objects.pod(pod.name, uid=pod.uid, version=str(number), meta=meta, spec=spec, **status)
        log.append(Shown(changed_us, pod.uid, item))
    if pod.gone_us < NEVER_US:
        log.append(Shown(pod.gone_us, pod.uid, None))
    return log


def second(time_us: int) -> str:
    """Return a time as Kubernetes writes it, rounded down to a second."""
    return datetime.fromtimestamp(time_us // SECOND_US, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _running(since_us: int) -> dict[str, Any]:
    return objects.container(state={"running": {"startedAt": second(since_us)}})


def _ended(since_us: int, until_us: int) -> dict[str, Any]:
    times = {"startedAt": second(since_us), "finishedAt": second(until_us)}
    return objects.container(state={"terminated": times})
