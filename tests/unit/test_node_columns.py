"""What each field of TcpEvent says about a kernel event, and when it is null."""

from __future__ import annotations

import errno
import json
from typing import Any

import numpy as np
import pytest

from collector.node import abi, columns
from collector.node.batches import Batcher
from collector.node.clock import ClockOffset
from collector.node.columns import Owners, tcp_event_columns, tcp_keys
from collector.node.encode import encode_events, raw_batch
from schemas import codec
from tests.node_events import ORIGIN, events, no_owners

CLOCK = ClockOffset(1_790_000_000_000_000, 2)
HEAD_BYTES = 101
RESET_LOCAL, RESET_REMOTE, NEVER_ACCEPTED = 1, 2, 4


def decoded(made: np.ndarray, owners: Owners | None = None) -> list[dict[str, Any]]:
    """Return the events as a reader of Kafka sees them, by way of the one-partition batch."""
    batches = Batcher(ORIGIN, 1, 1).batches(made, owners or no_owners(len(made)), CLOCK)
    return [event for batch in batches for event in codec.decode("RawBatch", batch.value)["events"]]


def decoded_one(**fields: Any) -> dict[str, Any]:
    """Return one event with these kernel fields as a reader sees it."""
    return decoded(events(1, **fields))[0]


def test_connect_says_who_and_how_long() -> None:
    """A client's CONNECT carries process, handshake and times, and no counters."""
    event = decoded_one()
    assert event["type"] == "CONNECT"
    assert event["role"] == "CLIENT"
    assert event["outcome"] == "ESTABLISHED"
    assert event["closed_by"] == "NONE"
    assert event["owner_source"] == "PROCESS"
    assert event["comm"] == b"curl"
    assert (event["pid"], event["uid"], event["cgroup_id"], event["socket_cookie"]) == (1234, 1000, 42, 77)
    assert event["handshake_us"] == 250
    assert event["duration_us"] is None
    assert event["event_unix_us"] == CLOCK.offset_us + 5_000_000
    assert event["established_unix_us"] == CLOCK.offset_us + 4_000_250
    assert (event["port"], event["remote_port"], event["netns_ino"]) == (40000, 443, 4026531840)
    for name in (
        "bytes_sent",
        "bytes_received",
        "segments_sent",
        "segments_received",
        "retransmits",
        "rtt_us",
    ):
        assert event[name] is None


def test_accept_has_no_handshake_time() -> None:
    """A server can't time the handshake from the first SYN."""
    event = decoded_one(type=3, role=2, start_ns=0)
    assert (event["type"], event["role"]) == ("ACCEPT", "SERVER")
    assert event["handshake_us"] is None


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (errno.ECONNREFUSED, "REFUSED"),
        (errno.ETIMEDOUT, "TIMEOUT"),
        (errno.ENETUNREACH, "UNREACHABLE"),
        (errno.EHOSTUNREACH, "UNREACHABLE"),
        (0, "ABORTED"),
        (errno.EACCES, "OTHER"),
        (512, "OTHER"),
    ],
)
def test_connect_failed_names_its_cause(error: int, outcome: str) -> None:
    """The errno of a failed attempt decides its outcome; its duration runs from the first SYN."""
    event = decoded_one(type=2, error=error, established_ns=0)
    assert (event["outcome"], event["errno"]) == (outcome, error)
    assert event["duration_us"] == 1_000_000
    assert event["handshake_us"] is None
    assert event["established_unix_us"] is None


@pytest.mark.parametrize(
    ("error", "flags", "closed_by", "outcome", "ended_by"),
    [
        (0, 0, 2, "CLOSED", "LOCAL"),
        (0, 0, 4, "CLOSED", "BOTH"),
        (errno.ECONNRESET, RESET_REMOTE, 3, "RESET", "REMOTE"),
        (errno.EPIPE, 0, 2, "RESET", "LOCAL"),
        (0, RESET_LOCAL, 2, "RESET", "LOCAL"),
        (errno.ETIMEDOUT, 0, 5, "TIMEOUT", "TIMER"),
        (errno.EHOSTUNREACH, 0, 5, "TIMEOUT", "TIMER"),
        (0, NEVER_ACCEPTED, 2, "ABORTED", "LOCAL"),
        (0, NEVER_ACCEPTED | RESET_REMOTE, 3, "RESET", "REMOTE"),
        (errno.ECONNABORTED, 0, 2, "ABORTED", "LOCAL"),
        (errno.EBADF, 0, 99, "OTHER", "UNKNOWN"),
    ],
)
def test_close_says_how_it_ended(error: int, flags: int, closed_by: int, outcome: str, ended_by: str) -> None:
    """Error, flags and the first closer decide how a close is called."""
    event = decoded_one(type=4, error=error, flags=flags, closed_by=closed_by)
    assert (event["outcome"], event["closed_by"]) == (outcome, ended_by)
    assert event["duration_us"] == 999_750


def test_close_carries_counters_and_measured_round_trips() -> None:
    """Counters are there at CLOSE, zero included; round-trip times only when they were measured."""
    made = events(2, type=4, bytes_sent=0, bytes_received=2**40, retransmits=3)
    made["rtt_us"], made["rtt_min_us"] = [150, 0], [90, 0xFFFFFFFF]
    measured, never = decoded(made)
    assert (measured["bytes_sent"], measured["bytes_received"], measured["retransmits"]) == (0, 2**40, 3)
    assert (measured["rtt_us"], measured["rtt_min_us"]) == (150, 90)
    assert (never["rtt_us"], never["rtt_min_us"]) == (None, None)


@pytest.mark.parametrize(("kind", "name"), [(5, "EXISTING"), (6, "PROGRESS")])
def test_open_connection_carries_counters_so_far(kind: int, name: str) -> None:
    """EXISTING and PROGRESS have bytes and round trips; only PROGRESS has a number; neither has an end."""
    event = decoded_one(type=kind, bytes_sent=7, rtt_us=80, progress_seq=3, established_ns=0, flags=8)
    assert (event["type"], event["outcome"], event["closed_by"]) == (name, "ESTABLISHED", "NONE")
    assert (event["bytes_sent"], event["rtt_us"]) == (7, 80)
    assert event["progress_seq"] == (3 if name == "PROGRESS" else 0)
    assert (event["established_unix_us"], event["handshake_us"], event["duration_us"]) == (None, None, None)


def test_owner_without_process_has_no_process_fields() -> None:
    """What was not seen in process context is null, even where the kernel left bytes behind."""
    event = decoded_one(owner=3)
    assert event["owner_source"] == "CGROUP"
    assert (event["pid"], event["uid"], event["comm"], event["cgroup_id"]) == (None, None, b"", 42)
    nobody = decoded_one(owner=1, cgroup_id=0)
    assert (nobody["owner_source"], nobody["cgroup_id"]) == ("NONE", None)


def test_owner_by_namespace_is_named_so() -> None:
    """A pod known by its network namespace alone is marked, a process's own pod is not."""
    uid = np.full((2, 16), 7, np.uint8)
    owners = Owners(uid, np.zeros((2, 32), np.uint8), np.array([True, False]))
    made = events(2)
    made["owner"] = [1, 2]
    by_namespace, by_process = decoded(made, owners)
    assert by_namespace["owner_source"] == "NAMESPACE"
    assert by_process["owner_source"] == "PROCESS"
    assert by_namespace["pod_uid"] == bytes([7]) * 16


@pytest.mark.parametrize("comm", [b"", b"a", b"\xff\xfe\x80", b"fifteen--bytes!", b"x\0leftover"], ids=repr)
def test_comm_ends_at_the_first_nul(comm: bytes) -> None:
    """Process names are bytes up to the first NUL, whatever they are."""
    assert decoded(events(1, comm=comm))[0]["comm"] == comm.partition(b"\0")[0]


def test_head_has_its_fixed_width_even_with_a_clock_in_1970() -> None:
    """The fields up to remote_address take 101 bytes in every event, so that the key can be cut out."""
    made = events(3, remote_address=np.arange(16), comm=b"zz")
    for offset in (0, CLOCK.offset_us, 2**60):
        keys = tcp_keys(made, ORIGIN)
        found = tcp_event_columns(made, keys, no_owners(3), ClockOffset(offset, 1))
        bodies, sizes = encode_events(found, np.arange(3))
        for start in np.cumsum(sizes) - sizes:
            head = bodies[start : start + HEAD_BYTES]
            assert head[-16:] == bytes(range(16))
            assert bodies[start + HEAD_BYTES : start + HEAD_BYTES + 3] == b"\x04zz"
    assert codec.decode("RawBatch", raw_batch(1, _header(), sizes, [bodies]))["events"]


def _header() -> Any:
    return Batcher(ORIGIN, 1, 1)._header(0, CLOCK)


def test_failed_attempts_get_keys_of_their_own() -> None:
    """Attempts without sequence numbers differ by cookie and start; connections by their pair alone."""
    made = events(3, type=2, client_isn=0, server_isn=0)
    made["socket_cookie"] = [1, 2, 2]
    made["start_ns"] = [1, 1, 2]
    assert len(set(tcp_keys(made, ORIGIN).tolist())) == 3
    both = events(2, client_isn=5, server_isn=6)
    both["socket_cookie"] = [1, 2]
    assert len(set(tcp_keys(both, ORIGIN).tolist())) == 1


def test_constants_are_the_schemas_and_the_kernels() -> None:
    """The numbers used for symbols are their indexes in the `.avsc` and the values of the kernel ABI."""
    fields = {
        field["name"]: field
        for field in json.loads(codec.text("RawBatch"))["fields"][-2]["type"]["items"]["fields"]
    }
    symbols = {
        name: field["type"].get("symbols")
        for name, field in fields.items()
        if isinstance(field["type"], dict)
    }
    names = {"type": abi.EventType, "role": abi.Role, "closed_by": abi.ClosedBy, "owner_source": abi.Owner}
    for field, enum in names.items():
        assert all(symbols[field][member.value] == member.name for member in enum)
    for name in ("ESTABLISHED", "REFUSED", "TIMEOUT", "UNREACHABLE", "ABORTED", "CLOSED", "RESET", "OTHER"):
        assert symbols["outcome"][getattr(columns, name)] == name
    assert symbols["owner_source"][columns.OWNER_NAMESPACE] == "NAMESPACE"
    assert abi.EVENT.itemsize == 168
