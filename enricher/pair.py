"""Joins the two halves of a connection within a window of log-append time.

Pure and deterministic: the same messages of a partition in the same order give the same outputs, whatever
the wall clock says. Owns the halves that wait for their other half. Never resolves, never encodes. Called by
`engine`, one `Pairing` per partition.

Client's and server's half of one key are a pair, whatever their addresses and times: NAT may rewrite all of the
first, clocks the second. A half of the same side and the same socket is a repeat; of another socket, it shows that
two connections share a key (their 64 bits collide). Whose half another one is can't be told any more, so from then on
each half of that key goes out alone, counted, never as a repeat and never in a pair.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from enricher.raw import (
    ACCEPT,
    CLIENT,
    CLOSE,
    CONNECT,
    EXISTING,
    ROLE_AT,
    TYPE_AT,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from enricher.raw import Half

_KIND = {CONNECT: b"o", ACCEPT: b"o", CLOSE: b"c", EXISTING: b"e"}
"""Types that pair, by what they pair as; FAILED and PROGRESS never wait."""


COLLIDED = ()
"""In the place of the sockets of a pair: whose halves these are can't be told any more."""
WARM_UP_WINDOWS = 2
"""A half within the last window may have met its partner up to one window earlier."""
WARM_UP_MARGIN_MS = 1000


def warm_up_ms(window_ms: int) -> int:
    """Return how long before a point its waiting halves are known from, in ms of append time."""
    return WARM_UP_WINDOWS * window_ms + WARM_UP_MARGIN_MS


class Pair(NamedTuple):
    """What is known of one life-cycle event of a connection: one half, or both."""

    client: Half | None
    server: Half | None


@dataclass
class PairCounts:
    """What happened to halves: `halves` + `told_then_paired` = 2 x `paired` + `one_sided` + repeats + waiting.

    `collisions` are those among `one_sided` whose key was another connection's.
    """

    halves: int = 0
    paired: int = 0
    one_sided: int = 0
    told_then_paired: int = 0
    repeats_waiting: int = 0
    repeats_paired: int = 0
    collisions: int = 0

    @property
    def repeats(self) -> int:
        """Halves dropped since the same half had come before."""
        return self.repeats_waiting + self.repeats_paired


class _Bucket(NamedTuple):
    append_ms: int
    keys: list[bytes]


class Pairing:
    """The waiting halves of one partition.

    Attributes:
        counts: where this pairing counts; several may share one, and it may be exchanged.
    """

    def __init__(self, window_ms: int, counts: PairCounts) -> None:
        self._window_ms = window_ms
        self.counts = counts
        self._now_ms = 0
        self._waiting: dict[bytes, Half] = {}
        self._told: set[bytes] = set()
        self._untold_order: deque[_Bucket] = deque()
        self._waiting_order: deque[_Bucket] = deque()
        self._paired: dict[bytes, tuple[int, ...]] = {}  # the sockets of client and server, or COLLIDED
        self._paired_order: deque[_Bucket] = deque()

    @property
    def waiting(self) -> int:
        """Number of halves that wait and were not told one-sided."""
        return len(self._waiting) - len(self._told)

    def waiting_halves(self) -> Iterator[Half]:
        """Yield the halves that wait and were not told one-sided, in the order of their arrival."""
        return (half for key, half in self._waiting.items() if key not in self._told)

    @property
    def oldest_untold_ms(self) -> int | None:
        """Append time of the oldest message that may hold a waiting half nobody was told of; None without any."""
        return self._untold_order[0].append_ms if self.waiting and self._untold_order else None

    def add(self, append_ms: int, halves: Iterable[Half]) -> list[Pair]:
        """Take one message's halves and return what is complete now: window closes first, then pairs.

        An append time lower than one before it counts as that one, so time never runs backwards.
        """
        now_ms = self._now_ms = max(append_ms, self._now_ms)
        outputs = self._close(now_ms)
        new_waiting: list[bytes] = []
        new_paired: list[bytes] = []
        waiting, counts = self._waiting, self.counts
        for half in halves:
            data = half.data
            counts.halves += 1
            kind = _KIND.get(data[TYPE_AT])
            if kind is None:
                counts.one_sided += 1
                outputs.append(alone(half))
                continue
            key = data[:8] + kind
            is_client = data[ROLE_AT] == CLIENT
            sockets = self._paired.get(key)
            if sockets is not None:
                outputs += self._seen_before(half, sockets, is_client=is_client)
                continue
            other = waiting.get(key)
            if other is None:
                waiting[key] = half
                new_waiting.append(key)
            elif other.data[ROLE_AT] != data[ROLE_AT]:
                del waiting[key]
                pair = Pair(half, other) if is_client else Pair(other, half)
                self._paired[key] = (half.socket, other.socket) if is_client else (other.socket, half.socket)
                new_paired.append(key)
                counts.paired += 1
                if key in self._told:
                    self._told.discard(key)
                    counts.told_then_paired += 1
                outputs.append(pair)
            elif other.socket == half.socket:
                counts.repeats_waiting += 1
            else:
                self._paired[key] = COLLIDED
                new_paired.append(key)
                outputs += [*self._given_up(key), self._collided(half)]
        if new_waiting:
            bucket = _Bucket(now_ms, new_waiting)
            self._waiting_order.append(bucket)
            self._untold_order.append(bucket)
        if new_paired:
            self._paired_order.append(_Bucket(now_ms, new_paired))
        return outputs

    def tell_idle(self, now_ms: int) -> list[Pair]:
        """Return, one-sided, the halves that have waited for a window at `now_ms` on the reader's clock.

        For a partition that has gone quiet, so that no message closes its windows. The halves stay: should the
        other half yet come within the window on the broker's clock, the two come out as a pair all the same.
        """
        outputs = []
        while self._untold_order and self._untold_order[0].append_ms + self._window_ms < now_ms:
            for key in self._untold_order.popleft().keys:
                half = self._waiting.get(key)
                if half is not None:
                    self._told.add(key)
                    self.counts.one_sided += 1
                    outputs.append(alone(half))
        return outputs

    def _seen_before(self, half: Half, sockets: tuple[int, ...], *, is_client: bool) -> Iterable[Pair]:
        """Return what comes of a half whose key was paired or collided within the window."""
        if sockets is COLLIDED or half.socket != sockets[not is_client]:
            return (self._collided(half),)
        self.counts.repeats_paired += 1
        return ()

    def _given_up(self, key: bytes) -> Iterable[Pair]:
        """Return, one-sided, the waiting half of a key that has turned out to be another connection's too."""
        half = self._waiting.pop(key)
        if key in self._told:
            self._told.discard(key)
            return ()
        return (self._collided(half),)

    def _collided(self, half: Half) -> Pair:
        self.counts.one_sided += 1
        self.counts.collisions += 1
        return alone(half)

    def _close(self, now_ms: int) -> list[Pair]:
        """Forget what is older than the window and return the halves among it that nobody was told of."""
        oldest_ms = now_ms - self._window_ms
        outputs = []
        while self._waiting_order and self._waiting_order[0].append_ms < oldest_ms:
            for key in self._waiting_order.popleft().keys:
                half = self._waiting.pop(key, None)
                if half is None:
                    continue
                if key in self._told:
                    self._told.discard(key)
                else:
                    self.counts.one_sided += 1
                    outputs.append(alone(half))
        while self._untold_order and self._untold_order[0].append_ms < oldest_ms:
            self._untold_order.popleft()
        while self._paired_order and self._paired_order[0].append_ms < oldest_ms:
            for key in self._paired_order.popleft().keys:
                del self._paired[key]
        return outputs


def alone(half: Half) -> Pair:
    """Return a one-sided output."""
    return Pair(half, None) if half.data[ROLE_AT] == CLIENT else Pair(None, half)
