"""Maps kernel events to the columns of TcpEvent: which value, when null, in which vocabulary.

Pure. Owns the meaning of every field of `schemas/RawBatch.avsc` in terms of `bpf/event.h`. Never encodes. Called by
`node.batches`.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from collector.node import keys
from collector.node.abi import ClosedBy, EventType, Flag, Owner, Role
from collector.node.encode import Nullable, Text

if TYPE_CHECKING:
    from collector.node.clock import ClockOffset
    from collector.node.encode import Column

Events = npt.NDArray[np.void]
Integers = npt.NDArray[np.int64]

# Indexes of symbols in schemas/RawBatch.avsc that the kernel ABI does not have; a test compares.
ESTABLISHED, REFUSED, TIMEOUT, UNREACHABLE, ABORTED, CLOSED, RESET, OTHER = range(1, 9)
OWNER_NAMESPACE = 4
RESET_FLAGS = Flag.RESET_LOCAL | Flag.RESET_REMOTE

RTT_NEVER_MEASURED = 0xFFFFFFFF
PROGRESS_SEQ_MAX = 0x7FFFFFFF  # an Avro int
EVENT_UNIX_US_MIN, EVENT_UNIX_US_MAX = (
    1 << 48,
    (1 << 55) - 1,
)  # 8 bytes in Avro, so that the head has a fixed width

_FAILED_ERRORS = {
    0: ABORTED,
    errno.ECONNABORTED: ABORTED,
    errno.ECONNREFUSED: REFUSED,
    errno.ETIMEDOUT: TIMEOUT,
    errno.ENETUNREACH: UNREACHABLE,
    errno.EHOSTUNREACH: UNREACHABLE,
    errno.ENETDOWN: UNREACHABLE,
    errno.EHOSTDOWN: UNREACHABLE,
    errno.ENONET: UNREACHABLE,
}
_CLOSED_ERRORS = {
    0: CLOSED,
    errno.ECONNABORTED: ABORTED,
    errno.ECONNRESET: RESET,
    errno.EPIPE: RESET,  # our FIN was answered by a RST (facts: state table)
    errno.ETIMEDOUT: TIMEOUT,
}


def _table(outcomes: dict[int, int]) -> npt.NDArray[np.uint8]:
    table = np.full(256, OTHER, np.uint8)
    table[list(outcomes)] = list(outcomes.values())
    return table


_FAILED_OUTCOME, _CLOSED_OUTCOME = _table(_FAILED_ERRORS), _table(_CLOSED_ERRORS)


class Owners(NamedTuple):
    """Who the cgroups of some events belong to; zero bytes where that is no pod or not known.

    Attributes:
        pod_uids: (events, 16) bytes.
        container_ids: (events, 32) bytes.
        from_namespace: (events,) True where pod_uid is that of the network namespace's one pod.
    """

    pod_uids: npt.NDArray[np.uint8]
    container_ids: npt.NDArray[np.uint8]
    from_namespace: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Origin:
    """What all events of this process share.

    Attributes:
        cluster: name of the cluster.
        node: name of the node.
        boot_id: the kernel's boot id.
        producer_epoch: Unix time in us at which this process started.
        secret: the cluster's secret.
        key_id: number of that secret.
    """

    cluster: str
    node: str
    boot_id: str
    producer_epoch: int
    secret: keys.Secret
    key_id: int


def tcp_keys(events: Events, origin: Origin) -> npt.NDArray[np.uint64]:
    """Return tcp_key of each event; attempts that failed have no pair of sequence numbers and get one of their own."""
    found = keys.connection_keys(origin.secret, events["client_isn"], events["server_isn"])
    failed = np.flatnonzero(events["type"] == EventType.CONNECT_FAILED)
    if len(failed):
        node = keys.node_word(origin.cluster, origin.node, origin.boot_id)
        cookies, starts = events["socket_cookie"][failed], events["start_ns"][failed]
        found[failed] = keys.attempt_keys(origin.secret, node, cookies, starts)
    return found


def outcomes(events: Events) -> npt.NDArray[np.uint8]:
    """Return the index of TcpOutcome of each event.

    A close is TIMEOUT before RESET before what the error says: a kernel that gave up may also have sent a RST. A
    connection that no process accepted, closed without error or RST, counts as ABORTED.
    """
    kind, flags = events["type"], events["flags"]
    error = np.minimum(events["error"], 255).astype(np.uint8)
    found = np.full(len(events), ESTABLISHED, np.uint8)
    np.copyto(found, _FAILED_OUTCOME[error], where=kind == EventType.CONNECT_FAILED)
    closed = _CLOSED_OUTCOME[error]
    closed[(closed == CLOSED) & (flags & Flag.NEVER_ACCEPTED != 0)] = ABORTED
    closed[flags & RESET_FLAGS != 0] = RESET
    closed[(events["closed_by"] == ClosedBy.TIMER) | (error == errno.ETIMEDOUT)] = TIMEOUT
    np.copyto(found, closed, where=kind == EventType.CLOSE)
    return found


def _between_us(from_ns: npt.NDArray[Any], to_ns: npt.NDArray[Any]) -> Integers:
    return (to_ns.astype(np.int64) - from_ns.astype(np.int64)) // 1000


def _owner(events: Events, owners: Owners) -> dict[str, Column]:
    by_process = events["owner"] == Owner.PROCESS
    source = np.where(events["owner"] <= Owner.CGROUP, events["owner"], 0)
    source = np.where(owners.from_namespace & ~by_process, OWNER_NAMESPACE, source)
    comm = events["comm"]
    lengths = np.argmin(np.append(comm, np.zeros((len(events), 1), np.uint8), axis=1) != 0, axis=1)
    cgroups = (
        events["cgroup_id"].view(np.int64) if events["cgroup_id"].flags.contiguous else events["cgroup_id"]
    )
    return {
        "owner_source": source,
        "pod_uid": owners.pod_uids,
        "container_id": owners.container_ids,
        "comm": Text(comm[:, :15], np.where(by_process, np.minimum(lengths, 15), 0)),
        "pid": Nullable(events["tgid"].astype(np.int64), by_process),
        "uid": Nullable(events["uid"].astype(np.int64), by_process),
        "cgroup_id": Nullable(cgroups.astype(np.int64), events["cgroup_id"] != 0),
    }


def _times(events: Events, clock: ClockOffset) -> dict[str, Column]:
    kind, time_ns = events["type"], events["time_ns"]
    start_ns, established_ns = events["start_ns"], events["established_ns"]
    established, started = established_ns != 0, start_ns != 0
    failed = kind == EventType.CONNECT_FAILED
    event_us = time_ns.astype(np.int64) // 1000 + clock.offset_us
    since = np.where(failed, start_ns, established_ns)
    return {
        "event_unix_us": np.minimum(np.maximum(event_us, EVENT_UNIX_US_MIN), EVENT_UNIX_US_MAX),
        "handshake_us": Nullable(
            _between_us(start_ns, established_ns), (events["role"] == Role.CLIENT) & started & established
        ),
        "duration_us": Nullable(
            _between_us(since, time_ns), (failed & started) | ((kind == EventType.CLOSE) & established)
        ),
        "established_unix_us": Nullable(
            established_ns.astype(np.int64) // 1000 + clock.offset_us, established
        ),
    }


def _counters(events: Events) -> dict[str, Column]:
    counted = np.isin(events["type"], (EventType.CLOSE, EventType.EXISTING, EventType.PROGRESS))
    names = ("bytes_sent", "bytes_received", "segments_sent", "segments_received", "retransmits")
    found: dict[str, Column] = {name: Nullable(events[name].astype(np.int64), counted) for name in names}
    for name in ("rtt_us", "rtt_min_us"):
        rtt = events[name].astype(np.int64)
        found[name] = Nullable(rtt, counted & (rtt != 0) & (rtt != RTT_NEVER_MEASURED))
    return found


def tcp_event_columns(
    events: Events, tcp_key: npt.NDArray[np.uint64], owners: Owners, clock: ClockOffset
) -> dict[str, Column]:
    """Return the columns of TcpEvent, by field name, for `encode.encode_events`."""
    everywhere = np.ones(len(events), np.bool_)
    closed_by = np.where(events["closed_by"] <= ClosedBy.TIMER, events["closed_by"], ClosedBy.UNKNOWN)
    return {
        "tcp_key": tcp_key.astype("<u8").view(np.uint8).reshape(-1, 8),
        "type": np.where(events["type"] <= EventType.PROGRESS, events["type"], 0),
        "role": np.where(events["role"] <= Role.SERVER, events["role"], 0),
        "outcome": outcomes(events),
        "closed_by": np.where(events["type"] == EventType.CLOSE, closed_by, ClosedBy.NONE),
        "local_address": events["local_address"],
        "remote_address": events["remote_address"],
        "progress_seq": np.where(
            events["type"] == EventType.PROGRESS, events["progress_seq"] & PROGRESS_SEQ_MAX, 0
        ).astype(np.int64),
        "remote_port": events["remote_port"].astype(np.int64),
        "errno": events["error"].astype(np.int64),
        "port": Nullable(events["local_port"].astype(np.int64), events["local_port"] != 0),
        "netns_ino": Nullable(events["netns_ino"].astype(np.int64), everywhere),
        "socket_cookie": Nullable(events["socket_cookie"].astype(np.int64), everywhere),
        **_owner(events, owners),
        **_times(events, clock),
        **_counters(events),
    }
