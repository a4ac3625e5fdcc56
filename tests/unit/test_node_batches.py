"""Messages of the raw topic: which partition, which order, which number, how big."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from collector.node import batches as module
from collector.node.batches import Batcher, cuts
from collector.node.clock import ClockOffset
from collector.node.columns import tcp_keys
from schemas import codec
from tests.node_events import ORIGIN, events, no_owners

CLOCK = ClockOffset(1_790_000_000_000_000, 7)


def test_batches_hold_each_event_once_in_the_partition_of_its_key() -> None:
    """Every event lands in partition tcp_key modulo count, in kernel order, sizes alongside."""
    made = events(500, socket_cookie=np.arange(500))
    cookies = set()
    for batch in Batcher(ORIGIN, 4, 9).batches(made, no_owners(500), CLOCK):
        message = codec.decode("RawBatch", batch.value)
        assert codec.split(batch.value)[0] == 9
        assert (message["partition"], len(message["events"])) == (batch.partition, batch.events)
        keys = [int.from_bytes(event["tcp_key"], "little") for event in message["events"]]
        assert {key % 4 for key in keys} == {batch.partition}
        in_batch = [event["socket_cookie"] for event in message["events"]]
        assert in_batch == sorted(in_batch)
        assert keys == tcp_keys(made[in_batch], ORIGIN).tolist()
        cookies |= set(in_batch)
    assert cookies == set(range(500))


def test_header_tells_origin_and_clock() -> None:
    """Whoever reads a batch knows node, boot, process, secret and clock."""
    batch = Batcher(ORIGIN, 1, 1).batches(events(), no_owners(1), CLOCK)[0]
    message = codec.decode("RawBatch", batch.value)
    assert (message["cluster"], message["node"], message["boot_id"]) == ("test", "node-1", "b0071d")
    assert (message["producer_epoch"], message["key_id"]) == (ORIGIN.producer_epoch, 1)
    assert (message["clock_offset_us"], message["clock_error_us"]) == CLOCK


def test_sequence_numbers_have_no_holes() -> None:
    """Each partition counts its own batches from 0, whatever the others do."""
    batcher = Batcher(ORIGIN, 3, 1)
    seen: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for first in range(30):
        made = events(2, client_isn=np.array([first, first * 7]), server_isn=1)
        for batch in batcher.batches(made, no_owners(2), CLOCK):
            seen[batch.partition].append(codec.decode("RawBatch", batch.value)["sequence"])
    assert all(numbers == list(range(len(numbers))) for numbers in seen.values())
    assert all(seen.values())


def test_big_flush_is_cut_below_the_message_limit() -> None:
    """What would exceed Kafka's message size goes out as several batches."""
    made = events(12_000)
    batches = Batcher(ORIGIN, 1, 1).batches(made, no_owners(12_000), CLOCK)
    assert len(batches) > 1
    assert sum(batch.events for batch in batches) == 12_000
    assert all(len(batch.value) < 1_000_000 for batch in batches)


@settings(deadline=None)
@given(st.lists(st.integers(64, 400), max_size=60), st.integers(1, 3000))
def test_cuts_are_gapless_bounded_and_greedy(sizes: list[int], bytes_max: int) -> None:
    """Stretches follow each other, none exceeds the bound unless it is one event, none could take one more."""
    array = np.array(sizes, np.int64)
    found = list(cuts(array, bytes_max))
    assert [start for start, _ in found] == [0, *(stop for _, stop in found[:-1])][: len(found)]
    assert (found[-1][1] if found else 0) == len(sizes)
    for start, stop in found:
        weight = sum(sizes[start:stop]) + module.SIZE_ENTRY_BYTES * (stop - start)
        assert weight <= bytes_max or stop == start + 1
        assert stop == len(sizes) or weight + sizes[stop] + module.SIZE_ENTRY_BYTES > bytes_max
