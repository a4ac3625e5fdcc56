"""The memory of cgroups and network namespaces, and its journal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from collector.node.abi import CGROUP_NAME, EVENT, Owner
from collector.node.cgroups import JOURNAL_NAME, Cgroups, Journal

if TYPE_CHECKING:
    from pathlib import Path

UID = "0a1b2c3d-4e5f-6071-8293-a4b5c6d7e8f9"
CONTAINER = "0123456789abcdef" * 4
POD = bytes.fromhex(UID.replace("-", ""))
OTHER_POD = bytes(range(16))
BOOT = "boot-1"
Names = np.ndarray[Any, np.dtype[Any]]


def told(*cgroups: tuple[int, bytes]) -> Names:
    """Make records as the probes do: the cgroup first, its parents after it."""
    names = np.zeros(len(cgroups), CGROUP_NAME)
    for name, (cgroup, path) in zip(names, cgroups, strict=True):
        levels = [*path.strip(b"/").split(b"/")[::-1], b""][:7]
        name["cgroup_id"], name["levels"] = cgroup, len(levels)
        for place, level in enumerate(levels):
            name["names"][place, : len(level)] = np.frombuffer(level, np.uint8)
    return names


def pod_path(uid: str = UID, container: str = CONTAINER) -> bytes:
    """Return a container's path under the cgroupfs driver."""
    return f"/kubepods/burstable/pod{uid}/{container}".encode()


def events(*rows: tuple[int, int, int]) -> Names:
    """Make events of (cgroup id, netns, owner)."""
    made = np.zeros(len(rows), EVENT)
    for event, (cgroup, netns, owner) in zip(made, rows, strict=True):
        event["cgroup_id"], event["netns_ino"], event["owner"] = cgroup, netns, owner
    return made


@pytest.fixture
def cgroups(tmp_path: Path) -> Cgroups:
    """An empty memory of four cgroups; network namespace 1 is the host's."""
    return Cgroups(Journal(tmp_path, BOOT), 4, host_netns=[1])


def test_lookup_answers_in_the_order_of_the_ids(cgroups: Cgroups) -> None:
    """Repeated, unknown and podless ids get their own rows, zeros where there is no pod."""
    cgroups.learn(told((7, pod_path()), (9, b"/system.slice/sshd.service")))
    uids, containers = cgroups.lookup(np.array([9, 7, 0, 7, 8], np.uint64))
    assert [row.tobytes() for row in uids] == [bytes(16), POD, bytes(16), POD, bytes(16)]
    known = bytes.fromhex(CONTAINER)
    assert [row.tobytes() for row in containers] == [bytes(32), known, bytes(32), known, bytes(32)]


def test_lookup_of_nothing_is_empty(cgroups: Cgroups) -> None:
    """No ids, no rows, and the shapes hold."""
    uids, containers = cgroups.lookup(np.array([], np.uint64))
    assert (uids.shape, containers.shape) == ((0, 16), (0, 32))


def test_path_keeps_bytes_that_are_not_utf8(cgroups: Cgroups, tmp_path: Path) -> None:
    """A cgroup's name is any bytes; they survive the journal."""
    cgroups.learn(told((7, b"/caf\xe9/\xff")))
    again = Cgroups(Journal(tmp_path, BOOT), 4)
    again.restore()
    assert again.path(7) == cgroups.path(7) == "/caf\udce9/\udcff"


def test_restored_memory_knows_what_was_told(cgroups: Cgroups, tmp_path: Path) -> None:
    """A successor of the same boot reads the journal."""
    cgroups.learn(told((7, pod_path())))
    again = Cgroups(Journal(tmp_path, BOOT), 4)
    again.restore()
    assert again.lookup(np.array([7], np.uint64))[0].tobytes() == POD


def test_name_that_comes_again_is_counted(cgroups: Cgroups) -> None:
    """The kernel drops the least recently used of what it told; that is seen by what it tells again."""
    cgroups.learn(told((7, pod_path()), (8, b"/a")))
    assert cgroups.told_again == 0
    cgroups.learn(told((7, pod_path())))
    assert cgroups.told_again == 1


def test_journal_of_another_boot_is_not_believed(cgroups: Cgroups, tmp_path: Path) -> None:
    """Ids start anew with the kernel."""
    cgroups.learn(told((7, pod_path())))
    again = Cgroups(Journal(tmp_path, "boot-2"), 4)
    again.restore()
    assert again.path(7) is None


def test_torn_last_line_is_left_out(cgroups: Cgroups, tmp_path: Path) -> None:
    """A process killed while it wrote leaves the other lines readable."""
    cgroups.learn(told((7, pod_path()), (8, b"/a")))
    journal = tmp_path / JOURNAL_NAME
    journal.write_bytes(journal.read_bytes()[:-9])
    again = Cgroups(Journal(tmp_path, BOOT), 4)
    again.restore()
    assert again.path(7) is not None
    assert again.path(8) is None


def test_forgotten_memory_starts_with_an_empty_journal(cgroups: Cgroups, tmp_path: Path) -> None:
    """Fresh probes tell all names again."""
    cgroups.learn(told((7, pod_path())))
    cgroups.forget()
    assert cgroups.path(7) is None
    assert (tmp_path / JOURNAL_NAME).read_bytes() == b""


def test_longest_unasked_cgroup_is_forgotten_first(cgroups: Cgroups, tmp_path: Path) -> None:
    """The memory is bounded, a cgroup in use stays, and the journal is rewritten before it grows without end."""
    cgroups.learn(told((1, pod_path())))
    for cgroup in range(2, 20):
        cgroups.learn(told((cgroup, b"/churn")))
        cgroups.lookup(np.array([1], np.uint64))
    assert cgroups.path(1) is not None
    assert cgroups.path(2) is None
    assert len((tmp_path / JOURNAL_NAME).read_text().splitlines()) <= 8


def test_unwritable_journal_does_not_stop_learning(cgroups: Cgroups, tmp_path: Path) -> None:
    """A full disk costs the names after a restart, not the events now."""
    (tmp_path / JOURNAL_NAME).mkdir()
    cgroups.learn(told((7, pod_path())))
    assert cgroups.path(7) is not None
    assert cgroups.journal_error


def test_sure_namespace_names_its_pod(cgroups: Cgroups) -> None:
    """An event without owner gets the one pod that was seen in its network namespace, and says how."""
    cgroups.learn(told((7, pod_path())))
    owners = cgroups.owners_of(events((7, 50, Owner.PROCESS), (0, 50, Owner.NONE), (0, 51, Owner.NONE)))
    assert [row.tobytes() for row in owners.pod_uids] == [POD, POD, bytes(16)]
    assert list(owners.from_namespace) == [False, True, False]
    assert not owners.container_ids[1].any()


@pytest.mark.parametrize("second", [pod_path(OTHER_POD.hex()), b"/system.slice/sshd.service"])
def test_shared_namespace_names_no_pod(cgroups: Cgroups, second: bytes) -> None:
    """Two pods, or a pod and a process outside pods, in one network namespace: never sure again."""
    cgroups.learn(told((7, pod_path()), (8, second)))
    cgroups.owners_of(events((7, 50, Owner.PROCESS), (8, 50, Owner.CGROUP)))
    cgroups.owners_of(events((7, 50, Owner.PROCESS)))
    assert not cgroups.owners_of(events((0, 50, Owner.NONE))).pod_uids.any()


def test_host_namespace_names_no_pod(cgroups: Cgroups) -> None:
    """A hostNetwork pod shares the host's namespace with everything else there."""
    cgroups.learn(told((7, pod_path())))
    owners = cgroups.owners_of(events((7, 1, Owner.PROCESS), (0, 1, Owner.NONE)))
    assert not owners.pod_uids[1].any()


def test_unknown_cgroup_does_not_spoil_its_namespace(cgroups: Cgroups) -> None:
    """An owner whose name was not told yet says nothing about the namespace."""
    cgroups.learn(told((7, pod_path())))
    cgroups.owners_of(events((99, 50, Owner.PROCESS), (7, 50, Owner.PROCESS)))
    assert cgroups.owners_of(events((0, 50, Owner.NONE))).pod_uids.tobytes() == POD
