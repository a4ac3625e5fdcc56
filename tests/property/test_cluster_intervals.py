"""Whatever a pod goes through, its bands stay consistent."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from collector.cluster import intervals
from collector.cluster.intervals import Moment
from collector.cluster.records import PodTimes, Record, Seen
from schemas import codec

BASE_US = 1_795_000_000_000_000
LAG_US = 10_000_000
RETENTION_US = 10**15
ADDRESSES = ("10.0.0.1", "10.0.0.2", "fd00::1")


@dataclass(frozen=True)
class Step:
    """One look at the pod; `times` None means that it is gone."""

    wait_us: int
    known_before_us: int
    times: PodTimes | None


def moments() -> st.SearchStrategy[int | None]:
    """Return times around the whole test, also before its creation and in the future, or none."""
    return st.none() | st.integers(BASE_US - 10**8, BASE_US + 10**9)


@st.composite
def pod_times(draw: st.DrawFn) -> PodTimes:
    """Return any times a status may claim, also absurd ones: nodes' clocks may be wrong."""
    return PodTimes(
        addresses=tuple(draw(st.lists(st.sampled_from(ADDRESSES), unique=True, max_size=2))),
        started_us=draw(moments()),
        container_started_us=draw(moments()),
        terminating_us=draw(moments()),
        finished_us=draw(moments()),
        terminal=draw(st.booleans()),
    )


def steps() -> st.SearchStrategy[list[Step]]:
    """Return a pod's story."""
    step = st.builds(Step, st.integers(0, 10**8), st.integers(0, 10**8), st.none() | pod_times())
    return st.lists(step, min_size=1, max_size=8)


def story(told: list[Step]) -> list[tuple[Moment, PodTimes | None, Record]]:
    """Return the record after each step that leaves one."""
    now_us, record, out = BASE_US, None, []
    for step in told:
        now_us += step.wait_us
        moment = Moment(now_us, now_us - step.known_before_us, LAG_US, RETENTION_US)
        if step.times is not None:
            fields = {"cluster": "c", "uid": "u", "name": "p", "namespace": "n", "phase": "Running"}
            rest: Record = {"resource_version": "", "host_network": False, "labels": {}, "containers": []}
            rest |= {"workload_kind": None, "workload": None}
            record = intervals.advance(record, Seen("pods", "u", BASE_US, fields | rest, step.times), moment)
        elif record is not None:
            record = intervals.close("pods", record, moment)
        if record is not None:
            out.append((moment, step.times, record))
    return out


@given(steps())
def test_bands_are_ordered_and_the_sure_part_lies_inside_the_possible(told: list[Step]) -> None:
    """from_earliest <= from_latest, to_earliest <= to_latest, and both ends fit around the sure part."""
    for _, _, record in story(told):
        for band in record["addresses"]:
            assert band["from_earliest_us"] <= band["from_latest_us"]
            if band["to_earliest_us"] is not None:
                assert band["from_earliest_us"] <= band["to_earliest_us"]
            if band["to_latest_us"] is not None:
                assert band["from_latest_us"] <= band["to_latest_us"]
                assert band["to_earliest_us"] <= band["to_latest_us"]


@given(steps())
def test_bands_of_one_address_never_overlap_and_one_at_most_is_open(told: list[Step]) -> None:
    """An address of a pod is open at most once, and a later band begins where the earlier one ended."""
    for _, _, record in story(told):
        for address in ADDRESSES:
            mine = [band for band in record["addresses"] if band["address"] == address]
            for earlier, later in itertools.pairwise(mine):
                assert earlier["to_latest_us"] is not None
                assert earlier["to_latest_us"] <= later["from_earliest_us"]


@given(steps())
def test_open_bands_are_exactly_what_a_living_pod_has(told: list[Step]) -> None:
    """Present addresses are open; completed and deleted pods have none."""
    for _, times, record in story(told):
        held = [band["address"] for band in record["addresses"] if band["to_latest_us"] is None]
        expected = () if times is None or times.terminal else times.addresses
        assert sorted(held) == sorted(expected)
        assert (record["valid_to_us"] is not None) == (times is None or times.terminal)


@given(steps())
def test_ended_bands_never_change_again(told: list[Step]) -> None:
    """History is written once: what a replay resolves today it resolves next week."""
    ended: list[Record] = []
    for _, _, record in story(told):
        now_ended = [band for band in record["addresses"] if band["to_latest_us"] is not None]
        assert all(now_ended.count(band) >= ended.count(band) for band in ended)
        ended = now_ended


@given(steps())
def test_same_state_again_changes_nothing(told: list[Step]) -> None:
    """Seeing a state twice, at whatever time, is no news."""
    last = [step for step in told if step.times is not None][-1:]
    for moment, times, record in story(told)[-1:]:
        if times is None or not last:
            continue
        seen = {
            name: record[name] for name in record if name not in ("addresses", "valid_from_us", "valid_to_us")
        }
        later = Moment(moment.observed_us + 10**9, moment.observed_us, LAG_US, RETENTION_US)
        again = intervals.advance(record, Seen("pods", "u", BASE_US, seen, times), later)
        assert not intervals.differs(record, again)


@given(steps())
def test_records_always_encode(told: list[Step]) -> None:
    """Avro takes every record and gives it back."""
    defaults = {
        "config_hash": None,
        "node": None,
        "workload_kind": None,
        "workload": None,
        "service_account": None,
    }
    for _, _, record in story(told):
        whole = defaults | record
        assert codec.decode("Pod", codec.encode("Pod", whole, 3)) == whole
