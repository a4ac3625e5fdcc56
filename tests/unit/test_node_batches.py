"""Messages of the raw topic: which partition, which order, which number, how big."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from collector.node import batches as module
from collector.node.batches import Batcher, messages
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
@given(st.lists(st.lists(st.integers(64, 400), min_size=1, max_size=9), max_size=12), st.integers(4000, 9000))
def test_messages_are_gapless_bounded_and_greedy(sizes: list[list[int]], bytes_max: int) -> None:
    """Stretches keep their order, no message exceeds the bound, none could take the next stretch too."""
    stretches = [module._Stretch(np.array(some), memoryview(bytes(sum(some)))) for some in sizes]
    found = list(messages(stretches, bytes_max))
    assert [id(stretch) for message in found for stretch in message] == [id(stretch) for stretch in stretches]
    weights = [sum(stretch.bytes() for stretch in message) for message in found]
    assert all(weight <= bytes_max for weight in weights)
    for weight, following in zip(weights[:-1], found[1:], strict=True):
        assert weight + following[0].bytes() > bytes_max


def test_largest_stretch_fits_into_a_message() -> None:
    """Even events of the largest encoding, as many as are encoded together, fit below the limit."""
    huge = dict.fromkeys(("tgid", "uid", "netns_ino", "segments_sent", "retransmits", "rtt_us"), 2**32 - 1)
    made = events(
        module.ROWS_MAX, b"x" * 15, type=4, socket_cookie=2**63, bytes_sent=2**63, cgroup_id=2**63, **huge
    )
    (batch,) = Batcher(ORIGIN, 1, 1).batches(made, no_owners(len(made)), CLOCK)
    assert len(batch.value) < module.BATCH_BYTES_MAX
