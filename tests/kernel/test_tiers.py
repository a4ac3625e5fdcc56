"""Each tier that this kernel allows gives the same events; what one can't see is said here."""

from __future__ import annotations

import errno
import os
import socket
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from collector.errors import CapabilityError
from collector.node import tiers
from collector.node.abi import EventType, Owner, Role
from tests.kernel import uring
from tests.kernel.node import Watch, pair, text
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Callable

    from collector.node.probes import Probes
    from tests.kernel.node import Namespace, Process

CORE_TIERS = [name for name in tiers.NAMES if name != "bcc"]
SEES_URING = ("fentry", "kprobe")
TELLS_FAILED_ROUTES = [name for name in CORE_TIERS if name != "tp_btf"]
PORT = 7070
WAITING = 64
SYS_ACCEPT4 = "288"


@pytest.fixture
def open_tier(open_probes: Callable[..., Probes]) -> Callable[[str], Probes]:
    """Open a tier, or skip with the kernel's reason."""

    def start(tier: str, **options: object) -> Probes:
        try:
            return open_probes(tier=tier, **options)
        except CapabilityError as error:
            pytest.skip(str(error))

    return start


def test_best_tier_is_taken_and_every_better_one_has_its_reason(open_probes: Callable[..., Probes]) -> None:
    """Without a wish, no better tier than the one in use can be opened."""
    probes = open_probes()
    better = tiers.NAMES[: tiers.NAMES.index(probes.tier)]
    assert tuple(probes.refused) == better
    for name in better:
        with pytest.raises(CapabilityError):
            open_probes(tier=name)


@pytest.mark.parametrize("tier", CORE_TIERS)
@pytest.mark.parametrize("address", ["10.91.1.2", "fd91:1::2", "::ffff:10.91.1.2"])
def test_connection_is_told_by_both_ends(
    open_tier: Callable[[str], Probes], client: Namespace, server: Namespace, tier: str, address: str
) -> None:
    """CONNECT, ACCEPT and twice CLOSE, once each, with one pair and the owners."""
    watch = Watch(open_tier(tier), client, server)
    listener = server.listen("::")
    dialler = client.connect(address, listener.getsockname()[1])
    accepted, _ = listener.accept()
    for end in (dialler, accepted, listener):
        end.close()
    connect, accept = watch.one(EventType.CONNECT, Role.CLIENT), watch.one(EventType.ACCEPT, Role.SERVER)
    assert pair(connect) == pair(accept) != (0, 0)
    closes = watch.count(EventType.CLOSE, None, 2)
    assert {pair(close) for close in closes} == {pair(connect)}
    assert {close["owner"] for close in closes} == {Owner.PROCESS}
    assert len(watch.events) == 4


@pytest.mark.parametrize("tier", [name for name in CORE_TIERS if name != "tp_btf"])
def test_accepting_process_is_told_at_accept(
    open_tier: Callable[[str], Probes],
    make_process: Callable[..., Process],
    client: Namespace,
    server: Namespace,
    tier: str,
) -> None:
    """ACCEPT waits for the accept call and names its process; tier tp_btf, without that edge, does not wait."""
    watch = Watch(open_tier(tier), client, server)
    process = make_process(server, comm=b"taker")
    process.start("accept", "10.91.1.2", PORT)
    process.expect("listening")
    dialler = client.connect("10.91.1.2", PORT)
    accept = watch.one(EventType.ACCEPT)
    assert (accept["tgid"], bytes(accept["comm"]).rstrip(b"\0")) == (process.pid, b"taker")
    dialler.close()


@pytest.mark.parametrize("tier", [name for name in CORE_TIERS if name != "tp_btf"])
def test_accept_is_told_while_many_others_wait(
    open_tier: Callable[[str], Probes], client: Namespace, server: Namespace, tier: str
) -> None:
    """Callers blocked in accept hold the kernel's return probes: more of them than there are take nothing away."""
    watch = Watch(open_tier(tier), client, server)
    quiet, busy = server.listen("10.91.1.2"), server.listen("10.91.1.2")
    quiet.settimeout(None)
    waiting = [threading.Thread(target=fails, args=(quiet.accept,)) for _ in range(WAITING)]
    for thread in waiting:
        thread.start()
    until(lambda: blocked_threads() >= WAITING, "all threads in accept")
    dialler = client.connect("10.91.1.2", busy.getsockname()[1])
    accepted, _ = busy.accept()
    assert watch.one(EventType.ACCEPT)["tgid"] == os.getpid()
    quiet.shutdown(socket.SHUT_RDWR)
    for thread in waiting:
        thread.join()
    dialler.close()
    accepted.close()


def fails(call: Callable[[], object]) -> None:
    """Call what ends with an error."""
    with pytest.raises(OSError, match="Invalid argument"):
        call()


def blocked_threads() -> int:
    """Return how many of our threads wait in accept4."""
    calls = (task / "syscall" for task in Path("/proc/self/task").iterdir())
    return sum(call.read_text().split()[0] == SYS_ACCEPT4 for call in calls)


@pytest.mark.parametrize("tier", CORE_TIERS)
def test_accept_through_io_uring_is_told(
    open_tier: Callable[[str], Probes], client: Namespace, server: Namespace, tier: str
) -> None:
    """Once, with its process; where only the system calls are seen, at the close that shows whose it is."""
    watch = Watch(open_tier(tier), client, server)
    listener = server.listen("10.91.1.2")
    dialler = client.connect("10.91.1.2", listener.getsockname()[1])
    try:
        accepted = uring.accept(listener)
    except uring.NoUringError as error:
        pytest.skip(f"no io_uring: {error}")
    if tier in SEES_URING:
        assert watch.one(EventType.ACCEPT)["tgid"] == os.getpid()
    accepted.close()
    dialler.close()
    close = watch.one(EventType.CLOSE, Role.SERVER)
    assert (close["tgid"], close["flags"]) == (os.getpid(), 0)
    watch.one(EventType.ACCEPT)


@pytest.mark.parametrize("tier", TELLS_FAILED_ROUTES)
@pytest.mark.parametrize(
    ("family", "address"),
    [
        (socket.AF_INET, "198.51.100.9"),
        (socket.AF_INET6, "2001:db8::9"),
        (socket.AF_INET6, "::ffff:198.51.100.9"),
    ],
    ids=["v4", "v6", "mapped"],
)
def test_connect_without_a_route_is_told_once(
    open_tier: Callable[[str], Probes],
    client: Namespace,
    server: Namespace,
    tier: str,
    family: int,
    address: str,
) -> None:
    """No state changes, so the call's edge tells it: destination, errno, owner, bound port."""
    watch = Watch(open_tier(tier), client, server)
    dialler = client.socket(family)
    dialler.bind(("", 0))
    assert dialler.connect_ex((address, PORT)) == errno.ENETUNREACH
    event = watch.one(EventType.CONNECT_FAILED, Role.CLIENT)
    assert event["error"] == errno.ENETUNREACH
    assert text(event["remote_address"]) == (address if ":" in address else f"::ffff:{address}")
    assert (event["remote_port"], event["local_port"]) == (PORT, dialler.getsockname()[1])
    assert event["owner"] == Owner.PROCESS
    assert event["start_ns"] == event["time_ns"] > 0
    assert (event["netns_ino"], pair(event)) == (client.inode, (0, 0))
    assert event["socket_cookie"] > 0
    dialler.close()
    assert_nothing_more(watch, client, server, 1)


@pytest.mark.parametrize("tier", TELLS_FAILED_ROUTES)
@pytest.mark.parametrize(
    ("route", "error"),
    [("unreachable", errno.EHOSTUNREACH), ("prohibit", errno.EACCES), ("blackhole", errno.EINVAL)],
)
def test_forbidding_route_is_told_with_its_errno(
    open_tier: Callable[[str], Probes],
    client: Namespace,
    server: Namespace,
    tier: str,
    route: str,
    error: int,
) -> None:
    """Each kind of route that leads nowhere has its own errno (net/ipv4/fib_semantics.c, fib_props)."""
    watch = Watch(open_tier(tier), client, server)
    client.run("ip", "route", "add", route, "198.51.100.0/24")
    assert client.socket().connect_ex(("198.51.100.9", PORT)) == error
    assert watch.one(EventType.CONNECT_FAILED)["error"] == error


@pytest.mark.parametrize("tier", CORE_TIERS)
def test_failure_that_changed_the_state_is_not_told_twice(
    open_tier: Callable[[str], Probes], client: Namespace, server: Namespace, tier: str
) -> None:
    """Refused, no free port, and an answer that comes late and is asked for again: the edge adds nothing."""
    watch = Watch(open_tier(tier), client, server)
    assert client.socket().connect_ex(("10.91.1.2", PORT)) == errno.ECONNREFUSED
    watch.count(EventType.CONNECT_FAILED, None, 1)
    client.sysctl("net.ipv4.ip_local_port_range", "40000 40001")
    listener = server.listen("10.91.1.2")
    taken = [client.connect("10.91.1.2", listener.getsockname()[1]) for _ in range(2)]
    crowded = client.socket()
    assert crowded.connect_ex(("10.91.1.2", listener.getsockname()[1])) == errno.EADDRNOTAVAIL
    watch.count(EventType.CONNECT_FAILED, None, 2)
    server.run("nft", "add table ip t; add chain ip t c { type filter hook input priority 0; policy drop; }")
    server.run("nft", f"add rule ip t c tcp dport {PORT} reject with icmp type host-unreachable")
    late = client.socket()
    late.setblocking(False)
    for end in taken:
        end.close()
    client.sysctl("net.ipv4.ip_local_port_range", "40002 40100")
    assert late.connect_ex(("10.91.1.2", PORT)) == errno.EINPROGRESS
    asked = until(lambda: (late.connect_ex(("10.91.1.2", PORT)) - errno.EALREADY) or None, "an answer")
    assert asked + errno.EALREADY == errno.EHOSTUNREACH
    watch.count(EventType.CONNECT_FAILED, None, 3)
    server.run("nft", "flush ruleset")
    assert crowded.connect_ex(("198.51.100.9", PORT)) == errno.ENETUNREACH
    assert_nothing_more(watch, client, server, 4 if tier in TELLS_FAILED_ROUTES else 3)


@pytest.mark.parametrize("tier", CORE_TIERS)
def test_wrong_call_is_no_failed_connection(
    open_tier: Callable[[str], Probes], client: Namespace, server: Namespace, tier: str
) -> None:
    """A connected socket, another family, a datagram socket: nobody was dialled."""
    watch = Watch(open_tier(tier), client, server)
    listener = server.listen("10.91.1.2")
    dialler = client.connect("10.91.1.2", listener.getsockname()[1])
    assert [dialler.connect_ex(("10.91.1.2", PORT)) for _ in range(2)] == [
        0,
        errno.EISCONN,
    ]  # 0: it has a timeout
    with client.entered():
        datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    assert datagrams.connect_ex(("198.51.100.9", PORT)) == errno.ENETUNREACH
    datagrams.close()
    dialler.close()
    assert_nothing_more(watch, client, server, 0)


def assert_nothing_more(watch: Watch, client: Namespace, server: Namespace, failed: int) -> None:
    """Make one more connection, and find so many failed ones when it has been seen."""
    listener = server.listen("10.91.1.2")
    before = len(watch.select(EventType.CONNECT, Role.CLIENT))
    client.connect("10.91.1.2", listener.getsockname()[1]).close()
    until(lambda: len(watch.select(EventType.CONNECT, Role.CLIENT)) > before, "the last connection")
    assert len(watch.select(EventType.CONNECT_FAILED)) == failed
