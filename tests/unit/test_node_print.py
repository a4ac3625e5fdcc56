"""The text form of raw events: what `collector node --print` writes."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from collector.node.abi import EventType
from collector.node.clock import ClockOffset
from collector.node.columns import Owners, tcp_event_columns, tcp_keys
from collector.node.print import RECORDS_MAX, Printer, lines, origin_of, print_events
from collector.node.settings import parse_print
from schemas import codec
from tests.node_events import ORIGIN, events, no_owners
from tests.unit.test_node_columns import decoded

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

CLOCK = ClockOffset(1_790_000_000_000_000, 2)
V4 = np.frombuffer(bytes(10) + b"\xff\xff\x0a\x00\x00\x07", np.uint8)
V6 = np.frombuffer(bytes.fromhex("fd910001000000000000000000000002"), np.uint8)


def printed(made: np.ndarray, owners: Owners | None = None) -> list[dict[str, Any]]:
    """Return the events as a reader of stdout sees them."""
    columns = tcp_event_columns(made, tcp_keys(made, ORIGIN), owners or no_owners(len(made)), CLOCK)
    return [json.loads(line) for line in lines(columns, ["/some"] * len(made))]


def test_line_has_the_schemas_fields_in_their_order() -> None:
    """Named as in RawBatch.avsc, and the cgroup's path behind."""
    batch = {field["name"]: field for field in json.loads(codec.text("RawBatch"))["fields"]}
    names = [field["name"] for field in batch["events"]["type"]["items"]["fields"]]
    assert list(printed(events())[0]) == [*names, "cgroup_path"]


@pytest.mark.parametrize("kind", list(EventType), ids=lambda kind: kind.name)
def test_line_says_what_the_avro_event_says(kind: EventType) -> None:
    """Vocabularies, numbers and nulls are those that readers of Kafka get."""
    made = events(3, type=kind, role=[1, 2, 2], rtt_us=7, error=[0, 110, 104], owner=[1, 2, 3])
    avro, text = decoded(made), printed(made)
    for name in avro[0]:
        if not isinstance(avro[0][name], bytes):
            assert [event[name] for event in text] == [event[name] for event in avro], name


def test_bytes_become_text() -> None:
    """Addresses in their usual form, keys and ids in hex digits, the pod's UID as a UUID."""
    owners = Owners(
        np.arange(16, dtype=np.uint8)[None], np.arange(32, dtype=np.uint8)[None], np.zeros(1, np.bool_)
    )
    event = printed(events(local_address=V4, remote_address=V6), owners)[0]
    assert (event["local_address"], event["remote_address"]) == ("10.0.0.7", "fd91:1::2")
    assert event["pod_uid"] == "00010203-0405-0607-0809-0a0b0c0d0e0f"
    assert event["container_id"] == bytes(range(32)).hex()
    assert event["tcp_key"] == decoded(events())[0]["tcp_key"].hex()
    assert event["cgroup_path"] == "/some"


def test_no_pod_is_null_and_no_address_is_an_address() -> None:
    """Sixteen zero bytes mean no owner in one field and :: in the other."""
    event = printed(events())[0]
    assert (event["pod_uid"], event["container_id"], event["local_address"]) == (None, None, "::")


def test_any_process_name_is_one_line() -> None:
    """Bytes that are not UTF-8 are escaped, line ends too."""
    made = events(comm=b"\xff\n\xc3\xa9\"'")
    columns = tcp_event_columns(made, tcp_keys(made, ORIGIN), no_owners(1), CLOCK)
    (line,) = lines(columns, [None])
    assert "\n" not in line
    assert json.loads(line)["comm"] == "\\xff\né\"'"


class FakeProbes:
    """Probes whose ring holds some events at once, and one more that comes while they are detached."""

    def __init__(self, count: int) -> None:
        self.waiting, self.read_position, self.released = count, 0, 0
        self.events, self.cgroups = self, self

    def read(self, records_max: int) -> np.ndarray:
        """Return the next events."""
        taken = min(self.waiting, records_max)
        self.waiting -= taken
        self.read_position += taken
        return events(taken)

    def owners_of(self, made: np.ndarray) -> Owners:
        """Return none."""
        return no_owners(len(made))

    def tend(self, _: float) -> int:
        """Have nothing to tell."""
        return 0

    def path(self, cgroup: int) -> None:
        """Return none."""

    def release(self, position: int) -> None:
        """Note it."""
        self.released = position

    def detach(self) -> None:
        """Stop, one event later."""
        self.waiting += 1


def patience(waits: list[float]) -> Callable[[float], bool]:
    """Return an `ended` that notes its waits, and ends at the third."""

    def ended(within_s: float) -> bool:
        waits.append(within_s)
        return len(waits) == 3

    return ended


def test_end_prints_what_was_left() -> None:
    """More than one slice, and what came until the probes were off; a full slice makes the next one prompt."""
    probes, out, waits = FakeProbes(RECORDS_MAX + 5), io.StringIO(), []
    assert print_events(probes, Printer(ORIGIN, out), patience(waits), 0.1) == RECORDS_MAX + 6  # type: ignore[arg-type]
    assert len(out.getvalue().splitlines()) == RECORDS_MAX + 6 == probes.released
    assert waits == [0.0, 0.0, 0.1]


def test_random_key_is_used_without_a_key_file(tmp_path: Path) -> None:
    """Each run has its own; a file gives the cluster's."""
    first, second = origin_of(parse_print([])), origin_of(parse_print(["--key-file", ""]))
    assert first.secret != second.secret
    (tmp_path / "key").write_text(bytes(range(16)).hex())
    given = origin_of(parse_print(["--key-file", str(tmp_path / "key"), "--cluster", "test"]))
    assert replace(ORIGIN, secret=given.secret) == ORIGIN
