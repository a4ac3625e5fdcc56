"""Probes that outlive their collector: pinned, taken over, replaced, removed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from collector.errors import SettingsError
from collector.node import core
from collector.node.abi import EventType, Role
from tests.kernel.node import Watch, pair
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from collector.node.probes import Probes
    from tests.kernel.node import Cgroup, Namespace, Process

HOLDER = """
import sys, time
from pathlib import Path
from collector.node.probes import ProbeOptions, Probes
probes = Probes.open(ProbeOptions(state_dir=Path(sys.argv[1]), pin_dir=Path(sys.argv[2])))
assert "pinning" not in probes.refused, probes.refused
print("open", flush=True)
sys.stdin.readline()
read = probes.read(100000)
print("read", flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def pin_dir(tmp_path: Path) -> Iterator[Path]:
    """A folder on a bpffs of its own."""
    place = tmp_path / "bpffs"
    place.mkdir()
    subprocess.run(["mount", "-t", "bpf", "bpf", place], check=True)
    yield place / "podwire"
    subprocess.run(["umount", "--lazy", place], check=True)


@pytest.fixture
def holder(tmp_path: Path, pin_dir: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that opened pinned probes; it reads at a word, and never releases."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "state"), str(pin_dir)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "open\n"
    yield process
    process.kill()
    process.communicate()


def connect_once(client: Namespace, server: Namespace) -> None:
    """Make one connection and close it."""
    listener = server.listen("10.91.1.2")
    dialler = client.connect("10.91.1.2", listener.getsockname()[1])
    accepted, _ = listener.accept()
    dialler.close()
    accepted.close()
    listener.close()


def test_nothing_is_lost_over_a_killed_collector(
    holder: subprocess.Popen[str],
    open_probes: Callable[..., Probes],
    make_cgroup: Callable[[str], Cgroup],
    make_process: Callable[..., Process],
    client: Namespace,
    server: Namespace,
    pin_dir: Path,
) -> None:
    """Read but unreleased, unread, and made while no collector ran: a successor gets all of it, with its names."""
    listener = server.listen("10.91.1.2")
    process = make_process(client, make_cgroup("/before"))
    process.start("connect", "10.91.1.2", listener.getsockname()[1])
    process.expect("ready")
    assert holder.stdin
    assert holder.stdout
    holder.stdin.write("\n")
    holder.stdin.flush()
    assert holder.stdout.readline() == "read\n"
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    connect_once(client, server)
    process.stop()

    watch = Watch(open_probes(pin_dir=pin_dir), client, server)
    assert watch.probes.reused
    assert {pair(event) for event in watch.count(EventType.CONNECT, Role.CLIENT, 2)} == {
        pair(event) for event in watch.count(EventType.CLOSE, Role.CLIENT, 2)
    }
    told = {watch.probes.cgroups.path(int(event["cgroup_id"])) for event in watch.events}
    assert any(path and path.endswith("/before") for path in told)
    counters = watch.probes.counters()
    assert counters["lost_ring_full"] == 0
    connect_once(client, server)
    watch.count(EventType.CLOSE, Role.CLIENT, 3)
    listener.close()


def test_released_events_do_not_come_again(
    open_probes: Callable[..., Probes], client: Namespace, server: Namespace, pin_dir: Path
) -> None:
    """A successor starts where its predecessor released."""
    first = open_probes(pin_dir=pin_dir)
    watch = Watch(first, client, server)
    connect_once(client, server)
    watch.count(EventType.CLOSE, None, 2)
    first.close(detach=False)
    connect_once(client, server)
    second = Watch(open_probes(pin_dir=pin_dir), client, server)
    assert second.probes.reused
    second.count(EventType.CLOSE, None, 2)


def test_probes_with_other_settings_are_replaced(
    open_probes: Callable[..., Probes], client: Namespace, server: Namespace, pin_dir: Path
) -> None:
    """Pins of another ring size are removed, and fresh probes work."""
    open_probes(pin_dir=pin_dir).close(detach=False)
    watch = Watch(open_probes(pin_dir=pin_dir, ring_bytes=1 << 16), client, server)
    assert not watch.probes.reused
    assert len(list(pin_dir.iterdir())) == 1
    connect_once(client, server)
    watch.count(EventType.CLOSE, None, 2)


def test_incomplete_pins_are_replaced(open_probes: Callable[..., Probes], pin_dir: Path) -> None:
    """A collector that died while it pinned leaves nothing that is trusted."""
    open_probes(pin_dir=pin_dir).close(detach=False)
    next(pin_dir.glob("*/link_state_2")).unlink()
    assert not open_probes(pin_dir=pin_dir).reused


def test_detach_removes_the_pins(open_probes: Callable[..., Probes], pin_dir: Path) -> None:
    """After a clean end no probe runs and no pin is left."""
    probes = open_probes(pin_dir=pin_dir)
    assert list(pin_dir.iterdir())
    probes.close()
    assert not pin_dir.exists()


def test_removed_folder_ends_the_probes(
    open_probes: Callable[..., Probes], client: Namespace, server: Namespace, pin_dir: Path
) -> None:
    """After an orderly end the probes run on; `rm -r` of the folder is all that it takes to be rid of them."""
    probes = open_probes(pin_dir=pin_dir)
    counters = os.dup(probes._descriptors["counters"])

    def attempts() -> int:
        before = core.sum_over_cpus(counters, 1)[0]
        connect_once(client, server)
        return core.sum_over_cpus(counters, 1)[0] - before

    probes.close(detach=False)
    assert attempts() >= 4
    subprocess.run(["rm", "-r", pin_dir], check=True)
    until(lambda: attempts() == 0, "probes that stand still")
    os.close(counters)


def test_names_are_told_again_where_the_journal_is_gone(
    open_probes: Callable[..., Probes],
    make_cgroup: Callable[[str], Cgroup],
    make_process: Callable[..., Process],
    client: Namespace,
    server: Namespace,
    pin_dir: Path,
    tmp_path: Path,
) -> None:
    """A successor with an empty state folder learns the name of a cgroup that its predecessor was told."""
    listener = server.listen("10.91.1.2", 64)
    cgroup = make_cgroup("/told")

    def told_path(watch: Watch) -> str | None:
        process = make_process(client, cgroup)
        process.start("connect", "10.91.1.2", listener.getsockname()[1])
        process.expect("ready")
        connect = watch.one(EventType.CONNECT, Role.CLIENT)
        return watch.probes.cgroups.path(int(connect["cgroup_id"]))

    first = open_probes(pin_dir=pin_dir)
    path = told_path(Watch(first, client))
    assert path
    assert path.endswith(cgroup.path)
    first.close(detach=False)
    second = open_probes(pin_dir=pin_dir, state_dir=tmp_path / "other")
    assert second.reused
    assert told_path(Watch(second, client)) == path
    listener.close()


def test_second_collector_is_refused(open_probes: Callable[..., Probes], pin_dir: Path) -> None:
    """Two collectors on one ring would each see a part."""
    open_probes(pin_dir=pin_dir)
    with pytest.raises(SettingsError, match="Another collector"):
        open_probes(pin_dir=pin_dir)


def test_pin_dir_that_is_no_bpffs_is_refused(open_probes: Callable[..., Probes], tmp_path: Path) -> None:
    """Said before anything is loaded, with the remedy."""
    with pytest.raises(SettingsError, match="mount -t bpf"):
        open_probes(pin_dir=tmp_path / "ordinary")
