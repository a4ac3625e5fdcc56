"""A small network for the kernel tests: namespaces, sockets in them, processes in cgroups, events as they come.

Owns what it makes and removes it; never touches the host's own namespace. Called by the kernel tests.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from collector.node.abi import EVENT, ClosedBy, EventType, Owner, Role
from collector.node.cgroup_paths import V1_CONTROLLERS, choose_hierarchy
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from collector.node.probes import Probes
    from tests.kernel.scenarios import Scenario, Told

CLONE_NEWNET = 0x40000000
DEADLINE_S = 20
LIBC = ctypes.CDLL(None, use_errno=True)


def ip(*arguments: str, given: str = "") -> None:
    """Run iproute2's ip; `given` is its standard input."""
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, input=given)


class Namespace:
    """A network namespace with loopback up."""

    def __init__(self, name: str) -> None:
        self.name = f"pwt{os.getpid()}{name}"
        ip("netns", "add", self.name)
        self.path = f"/run/netns/{self.name}"
        self.inode = Path(self.path).stat().st_ino
        ip("-n", self.name, "link", "set", "lo", "up")

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Make sockets of this thread in the namespace; they stay there."""
        with Path("/proc/thread-self/ns/net").open("rb") as home, Path(self.path).open("rb") as there:
            assert LIBC.setns(there.fileno(), CLONE_NEWNET) == 0
            try:
                yield
            finally:
                assert LIBC.setns(home.fileno(), CLONE_NEWNET) == 0

    def socket(self, family: int = socket.AF_INET) -> socket.socket:
        """Return a TCP socket of this namespace, with a timeout."""
        with self.entered():
            made = socket.socket(family)
        made.settimeout(DEADLINE_S)
        return made

    def listen(self, address: str, backlog: int = 16) -> socket.socket:
        """Return a listening socket at any port; `::` takes IPv4 too."""
        listener = self.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
        if address == "::":
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind((address, 0))
        listener.listen(backlog)
        return listener

    def connect(self, address: str, port: int) -> socket.socket:
        """Return a connected socket."""
        client = self.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
        client.connect((address, port))
        return client

    def run(self, *command: str) -> None:
        """Run a command inside."""
        subprocess.run(["ip", "netns", "exec", self.name, *command], check=True, capture_output=True)

    def tcp_table(self) -> str:
        """Return the kernel's IPv4 TCP sockets there (/proc/net/tcp): states as two hex digits."""
        shown = subprocess.run(
            ["nsenter", f"--net={self.path}", "cat", "/proc/net/tcp"],
            check=True,
            capture_output=True,
            text=True,
        )
        return shown.stdout

    def sysctl(self, name: str, value: str) -> None:
        """Set one of the namespace's own sysctls."""
        self.run("sysctl", "-qw", f"{name}={value}")

    def remove(self) -> None:
        """Delete the namespace; sockets keep it alive until they are closed."""
        ip("netns", "del", self.name)


def wire(one: Namespace, two: Namespace, network: int) -> None:
    """Join two namespaces by a veth pair, .1 and .2 of 10.91.<network>.0/24 and fd91:<network>::/64."""
    ends = (f"pw{network}a{os.getpid() % 100000}", f"pw{network}b{os.getpid() % 100000}")
    ip("link", "add", ends[0], "netns", one.name, "type", "veth", "peer", "name", ends[1], "netns", two.name)
    for namespace, end, host in ((one, ends[0], 1), (two, ends[1], 2)):
        lines = (
            f"addr add 10.91.{network}.{host}/24 dev {end}",
            f"addr add fd91:{network}::{host}/64 dev {end} nodad",
            f"link set {end} up",
        )
        # one process instead of three: starting them is slow in a guest
        ip("-n", namespace.name, "-batch", "-", given="\n".join(lines))


class Cgroup:
    """A cgroup in every hierarchy that may hold containers, as a runtime makes it."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.folders = [root / path.lstrip("/") for root in _hierarchy_roots()]
        for folder in self.folders:
            folder.mkdir(parents=True, exist_ok=True)

    @property
    def id(self) -> int:
        """The kernel's id in the hierarchy that the probes ask."""
        return self.folders[0].stat().st_ino

    def remove(self) -> None:
        """Remove it and its parents, where nothing else is in them."""
        for folder, root in zip(self.folders, _hierarchy_roots(), strict=True):
            place = folder
            while place != root:
                with contextlib.suppress(OSError):
                    place.rmdir()
                place = place.parent


def _hierarchy_roots() -> list[Path]:
    """Return the mount points: first the hierarchy that the probes ask, then the others."""
    chosen, _ = choose_hierarchy(Path("/proc/self/cgroup").read_text())
    roots: dict[str, Path] = {}
    for line in Path("/proc/mounts").read_text().splitlines():
        _, place, kind, options = line.split()[:4]
        if kind == "cgroup2":
            roots["DEFAULT"] = Path(place)
        elif kind == "cgroup":
            roots |= {name.upper(): Path(place) for name in options.split(",") if name in V1_CONTROLLERS}
    first = roots.pop(chosen.name)
    return [first, *dict.fromkeys(root for root in roots.values() if root != first)]


PEER = """
import ctypes, os, socket, sys
command, address, port, uid, comm, *cgroups = sys.argv[1:]
for cgroup in cgroups:
    with open(cgroup + "/cgroup.procs", "w") as file:
        file.write(str(os.getpid()))
ctypes.CDLL(None).prctl(15, bytes.fromhex(comm), 0, 0, 0)
os.setuid(int(uid))
if command == "connect":
    peer = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    peer.connect((address, int(port)))
elif command == "accept":
    listener = socket.socket()
    listener.bind((address, int(port)))
    listener.listen()
    print("listening", flush=True)
    peer, _ = listener.accept()
print("ready", flush=True)
sys.stdin.readline()
peer.close()
print("closed", flush=True)
sys.stdin.readline()
"""


class Process:
    """A process of its own in a namespace and a cgroup, which connects or accepts once; it closes on `finish`."""

    def __init__(
        self, namespace: Namespace, cgroup: Cgroup | None, *, uid: int = 0, comm: bytes = b"peer"
    ) -> None:
        self.namespace, self.cgroup, self.uid, self.comm = namespace, cgroup, uid, comm
        self.process: subprocess.Popen[str] | None = None

    def start(self, command: str, address: str, port: int) -> None:
        """Run `connect` or `accept`."""
        cgroups = map(str, self.cgroup.folders if self.cgroup else ())
        words = [
            sys.executable,
            "-c",
            PEER,
            command,
            address,
            str(port),
            str(self.uid),
            self.comm.hex(),
            *cgroups,
        ]
        with self.namespace.entered():
            self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    @property
    def pid(self) -> int:
        """Process id in the test's own pid namespace."""
        assert self.process
        return self.process.pid

    def expect(self, word: str) -> None:
        """Wait until the process says a word."""
        assert self.process
        assert self.process.stdout
        assert self.process.stdout.readline() == word + "\n"

    def go_on(self) -> None:
        """Let the process take its next step."""
        assert self.process
        assert self.process.stdin
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def stop(self) -> None:
        """End the process, if it still runs."""
        if self.process:
            self.process.kill()
            self.process.communicate()


class Since:
    """Probes that several tests share, but for connections that began before: a namespace's inode comes again."""

    def __init__(self, probes: Probes) -> None:
        self._probes = probes
        self._since_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)

    def __getattr__(self, name: str) -> Any:
        """Return what the shared probes have."""
        return getattr(self._probes, name)

    def read(self, records_max: int) -> np.ndarray[Any, np.dtype[Any]]:
        """Return the next events of connections that began since."""
        events = self._probes.read(records_max)
        return events[np.maximum(events["start_ns"], events["established_ns"]) >= self._since_ns]


class Watch:
    """Collects the events of some namespaces; the machine's other traffic is left out."""

    def __init__(self, probes: Probes, *namespaces: Namespace) -> None:
        self.probes = probes
        self.tier = str(probes.tier)
        self.inodes = [namespace.inode for namespace in namespaces]
        self.events = np.empty(0, EVENT)
        self.received = 0

    def pull(self) -> np.ndarray[Any, np.dtype[Any]]:
        """Read and release what is there; return all events of the namespaces so far."""
        fresh = self.probes.read(100_000)
        self.probes.events.release(self.probes.events.read_position)
        self.received += len(fresh)
        self.events = np.concatenate([self.events, fresh[np.isin(fresh["netns_ino"], self.inodes)]])
        return self.events

    def stop(self) -> None:
        """Stop the probes and read what is left, so that the counts stand still."""
        self.probes.detach()
        self.pull()

    def select(self, kind: EventType, role: Role | None = None) -> list[np.void]:
        """Return the events so far of a type, and of a role."""
        events = self.pull()
        chosen = events["type"] == kind
        if role:
            chosen &= events["role"] == role
        return list(events[chosen])

    def one(self, kind: EventType, role: Role | None = None) -> np.void:
        """Wait for the only event of a type and role."""
        found: list[np.void] = until(lambda: self.select(kind, role), f"{kind.name} of {role}")
        assert len(found) == 1
        return found[0]

    def count(self, kind: EventType, role: Role | None, number: int) -> list[np.void]:
        """Wait for so many events of a type and role, and not more."""
        found: list[np.void] = until(
            lambda: len(self.select(kind, role)) >= number and self.select(kind, role),
            f"{number} times {kind.name}",
        )
        assert len(found) == number
        return found

    def tells(self, scenario: Scenario) -> None:
        """Wait for all that the two namespaces must tell of a scenario in this tier, and nothing else.

        The first namespace is the client's. All events of a connection must have one ISN pair, mirrored where both
        ends dialled; a failed connect has none.
        """
        watched = self.tier != "bcc" or "connect" not in self.probes.refused
        expected = [_lines(side) for side in scenario.expected(self.tier, connect_watched=watched)]
        number = sum(map(len, expected))
        with contextlib.suppress(AssertionError):
            until(lambda: len(self.pull()) >= number, scenario.name, DEADLINE_S)
        events = self.pull()
        sides = [events[events["netns_ino"] == inode] for inode in self.inodes[:2]]
        seen = [_seen_lines(side) for side in sides]
        assert seen == expected, f"told: {seen}\nexpected: {expected}"
        failed = events["type"] == EventType.CONNECT_FAILED
        pairs = {frozenset(pair(event)) for event in events[~failed]}
        assert len(pairs) == (not failed.all()), "one pair per connection"
        assert {pair(event) for event in events[failed]} <= {(0, 0)}


def _lines(events: tuple[Told, ...]) -> list[str]:
    """Return what an end must tell, a line per event, sorted: ends of a connection have no common order."""
    return sorted(
        f"{told.kind.name} by {told.closed_by.name} flags {told.flags} errno {told.error} "
        f"process {told.owner != 'none'} bytes {told.sent}/{told.received}"
        for told in events
    )


def _seen_lines(events: np.ndarray[Any, np.dtype[Any]]) -> list[str]:
    """Return what an end told, in the same form."""
    return sorted(
        f"{EventType(event['type']).name} by {ClosedBy(event['closed_by']).name} flags {event['flags']} "
        f"errno {event['error']} process {event['owner'] == Owner.PROCESS} "
        f"bytes {event['bytes_sent']}/{event['bytes_received']}"
        for event in events
    )


def pair(event: np.void) -> tuple[int, int]:
    """Return the event's ISN pair, from which tcp_key is made."""
    return int(event["client_isn"]), int(event["server_isn"])


def text(address: np.ndarray[Any, np.dtype[Any]]) -> str:
    """Return an event's address as text."""
    return socket.inet_ntop(socket.AF_INET6, bytes(address))
