"""Knows which pod and container each cgroup id belongs to, and each network namespace that has one pod only.

Owns that memory and its journal `cgroups.jsonl`, which a restarted collector reads when pinned probes went on: the
kernel tells a name once. Never asks /proc or Kubernetes. Fed by probes.py, asked by the run loop.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from collector.node.abi import Owner as OwnerKind
from collector.node.cgroup_paths import NO_UID, NOBODY, Owner, owner_of
from collector.node.columns import Owners

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from collector.node.ring import Records

JOURNAL_NAME = "cgroups.jsonl"
NETNS_MAX = 65_536
UNSURE = b""
"""Stands for a network namespace with more than one pod, or with processes outside pods."""


class Journal:
    """The names that were told since boot, one JSON object a line: boot_id, id, path.

    Without a folder it keeps nothing: probes that are not pinned leave no successor who could read it.
    """

    def __init__(self, folder: Path | None, boot_id: str) -> None:
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / JOURNAL_NAME if folder else None
        self._boot_id = boot_id
        self.lines = 0

    def read(self) -> dict[int, str]:
        """Return the paths by cgroup id that were told since this boot; a torn last line is left out."""
        paths: dict[int, str] = {}
        self.lines = 0
        if self._path is None or not self._path.exists():
            return paths
        for line in self._path.read_text(encoding="ascii", errors="replace").splitlines():
            self.lines += 1
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if isinstance(entry, dict) and entry.get("boot_id") == self._boot_id:
                paths[int(entry["id"])] = str(entry["path"])
        return paths

    def append(self, paths: Iterable[tuple[int, str]]) -> None:
        """Add names; in the page cache on return, so they survive the process but not the boot."""
        if self._path is None:
            return
        with self._path.open("a", encoding="ascii") as file:
            self.lines += self._write(file, paths)

    def replace(self, paths: Iterable[tuple[int, str]]) -> None:
        """Make `paths` the whole content."""
        if self._path is None:
            return
        fresh = self._path.with_suffix(".new")
        with fresh.open("w", encoding="ascii") as file:
            self.lines = self._write(file, paths)
        fresh.rename(self._path)

    def _write(self, file: Any, paths: Iterable[tuple[int, str]]) -> int:
        lines = [
            json.dumps({"boot_id": self._boot_id, "id": cgroup, "path": path}) + "\n"
            for cgroup, path in paths
        ]
        file.write("".join(lines))
        return len(lines)


def path_of(name: np.void) -> str:
    """Return the path that one struct podwire_cgroup_name tells; bytes that are not UTF-8 become surrogates."""
    levels = [bytes(level).partition(b"\0")[0] for level in name["names"][: int(name["levels"])]]
    return "/" + os.fsdecode(b"/".join(level for level in reversed(levels) if level))


class Cgroups:
    """Answers whose a cgroup id is, for arrays of ids.

    Attributes:
        known_max: how many cgroups are remembered; above it the longest unasked are forgotten. Must be well above
            the kernel's own memory of what it told (`named_cgroups`).
        told_again: names that came although they were known: the kernel's memory of what it told is too small.
        journal_error: why a name could not be kept for a successor; None while all could. Costs nothing now.
    """

    def __init__(self, journal: Journal, known_max: int, host_netns: Iterable[int] = ()) -> None:
        self.known_max = known_max
        self.told_again = 0
        self.journal_error: str | None = None
        self._journal = journal
        self._known: dict[int, tuple[str, Owner]] = {}
        self._pods_of_netns: dict[int, bytes] = dict.fromkeys(host_netns, UNSURE)

    def restore(self) -> None:
        """Take over what an earlier process was told, when its probes are still there."""
        self._known = {cgroup: (path, owner_of(path)) for cgroup, path in self._journal.read().items()}

    def forget(self) -> None:
        """Start without names: fresh probes will tell all of them again."""
        self._known = {}
        self._journal.replace(())

    def learn(self, names: Records) -> None:
        """Take over records of the names ring; written to the journal on return."""
        if not len(names):
            return
        paths = {int(name["cgroup_id"]): path_of(name) for name in names}
        try:
            self._journal.append(paths.items())
        except OSError as error:
            self.journal_error = str(error)
        for cgroup, path in paths.items():
            self.told_again += cgroup in self._known
            self._known.pop(cgroup, None)
            self._known[cgroup] = (path, owner_of(path))
        while len(self._known) > self.known_max:
            del self._known[next(iter(self._known))]
        if self._journal.lines > 2 * self.known_max:
            self._journal.replace((cgroup, path) for cgroup, (path, _) in self._known.items())

    def path(self, cgroup_id: int) -> str | None:
        """Return the path of a cgroup, None if it was never told."""
        known = self._known.get(cgroup_id)
        return known[0] if known else None

    def lookup(self, ids: npt.NDArray[np.uint64]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
        """Return the pod UIDs (N, 16) and container ids (N, 32) of N cgroup ids; zeros where there is none."""
        unique, places = np.unique(ids, return_inverse=True)
        owners = [self._touch(int(cgroup)) for cgroup in unique]
        uids = np.frombuffer(b"".join(owner.pod_uid for owner in owners), np.uint8).reshape(-1, 16)
        containers = np.frombuffer(b"".join(owner.container_id for owner in owners), np.uint8).reshape(-1, 32)
        return uids[places], containers[places]

    def _touch(self, cgroup: int) -> Owner:
        known = self._known.pop(cgroup, None)
        if known is None:
            return NOBODY
        self._known[cgroup] = known
        return known[1]

    def owners_of(self, events: Records) -> Owners:
        """Return who owns each event: by its cgroup, else by its network namespace if that has one pod only.

        Learns about namespaces from the events that have both.
        """
        uids, containers = self.lookup(events["cgroup_id"])
        owned = events["owner"] != OwnerKind.NONE
        told = owned & np.isin(events["cgroup_id"], list(self._known))
        self.learn_namespaces(events["netns_ino"][told], uids[told])
        lost = np.flatnonzero(~owned)
        if len(lost):
            uids[lost] = self._uids_of_namespaces(events["netns_ino"][lost])
        from_namespace = ~owned & uids.any(axis=1)
        return Owners(uids, containers, from_namespace)

    def learn_namespaces(self, netns: npt.NDArray[np.uint32], uids: npt.NDArray[np.uint8]) -> None:
        """Note which pods use which network namespaces; zeros, a process outside pods, make one unsure."""
        if not len(netns):
            return
        pairs = np.empty(len(netns), [("netns", "<u4"), ("uid", "V16")])
        pairs["netns"], pairs["uid"] = netns, np.ascontiguousarray(uids).view("V16")[:, 0]
        for raw in np.unique(np.ascontiguousarray(pairs).view("V20")):
            self._learn_namespace(int.from_bytes(raw.tobytes()[:4], "little"), raw.tobytes()[4:])

    def _learn_namespace(self, netns: int, uid: bytes) -> None:
        known = self._pods_of_netns.get(netns)
        if known is None:
            if len(self._pods_of_netns) < NETNS_MAX:
                self._pods_of_netns[netns] = UNSURE if uid == NO_UID else uid
        elif known != uid:
            self._pods_of_netns[netns] = UNSURE

    def _uids_of_namespaces(self, netns: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint8]:
        found = (self._pods_of_netns.get(int(one)) or NO_UID for one in netns)
        return np.frombuffer(b"".join(found), np.uint8).reshape(-1, 16)
