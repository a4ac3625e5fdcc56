"""Successive states of one object -> one record with validity and, for pods, address bands.

Pure: values in, values out; time is handed in. Called by `state` for each state seen and for each object gone.

A band says when an address was a pod's: possibly from `from_earliest_us` to `to_latest_us`, surely from
`from_latest_us` to `to_earliest_us` (which may be empty). Rules, since Kubernetes doesn't publish these moments:
* The first address can't be older than `status.startTime` (the kubelet sets it before it makes the sandbox) and
  is there when a container starts, at the latest when the API shows it.
* A later address came, and the earlier one went, between the time up to which the kind was known completely, less
  the lag of pod statuses, and the moment the API shows the change.
* A pod being deleted may have given its address up since the request; the end stays open until it's gone.
* A completed pod kept its addresses until its last container ended, and the lag of statuses later has none. Where
  no container tells its end (evicted, rejected), the end is between the two moments of a change, plus the lag.
* A pod that vanished had its addresses until the kind was last known completely, less the lag, and none when it
  was seen to be gone. (After a forced deletion its processes may live on unseen; the address isn't given to others
  before they end.)
Seconds are rounded down by Kubernetes, so a latest bound taken from them has one second added. When a state was read
is never taken for when it came about: a watch may deliver late, and the pages of a list show its first page's moment.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from collector.cluster.records import SECOND_US

if TYPE_CHECKING:
    from collector.cluster.records import Kind, PodTimes, Record, Seen

CONTAINERS_FORMER_MAX = 10
FORMER_MAX = 10
FORMER_US = 60 * SECOND_US
"""Flows show a change of labels this long after it was seen: by then all who make flows know of it, now and again."""
_FORMER = ("labels", "workload_kind", "workload")
_NOT_STATE = ("observed_unix_us", "resource_version")


@dataclass(frozen=True, slots=True)
class Moment:
    """When a state was seen.

    Attributes:
        observed_us: when this state was read, Unix time on the watcher's clock.
        known_until_us: up to when the kind's earlier states are known completely, on the same clock.
        status_lag_us: how far a pod's status may be behind its node.
        retention_us: how long ended bands are kept.
    """

    observed_us: int
    known_until_us: int
    status_lag_us: int
    retention_us: int

    @property
    def held_us(self) -> int:
        """Until when what a pod's earlier status said surely was so on its node."""
        return min(self.observed_us, self.known_until_us) - self.status_lag_us


def advance(previous: Record | None, seen: Seen, moment: Moment) -> Record:
    """Return the record for an object in its present state; `previous` is what was published last."""
    first_us = previous["valid_from_us"] if previous else moment.observed_us
    record = seen.record | {
        "valid_from_us": first_us if seen.created_us is None else seen.created_us,
        "valid_to_us": None,
        "observed_unix_us": moment.observed_us,
    }
    if seen.pod is not None:
        record["addresses"] = _bands(previous, seen.pod, record["valid_from_us"], moment)
        record["containers"] = _containers(previous, seen.record["containers"])
        record["former"] = _former(previous, record, moment)
        if seen.pod.terminal:
            record["valid_to_us"] = _completed_us(previous, seen.pod, record["valid_from_us"], moment)
    return record


def close(kind: Kind, previous: Record, moment: Moment) -> Record:
    """Return the record of an object that isn't there any more."""
    record = previous | {"observed_unix_us": moment.observed_us}
    if record["valid_to_us"] is None:
        record["valid_to_us"] = max(moment.observed_us, record["valid_from_us"])
    if kind == "pods":
        record["addresses"] = [
            band if _is_ended(band) else _end(band, _held(band, moment), moment.observed_us)
            for band in previous["addresses"]
        ]
    return record


def differs(previous: Record | None, record: Record) -> bool:
    """Return whether a record says something new; when it was observed and its version say nothing."""
    if previous is None:
        return True
    return any(previous[name] != value for name, value in record.items() if name not in _NOT_STATE)


def _or(value: int | None, otherwise: int) -> int:
    return otherwise if value is None else value


def _is_ended(band: Record) -> bool:
    return band["to_latest_us"] is not None


def _completed_us(previous: Record | None, pod: PodTimes, valid_from_us: int, moment: Moment) -> int:
    """Return when a completed pod ended: told by its containers, else kept, else when it was seen."""
    if pod.finished_us is not None:
        return max(pod.finished_us, valid_from_us)
    return _or(previous["valid_to_us"] if previous else None, max(moment.observed_us, valid_from_us))


def _bands(previous: Record | None, pod: PodTimes, valid_from_us: int, moment: Moment) -> list[Record]:
    """Return a pod's bands in the order of their beginning, at most one of them open per address."""
    before = previous["addresses"] if previous else []
    bands = [
        band
        if _is_ended(band) or (band["address"] in pod.addresses and not pod.terminal)
        else _gone(band, pod, _held(band, moment), moment)
        for band in before
    ]
    told = {band["address"] for band in before if not _is_ended(band)}
    if pod.terminal and previous and previous["valid_to_us"] is not None:
        told |= {band["address"] for band in before}
    for address in pod.addresses:
        if address in told:
            continue
        since_us = _or(pod.started_us, valid_from_us)
        if before:
            ends = [band["to_latest_us"] for band in before if band["address"] == address]
            since_us = max([since_us, moment.held_us, *ends])
        band = _begin(address, since_us, pod, moment, first=not before)
        bands.append(_gone(band, pod, band["from_earliest_us"], moment) if pod.terminal else band)
    kept_us = moment.observed_us - moment.retention_us
    return [
        band if _is_ended(band) else _terminating(band, pod)
        for band in bands
        if not _is_ended(band) or band["to_latest_us"] > kept_us
    ]


def _begin(address: str, earliest_us: int, pod: PodTimes, moment: Moment, *, first: bool) -> Record:
    """Return the open band of an address that the API shows for the first time, or again."""
    latest_us = moment.observed_us
    if first and pod.container_started_us is not None:
        latest_us = min(latest_us, pod.container_started_us + SECOND_US)
    return {
        "address": address,
        "from_earliest_us": earliest_us,
        "from_latest_us": max(earliest_us, latest_us),
        "to_earliest_us": None,
        "to_latest_us": None,
    }


def _terminating(band: Record, pod: PodTimes) -> Record:
    """Return an open band with the earliest end that a request for deletion sets, if there was one."""
    if pod.terminating_us is None:
        return band | {"to_earliest_us": None}
    return band | {"to_earliest_us": max(band["from_earliest_us"], pod.terminating_us)}


def _gone(band: Record, pod: PodTimes, held_us: int, moment: Moment) -> Record:
    """Return the ended band of an address that a pod no longer has, as it completed or changed its address."""
    if not pod.terminal:
        return _end(band, held_us, moment.observed_us)
    if pod.finished_us is None or band["address"] not in pod.addresses:
        return _end(band, held_us, moment.observed_us + moment.status_lag_us)
    return _end(band, pod.finished_us, pod.finished_us + SECOND_US + moment.status_lag_us)


def _held(band: Record, moment: Moment) -> int:
    """Return until when an open band's address surely was the pod's: until the request for its end, if earlier."""
    return min(moment.held_us, _or(band["to_earliest_us"], moment.held_us))


def _end(band: Record, earliest_us: int, latest_us: int) -> Record:
    """Return a band with both ends set, moved as far as its beginning demands."""
    earliest_us = max(earliest_us, band["from_earliest_us"])
    return band | {
        "to_earliest_us": earliest_us,
        "to_latest_us": max(latest_us, earliest_us, band["from_latest_us"]),
    }


def _containers(previous: Record | None, present: list[Record]) -> list[Record]:
    """Return the present containers, then former ones (restarts change the id) so that replays find them."""
    ids = {one["container_id"] for one in present}
    former = [one for one in previous["containers"] if one["container_id"] not in ids] if previous else []
    return present + [one for one in former if one["container_id"]][:CONTAINERS_FORMER_MAX]


def _former(previous: Record | None, record: Record, moment: Moment) -> list[Record]:
    """Return what labels and workload were before the present ones, oldest first."""
    if previous is None:
        return []
    former: list[Record] = previous["former"]
    before = {name: previous[name] for name in _FORMER}
    if any(record[name] != value for name, value in before.items()):
        former = [*former, before | {"until_us": moment.observed_us + FORMER_US}]
    kept_us = moment.observed_us - moment.retention_us
    return [one for one in former if one["until_us"] > kept_us][-FORMER_MAX:]
