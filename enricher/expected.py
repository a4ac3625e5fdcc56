"""Which nodes Kubernetes has, so that one without a collector is noticed and one that was removed is not missed.

Pure: Node records in, names out, times come in. Never judges an interval. Called by `completeness`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

PATIENCE_MS = 30_000
"""How long a node may not have reported before that is said, and between two times of saying it."""


class Expected:
    """The nodes of one cluster, as far as the metadata topic has them.

    Attributes:
        gone: names of nodes that reported, and that Kubernetes had and has no more.
    """

    def __init__(self, cluster: str) -> None:
        self._cluster = cluster
        self._known: dict[str, Mapping[str, Any]] = {}
        self._said_ms: dict[str, int] = {}
        self._since_ms: int | None = None
        self.gone: set[str] = set()

    def node(self, uid: str, record: Mapping[str, Any] | None) -> None:
        """Take a Node record under its UID, None for a tombstone."""
        known = self._known.pop(uid, None)
        if known is not None:
            self.gone.add(known["name"])
        if record is not None and record["cluster"] == self._cluster and record["valid_to_us"] is None:
            self._known[uid] = record
            self.gone.discard(record["name"])

    def mute(self, reporting: Collection[str], now_ms: int) -> Iterator[tuple[str, int]]:
        """Yield name and start (Unix time in us) of each node that has not reported, when that is to be said.

        `reporting` are the names of those that have; of others that are gone nothing is kept.
        """
        self._since_ms = now_ms if self._since_ms is None else self._since_ms
        self.gone.intersection_update(reporting)
        names = {known["name"]: known["valid_from_us"] for known in self._known.values()}
        self._said_ms = {name: at for name, at in self._said_ms.items() if name in names}
        for name, valid_from_us in names.items():
            last_ms = self._said_ms.get(name, self._since_ms)
            if name not in reporting and now_ms - last_ms > PATIENCE_MS:
                self._said_ms[name] = now_ms
                yield name, valid_from_us
