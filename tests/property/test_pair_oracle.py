"""Pairing against a brute-force oracle, and across restarts at any message."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from enricher.pair import WARM_UP_WINDOWS, Pair, PairCounts, Pairing
from enricher.raw import ACCEPT, CLIENT, CLOSE, CONNECT, CONNECT_FAILED, SERVER, Half, Header

WINDOW_MS = 10
HEADER = Header("testing", "node-1", "boot", 1, 0, 0, 1, 0)
Event = tuple[int, int, int, int]
"""Key, type, role, socket."""
Message = tuple[int, list[Event]]
"""Append time in ms, events."""

EVENTS = st.tuples(
    st.integers(0, 5),
    st.sampled_from([(CONNECT, CLIENT), (ACCEPT, SERVER), (CLOSE, CLIENT), (CLOSE, SERVER)]),
    st.sampled_from([0, 0, 0, 0, 1]),
).map(lambda drawn: (drawn[0], *drawn[1], drawn[2]))
FAILURES = st.integers(0, 5).map(lambda key: (key, CONNECT_FAILED, CLIENT, 0))


@st.composite
def topics(draw: st.DrawFn, *, repeats: bool) -> list[Message]:
    """Draw a partition's content in append order; without `repeats` no half comes twice, and no keys collide."""
    now_ms, seen, out = 100, set(), []
    for _ in range(draw(st.integers(1, 25))):
        now_ms += draw(st.integers(0, WINDOW_MS + 2))
        events = draw(st.lists(EVENTS | FAILURES, max_size=4))
        if not repeats:
            events = [(*event[:3], 0) for event in events]
            events = [event for event in dict.fromkeys(events) if event not in seen]
            seen.update(events)
        out.append((now_ms, events))
    return out


def half(event: Event) -> Half:
    """Return a half that has only what pairing looks at."""
    key, type_, role, socket = event
    data = key.to_bytes(8, "little") + bytes((type_, role, socket))
    return Half(HEADER, 0, data, 0, 0, 0, 10, 11)


def told(pairs: list[Pair]) -> list[tuple[Event | None, Event | None]]:
    """Return pairs as events."""
    return [
        tuple((one.data[0], *one.data[8:11]) if one else None for one in pair)  # type: ignore[misc]
        for pair in pairs
    ]


def run(pairing: Pairing, messages: list[Message]) -> list[list[tuple[Event | None, Event | None]]]:
    """Return what each message lets out."""
    return [told(pairing.add(at, [half(event) for event in events])) for at, events in messages]


def oracle(messages: list[Message]) -> list[list[tuple[Event | None, Event | None]]]:
    """Return what each message should let out, found by looking at all halves so far every time."""
    kind = {CONNECT: 0, ACCEPT: 0, CLOSE: 1}
    waiting: list[tuple[int, Event]] = []
    over: list[
        tuple[int, tuple[int, int], set[tuple[int, int]]]
    ] = []  # when, key, (role, socket) of the pair
    out = []
    for now, events in messages:
        expired = [(at, event) for at, event in waiting if at < now - WINDOW_MS]
        waiting = [one for one in waiting if one not in expired]
        over = [one for one in over if one[0] >= now - WINDOW_MS]
        outputs = [side(event) for _, event in expired]
        for event in events:
            number, type_, role, socket = event
            if type_ == CONNECT_FAILED:
                outputs.append((event, None))
                continue
            key = (number, kind[type_])
            before = next((one for one in over if one[1] == key), None)
            others = [one for one in waiting if (one[1][0], kind[one[1][1]]) == key]
            if before is not None:
                outputs += [] if (role, socket) in before[2] else [side(event)]
            elif not others:
                waiting.append((now, event))
            elif (other := others[0][1])[2] != role:
                waiting.remove(others[0])
                over.append((now, key, {(role, socket), (other[2], other[3])}))
                outputs.append((event, other) if role == CLIENT else (other, event))
            elif other[3] != socket:
                waiting.remove(others[0])
                over.append((now, key, set()))
                outputs += [side(other), side(event)]
        out.append(outputs)
    return out


def side(event: Event) -> tuple[Event | None, Event | None]:
    """Return a half that goes out alone."""
    return (event, None) if event[2] == CLIENT else (None, event)


@settings(max_examples=150, deadline=None)
@given(topics(repeats=True))
def test_pairing_does_what_the_oracle_does(messages: list[Message]) -> None:
    """Every message lets out exactly what a look at everything says it must."""
    pairing = Pairing(WINDOW_MS, PairCounts())
    assert run(pairing, messages) == oracle(messages)
    counts = pairing.counts
    repeats = counts.repeats_waiting + counts.repeats_paired
    assert counts.halves == 2 * counts.paired + counts.one_sided + repeats + pairing.waiting


@settings(max_examples=150, deadline=None)
@given(topics(repeats=False), st.data())
def test_restart_at_any_message_changes_no_output(messages: list[Message], data: st.DataObject) -> None:
    """A worker that warms up from two windows back lets out what the old one would have."""
    cut = data.draw(st.integers(1, len(messages)))
    whole = run(Pairing(WINDOW_MS, PairCounts()), messages)[cut:]
    since_ms = messages[cut - 1][0] - WARM_UP_WINDOWS * WINDOW_MS
    restarted = Pairing(WINDOW_MS, PairCounts())
    run(restarted, [message for message in messages[:cut] if message[0] >= since_ms])
    assert run(restarted, messages[cut:]) == whole


@settings(max_examples=100, deadline=None)
@given(topics(repeats=False), st.data())
def test_idle_rounds_lose_and_invent_nothing(messages: list[Message], data: st.DataObject) -> None:
    """Whenever a quiet partition is told, with whatever clock, every half comes out, and pairs stay pairs."""
    pairing, plain = Pairing(WINDOW_MS, PairCounts()), Pairing(WINDOW_MS, PairCounts())
    with_idle, without = [], []
    for message in [*messages, (10**6, [])]:
        with_idle += run(pairing, [message])[0]
        without += run(plain, [message])[0]
        if data.draw(st.booleans()):
            with_idle += told(pairing.tell_idle(message[0] + data.draw(st.integers(0, 3 * WINDOW_MS))))
    pairs = [pair for pair in without if None not in pair]
    assert sorted(pair for pair in with_idle if None not in pair) == sorted(pairs)
    alone = [pair for pair in with_idle if None in pair]
    assert len(alone) == len(set(alone))
    assert {one for pair in with_idle for one in pair} == {one for pair in without for one in pair}
