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
