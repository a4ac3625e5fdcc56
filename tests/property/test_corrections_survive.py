"""Whatever the order of metadata, deliveries and kills: the highest revision says what full metadata says."""

from __future__ import annotations

from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from enricher import corrections
from schemas import catalog
from tests import halves
from tests.lives import CORRECTION_MS, Life, Log, counting, node, pod, watermark

ADDRESSES = {1: "10.0.0.1", 2: "10.0.0.2", 3: "10.0.0.3"}
METADATA = [*(pod(number, address) for number, address in ADDRESSES.items()), watermark()]
NOT_COMPARED = ("emitted_at", "metadata_age_ms", "revision")
STEPS_MAX = 60
STEP_MS_MAX = 900
UNRESOLVED = [("take", 0), ("later", 900), ("later", 900), ("deliver_entry", 1)]
assert STEPS_MAX * STEP_MS_MAX < CORRECTION_MS

STEP = st.one_of(
    st.tuples(st.just("take"), st.just(0)),
    st.tuples(st.sampled_from(["deliver_flow", "deliver_entry"]), st.integers(1, 4)),
    st.tuples(st.just("later"), st.integers(0, STEP_MS_MAX)),
    st.tuples(st.just("publish"), st.integers(0, len(METADATA) - 1)),
    st.tuples(st.just("kill"), st.integers(0, 6)),
)


def inputs() -> list[bytes]:
    """Return raw messages: pairs, halves apart, an address alone, one-sided PROGRESS."""
    one, two, three, four = (halves.key(number) for number in range(1, 5))
    client, server = halves.opened(two)
    messages = [
        halves.opened(one),
        [client, halves.failed(three, remote_address=halves.ip(ADDRESSES[3]))],
        [server, halves.event("PROGRESS", "SERVER", four, progress_seq=2)],
        [halves.event("CLOSE", "CLIENT", one), halves.event("CLOSE", "SERVER", one)],
    ]
    return [halves.batch(events, sequence=number) for number, events in enumerate(messages)]


def beginning() -> Log:
    """Return the input, with the node and its range of pod addresses known: what is in it is not taken for outside."""
    return Log(inputs(), metadata=[node()])


def expected() -> dict[tuple[Any, ...], dict[str, Any]]:
    """Return what one undisturbed worker says that had all metadata from the beginning."""
    log = beginning()
    log.metadata += METADATA
    life = Life(log)
    while life.take_next():
        life.settle()
    assert life.engine.corrections.pending == 0
    return by_identity(life.log)


def by_identity(log: Log) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Return what a reader counts, by record, without what may differ."""
    return {
        (flow["flow_id"], flow["record_type"], flow["observed_by"], flow["progress_seq"]): {
            name: value for name, value in flow.items() if name not in NOT_COMPARED
        }
        for flow in counting(log.flows())
    }


EXPECTED = expected()


def end(life: Life) -> None:
    """Bring everything to its end: all metadata, all input, all deliveries, within the time."""
    life.publish(*METADATA)
    while life.take_next():
        pass
    for _ in range(3):
        life.settle()
        life.later(CORRECTION_MS // corrections.PATIENCE)
    life.settle()


@settings(max_examples=300, deadline=None)
@given(st.lists(STEP, max_size=STEPS_MAX))
@example([*UNRESOLVED, ("kill", 0)])
@example([*UNRESOLVED, ("later", 0), ("deliver_flow", 1), ("publish", 0), ("publish", 1), ("kill", 0)])
def test_highest_revision_is_what_full_metadata_says(steps: list[tuple[str, int]]) -> None:
    """At any kill the flows that a reader may have seen unresolved are corrected by whoever comes after."""
    log = beginning()
    life = Life(log)
    for what, number in steps:
        if what == "take":
            life.take_next()
        elif what == "later":
            life.later(number)
        elif what == "publish":
            life.publish(METADATA[number])
        elif what == "kill":
            for _ in range(number):  # a dead worker's messages may still arrive, each partition's in order
                life.deliver(catalog.FLOWS if number % 2 else catalog.CORRECTIONS)
            life = Life(log, life.now_ms)
        else:
            for _ in range(number):
                life.deliver(catalog.FLOWS if what == "deliver_flow" else catalog.CORRECTIONS)
    end(life)
    assert by_identity(log) == EXPECTED
    assert log.live() == {}
    assert log.committed == len(log.inputs)
    assert all(flow["revision"] <= 1 for flow in log.flows())
