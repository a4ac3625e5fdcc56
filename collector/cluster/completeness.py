"""When a watch has handed over everything up to a time: the rule behind watermarks from the Kubernetes API.

Pure: versions and times in, a time out. Called by `source`, once per kind, under its lock.

At time t a quorum list tells the store's resourceVersion R. The kind is complete up to t once its watch has come
to R, by an event, a bookmark or a list. R belongs to the whole store, so in a quiet kind it runs ahead of the
watch until the next bookmark (about a minute). Therefore a watch that was open at t and has
since been quiet for `quiet_us` counts as having come to R too (a stalled one would lie until its read timeout);
with 0 it doesn't. Versions are compared as numbers
(Kubernetes 1.35 promises that; etcd's always were), or for equality where they aren't numbers.
"""

from __future__ import annotations

from collections import deque

PENDING_MAX = 1000


class Completeness:
    """One kind's watch against the versions that were asked for at known times."""

    def __init__(self, quiet_us: int) -> None:
        self._quiet_us = quiet_us
        self._pending: deque[tuple[int, str]] = deque(maxlen=PENDING_MAX)
        self._reached: str | None = None
        self._opened_us: int | None = None
        self._brought_us = 0

    def opened(self, now_us: int) -> None:
        """Note that the watch is open from now on."""
        self._opened_us = now_us

    def closed(self) -> None:
        """Note that the watch isn't open any more."""
        self._opened_us = None

    def reached(self, version: str, now_us: int) -> None:
        """Note that everything up to a version has now been handed over."""
        self._reached = version
        self._brought_us = now_us

    def asked(self, version: str, asked_us: int) -> None:
        """Note the store's version, as told to a question sent at `asked_us`."""
        self._pending.append((asked_us, version))

    def until_us(self, now_us: int) -> int | None:
        """Return up to when the kind is newly known to be complete; None when that hasn't moved."""
        newest = None
        while self._pending and self._is_reached(*self._pending[0], now_us):
            newest = self._pending.popleft()[0]
        return newest

    def _is_reached(self, asked_us: int, version: str, now_us: int) -> bool:
        if self._reached is None:
            return False
        if version == self._reached:
            return True
        if version.isdecimal() and self._reached.isdecimal() and int(self._reached) >= int(version):
            return True
        if self._quiet_us == 0 or self._opened_us is None or self._opened_us > asked_us:
            return False
        return now_us - max(asked_us, self._brought_us) >= self._quiet_us
