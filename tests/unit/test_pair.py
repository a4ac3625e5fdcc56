"""Pairing in a window of log-append time."""

from __future__ import annotations

import pytest

from enricher import raw
from enricher.pair import PairCounts, Pairing
from schemas import catalog
from schemas.registry import CatalogIds
from tests import halves

WINDOW_MS = 5000


def cut(*events: dict[str, object]) -> list[raw.Half]:
    """Return the halves of one batch of these events."""
    found = raw.cut(halves.batch(list(events)), 0, CatalogIds(), catalog.RAW.schema_id)
    assert isinstance(found, list)
    return found


def pairing() -> Pairing:
    """Return an empty pairing with a window of 5 s."""
    return Pairing(WINDOW_MS, PairCounts())


@pytest.mark.parametrize(
    ("client_type", "server_type"),
    [("CONNECT", "ACCEPT"), ("CLOSE", "CLOSE"), ("EXISTING", "EXISTING")],
    ids=["open", "close", "existing"],
)
@pytest.mark.parametrize("client_first", [True, False], ids=["client_first", "server_first"])
def test_halves_of_one_key_come_out_as_a_pair(client_type: str, server_type: str, client_first: bool) -> None:
    """Whichever half comes first, the pair has each half on its own side."""
    client = halves.event(client_type, "CLIENT", halves.key(1))
    server = halves.event(server_type, "SERVER", halves.key(1))
    under_test = pairing()
    first, second = (client, server) if client_first else (server, client)
    assert under_test.add(1000, cut(first)) == []
    (pair,) = under_test.add(1000 + WINDOW_MS, cut(second))
    assert pair.client is not None
    assert pair.server is not None
    assert pair.client.data == halves.encoded(client)
    assert pair.server.data == halves.encoded(server)
    assert under_test.counts.paired == 1


def test_open_and_close_of_one_connection_do_not_pair() -> None:
    """A CONNECT waits for an ACCEPT, never for a CLOSE."""
    under_test = pairing()
    events = [
        halves.event("CONNECT", "CLIENT", halves.key(1)),
        halves.event("CLOSE", "SERVER", halves.key(1)),
    ]
    assert under_test.add(1000, cut(*events)) == []
    assert under_test.waiting == 2


def test_failed_connect_never_waits() -> None:
    """A FAILED has no other half and comes out at once."""
    (pair,) = pairing().add(1000, cut(halves.failed(halves.key(1))))
    assert pair.client is not None
    assert pair.server is None


def test_half_comes_out_alone_when_a_later_message_closes_its_window() -> None:
    """One ms within the window keeps a half waiting, one beyond lets it go, before the message's own pairs."""
    under_test = pairing()
    under_test.add(1000, cut(halves.event("CONNECT", "CLIENT", halves.key(1))))
    assert under_test.add(1000 + WINDOW_MS, []) == []
    outputs = under_test.add(1001 + WINDOW_MS, cut(halves.event("ACCEPT", "SERVER", halves.key(1))))
    assert [(pair.client is None, pair.server is None) for pair in outputs] == [(False, True)]
    assert under_test.waiting == 1


def test_repeat_of_a_waiting_half_is_dropped() -> None:
    """The same side again within the window is a repeat, counted and not paired with itself."""
    under_test = pairing()
    client = halves.event("CONNECT", "CLIENT", halves.key(1))
    under_test.add(1000, cut(client))
    assert under_test.add(1001, cut(client)) == []
    assert under_test.counts.repeats_waiting == 1
    assert len(under_test.add(1002, cut(halves.event("ACCEPT", "SERVER", halves.key(1))))) == 1


def test_repeat_of_a_pair_is_dropped_for_one_window() -> None:
    """Both halves sent again after their pair make no second record while the key is remembered."""
    under_test = pairing()
    both = halves.opened(halves.key(1))
    assert len(under_test.add(1000, cut(*both))) == 1
    assert under_test.add(1000 + WINDOW_MS, cut(*both)) == []
    assert under_test.counts.repeats_paired == 2
    assert len(under_test.add(1001 + WINDOW_MS, cut(*both))) == 1


def test_idle_half_is_told_once_and_still_pairs_within_the_window() -> None:
    """A reader's fast clock makes a half one-sided early; its pair is not lost by that."""
    under_test = pairing()
    under_test.add(1000, cut(halves.event("CONNECT", "CLIENT", halves.key(1))))
    assert len(under_test.tell_idle(1001 + WINDOW_MS)) == 1
    assert under_test.tell_idle(1001 + WINDOW_MS) == []
    assert under_test.waiting == 0
    (pair,) = under_test.add(2000, cut(halves.event("ACCEPT", "SERVER", halves.key(1))))
    assert pair.client is not None
    assert pair.server is not None
    assert under_test.counts.told_then_paired == 1


def test_idle_half_that_was_told_is_not_told_again_by_a_message() -> None:
    """The message that closes the window of a half told earlier has nothing to add."""
    under_test = pairing()
    under_test.add(1000, cut(halves.event("CONNECT", "CLIENT", halves.key(1))))
    assert under_test.tell_idle(1000 + WINDOW_MS) == []
    under_test.tell_idle(1001 + WINDOW_MS)
    assert under_test.add(9000, []) == []
    assert under_test.counts.one_sided == 1


def test_append_time_that_runs_backwards_counts_as_the_latest() -> None:
    """A broker clock set back neither reopens nor closes windows."""
    under_test = pairing()
    under_test.add(9000, cut(halves.event("CONNECT", "CLIENT", halves.key(1))))
    under_test.add(3000, cut(halves.event("CONNECT", "CLIENT", halves.key(2))))
    assert under_test.add(9000 + WINDOW_MS, []) == []
    assert len(under_test.add(9001 + WINDOW_MS, [])) == 2


def test_halves_of_two_connections_with_one_key_go_out_alone() -> None:
    """Two clients whose keys collide: neither is a repeat, and which server is whose nobody can tell."""
    under_test = pairing()
    first = halves.event("CONNECT", "CLIENT", halves.key(1))
    second = halves.event("CONNECT", "CLIENT", halves.key(1), socket_cookie=77)
    under_test.add(1000, cut(first))
    out = under_test.add(1001, cut(second))
    assert [pair.client and pair.client.data for pair in out] == [
        halves.encoded(first),
        halves.encoded(second),
    ]
    servers = [halves.event("ACCEPT", "SERVER", halves.key(1), socket_cookie=cookie) for cookie in (7, 8)]
    out += under_test.add(1002, cut(*servers))
    assert [pair.server and pair.server.data for pair in out[2:]] == [halves.encoded(one) for one in servers]
    assert [None in pair for pair in out] == [True] * 4
    counts = under_test.counts
    assert (counts.collisions, counts.one_sided, counts.paired, under_test.waiting) == (4, 4, 0, 0)
    assert under_test.add(1003 + 2 * WINDOW_MS, cut(*halves.opened(halves.key(1)))) != []
    assert counts.paired == 1


def test_collision_tells_a_half_once_that_a_quiet_partition_told() -> None:
    """The first half went out alone already; the collision brings the second only."""
    under_test = pairing()
    under_test.add(1000, cut(halves.event("CONNECT", "CLIENT", halves.key(1))))
    assert len(under_test.tell_idle(1001 + WINDOW_MS)) == 1
    second = halves.event("CONNECT", "CLIENT", halves.key(1), socket_cookie=77)
    (pair,) = under_test.add(1000 + WINDOW_MS, cut(second))
    assert pair.client is not None
    assert pair.client.data == halves.encoded(second)
    assert (under_test.counts.one_sided, under_test.waiting) == (2, 0)


@pytest.mark.parametrize("role", ["CLIENT", "SERVER"])
def test_half_of_another_socket_with_a_pairs_key_goes_out_alone(role: str) -> None:
    """After a pair only its own two sockets make repeats."""
    under_test = pairing()
    under_test.add(1000, cut(*halves.opened(halves.key(1))))
    other = halves.event("CONNECT" if role == "CLIENT" else "ACCEPT", role, halves.key(1), socket_cookie=77)
    (pair,) = under_test.add(1001, cut(other))
    assert [one is not None for one in pair] == [role == "CLIENT", role == "SERVER"]
    assert (under_test.counts.collisions, under_test.counts.repeats_paired) == (1, 0)


@pytest.mark.parametrize(
    ("changes", "repeats"),
    [
        ({"event_unix_us": halves.NOW_US + 3, "established_unix_us": halves.NOW_US - 7}, 1),
        ({"socket_cookie": None}, 0),
        ({"local_address": halves.ip("10.0.0.9")}, 0),
    ],
    ids=["clock_measured_again", "no_cookie", "other_address"],
)
def test_repeat_is_known_by_its_socket(changes: dict[str, object], repeats: int) -> None:
    """A half that is sent again may tell another time, as the clock is measured again; its socket stays."""
    under_test = pairing()
    under_test.add(1000, cut(halves.event("CONNECT", "CLIENT", halves.key(1))))
    under_test.add(1001, cut(halves.event("CONNECT", "CLIENT", halves.key(1), **changes)))
    assert under_test.counts.repeats_waiting == repeats
    assert under_test.counts.collisions == (0 if repeats else 2)


def test_same_cookie_of_another_boot_is_another_socket() -> None:
    """Cookies count from one on each node and boot."""
    under_test = pairing()
    connect = halves.event("CONNECT", "CLIENT", halves.key(1))
    under_test.add(1000, cut(connect))
    elsewhere = raw.cut(halves.batch([connect], boot_id="another"), 0, CatalogIds(), catalog.RAW.schema_id)
    assert isinstance(elsewhere, list)
    assert len(under_test.add(1001, elsewhere)) == 2


def test_reused_ports_are_two_connections() -> None:
    """The same addresses and ports again, a moment later, have other sequence numbers and so another key."""
    under_test = pairing()
    first, second = halves.opened(halves.key(1)), halves.opened(halves.key(2))
    pairs = under_test.add(1000, cut(first[0], second[1], second[0], first[1]))
    assert [pair.client and pair.client.data[:8] for pair in pairs] == [halves.key(2), halves.key(1)]
    assert [pair.server and pair.server.data[:8] for pair in pairs] == [halves.key(2), halves.key(1)]


def test_clocks_seconds_apart_do_not_matter() -> None:
    """What pairs is the broker's clock: each half keeps the time that its own node told."""
    under_test = pairing()
    connect, accept = halves.opened(halves.key(1))
    accept["event_unix_us"] = halves.NOW_US - 5_000_000
    (pair,) = under_test.add(1000, cut(connect, accept))
    assert pair.client is not None
    assert pair.server is not None
    assert pair.client.event_unix_us - pair.server.event_unix_us == 5_000_000


@pytest.mark.parametrize(
    ("first", "second"),
    [("CLOSE", "CLOSE"), ("CONNECT", "ACCEPT")],
    ids=["half_closed_and_held", "accepted_late"],
)
def test_halves_minutes_apart_come_out_alone(first: str, second: str) -> None:
    """Each side's own moment is on record, once, and neither waits for minutes nor is lost."""
    under_test = pairing()
    under_test.add(1000, cut(halves.event(first, "CLIENT", halves.key(1))))
    late = under_test.add(181_000, cut(halves.event(second, "SERVER", halves.key(1))))
    last = under_test.add(400_000, [])
    assert [(pair.client is None, pair.server is None) for pair in (*late, *last)] == [
        (False, True),
        (True, False),
    ]


def test_connection_of_a_pod_with_itself_pairs() -> None:
    """Both halves come from one node, one pod and one batch, with the same address on each side."""
    mine = halves.ip("10.0.0.1")
    both = [
        halves.event("CONNECT", "CLIENT", halves.key(1), remote_address=mine, remote_port=8080),
        halves.event("ACCEPT", "SERVER", halves.key(1), local_address=mine, remote_address=mine),
    ]
    (pair,) = pairing().add(1000, cut(*both))
    assert pair.client is not None
    assert pair.server is not None


def test_userspace_proxy_makes_two_pairs() -> None:
    """A proxy ends one connection and begins another: each has a key of its own."""
    incoming, outgoing = halves.opened(halves.key(1)), halves.opened(halves.key(2))
    pairs = pairing().add(1000, cut(*incoming, *outgoing))
    assert len(pairs) == 2
    assert all(None not in pair for pair in pairs)
