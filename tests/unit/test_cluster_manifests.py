"""Manifest files as a source: read when they change, and never half."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import pytest

from collector.cluster.manifests import Manifests
from collector.cluster.metrics import Metrics
from collector.cluster.records import KINDS
from collector.cluster.state import Complete, ListBegins, ListEnds, Present
from collector.cluster.stop import Stop
from tests.objects import CLUSTER, listing, node, pod, service

if TYPE_CHECKING:
    from pathlib import Path

    from collector.cluster.state import Observation

SECOND_NS = 1_000_000_000
WRITTEN_NS = 1_795_334_400 * SECOND_NS


class Looks:
    """A manifest source on a folder, with a clock of its own that each look moves by a second."""

    def __init__(self, path: Path) -> None:
        self.now_ns = WRITTEN_NS + 10 * SECOND_NS
        self.metrics = Metrics()
        self.source = Manifests(
            path, cluster=CLUSTER, labels=(), stop=Stop(), now_ns=lambda: self.now_ns, metrics=self.metrics
        )

    def look(self) -> list[Observation]:
        """Return what the next look brings."""
        self.now_ns += SECOND_NS
        return self.source.poll(0)

    def errors(self) -> float | None:
        """Return how many looks failed."""
        return self.metrics.registry.get_sample_value(
            "podwire_watcher_source_errors_total", {"kind": "all", "reason": "unreadable"}
        )


def write(path: Path, content: Any, written_ns: int = WRITTEN_NS) -> None:
    """Write JSON or raw text, with a time of change."""
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    os.utime(path, ns=(written_ns, written_ns))


def names(observations: list[Observation]) -> dict[str, list[str]]:
    """Return the names of the objects handed over, by kind."""
    return {
        one.kind: [seen.record["name"] for seen in one.objects]
        for one in observations
        if isinstance(one, Present)
    }


def test_first_look_hands_over_all_kinds_whole(tmp_path: Path) -> None:
    """Each kind is a complete list, followed by the time just before the files were looked at."""
    write(tmp_path / "m.json", listing(pod("a"), service("s"), node("n"), {"kind": "ConfigMap"}))
    looks = Looks(tmp_path / "m.json")
    observations = looks.look()
    assert names(observations) == {"pods": ["a"], "services": ["s"], "nodes": ["n"]}
    for kind in KINDS:
        mine = [type(one) for one in observations if one.kind == kind]
        assert mine == [ListBegins, Present, ListEnds, Complete]
        assert Complete(kind, looks.now_ns // 1000) in observations


def test_unchanged_files_are_complete_again_without_objects(tmp_path: Path) -> None:
    """The watermark goes on although nothing is read."""
    write(tmp_path / "m.json", listing(pod("a")))
    looks = Looks(tmp_path / "m.json")
    looks.look()
    assert looks.look() == [Complete(kind, looks.now_ns // 1000) for kind in KINDS]


@pytest.mark.parametrize("change", ["time", "size", "replaced"])
def test_changed_file_is_read_again(tmp_path: Path, change: str) -> None:
    """A newer time, another size or another inode tells of a change."""
    file = tmp_path / "m.json"
    write(file, listing(pod("a")))
    looks = Looks(file)
    looks.look()
    if change == "replaced":
        write(tmp_path / "new", listing(pod("b")))
        (tmp_path / "new").rename(file)
    else:
        write(file, listing(pod("bb" if change == "size" else "b")), WRITTEN_NS + (change == "time"))
    assert names(looks.look())["pods"] != ["a"]


def test_recently_written_file_is_read_once_more(tmp_path: Path) -> None:
    """File times tick coarsely: a second write in the same tick would go unseen."""
    file = tmp_path / "m.json"
    looks = Looks(file)
    written_ns = looks.now_ns + SECOND_NS - 1
    write(file, listing(pod("a")), written_ns)
    looks.look()
    with file.open("r+") as same_inode:
        same_inode.write(json.dumps(listing(pod("b"))))
    os.utime(file, ns=(written_ns, written_ns))
    assert names(looks.look())["pods"] == ["b"]
    assert names(looks.look()) == {}


def test_folder_is_read_as_one(tmp_path: Path) -> None:
    """All JSON files count, lists and single objects; other files don't; a new file is a change."""
    write(tmp_path / "1.json", listing(pod("a")))
    write(tmp_path / "2.json", node("n"))
    write(tmp_path / "note.txt", "not JSON")
    looks = Looks(tmp_path)
    assert names(looks.look()) == {"pods": ["a"], "services": [], "nodes": ["n"]}
    write(tmp_path / "3.json", listing(pod("c")))
    assert names(looks.look())["pods"] == ["a", "c"]


@pytest.mark.parametrize(
    "broken",
    ['{"items": [', "[]", '{"items": {"a": 1}}', '{"items": [1]}', None],
    ids=["cut", "array", "items", "item", "missing"],
)
def test_broken_file_keeps_the_last_good_state(tmp_path: Path, broken: str | None) -> None:
    """Neither objects nor a watermark come from a file that can't be read; once mended it goes on."""
    file = tmp_path / "m.json"
    write(file, listing(pod("a")))
    looks = Looks(file)
    looks.look()
    if broken is None:
        file.unlink()
    else:
        write(file, broken, WRITTEN_NS + 1)
    assert looks.look() == []
    assert looks.look() == []
    assert looks.errors() == 2
    assert looks.source.unhealthy() is not None
    write(file, listing(pod("b")), WRITTEN_NS + 2)
    assert names(looks.look())["pods"] == ["b"]
    assert looks.source.unhealthy() is None


def test_unusable_object_is_counted_and_its_neighbours_kept(tmp_path: Path) -> None:
    """One bad pod doesn't hide the others."""
    write(tmp_path / "m.json", listing(pod("a", meta={"uid": None}), {"kind": "Pod"}, pod("b")))
    looks = Looks(tmp_path / "m.json")
    assert names(looks.look())["pods"] == ["b"]
    labels = {"kind": "pods", "reason": "malformed"}
    assert looks.metrics.registry.get_sample_value("podwire_watcher_dropped_objects_total", labels) == 2


def test_stopping_ends_the_wait(tmp_path: Path) -> None:
    """A look that waits is given up at once."""
    write(tmp_path / "m.json", listing())
    stop = Stop()
    source = Manifests(
        tmp_path / "m.json",
        cluster=CLUSTER,
        labels=(),
        stop=stop,
        now_ns=lambda: WRITTEN_NS,
        metrics=Metrics(),
    )
    source.poll(3600)
    stop.request()
    assert source.poll(3600) == []
