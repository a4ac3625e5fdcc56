"""What the demo counts, and when it says that the pipeline did not work."""

from __future__ import annotations

from typing import Any

from podwire.demo import totals

SERVICE = ("shop", "api")


def flow(
    flow_id: str = "a", record_type: str = "OPEN", observed_by: str = "BOTH", **changes: Any
) -> dict[str, Any]:
    """Return the fields of a flow record that the counts look at."""
    return {
        "flow_id": flow_id,
        "record_type": record_type,
        "observed_by": observed_by,
        "progress_seq": 0,
        "revision": 0,
        "service_namespace": "shop",
        "service_name": "api",
        "client_resolution": "SOCKET",
        "server_resolution": "SOCKET",
    } | changes


def counter(*flows: dict[str, Any]) -> totals.Counter:
    """Return a counter that has seen these flows."""
    counted = totals.Counter(SERVICE)
    for one in flows:
        counted.add(one)
    return counted


def test_counter_counts_a_repeat_as_a_duplicate_only() -> None:
    """The same record identity twice is one flow and one duplicate."""
    assert counter(flow(), flow(), flow(record_type="CLOSE")).totals(4, 0) == totals.Totals(
        flows=2, both_sided=2, unresolved=0, raw_events=4, lost=0, duplicates=1
    )


def test_corrected_record_counts_in_its_highest_revision() -> None:
    """A correction is neither a second flow nor a repeat, and what it names is not unresolved."""
    first, second = flow(client_resolution="UNRESOLVED"), flow(revision=1)
    close = flow(record_type="CLOSE")
    for seen in (counter(first, second, close), counter(first, second, first, close)):
        counts = seen.totals(4, 0)
        assert (counts.flows, counts.both_sided, counts.unresolved) == (2, 2, 0)
        assert seen.complaint() is None


def test_counter_counts_one_sided_and_unresolved_flows_of_the_whole_machine() -> None:
    """Connections beside the Service are counted, too."""
    other = flow("b", observed_by="CLIENT", service_name=None, server_resolution="UNRESOLVED")
    counts = counter(flow(), other).totals(3, 0)
    assert (counts.flows, counts.both_sided, counts.unresolved) == (2, 1, 1)


def test_complaint_is_none_when_all_came_out_two_sided_and_resolved() -> None:
    """What happens beside the Service does not matter, nor do refused connections to it."""
    beside = flow("b", observed_by="CLIENT", service_name=None, server_resolution="UNRESOLVED")
    refused = flow("c", "FAILED", "CLIENT", server_resolution="SERVICE_ONLY")
    assert counter(flow(), flow(record_type="CLOSE"), beside, refused).complaint() is None


def test_complaint_ignores_a_one_sided_record_beside_a_two_sided_one() -> None:
    """Readers of the topic ignore the one-sided record where a two-sided one exists; so does the demo."""
    both = [flow(), flow(record_type="CLOSE")]
    stray = flow(observed_by="CLIENT", server_resolution="SERVICE_ONLY")
    assert counter(stray, *both).complaint() is None
    assert counter(*both, stray).complaint() is None


def test_complaint_names_what_is_missing() -> None:
    """No flow, no CLOSE, a lonely half and an unknown pod each have their sentence."""
    close = flow(record_type="CLOSE")
    assert "No connection" in str(counter().complaint())
    assert "No connection" in str(counter(flow()).complaint())
    assert "1 of 2 OPEN and CLOSE" in str(counter(flow(observed_by="SERVER"), close).complaint())
    assert "do not name both pods" in str(counter(flow(client_resolution="UNRESOLVED"), close).complaint())


def test_lost_takes_the_last_report_without_repeated_names() -> None:
    """The counts are cumulative, and a name that did not fit is told again."""
    reports = [
        {"lost": {"ring_full": 1}},
        {"lost": {"ring_full": 3, "socket_map_full": 2, "name_ring_full": 9}},
    ]
    assert totals.lost(reports) == 5
    assert totals.lost([]) == 0


def test_pending_adds_up_what_the_enricher_holds() -> None:
    """Halves that wait and flows on their way count, anything else does not."""
    text = "# HELP x y\npodwire_enricher_waiting_halves 3.0\npodwire_enricher_in_flight 2.0\n"
    assert totals.pending(text) == 5
    assert totals.pending("podwire_enricher_pods 9.0\n") == 0
