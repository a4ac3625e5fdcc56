"""The table of scenarios: what is done, which events each end must tell, and what a probe tier can't see of them.

Pure data and rules. Used by the kernel tests on every kernel and tier (`Watch.tells`), and published:
`python -m tests.kernel.scenarios` writes docs/kernels.md.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from collector.node.abi import ClosedBy, EventType, Flag

CORE_TIERS = ("fentry", "kprobe", "tracepoint", "tp_btf")
"""The tiers that need no compiler: every kernel of the matrix must allow all of them."""

CELL = "podwire-cell"
"""What a scenario's line of a kernel test starts with; then tier, outcome and scenario, a tab between."""

Owner = Literal["process", "edge", "none"]
"""Whether the event names a process: in every tier, only where accept is watched, in none."""


@dataclass(frozen=True)
class Told:
    """One event that an end must tell.

    Attributes:
        kind: its type.
        closed_by: CLOSE: who ended it.
        flags: a sum of `Flag`.
        error: errno, positive; 0 for none.
        owner: who can name the process.
        sent: CLOSE: payload bytes that the application sent.
        received: CLOSE: payload bytes that it got.
        by_edge: no state changes, so only tiers that watch connect calls tell it.
    """

    kind: EventType
    closed_by: ClosedBy = ClosedBy.NONE
    flags: int = 0
    error: int = 0
    owner: Owner = "process"
    sent: int = 0
    received: int = 0
    by_edge: bool = False

    def text(self) -> str:
        """Return it in words, as in the published table."""
        words = [self.kind.name]
        if self.closed_by != ClosedBy.NONE:
            words.append(self.closed_by.name)
        words += [flag.name.replace("_", " ").lower() for flag in Flag if self.flags & flag]
        if self.error:
            words.append(errno.errorcode[self.error])
        if self.sent or self.received:
            words.append(f"{self.sent}/{self.received} B")
        if self.owner == "none":
            words.append("(no process)")
        return " ".join(words)


@dataclass(frozen=True)
class Scenario:
    """One row.

    Attributes:
        name: unique; what tests and matrices call it.
        done: what happens, for a reader.
        client: what the dialling end tells, in order.
        server: what the listening end tells; of two that dial, the other.
        later: tier -> what it tells later than the others.
        server_at_handshake: what the server tells where accept is not watched, if the rules don't say it.
    """

    name: str
    done: str
    client: tuple[Told, ...]
    server: tuple[Told, ...] = ()
    later: tuple[tuple[str, str], ...] = ()
    server_at_handshake: tuple[Told, ...] | None = None

    def expected(
        self, tier: str, *, connect_watched: bool = True
    ) -> tuple[tuple[Told, ...], tuple[Told, ...]]:
        """Return what client and server tell in a tier; tier bcc watches connect calls where it has kprobes."""
        server = self.server
        if tier == "tp_btf":
            connect_watched = False
            server = self.server_at_handshake or tuple(_unseen_accept(told) for told in server)
        client = tuple(told for told in self.client if connect_watched or not told.by_edge)
        return client, server

    def unseen(self, tier: str, *, kprobes: bool = True) -> str:
        """Return what the tier can't see, in words, empty if it sees all; of tier bcc also where it has no kprobes."""
        client, server = self.expected(tier, connect_watched=kprobes)
        lost = [told.text() for told in self.client if told not in client]
        lost += [
            f"the process of {told.kind.name}"
            for told in self.server
            if _loses_owner(told) and tier == "tp_btf"
        ]
        if server == self.server_at_handshake:
            lost = [f"told instead: {_texts(server)}"]
        accept_watched_by = tier if kprobes else "tracepoint"
        return "; ".join(lost + [text for name, text in self.later if name == accept_watched_by])


def _loses_owner(told: Told) -> bool:
    return told.owner == "edge"


def _unseen_accept(told: Told) -> Told:
    return replace(told, owner="none") if _loses_owner(told) else told


def _texts(events: tuple[Told, ...]) -> str:
    return ", ".join(told.text() for told in events)


# ---- the events that most rows share ----

CONNECT = Told(EventType.CONNECT)
ACCEPT = Told(EventType.ACCEPT, owner="edge")


def _close(
    by: ClosedBy, flags: int = 0, error: int = 0, sent: int = 0, received: int = 0, owner: Owner = "process"
) -> Told:
    return Told(EventType.CLOSE, by, flags, error, owner, sent, received)


def _failed(error: int, *, by_edge: bool = False) -> tuple[Told, ...]:
    return (Told(EventType.CONNECT_FAILED, error=error, by_edge=by_edge),)


LOCAL, REMOTE, BOTH, TIMER = ClosedBy.LOCAL, ClosedBy.REMOTE, ClosedBy.BOTH, ClosedBy.TIMER
RESET = _close(LOCAL, Flag.RESET_LOCAL)
WAS_RESET = _close(REMOTE, Flag.RESET_REMOTE, errno.ECONNRESET)
GIVEN_UP = _close(LOCAL, Flag.RESET_LOCAL)


def _talk(
    name: str, done: str, sent: int = 0, answered: int = 0, later: tuple[tuple[str, str], ...] = ()
) -> Scenario:
    """Return a row in which the client closes first, and all goes well."""
    client = _close(LOCAL, sent=sent, received=answered)
    server = _close(REMOTE, sent=answered, received=sent)
    return Scenario(name, done, (CONNECT, client), (ACCEPT, server), later)


BYTES, ANSWER = 70_000, 1_234
_LATE = (("tracepoint", "ACCEPT comes when the process first closes"),)

TABLE = (
    _talk("IPv4", "70,000 bytes, an answer of 1,234, the client closes", BYTES, ANSWER),
    _talk("IPv6", "the same over IPv6", BYTES, ANSWER),
    _talk("dual stack", "IPv4 to a listener on ::", BYTES, ANSWER),
    _talk("v4-mapped", "an IPv6 socket dials ::ffff:a.b.c.d", BYTES, ANSWER),
    Scenario(
        "closed by the server",
        "the server's FIN is first",
        (CONNECT, _close(REMOTE)),
        (ACCEPT, _close(LOCAL)),
    ),
    _talk("half-close", "shutdown(SHUT_WR), then the server's answer", 8, 11),
    _talk("Fast Open", "data in the SYN", 5),
    _talk("Fast Open, accepted early", "accept comes before the handshake's last ACK", 5),
    _talk("syncookies", "the server keeps no state before the last ACK", 5),
    _talk("non-blocking", "connect returns EINPROGRESS"),
    Scenario(
        "simultaneous open",
        "two connect to each other, both SYNs on the wire",
        (CONNECT, _close(LOCAL)),
        (CONNECT, _close(REMOTE)),
    ),
    Scenario("self-connect", "a socket connects to its own address and port", (CONNECT, _close(BOTH))),
    _talk("accept", "accept(2)"),
    _talk("accept4", "accept4(2)"),
    _talk("accept by io_uring", "IORING_OP_ACCEPT", later=_LATE),
    _talk("accept after fork", "the process that accepts inherited the listener"),
    _talk("owners and pods", "both ends in a container's cgroup, each end's events name process and pod"),
    _talk("killed process", "kill -9 of the client"),
    _talk("DNAT", "the dialled Service address is rewritten on the way", 7),
    _talk("masquerade", "the client's address is rewritten on the way", 7),
    _talk("DNAT and masquerade", "both", 7),
    _talk("DNAT and masquerade, IPv6", "both", 7),
    Scenario(
        "reset by the client",
        "SO_LINGER 0, close",
        (CONNECT, RESET),
        (ACCEPT, replace(WAS_RESET, owner="edge")),
    ),
    Scenario(
        "unread data",
        "the server closes with data unread",
        (CONNECT, replace(WAS_RESET, sent=10)),
        (ACCEPT, replace(RESET, received=10)),
    ),
    Scenario(
        "reset by the server after FIN",
        "shutdown(SHUT_WR), then the server's SO_LINGER 0 and close",
        (CONNECT, _close(LOCAL, Flag.RESET_REMOTE, errno.ECONNRESET)),
        (ACCEPT, _close(REMOTE, Flag.RESET_LOCAL)),
    ),
    Scenario(
        "reset while the FIN is under way",
        "the client's FIN is lost, the server resets",
        (CONNECT, _close(LOCAL, Flag.RESET_REMOTE, errno.ECONNRESET)),
        (ACCEPT, _close(LOCAL, Flag.RESET_LOCAL)),
    ),
    Scenario(
        "data after close",
        "the server has closed both ways, then data comes",
        (CONNECT, _close(REMOTE, Flag.RESET_REMOTE, errno.EPIPE, sent=8)),
        (ACCEPT, _close(LOCAL)),
    ),
    Scenario(
        "disconnect",
        "connect(AF_UNSPEC)",
        (CONNECT, RESET),
        (ACCEPT, replace(WAS_RESET, owner="edge")),
    ),
    Scenario(
        "never accepted",
        "the listener is closed before accept",
        (CONNECT, WAS_RESET),
        (_close(LOCAL, Flag.RESET_LOCAL | Flag.NEVER_ACCEPTED, owner="none"),),
        server_at_handshake=(replace(ACCEPT, owner="none"), replace(RESET, owner="none")),
    ),
    Scenario(
        "user timeout",
        "data is never acknowledged",
        (CONNECT, _close(TIMER, 0, errno.ETIMEDOUT, sent=13)),
        (ACCEPT,),
    ),
    Scenario(
        "keepalive death",
        "probes are never answered",
        (CONNECT, _close(TIMER, 0, errno.ETIMEDOUT)),
        (ACCEPT,),
    ),
    Scenario(
        "FIN never acknowledged",
        "the client closes, nothing comes back",
        (CONNECT, _close(LOCAL, 0, errno.ETIMEDOUT)),
        (ACCEPT,),
    ),
    Scenario(
        "crossing FINs",
        "both close, both FINs on the wire",
        (CONNECT, _close(BOTH)),
        (ACCEPT, _close(BOTH)),
    ),
    Scenario("refused", "no listener", _failed(errno.ECONNREFUSED)),
    Scenario("refused, IPv6", "no listener", _failed(errno.ECONNREFUSED)),
    Scenario("host unreachable", "ICMP answers", _failed(errno.EHOSTUNREACH)),
    Scenario("net unreachable", "ICMP answers", _failed(errno.ENETUNREACH)),
    Scenario("port unreachable", "ICMP answers", _failed(errno.ECONNREFUSED)),
    Scenario("timeout", "nobody answers", _failed(errno.ETIMEDOUT)),
    Scenario("aborted", "close while connecting", _failed(0)),
    Scenario("aborted by kill -9", "while connecting", _failed(0)),
    Scenario("aborted by a send timeout", "SO_SNDTIMEO passes while connecting", _failed(0)),
    Scenario("no free port", "all local ports to that peer are taken", _failed(errno.EADDRNOTAVAIL)),
    Scenario("no route", "connect returns ENETUNREACH at once", _failed(errno.ENETUNREACH, by_edge=True)),
    Scenario("no route, IPv6", "the same", _failed(errno.ENETUNREACH, by_edge=True)),
    Scenario(
        "unreachable route", "connect returns EHOSTUNREACH at once", _failed(errno.EHOSTUNREACH, by_edge=True)
    ),
)
SCENARIOS = {scenario.name: scenario for scenario in TABLE}
assert len(SCENARIOS) == len(TABLE)


# ---- the published page ----

PAGE = Path(__file__).parents[2] / "docs" / "kernels.md"
HEAD = """\
# Kernels, tiers and scenarios

Written by `python -m tests.kernel.scenarios` (`make docs`), from the table that the kernel tests check. Don't edit.

    make kernels                             # Debian's 5.10, 6.1, 6.12 and newest 7.x, each in a QEMU guest
    make kernels KERNELS=6.1,6.16            # others: the newest of each version line in Debian's suites
    make kernels KERNELS="6.12 --suites bookworm-backports"    # from other Debian suites than the usual
    PODWIRE_TEST_TIER=tp_btf .venv/bin/python -m pytest tests/kernel    # the running kernel; several with commas

`make kernels` runs every row in each of the tiers fentry, kprobe, tracepoint and tp_btf, on 6.1 also in tier bcc with
its headers (3 GB of memory), in one boot per kernel, and prints kernel x tier x scenario. `ok`: both ends told
exactly the events below, by type, who closed, flags, errno, payload bytes, whether the process is named, and one pair
of initial sequence numbers. `less`: exactly what the tier can see of them. On 5.10 and 6.12 the tests of books,
filters, pins, privileges, EXISTING and PROGRESS follow, in the tier that the kernel chooses; a second table counts how
they ended. Exit status 0 means that every cell is `ok` or `less`, and that no test failed.

Each end's events come in order; LOCAL and REMOTE are as seen from that end; bytes are sent/received. "(no process)":
there is none. Tiers fentry and kprobe see everything. So does bcc of these rows, where it has kprobes, but EXISTING and
PROGRESS it never tells, and it sweeps nothing.

A guest is an emulated machine, also where there is a /dev/kvm: it boots in 9 to 15 s, and plays the scenarios in 4 to 5
minutes on two idle cores; tier bcc and the other tests take about as long again, each. With KVM it would be less; where
it was tried (a virtual machine without vmx or svm among its CPU's flags) Debian's kernels hang before their first
line, so nothing could be measured. A tier that the kernel refuses shows as SKIPPED, and that is not good: Debian's
kernels allow all four. `make test` plays six rows in tiers fentry, kprobe and tp_btf on 5.10 and 7.x.

"""


def page() -> str:
    """Return docs/kernels.md."""
    rows = [
        (
            "scenario",
            "what is done",
            "client tells",
            "server tells",
            "tier tracepoint",
            "tier tp_btf",
            "tier bcc",
        ),
        ("---",) * 7,
        *(
            (
                scenario.name,
                scenario.done,
                _texts(scenario.client),
                _texts(scenario.server) or "-",
                scenario.unseen("tracepoint") or "all",
                _unseen_text(scenario.unseen("tp_btf")),
                _bcc_text(scenario),
            )
            for scenario in TABLE
        ),
    ]
    return HEAD + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _bcc_text(scenario: Scenario) -> str:
    assert not scenario.unseen("bcc"), "with kprobes it sees all, which is what the page says"
    unseen = scenario.unseen("bcc", kprobes=False)
    return f"without kprobes: {unseen if scenario.later else _unseen_text(unseen)}" if unseen else "all"


def _unseen_text(unseen: str) -> str:
    if not unseen or unseen.startswith("told instead"):
        return unseen or "all"
    return f"not {unseen}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
