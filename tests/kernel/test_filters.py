"""What a filter leaves out costs nothing: not attempted, no room in the ring, not counted as untracked."""

from __future__ import annotations

import errno
import socket
import struct
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from collector.errors import SettingsError
from collector.node.abi import EventType, Role
from collector.node.filters import Filters
from tests.kernel.node import Watch
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from collector.node.probes import Probes
    from tests.kernel.node import Cgroup, Namespace, Process

    Open = Callable[..., Watch]

V4, V6 = "10.91.1.2", "fd91:1::2"
LEFT_OUT, FOLLOWED = 7171, 7272
RECORD_BYTES = 176
RESET = struct.pack("ii", 1, 0)


@pytest.fixture
def open_filtered(open_probes: Callable[..., Probes], client: Namespace, server: Namespace) -> Open:
    """Open probes for client and server alone, so that the kernel's totals are the test's own."""

    def start(*, filter_own: bool = False, tier: str = "auto", **lists: str) -> Watch:
        lists.setdefault("only_netns", f"{client.path},{server.inode}")
        probes = open_probes(filters=Filters(**lists), filter_own=filter_own, tier=tier)
        return Watch(probes, client, server)

    return start


def talk(client: Namespace, server: Namespace, address: str, port: int, *, reset: bool = False) -> None:
    """Make one connection to a listener at that port and end it, the client first."""
    listener = server.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((address, port))
    listener.listen()
    dialler = client.connect(address, port)
    accepted, _ = listener.accept()
    if reset:
        dialler.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    dialler.close()
    assert reset or accepted.recv(1) == b""
    accepted.close()
    listener.close()


def expect_only_followed(watch: Watch, client: Namespace, server: Namespace, address: str = V4) -> None:
    """Make one connection that is followed: its four events are all that the kernel ever tried."""
    talk(client, server, address, FOLLOWED)
    watch.count(EventType.CLOSE, None, 2)
    expect_totals(watch, 4)


def expect_totals(watch: Watch, events: int) -> None:
    """Check the kernel's own counts after the probes have stopped."""
    watch.probes.detach()
    watch.pull()
    assert watch.probes.events.producer_position() == events * RECORD_BYTES
    counters = watch.probes.counters()
    assert counters.pop("attempted") == events == watch.received
    assert set(counters.values()) == {0}


@pytest.mark.parametrize(
    "lists",
    [
        {"not_ports": str(LEFT_OUT)},
        {"not_ports": "7000-7199"},
        {"only_ports": str(FOLLOWED)},
        {"only_ports": "7000-7999", "not_ports": str(LEFT_OUT)},
    ],
    ids=str,
)
@pytest.mark.parametrize("address", [V4, V6])
def test_server_port_that_is_left_out_costs_nothing(
    open_filtered: Open, client: Namespace, server: Namespace, lists: dict[str, str], address: str
) -> None:
    """Opened, refused, closed and reset; both ends go by the server's port."""
    watch = open_filtered(**lists)
    talk(client, server, address, LEFT_OUT)
    talk(client, server, address, LEFT_OUT, reset=True)
    dialler = client.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    assert dialler.connect_ex((address, LEFT_OUT)) == errno.ECONNREFUSED
    assert client.socket().connect_ex(("198.51.100.9", LEFT_OUT)) == errno.ENETUNREACH
    expect_only_followed(watch, client, server, address)


@pytest.mark.parametrize(
    ("lists", "left_out", "followed"),
    [
        ({"not_cidrs": "10.91.1.0/24"}, V4, V6),
        ({"not_cidrs": "10.91.1.1/32"}, V4, V6),
        ({"only_cidrs": "fd91:1::/64"}, V4, V6),
        ({"not_cidrs": "fd91:1::2"}, V6, V4),
        ({"only_cidrs": "192.0.2.0/24,10.0.0.0/8"}, V6, V4),
        ({"only_cidrs": "::/0", "not_cidrs": "::ffff:0:0/96"}, V4, V6),
        ({"not_cidrs": "0.0.0.0/0,fd00::/8", "only_cidrs": "fd91:1::/64"}, V4, V6),
    ],
    ids=str,
)
def test_network_that_is_left_out_costs_nothing(
    open_filtered: Open,
    client: Namespace,
    server: Namespace,
    lists: dict[str, str],
    left_out: str,
    followed: str,
) -> None:
    """Either end's address decides, the longest prefix first."""
    watch = open_filtered(**lists)
    talk(client, server, left_out, LEFT_OUT)
    dialler = client.socket(socket.AF_INET6 if ":" in left_out else socket.AF_INET)
    assert dialler.connect_ex((left_out, LEFT_OUT)) == errno.ECONNREFUSED
    expect_only_followed(watch, client, server, followed)


@pytest.mark.parametrize("wanted", [True, False], ids=["only", "not"])
def test_network_namespace_that_is_left_out_costs_nothing(
    open_filtered: Open, client: Namespace, server: Namespace, wanted: bool
) -> None:
    """Of a connection between two namespaces one half is followed."""
    watch = open_filtered(only_netns=client.path) if wanted else open_filtered(not_netns=server.path)
    talk(client, server, V4, FOLLOWED)
    watch.count(EventType.CLOSE, Role.CLIENT, 1)
    assert set(watch.events["netns_ino"]) == {client.inode}
    if wanted:
        expect_totals(watch, 2)


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_loopback_costs_nothing(
    open_filtered: Open, client: Namespace, server: Namespace, address: str
) -> None:
    """The default."""
    watch = open_filtered()
    talk(client, client, address, LEFT_OUT)
    expect_only_followed(watch, client, server)


def test_own_connections_cost_nothing(
    open_filtered: Open, client: Namespace, server: Namespace, make_process: Callable[..., Process]
) -> None:
    """Neither end that this process holds is told, nor its failures; another process's are."""
    watch = open_filtered(filter_own=True)
    talk(client, server, V4, LEFT_OUT)
    talk(client, server, V6, LEFT_OUT, reset=True)
    assert client.socket().connect_ex((V4, LEFT_OUT)) == errno.ECONNREFUSED
    assert client.socket().connect_ex(("198.51.100.9", LEFT_OUT)) == errno.ENETUNREACH
    listener = server.listen(V4)
    process = make_process(client)
    process.start("connect", V4, listener.getsockname()[1])
    accepted, _ = listener.accept()
    process.expect("ready")
    process.go_on()
    process.expect("closed")
    assert accepted.recv(1) == b""
    accepted.close()
    close = watch.one(EventType.CLOSE, Role.CLIENT)
    assert close["tgid"] == process.pid
    expect_totals(watch, 2)


def test_own_server_end_is_told_where_accept_is_not_seen(
    open_filtered: Open, client: Namespace, server: Namespace
) -> None:
    """Tier tp_btf announces a server's socket before it knows whose it is."""
    watch = open_filtered(filter_own=True, tier="tp_btf")
    talk(client, server, V4, LEFT_OUT)
    watch.count(EventType.CLOSE, Role.SERVER, 1)
    expect_totals(watch, 2)


@pytest.mark.parametrize("nested", [False, True], ids=["itself", "below"])
@pytest.mark.parametrize("wanted", [True, False], ids=["only", "not"])
def test_cgroup_that_is_left_out_costs_nothing(
    open_filtered: Open,
    client: Namespace,
    server: Namespace,
    make_cgroup: Callable[[str], Cgroup],
    make_process: Callable[..., Process],
    wanted: bool,
    nested: bool,
) -> None:
    """The cgroup and all below it; of a connection between two cgroups one half is followed."""
    top = make_cgroup("/filtered")
    inside = make_cgroup("/filtered/pod/container") if nested else top
    outside = make_cgroup("/other")
    folder = str(top.folders[0])
    watch = open_filtered(only_cgroups=folder) if wanted else open_filtered(not_cgroups=folder)
    taker, dialler = make_process(server, outside), make_process(client, inside)
    followed = (dialler, Role.CLIENT) if wanted else (taker, Role.SERVER)
    taker.start("accept", V4, LEFT_OUT)
    taker.expect("listening")
    dialler.start("connect", V4, LEFT_OUT)
    for process in (taker, dialler):
        process.expect("ready")
    for process in (dialler, taker):
        process.go_on()
        process.expect("closed")
    close = watch.one(EventType.CLOSE, followed[1])
    assert close["tgid"] == followed[0].pid
    until(lambda: watch.pull().size == 2, "both events of the half")
    expect_totals(watch, 2)


HOLDER = """
import sys
from pathlib import Path
from collector.node.filters import Filters
from collector.node.probes import ProbeOptions, Probes
filters = Filters(only_netns=sys.argv[3])
Probes.open(ProbeOptions(state_dir=Path(sys.argv[1]), pin_dir=Path(sys.argv[2]), filters=filters, filter_own=True))
print("open", flush=True)
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


def test_successor_leaves_out_its_own_connections(
    open_probes: Callable[..., Probes], client: Namespace, server: Namespace, tmp_path: Path, pin_dir: Path
) -> None:
    """Probes that were taken over learn whom they now serve."""
    lists = f"{client.path},{server.inode}"
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "state"), str(pin_dir), lists]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == "open\n"
        holder.kill()
    probes = open_probes(pin_dir=pin_dir, filters=Filters(only_netns=lists), filter_own=True)
    if "pinning" in probes.refused:
        pytest.skip(probes.refused["pinning"])
    assert probes.reused
    talk(client, server, V4, LEFT_OUT)
    expect_totals(Watch(probes, client, server), 0)


def test_filter_of_a_missing_folder_is_a_settings_error(open_filtered: Open) -> None:
    """Said with the path, before anything is loaded."""
    with pytest.raises(SettingsError, match="/no/such/cgroup"):
        open_filtered(not_cgroups="/no/such/cgroup")
