"""Every way in which a process gets a connection from a listener."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

import pytest

from collector.node.abi import EventType, Role
from tests.kernel import uring
from tests.kernel.node import DEADLINE_S, LIBC

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.kernel.node import Namespace, Watch
    from tests.kernel.scenarios import Scenario


def by_accept(listener: socket.socket) -> socket.socket:
    """Take the next connection with accept(2), which Python itself never calls."""
    listener.settimeout(None)
    return socket.socket(fileno=LIBC.accept(listener.fileno(), None, None))


def by_accept4(listener: socket.socket) -> socket.socket:
    """Take the next connection with accept4(2)."""
    return listener.accept()[0]


def by_uring(listener: socket.socket) -> socket.socket:
    """Take the next connection with IORING_OP_ACCEPT."""
    try:
        return uring.accept(listener)
    except uring.NoUringError as error:
        # Built without it, or forbidden by a sysctl or seccomp; CI fails on this skip, the guests' kernels have it.
        pytest.skip(f"no io_uring: {error}")


@pytest.mark.parametrize(
    "accept",
    [
        pytest.param(by_accept, id="accept", marks=pytest.mark.scenario("accept")),
        pytest.param(by_accept4, id="accept4", marks=pytest.mark.scenario("accept4")),
        pytest.param(by_uring, id="io_uring", marks=pytest.mark.scenario("accept by io_uring")),
    ],
)
def test_accept_is_told_however_it_is_called(
    watch: Watch,
    client: Namespace,
    server: Namespace,
    scenario: Scenario,
    accept: Callable[[socket.socket], socket.socket],
) -> None:
    """One ACCEPT, of the process that called."""
    listener = server.listen("10.91.1.2")
    dialler = client.connect("10.91.1.2", listener.getsockname()[1])
    accepted = accept(listener)
    accepted.settimeout(DEADLINE_S)
    dialler.close()
    assert accepted.recv(1) == b""
    accepted.close()
    watch.tells(scenario)
    assert watch.one(EventType.CLOSE, Role.SERVER)["tgid"] == os.getpid()
    listener.close()


@pytest.mark.scenario("accept after fork")
def test_accept_by_a_child_is_the_childs(
    watch: Watch, client: Namespace, server: Namespace, scenario: Scenario
) -> None:
    """A process that forked after listen accepts: it is the owner, not the one that listened."""
    listener = server.listen("10.91.1.2")
    child = os.fork()
    if child == 0:
        accepted = by_accept(listener)
        os.read(accepted.fileno(), 1)
        os._exit(0)
    dialler = client.connect("10.91.1.2", listener.getsockname()[1])
    dialler.close()
    assert os.waitpid(child, 0)[1] == 0
    watch.tells(scenario)
    assert watch.one(EventType.CLOSE, Role.SERVER)["tgid"] == child
    listener.close()
