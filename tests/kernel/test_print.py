"""`collector node --print`: raw events as JSON lines, without Kafka, key file or node name."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from schemas import codec
from tests.kernel.printing import START_DEADLINE_S, Printing, Surrounding, environment

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.kernel.node import Cgroup, Namespace, Process

CONTAINER = "c0ffee" + 58 * "0"
UID = "1e85b6a5-0d6c-4b2b-9b9e-1f0d3b6f3a11"


@pytest.fixture
def printing() -> Iterator[Printing]:
    """A collector that prints, with its probes attached."""
    made = Printing(Surrounding())
    made.log("started")
    yield made
    made.stop()


def connect_and_close(client: Namespace, server: Namespace, count: int = 1) -> None:
    """Make connections of 5 bytes there and close them, the client first."""
    listener = server.listen("10.91.1.2")
    for _ in range(count):
        dialler = client.connect("10.91.1.2", listener.getsockname()[1])
        accepted, _ = listener.accept()
        dialler.sendall(b"hello")
        assert accepted.recv(5) == b"hello"
        dialler.close()
        assert accepted.recv(1) == b""
        accepted.close()
    listener.close()


def test_both_ends_are_printed_with_their_facts(
    printing: Printing,
    client: Namespace,
    server: Namespace,
    make_cgroup: Callable[[str], Cgroup],
    make_process: Callable[..., Process],
) -> None:
    """Process, pod, container, addresses as text; the same tcp_key on both ends; TcpEvent's fields."""
    listener = server.listen("10.91.1.2")
    port = listener.getsockname()[1]
    cgroup = make_cgroup(f"/kubepods/burstable/pod{UID}/{CONTAINER}")
    process = make_process(client, cgroup, uid=1234, comm=b"cl\xffent")
    process.start("connect", "10.91.1.2", port)
    process.expect("ready")
    accepted, _ = listener.accept()
    opened = printing.of(client.inode, "CONNECT")
    assert {
        "role": "CLIENT",
        "outcome": "ESTABLISHED",
        "owner_source": "PROCESS",
        "pid": process.pid,
        "uid": 1234,
        "comm": "cl\\xffent",
        "pod_uid": UID,
        "container_id": CONTAINER,
        "local_address": "10.91.1.1",
        "remote_address": "10.91.1.2",
        "remote_port": port,
        "cgroup_id": cgroup.id,
        "bytes_sent": None,
    }.items() <= opened.items()
    assert opened["cgroup_path"].endswith(cgroup.path)
    assert printing.of(server.inode, "ACCEPT")["tcp_key"] == opened["tcp_key"]
    fields = {field["name"]: field for field in json.loads(codec.text("RawBatch"))["fields"]}
    names = [field["name"] for field in fields["events"]["type"]["items"]["fields"]]
    assert list(opened) == [*names, "cgroup_path"]
    accepted.close()
    listener.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_signal_drains_and_ends_well(
    printing: Printing, client: Namespace, server: Namespace, number: signal.Signals
) -> None:
    """Everything that happened before the signal is printed, and the books are in the last log line."""
    connect_and_close(client, server, 50)
    assert printing.end(number) == 0
    kinds = [(one["type"], one["role"]) for one in printing.events if one["netns_ino"] == client.inode]
    assert kinds.count(("CONNECT", "CLIENT")) == kinds.count(("CLOSE", "CLIENT")) == 50
    books = printing.log("finished")
    lost = books["lost_ring_full"] + books["lost_socket_map_full"]
    assert books["printed"] == len(printing.events) == books["attempted"] - lost


def test_lines_are_unaffected_by_a_collector_beside_it(
    printing: Printing, client: Namespace, server: Namespace
) -> None:
    """Two at once see the same connection, each with its own probes and its own random key."""
    other = Printing(Surrounding())
    try:
        other.log("started")
        connect_and_close(client, server)
        keys = {one.of(client.inode, "CLOSE")["tcp_key"] for one in (printing, other)}
        assert len(keys) == 2
        assert all(one.log("random_key") for one in (printing, other))
        cookies = {one.of(client.inode, "CLOSE")["socket_cookie"] for one in (printing, other)}
        assert len(cookies) == 1
    finally:
        other.stop()


def test_reader_that_leaves_ends_it_well(client: Namespace, server: Namespace) -> None:
    """`| head -1` is no error."""
    words = [sys.executable, "-m", "collector", "node", "--print"]
    pipe = subprocess.PIPE
    process = subprocess.Popen(words, env=environment(), stdout=pipe, stderr=pipe, text=True)
    assert process.stdout
    assert process.stderr
    try:
        for line in process.stderr:
            if "started" in line:
                break
        process.stdout.close()
        connect_and_close(client, server)
        assert "reader_gone" in process.stderr.read()
        assert process.wait(START_DEADLINE_S) == 0
    finally:
        process.kill()
        process.stderr.close()
        process.wait()
