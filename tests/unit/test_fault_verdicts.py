"""What the fault suite calls wrong, open, contradicting or out of balance: each verdict can be the bad one."""

from __future__ import annotations

from typing import Any

import pytest

from tests import halves
from tests.fault.books import NOT_OURS, Books, Message
from tests.fault.verdicts import difference, latest, leaves_open, names_wrongly

PLACE = (0, 7)


def flow(**changes: Any) -> dict[str, Any]:
    """Return the part of a flow between web and api that verdicts look at."""
    sides = {
        f"{side}_{name}": value
        for side, pod in (("client", "web"), ("server", "api"))
        for name, value in {"pod": pod, "resolution": "SOCKET", "sequence": 1, "event_unix_us": 5}.items()
    }
    record = {"flow_id": "f", "record_type": "OPEN", "observed_by": "BOTH", "progress_seq": 0, "revision": 0}
    return record | sides | {"service_name": "api", "emitted_at": 1} | changes


@pytest.mark.parametrize("name", ["client_pod", "server_pod", "service_name"])
def test_other_name_is_wrong_and_none_is_open(name: str) -> None:
    """A name must be the one that took part; that it is missing is a verdict of its own."""
    assert not names_wrongly(flow())
    assert names_wrongly(flow(**{name: "other"}))
    assert not names_wrongly(flow(**{name: None}))
    assert leaves_open(flow(**{name: None}))
    assert not leaves_open(flow())


def test_side_that_was_not_heard_may_be_nameless_for_a_reason_only() -> None:
    """An address inside a band, or the Service alone, may stand for it; UNRESOLVED may not."""
    alone = flow(observed_by="CLIENT", server_pod=None, server_resolution="SERVICE_ONLY")
    assert not leaves_open(alone)
    assert leaves_open(alone | {"server_resolution": "UNRESOLVED"})
    assert leaves_open(alone | {"client_pod": None, "client_resolution": "IP_AMBIGUOUS"})
    assert leaves_open(alone | {"service_name": None})


def test_highest_revision_counts() -> None:
    """A correction takes the place of what it corrects, in whatever order they are read."""
    corrected = flow(revision=1)
    assert latest([corrected, flow(server_pod=None)]) == [corrected]


def test_repeat_may_differ_in_its_moment_and_with_its_place_in_its_measured_times() -> None:
    """Another name is a contradiction; another time is one unless the event was read again."""
    assert difference(flow(), flow(emitted_at=2)) == set()
    assert difference(flow(), flow(server_pod="other")) == {"server_pod"}
    assert difference(flow(), flow(server_event_unix_us=6)) == {"server_event_unix_us"}
    assert difference(flow(), flow(server_event_unix_us=6, server_sequence=2)) == set()


def report(**changes: Any) -> dict[str, Any]:
    """Return a report of a collector that has sent two events."""
    counts = {"attempted": 2, "received": 2, "published": 2, "spooled": 0, "in_flight": 0, "unreadable": 0}
    named = {"node": "node-1", "producer_epoch": 1, "sequence": 0, "last": False}
    return named | counts | {"inherited": 0, "unaccounted": 0, "lost": {}} | changes


def books(*values: bytes, key: bytes | None = None, **reported: Any) -> Books:
    """Return the books of these raw messages and one report."""
    found = Books()
    for number, value in enumerate(values):
        found.add_raw(Message((PLACE[0], PLACE[1] + number), key, value))
    found.add_report(report(**reported))
    return found


BATCH = halves.batch(halves.opened(halves.key(1)))
SPOILT = BATCH[:-10] + bytes((BATCH[-10] ^ 1,)) + BATCH[-9:]


def test_books_of_what_was_sent_and_emitted_balance() -> None:
    """Two halves, one flow made of both; without the flow the sum says what is missing."""
    found = books(BATCH)
    assert any(text.startswith("published 2 != emitted 0") for text in found.complaints())
    found.emitted.update(found.sent)
    assert found.complaints() == []


@pytest.mark.parametrize(
    ("reported", "said"),
    [
        ({"attempted": 3, "unaccounted": 1}, "attempted 3 != received 2 + lost 0"),
        ({"attempted": 3, "received": 3, "in_flight": 1}, "received 3 != published 2"),
        ({"received": 3}, "received and inherited 3 != published 2"),
        ({"received": 1, "inherited": 0, "published": 1}, "reports say that 1 events were published, 2 are"),
    ],
    ids=["uncounted in the kernel", "not in the topic", "nowhere", "published by nobody"],
)
def test_books_that_do_not_balance_say_which_sum(reported: dict[str, Any], said: str) -> None:
    """Each sum can be the one that does not hold."""
    found = books(BATCH, **reported)
    found.emitted.update(found.sent)
    assert any(said in text for text in found.complaints()), found.complaints()


def test_spoilt_batch_counts_as_dead_lettered_once_it_is() -> None:
    """Its halves are published and dead-lettered; a batch that is whole must not be."""
    found = books(SPOILT)
    assert found.dead_lettered == 0
    assert len(found.complaints()) == 2
    found.add_dead_letter({"partition": PLACE[0], "offset": PLACE[1]})
    assert (found.dead_lettered, found.complaints()) == (2, [])
    whole = books(BATCH)
    whole.emitted.update(whole.sent)
    whole.add_dead_letter({"partition": PLACE[0], "offset": PLACE[1]})
    assert len(whole.complaints()) == 1


def test_message_of_no_collector_is_not_published() -> None:
    """What a fault appended is in no sum, and must be set aside."""
    found = books(SPOILT, key=NOT_OURS, attempted=0, received=0, published=0)
    assert len(found.complaints()) == 1
    found.add_dead_letter({"partition": PLACE[0], "offset": PLACE[1]})
    assert found.complaints() == []
