"""Who had an address: the watcher's and the enricher's whole way, against a brute-force look at the truth.

The model's API log reaches the watcher late, twice, with gaps that a new list closes, and over crashes of the watcher.
What it publishes goes through Avro into a History. The documented bands (ARCHITECTURE.md, "How wide the bands are")
are worked out here a second time, from all observations of a pod at once; the code does it step by step.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from collector.cluster.records import seen
from collector.cluster.state import TOPICS, Complete, Gone, ListBegins, ListEnds, Present, State
from enricher.history import History
from enricher.networks import Networks, packed
from enricher.resolve import Resolution, Resolver
from schemas import codec
from tests import cluster_model
from tests.cluster_model import (
    BASE_US,
    LAG_US,
    NEVER_US,
    NODE_ADDRESS,
    SECOND_US,
    Holding,
    Plan,
    Shown,
    World,
)
from tests.objects import CLUSTER

POOLS = (("10.0.0.1", "10.0.0.2"), ("fd00::1", "fd00::2"))
RETENTION_US = 1 << 50
TICK_US = 4 * SECOND_US
IDS = {kind: topic.schema_id for kind, topic in TOPICS.items()}


QUICK = Plan(
    wait_us=6_000,
    start_us=0,
    address_us=0,
    container_us=5_000,
    resandbox_us=None,
    life_us=30_000,
    end="completed",
    stop_us=0,
    teardown_us=2_000,
    collected_us=NEVER_US,
    tells_end=True,
    host_network=False,
    delays_us=(0,),
)


def spans(seconds_max: float) -> st.SearchStrategy[int]:
    """Return spans in steps of 0.1 s, in us."""
    return st.integers(0, int(seconds_max * 10)).map(lambda tenths: tenths * SECOND_US // 10)


PLANS = st.builds(
    Plan,
    wait_us=spans(6),
    start_us=spans(2),
    address_us=spans(2),
    container_us=spans(3),
    resandbox_us=st.none() | spans(20),
    life_us=spans(25),
    end=st.sampled_from(["stays", "deleted", "deleted", "completed", "completed", "evicted", "forced"]),
    stop_us=spans(5),
    teardown_us=spans(3) | spans(10),
    collected_us=spans(20) | st.just(NEVER_US),
    tells_end=st.booleans(),
    host_network=st.sampled_from([False, False, False, False, True]),
    delays_us=st.lists(spans(1) | spans(10), min_size=1, max_size=4).map(tuple),
)


@dataclass(frozen=True)
class Delivery:
    """How the API's log reaches the watcher.

    Attributes:
        late_us: how late the events of a watch come, in turn.
        twice: whether an event comes twice, in turn.
        gaps: (begin, length) in us since the model's beginning in which events are missed; a list ends each.
        crash: whether a watcher of its own goes on after a gap, knowing only what is in Kafka.
        flush_every: observations between two writes to Kafka.
    """

    late_us: tuple[int, ...]
    twice: tuple[bool, ...]
    gaps: tuple[tuple[int, int], ...]
    crash: bool
    flush_every: int


DELIVERIES = st.builds(
    Delivery,
    late_us=st.lists(spans(1) | spans(15), min_size=1, max_size=4).map(tuple),
    twice=st.lists(st.booleans(), min_size=1, max_size=3).map(tuple),
    gaps=st.lists(st.tuples(spans(40), spans(20)), max_size=2).map(tuple),
    crash=st.booleans(),
    flush_every=st.integers(1, 4),
)


@dataclass
class Told:
    """What the watcher was told of one pod, when, and up to when all pods were known then; None: gone."""

    observed_us: int
    known_us: int
    item: dict[str, Any] | None


@dataclass
class Rig:
    """The real way from observations to answers, and what went over it.

    Attributes:
        skew_us: how far the clocks of those who ask may be off.
        told: by uid, what the present watcher's line of states rests on.
        until_us: up to when everything was handed over.
    """

    world: World
    skew_us: int = 0
    state: State = field(default_factory=lambda: State(CLUSTER, IDS, LAG_US, RETENTION_US))
    told: dict[str, list[Told]] = field(default_factory=dict)
    until_us: int = 0

    def __post_init__(self) -> None:
        """Begin with nothing written."""
        self.history = History(self.skew_us)
        self.resolver = Resolver(self.history, Networks({}, ("10.0.0.0/8", "fd00::/16", "192.168.0.0/16")))
        self._written: dict[str, bytes] = {}
        self._flushed: tuple[dict[str, int], int] = ({}, 0)

    @cached_property
    def questions(self) -> list[tuple[str, int, Holding | None]]:
        """Addresses and times that are worth a question, with their true owners."""
        return [
            (address, time_us, self.world.owner(address, time_us))
            for address in (*POOLS[0], *POOLS[1])
            for time_us in moments(self.world, [])
        ]

    def tell(self, uid: str, item: dict[str, Any] | None, at_us: int) -> None:
        """Hand one state to the watcher, as a watch does."""
        if item is not None:
            self.state.apply(Present("pods", (seen("pods", item, CLUSTER),), at_us))
        else:
            self.state.apply(Gone("pods", uid, at_us))
        self.told.setdefault(uid, []).append(Told(at_us, self.until_us, item))

    def complete(self, until_us: int) -> None:
        """Say that all up to a time was handed over."""
        if until_us > self.until_us:
            self.until_us = until_us
            self.state.apply(Complete("pods", until_us))

    def list_all(self, asked_us: int, read_us: int) -> None:
        """Hand all objects over as they were at `asked_us`, read later, then say so."""
        self.state.apply(ListBegins("pods"))
        there = self.world.snapshot(asked_us)
        for item in there:
            self.tell(item["metadata"]["uid"], item, read_us)
        present = {item["metadata"]["uid"] for item in there}
        self.state.apply(ListEnds("pods", read_us))
        for uid, told in self.told.items():
            if uid not in present and told and told[-1].item is not None:
                told.append(Told(read_us, self.until_us, None))
        self.complete(asked_us)

    def flush(self) -> None:
        """Write what has changed, and the watermark, as the enricher gets them."""
        for (kind, uid), value in self.state.changes.items():
            assert kind == "pods"
            assert value is not None
            self._written[uid] = value
            self.history.put_pod(uid, codec.decode("Pod", value))
        self.state.changes.clear()
        if self.until_us:
            self.history.complete_until("pods", self.until_us, LAG_US)
        self._flushed = ({uid: len(told) for uid, told in self.told.items()}, self.until_us)

    def crash(self) -> None:
        """Let another watcher go on from what was written; what was not is as if never told."""
        counts, self.until_us = self._flushed
        self.told = {uid: self.told[uid][:count] for uid, count in counts.items()}
        self.state = State(CLUSTER, IDS, LAG_US, RETENTION_US)
        for value in self._written.values():
            self.state.restore("pods", codec.decode("Pod", value))
        if self.until_us:
            self.state.complete_until_us["pods"] = self.until_us

    def at(self, address: str, time_us: int) -> Resolution:
        """Return the enricher's answer."""
        return self.resolver.at(packed(address), time_us)


def play(world: World, delivery: Delivery, look: Any, skew_us: int = 0) -> Rig:
    """Deliver the world's log; call `look(rig)` after each write. The last look is at everything."""
    rig = Rig(world, skew_us)
    gaps = _merged(delivery.gaps)
    end_us = max([one.at_us for one in world.log] + [to for _, to in gaps]) + 40 * SECOND_US
    due: list[tuple[int, int, Shown | tuple[int, int] | None]] = []
    now_us = 0
    for number, one in enumerate(world.log):
        if any(begin < one.at_us <= to for begin, to in gaps):
            continue
        late_us = delivery.late_us[number % len(delivery.late_us)]
        stop_us = min([begin for begin, _ in gaps if one.at_us <= begin], default=NEVER_US)
        now_us = max(now_us, min(one.at_us + late_us, stop_us))
        due.append((now_us, 1, one))
        if delivery.twice[number % len(delivery.twice)]:
            due.append((now_us, 1, one))
    due += [(to, 0, (begin, to)) for begin, to in gaps]
    due += [(tick_us, 2, None) for tick_us in range(BASE_US, end_us, TICK_US)]
    due.sort(key=lambda one: one[:2])
    waiting = [one[2].at_us for one in due if isinstance(one[2], Shown)]
    for number, (at_us, _, what) in enumerate(due):
        if isinstance(what, Shown):
            rig.tell(what.uid, what.item, at_us)
            waiting.remove(what.at_us)
        elif what is not None:
            if delivery.crash:
                rig.crash()
            rig.list_all(what[1], at_us + SECOND_US // 2)
        begun = [begin for begin, to in gaps if begin <= at_us < to]
        unread_us = min([*waiting, *(begin + 1 for begin in begun)], default=NEVER_US)
        if what is None:
            rig.complete(min(at_us, unread_us - 1))
        if number % delivery.flush_every == 0 or number == len(due) - 1:
            rig.flush()
            look(rig)
    return rig


def _merged(gaps: tuple[tuple[int, int], ...]) -> list[tuple[int, int]]:
    """Return (begin, end) of gaps in Unix time, in order, overlapping ones as one."""
    out: list[tuple[int, int]] = []
    for begin, length in sorted(gaps):
        if out and BASE_US + begin <= out[-1][1]:
            out[-1] = (out[-1][0], max(out[-1][1], BASE_US + begin + length))
        else:
            out.append((BASE_US + begin, BASE_US + begin + length))
    return out


@dataclass(frozen=True)
class Claim:
    """What the documentation says of a pod's address: possible in [first, last), sure in [sure_from, sure_to)."""

    uid: str
    address: str
    first_us: int
    sure_from_us: int
    sure_to_us: int
    last_us: int


def claims(uid: str, told: list[Told]) -> list[Claim]:
    """Return the documented claims of a pod from all that was told of it."""
    out: list[Claim] = []
    if not any(one.item for one in told) or next(one.item for one in told if one.item)["spec"]["hostNetwork"]:
        return out
    for address in {ip for one in told for ip in _addresses(one.item)}:
        shows = [address in _addresses(one.item) for one in told]
        begins = [at for at, here in enumerate(shows) if here and (at == 0 or not shows[at - 1])]
        last_us = 0
        for begin in begins:
            claim = _claim(uid, address, told, begin, last_us)
            out.append(claim)
            last_us = claim.last_us
    return out


def _claim(uid: str, address: str, told: list[Told], begin: int, after_us: int) -> Claim:
    first_ever = not any(_addresses(one.item) for one in told[:begin])
    shown = told[begin]
    assert shown.item is not None
    first_us = _unix_us(shown.item["status"]["startTime"]) or _unix_us(
        shown.item["metadata"]["creationTimestamp"]
    )
    sure_from_us = shown.observed_us
    if first_ever:
        sure_from_us = min(sure_from_us, _started_us(shown.item))
    else:
        first_us = max(first_us, min(shown.known_us, shown.observed_us) - LAG_US, after_us)
    request_us = NEVER_US
    for one in told[begin:]:
        held_us = min(one.known_us, one.observed_us) - LAG_US
        ends = [state["finishedAt"] for state in _states(one.item, "terminated")]
        if _is_terminal(one.item) and ends and address in _addresses(one.item):
            finished_us = max(map(_unix_us, ends))
            edges = (finished_us, finished_us + SECOND_US + LAG_US)
        elif _is_terminal(one.item):
            edges = (first_us if one is shown else min(held_us, request_us), one.observed_us + LAG_US)
        elif one.item is None or address not in _addresses(one.item):
            edges = (min(held_us, request_us), one.observed_us)
        else:
            if stamp := one.item["metadata"].get("deletionTimestamp"):
                request_us = _unix_us(stamp) - cluster_model.GRACE_SECONDS * SECOND_US
            continue
        sure_to_us = max(edges[0], first_us)
        return Claim(
            uid,
            address,
            first_us,
            max(first_us, sure_from_us),
            sure_to_us,
            max(edges[1], sure_to_us, sure_from_us),
        )
    return Claim(uid, address, first_us, max(first_us, sure_from_us), request_us, NEVER_US)


def _addresses(item: dict[str, Any] | None) -> list[str]:
    return [one["ip"] for one in item["status"]["podIPs"]] if item else []


def _is_terminal(item: dict[str, Any] | None) -> bool:
    return item is not None and item["status"]["phase"] in ("Succeeded", "Failed")


def _states(item: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    statuses = item["status"]["containerStatuses"] if item else []
    return [one["state"][name] for one in statuses if name in one["state"]]


def _started_us(item: dict[str, Any]) -> int:
    """Return when a container of the present sandbox had started for sure."""
    states = _states(item, "terminated" if _is_terminal(item) else "running")
    return _unix_us(states[0]["startedAt"]) + SECOND_US if states else NEVER_US


def _unix_us(text: str | None) -> int:
    return round(datetime.fromisoformat(text).timestamp()) * SECOND_US if text else 0


def moments(world: World, more: list[int]) -> list[int]:
    """Return the times that are worth a question: every edge, just before it, and some in between."""
    edges = set(more)
    for one in world.holdings:
        edges |= {one.from_us, one.to_us, (one.from_us + min(one.to_us, one.from_us + 20 * SECOND_US)) // 2}
    whole = sorted(edge for edge in edges if BASE_US <= edge < NEVER_US)
    return [time for edge in whole for time in (edge - 1, edge)]


def excused(rig: Rig, holding: Holding) -> bool:
    """Return whether nobody could know a holding: never shown to the watcher, or living on after a forced removal."""
    told = rig.told.get(holding.uid, [])
    shown = any(one.item and one.item["status"].get("sandbox") == holding.sandbox for one in told)
    return not shown or holding.uid in rig.world.forced


def check_live(rig: Rig) -> None:
    """Whatever is answered for a time that the watermark has passed is right, or says that it is not sure."""
    for address, time_us, truth in rig.questions:
        for asked_us in {time_us - rig.skew_us, time_us, time_us + rig.skew_us}:
            if asked_us > rig.until_us:
                continue
            found = rig.at(address, asked_us)
            if found.kind == "IP_AT_TIME":
                right = truth is not None and found.pod is not None and found.pod.uid == truth.uid
            elif found.pod is not None:
                right = False  # only what is sure is named
            elif truth is None or excused(rig, truth):
                right = True
            else:
                right = found.reason != "NO_OWNER_AT_TIME" or found.provisional
            assert right, (address, time_us - BASE_US, asked_us, rig.until_us - BASE_US, found, truth)


def check_end(rig: Rig) -> None:
    """With everything known, each answer is what the documented bands say: neither less sure nor more."""
    known = [claim for uid, told in rig.told.items() for claim in claims(uid, told)]
    more = [edge for one in known for edge in (one.first_us, one.sure_from_us, one.sure_to_us, one.last_us)]
    for address in (*POOLS[0], *POOLS[1], NODE_ADDRESS):
        for time_us in moments(rig.world, more):
            if time_us > rig.until_us - LAG_US:
                continue
            possible = [
                one for one in known if one.address == address and one.first_us <= time_us < one.last_us
            ]
            sure = [one.uid for one in possible if one.sure_from_us <= time_us < one.sure_to_us]
            found = rig.at(address, time_us)
            answer: tuple[Any, ...] = (found.kind, found.pod and found.pod.uid, found.candidates)
            if len(sure) == 1:
                expected: tuple[Any, ...] = ("IP_AT_TIME", sure[0], None)
            elif possible:
                expected = ("IP_AMBIGUOUS", None, len(possible))
            else:
                expected = ("UNRESOLVED", None, None)
            assert answer == expected, (address, time_us - BASE_US, possible)


ON_TIME = Delivery(late_us=(0,), twice=(False,), gaps=(), crash=False, flush_every=1)
# What the oracle found, smaller by hand: the watch misses what matters, and a list shows only what came of it.
COMPLETED_ELSEWHERE = (
    [replace(QUICK, wait_us=0, resandbox_us=5_000_000, life_us=20_000_000)],
    replace(ON_TIME, gaps=((3_000_000, 32_000_000),)),
)
CONTAINER_OF_THE_SANDBOX_BEFORE = (
    [
        replace(
            QUICK,
            wait_us=0,
            address_us=1_000_000,
            container_us=4_000_000,
            resandbox_us=3_000_000,
            end="stays",
        )
    ],
    replace(ON_TIME, gaps=((0, 9_000_000),)),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(PLANS, min_size=1, max_size=6), DELIVERIES)
@example(*COMPLETED_ELSEWHERE)
@example(*CONTAINER_OF_THE_SANDBOX_BEFORE)
def test_no_answer_ever_names_the_wrong_pod(plans: list[Plan], delivery: Delivery) -> None:
    """For every time that the watermark has passed: the true owner, or doubt, or nobody rightly."""
    play(cluster_model.build(plans, POOLS), delivery, check_live)


@settings(max_examples=75, deadline=None)
@given(st.lists(PLANS, min_size=1, max_size=6), DELIVERIES, spans(5))
def test_clocks_that_are_off_name_no_wrong_pod(plans: list[Plan], delivery: Delivery, skew_us: int) -> None:
    """The same, asked by nodes whose clocks are ahead or behind by as much as is allowed for."""
    play(cluster_model.build(plans, POOLS), delivery, check_live, skew_us)


@settings(max_examples=150, deadline=None)
@given(st.lists(PLANS, min_size=1, max_size=6), DELIVERIES)
def test_doubt_is_exactly_as_wide_as_documented(plans: list[Plan], delivery: Delivery) -> None:
    """In the end the sure owner is named outside the documented bands, and inside them the candidates are counted."""
    check_end(play(cluster_model.build(plans, POOLS), delivery, lambda rig: None))


def test_ten_thousand_pods_on_eight_addresses_within_a_minute() -> None:
    """In the storm each answer counts every pod that comes into question; before and after it the owner is named."""
    before = [replace(QUICK, wait_us=0, life_us=60 * SECOND_US)] * 8
    after = [
        replace(QUICK, wait_us=30 * SECOND_US, end="stays"),
        *[replace(QUICK, wait_us=0, end="stays")] * 7,
    ]
    start = replace(QUICK, wait_us=90 * SECOND_US)
    pool = tuple(f"10.0.0.{number}" for number in range(1, 9))
    world = cluster_model.build([*before, start, *[QUICK] * 10_000, *after], (pool,))
    rig = Rig(world)
    for one in world.log:
        rig.tell(one.uid, one.item, one.at_us)
    end_us = world.log[-1].at_us + 60 * SECOND_US
    rig.complete(end_us)
    rig.flush()
    known = defaultdict(list)
    for claim in (claim for uid, told in rig.told.items() for claim in claims(uid, told)):
        known[claim.address].append(claim)
    kinds = Counter[str]()
    for address in pool:
        truly = World([one for one in world.holdings if one.address == address])
        for second in range((end_us - LAG_US - BASE_US) // SECOND_US):
            time_us = BASE_US + second * SECOND_US + 500_000
            found = rig.at(address, time_us)
            kinds[found.kind] += 1
            if found.kind == "IP_AMBIGUOUS":
                assert found.candidates == sum(
                    one.first_us <= time_us < one.last_us for one in known[address]
                )
                continue
            truth = truly.owner(address, time_us)
            assert (found.pod and found.pod.uid) == (truth and truth.uid)
    in_storm = [one.from_us for one in world.holdings if one.uid not in {f"uid-{n}" for n in range(8)}]
    assert in_storm[9_999] - in_storm[0] < 61 * SECOND_US
    assert kinds["IP_AMBIGUOUS"] > 8 * 60
    assert kinds["IP_AT_TIME"] > 8 * (50 + 30)
