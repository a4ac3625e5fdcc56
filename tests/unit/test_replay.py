"""Which messages a replay reads, which records it keeps, and what the command line makes of times and names."""

from __future__ import annotations

from typing import Any

import pytest

from enricher.flow import Flow, FlowBuilder, Moment
from enricher.history import History
from enricher.networks import Networks
from enricher.replay import Counts, PartitionReplay, Span, share
from enricher.resolve import Resolver
from podwire.replay.plan import plan, span_ms
from schemas import catalog, codec
from schemas.registry import CatalogIds
from tests import halves

WINDOW_MS = 5000
NOW_MS = halves.NOW_US // 1000
SPAN = Span(halves.NOW_US, halves.NOW_US + 1_000_000, 60_000, 3_600_000, WINDOW_MS, NOW_MS + 10_000_000)


def replay(span: Span, *messages: tuple[int, list[dict[str, Any]]]) -> tuple[list[dict[str, Any]], Counts]:
    """Return the records of a span from messages (append time in ms after now, events), and the counts."""
    history = History()
    for number in (1, 2):
        history.put_pod(str(halves.uid(number)), halves.pod_record(number))
    networks = Networks({})
    builder = FlowBuilder(
        halves.CLUSTER, catalog.FLOWS.schema_id, history, networks, Resolver(history, networks)
    )
    counts = Counts()
    one = PartitionReplay(span, 0, CatalogIds(), builder, counts)
    moment = Moment.at(NOW_MS, None)
    flows: list[Flow] = []
    for later_ms, events in messages:
        flows += one.take(NOW_MS + later_ms, halves.batch(events), moment)
    flows += one.end(moment)
    return [codec.decode("Flow", flow.value) for flow in flows], counts


def test_half_from_before_the_span_completes_a_pair_within_it() -> None:
    """The server's half came and happened earlier; the record's time is the client's, so it belongs to the span."""
    client, server = halves.opened(halves.key(1))
    early = server | {"event_unix_us": halves.NOW_US - 2_000_000}
    (flow,), _ = replay(SPAN, (-1500, [early]), (1000, [client]))
    assert flow["observed_by"] == "BOTH"


@pytest.mark.parametrize(
    ("later_us", "records"),
    [(-1, 0), (0, 1), (999_999, 1), (1_000_000, 0)],
    ids=["before", "from", "last", "to"],
)
def test_record_belongs_to_the_span_by_its_own_time(later_us: int, records: int) -> None:
    """From is within, to is not, to the microsecond; the rest is counted as outside."""
    event = halves.failed(halves.key(1), event_unix_us=halves.NOW_US + later_us)
    flows, counts = replay(SPAN, (500, [event]))
    assert (len(flows), counts.records, counts.outside) == (records, records, 1 - records)


def test_what_comes_out_while_halves_are_gathered_is_no_record() -> None:
    """Before the first append time that counts, a half may lack its other half only since reading began there."""
    alone = halves.event("CONNECT", "CLIENT", halves.key(1))
    flows, counts = replay(SPAN, (-60_000 - 2 * WINDOW_MS, [alone]), (-60_001, []))
    assert (flows, counts.outside) == ([], 1)


def test_window_that_is_over_when_the_topic_ends_is_closed_and_another_is_not() -> None:
    """No later message ends the window of the last half; what is left then depends on the replay's one time."""
    alone = halves.event("CONNECT", "CLIENT", halves.key(1))
    for settled_ms, records in ((WINDOW_MS, 0), (WINDOW_MS + 1, 1)):
        span = Span(SPAN.from_us, SPAN.to_us, 0, 0, WINDOW_MS, NOW_MS + settled_ms)
        flows, counts = replay(span, (0, [alone]))
        assert (len(flows), counts.unsettled) == (records, 1 - records)


def test_span_reads_two_windows_and_the_margins_more() -> None:
    """What is read reaches from the margin and two windows before to the margin and a window after."""
    assert SPAN.first_ms == NOW_MS - 60_000 - 2 * WINDOW_MS - 1000
    assert SPAN.last_ms == NOW_MS + 1000 + 3_600_000 + WINDOW_MS


@pytest.mark.parametrize("of", [1, 2, 3, 5, 9])
def test_shares_hold_every_partition_once(of: int) -> None:
    """However many processes there are, each partition is one's."""
    shares = [partition for number in range(1, of + 1) for partition in share(8, number, of)]
    assert sorted(shares) == list(range(8))


def test_plan_names_the_topic_after_the_span_unless_told() -> None:
    """The same span has the same topic, so that a second replay of it is noticed."""
    made = plan(
        from_text="2026-01-31T10:00:00+01:00",
        to_text="2026-01-31T10:00:00.250Z",
        early="1m",
        late="2h",
        name=None,
        now_ms=NOW_MS,
    )
    assert made.topic == "podwire.flows.replay.20260131T090000Z-20260131T100000_250Z.v1"
    assert str(made) == "2026-01-31T09:00:00.000Z to 2026-01-31T10:00:00.250Z"
    assert (made.early_ms, made.late_ms) == (60_000, 7_200_000)


def test_span_without_a_unit_is_refused() -> None:
    """A bare number could be anything."""
    with pytest.raises(ValueError, match="--late '90'"):
        span_ms("90", "--late")
