"""A file or folder of manifests instead of the Kubernetes API, for the demo, tests and closed networks.

Reads JSON in the form of `kubectl get pods,services,nodes -A -o json`: a List of mixed kinds, or single objects;
of a folder, all its `*.json`. Looks at names, times, sizes and inodes, and reads everything again when one of
these changed. A state that can't be read leaves the last good one in force, and the watermark where it is.
Never writes. Called by `run` as one of the two sources.
"""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

import orjson
import structlog

from collector.cluster.records import KINDS, MalformedError, seen
from collector.cluster.state import Complete, ListBegins, ListEnds, Present

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator
    from pathlib import Path

    from collector.cluster.metrics import Metrics
    from collector.cluster.records import Kind, Seen
    from collector.cluster.state import Observation
    from collector.cluster.stop import Stop

log = structlog.get_logger()

KIND_OF: dict[str, Kind] = {"Pod": "pods", "Service": "services", "Node": "nodes"}
SETTLED_NS = 100_000_000  # file times tick more coarsely than the clock: what is younger is read once more
Stamp = tuple[tuple[str, int, int, int], ...]


class Manifests:
    """The source that reads files."""

    name = "manifests"

    def __init__(
        self,
        path: Path,
        *,
        cluster: str,
        labels: Collection[str],
        stop: Stop,
        now_ns: Callable[[], int],
        metrics: Metrics,
    ) -> None:
        self._path = path
        self._cluster = cluster
        self._labels = labels
        self._stop = stop
        self._now_ns = now_ns
        self._metrics = metrics
        self._stamp: Stamp | None = None
        self._broken: str | None = None
        self._looked = False

    def poll(self, wait_seconds: float) -> list[Observation]:
        """Wait, except before the first look, then return what changed; nothing when it can't be read."""
        if self._looked and self._stop.wait(wait_seconds):
            return []
        self._looked = True
        before_ns = self._now_ns()
        try:
            observations = self._read(before_ns)
        except (OSError, ValueError) as error:
            self._say_broken(error)
            return []
        if self._broken is not None:
            log.info("manifests_readable_again", path=str(self._path))
            self._broken = None
        return [*observations, *(Complete(kind, before_ns // 1000) for kind in KINDS)]

    def unhealthy(self) -> str | None:
        """Return why the source can't be read, None when it can."""
        return None if self._broken is None else f"manifests can't be read: {self._broken}"

    def close(self) -> None:
        """Release nothing: no file stays open."""

    def _read(self, before_ns: int) -> list[Observation]:
        """Return all objects when the files changed since the last good look; OSError or ValueError if unreadable."""
        stamp = _stamp(self._path)
        if stamp == self._stamp:
            return []
        gc.disable()  # a collection per few thousand new dicts costs as much as the parsing
        try:
            objects = self._objects()
        finally:
            gc.enable()
        if _stamp(self._path) != stamp:
            raise ValueError("it changed while it was read")
        settled = all(time_ns < before_ns - SETTLED_NS for _, time_ns, _, _ in stamp)
        self._stamp = stamp if settled else None
        read_us = self._now_ns() // 1000
        observations: list[Observation] = []
        for kind, found in objects.items():
            observations += [ListBegins(kind), Present(kind, tuple(found), read_us), ListEnds(kind, read_us)]
        return observations

    def _objects(self) -> dict[Kind, list[Seen]]:
        """Return what the files hold, by kind; unusable objects are counted and left out."""
        objects: dict[Kind, list[Seen]] = {kind: [] for kind in KINDS}
        malformed: list[str] = []
        for item in _items(self._path):
            kind = KIND_OF.get(item.get("kind", ""))
            if kind is None:
                continue
            try:
                objects[kind].append(seen(kind, item, self._cluster, self._labels))
            except MalformedError as error:
                self._metrics.malformed(kind)
                malformed.append(str(error))
        if malformed:
            log.warning("objects_malformed", count=len(malformed), first=malformed[0])
        return objects

    def _say_broken(self, error: Exception) -> None:
        message = f"{type(error).__name__}: {error}"
        self._metrics.source_errors.labels("all", "unreadable").inc()
        if message != self._broken:
            log.warning("manifests_unreadable", path=str(self._path), error=message)
        self._broken = message


def _files(path: Path) -> list[Path]:
    return sorted(path.glob("*.json")) if path.is_dir() else [path]


def _stamp(path: Path) -> Stamp:
    """Return what changes when a file is written or replaced; OSError when one isn't there."""
    stats = [(str(file), file.stat()) for file in _files(path)]
    return tuple((name, stat.st_mtime_ns, stat.st_size, stat.st_ino) for name, stat in stats)


def _items(path: Path) -> Iterator[Any]:
    """Yield the objects of all files; ValueError when one holds no JSON objects."""
    for file in _files(path):
        document = orjson.loads(file.read_bytes())
        if not isinstance(document, dict):
            raise ValueError(f"{file.name} holds no JSON object")  # noqa: TRY004 (one error for broken files)
        items = document.get("items", [document])
        if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
            raise ValueError(f"{file.name}: items is no list of objects")
        yield from items
