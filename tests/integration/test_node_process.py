"""`python -m collector node` as a process: exit codes, waiting, an orderly end, and a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
import uuid
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from collector.errors import SettingsError, TopicError
from collector.node.probes import DEFAULT_OBJECT
from podwire import topics
from podwire.demo.broker import free_port
from schemas import catalog, codec
from tests.integration.test_node_delivery import batches_of, messages
from tests.kernel.node import Namespace
from tests.kernel.node import wire as join
from tests.waiting import until

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator

    from tests.conftest import RunningBroker

ROOT = Path(__file__).parents[2]
DEADLINE_S = 60.0
PORT = 8099

needs_kernel = pytest.mark.skipif(
    os.geteuid() != 0 or not DEFAULT_OBJECT.exists() or not Path("/sys/kernel/btf/vmlinux").exists(),
    reason="needs root, BTF and the built BPF object",
)


class Collector:
    """A collector process with its log."""

    def __init__(self, folder: Path, bootstrap: str, **settings: object) -> None:
        self._log = folder / f"log-{uuid.uuid4().hex[:6]}"
        key = folder / "key"
        key.write_text("00" * 16)
        self.node = str(settings.pop("node", f"node-{uuid.uuid4().hex[:8]}"))
        values = {
            "cluster": "test",
            "node": self.node,
            "bootstrap": bootstrap,
            "key_file": key,
            "state_dir": folder / "state",
            **settings,
        }
        environment = {f"PODWIRE_{name.upper()}": str(value) for name, value in values.items()}
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "collector", "node"],
                cwd=ROOT,
                env={**os.environ, **environment},
                stderr=log,
            )

    def lines(self, event: str) -> list[dict[str, Any]]:
        """Return the log lines of one event."""
        lines = [json.loads(line) for line in self._log.read_text().splitlines() if line.startswith("{")]
        return [line for line in lines if line["event"] == event]

    def said(self) -> str:
        """Return the whole log."""
        return self._log.read_text()

    def await_line(self, event: str) -> dict[str, Any]:
        """Return the first log line of that event, waiting for it."""
        until(lambda: self.lines(event) or self.process.poll() is not None, event, said=self.said)
        assert self.lines(event), self.said()
        return self.lines(event)[0]

    def end(self, how: signal.Signals = signal.SIGTERM) -> int:
        """Signal the process and return its exit status."""
        self.process.send_signal(how)
        return self.process.wait(DEADLINE_S)


@pytest.fixture
def bootstrap(broker: RunningBroker) -> str:
    """The shared broker with the topics."""
    topics.create(broker.bootstrap, partitions=4)
    return broker.bootstrap


def ip(*arguments: str) -> None:
    """Run the `ip` command."""
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def wire() -> Iterator[tuple[str, str]]:
    """Two network namespaces with a link between 198.18.77.1 and 198.18.77.2."""
    tag = uuid.uuid4().hex[:5]
    names = (f"pw-c-{tag}", f"pw-s-{tag}")
    with ExitStack() as cleanup:
        for name in names:
            ip("netns", "add", name)
            cleanup.callback(ip, "netns", "del", name)
        ip(
            "link",
            "add",
            f"c{tag}",
            "netns",
            names[0],
            "type",
            "veth",
            "peer",
            "name",
            f"s{tag}",
            "netns",
            names[1],
        )
        for number, (name, link) in enumerate(zip(names, (f"c{tag}", f"s{tag}"), strict=True), 1):
            ip("-n", name, "addr", "add", f"198.18.77.{number}/24", "dev", link)
            ip("-n", name, "link", "set", link, "up")
        yield names


@pytest.fixture
def pins(tmp_path: Path) -> Iterator[Path]:
    """A bpffs of its own; what is pinned there goes with it."""
    place = tmp_path / "bpf"
    place.mkdir()
    subprocess.run(["mount", "-t", "bpf", "bpf", str(place)], check=True)
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def connect(wire: tuple[str, str], times: int) -> None:
    """Make that many connections, one after the other, each echoed and closed by both ends."""
    server = (
        f"import socket; s = socket.create_server(('198.18.77.2', {PORT}), backlog=64); print('up', flush=True)\n"
        f"for _ in range({times}):\n c, _ = s.accept(); c.sendall(c.recv(9)); c.close()"
    )
    client = (
        f"import socket\nfor _ in range({times}):\n s = socket.create_connection(('198.18.77.2', {PORT}), 9)\n"
        " s.sendall(b'x'); s.recv(9); s.close()"
    )
    enter = ["ip", "netns", "exec"]
    with subprocess.Popen(
        [*enter, wire[1], sys.executable, "-c", server], stdout=subprocess.PIPE
    ) as listening:
        assert listening.stdout is not None
        listening.stdout.readline()
        subprocess.run([*enter, wire[0], sys.executable, "-c", client], check=True, timeout=DEADLINE_S)
        assert listening.wait(DEADLINE_S) == 0


def kinds(bootstrap: str, node: str) -> dict[str, int]:
    """Return how many connections between the test's namespaces each event type was seen for, repeats aside."""
    seen = {
        (event["type"], event["role"], event["tcp_key"])
        for batch in batches_of(bootstrap, node)
        for event in batch["events"]
        if PORT in (event["port"], event["remote_port"])
        and event["remote_address"][-4:-1] == bytes((198, 18, 77))
    }
    found: dict[str, int] = {}
    for kind, role, _ in seen:
        found[f"{kind} {role}"] = found.get(f"{kind} {role}", 0) + 1
    return found


def expected(times: int) -> dict[str, int]:
    """Return what `connect` makes."""
    return dict.fromkeys(("CONNECT CLIENT", "ACCEPT SERVER", "CLOSE CLIENT", "CLOSE SERVER"), times)


@pytest.mark.parametrize(
    "wrong",
    [{"key_file": "/nowhere"}, {"partitions": "none"}, {"cluster": ""}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_wrong_setting_has_an_exit_code_and_says_what_to_do(tmp_path: Path, wrong: dict[str, str]) -> None:
    """Nothing is touched before all settings are right."""
    collector = Collector(tmp_path, "127.0.0.1:1", **wrong)
    assert collector.process.wait(DEADLINE_S) == SettingsError.exit_code
    assert "Operator action" in collector.lines("fatal")[0]["message"]


@needs_kernel
def test_topic_with_other_partitions_is_refused(bootstrap: str, tmp_path: Path) -> None:
    """A collector that would hash into other partitions than its peers does not start."""
    collector = Collector(tmp_path, bootstrap, partitions=3)
    assert collector.process.wait(DEADLINE_S) == TopicError.exit_code


@needs_kernel
def test_kafka_that_is_not_there_is_waited_for_and_said_once(tmp_path: Path) -> None:
    """Without Kafka the probes run and the process is healthy; one line says what is missing; SIGTERM ends it."""
    collector = Collector(tmp_path, f"127.0.0.1:{free_port()}")
    started = collector.await_line("started")
    address = started["http"]
    with urllib.request.urlopen(f"http://{address}/healthz") as answer:
        assert answer.read() == b"ok\n"
    with urllib.request.urlopen(f"http://{address}/metrics") as answer:
        families = {one.name: one for one in text_string_to_metric_families(answer.read().decode())}
    assert families["podwire_node_build_info"].samples[0].labels["tier"] == started["tier"]
    refused = families["podwire_node_refused"].samples
    assert {one.labels["what"]: one.labels["reason"] for one in refused} == {
        what: shorten(reason, 200) for what, reason in started["refused"].items()
    }
    collector.await_line("waiting")
    assert collector.end() == 0
    assert len(collector.lines("waiting")) == 1
    assert collector.lines("finished")[0]["left"] == 0


@needs_kernel
def test_state_folder_belongs_to_one_collector(tmp_path: Path) -> None:
    """A second collector on the same folder would replay the first one's spool: it does not start."""
    first = Collector(tmp_path, f"127.0.0.1:{free_port()}")
    first.await_line("started")
    second = Collector(tmp_path, f"127.0.0.1:{free_port()}")
    assert second.process.wait(DEADLINE_S) == SettingsError.exit_code
    assert first.end() == 0


@needs_kernel
def test_connections_reach_kafka_and_the_counts_are_exact(
    bootstrap: str, tmp_path: Path, wire: tuple[str, str]
) -> None:
    """Each of 50 connections comes out as CONNECT, ACCEPT and two CLOSE; attempted = received + lost = published."""
    collector = Collector(tmp_path, bootstrap)
    collector.await_line("topics_found")
    connect(wire, 50)
    assert collector.end() == 0
    assert kinds(bootstrap, collector.node) == expected(50)
    reports = [codec.decode("CollectorReport", value) for value in messages(bootstrap, catalog.COLLECTOR, 1)]
    last = [report for report in reports if report["node"] == collector.node][-1]
    assert last["last"]
    lost = {reason: count for reason, count in last["lost"].items() if reason != "name_ring_full"}
    assert last["attempted"] == last["received"] + sum(lost.values()), lost
    assert last["received"] == last["published"]


@needs_kernel
def test_killed_collector_misses_nothing_when_its_probes_are_pinned(
    bootstrap: str, tmp_path: Path, wire: tuple[str, str], pins: Path
) -> None:
    """Connections before, during and after a kill -9 are all in Kafka once the collector is back."""
    with ExitStack() as cleanup:
        settings = {"pin_dir": pins / "podwire", "state_dir": tmp_path / "state"}
        first = Collector(tmp_path, bootstrap, **settings)
        cleanup.callback(first.process.kill)
        first.await_line("topics_found")
        connect(wire, 20)
        first.end(signal.SIGKILL)
        connect(wire, 20)
        second = Collector(tmp_path, bootstrap, node=first.node, **settings)
        cleanup.callback(second.process.kill)
        assert second.await_line("started")["reused_probes"]
        second.await_line("topics_found")
        connect(wire, 20)
        until(lambda: kinds(bootstrap, first.node) == expected(60), "60 connections", said=second.said)
        assert second.end() == 0


@needs_kernel
def test_restarted_collector_goes_on_with_its_sockets(bootstrap: str, tmp_path: Path, pins: Path) -> None:
    """Over SIGTERM and a new start nothing is told again; what opened or closed in between is told once."""
    with ExitStack() as cleanup:
        ends = Namespace("c"), Namespace("s")
        for namespace in ends:
            cleanup.callback(namespace.remove)
        join(*ends, 77)
        settings = {
            "pin_dir": pins / "podwire",
            "state_dir": tmp_path / "state",
            "only_netns": f"{ends[0].inode},{ends[1].inode}",
        }
        before = connected(*ends)
        first = Collector(tmp_path, bootstrap, **settings)
        cleanup.callback(first.process.kill)
        first.await_line("topics_found")
        seen = connected(*ends)
        until(lambda: len(told(bootstrap, first.node)) >= 4, "EXISTING and opens", said=first.said)
        assert first.end() == 0
        for end in seen:
            end.close()
        between = connected(*ends)
        second = Collector(tmp_path, bootstrap, node=first.node, keep_probes=False, **settings)
        cleanup.callback(second.process.kill)
        assert second.await_line("started")["reused_probes"]
        second.await_line("topics_found")
        for end in (*before, *between):
            end.close()
        until(lambda: closes(told(bootstrap, first.node)) >= 6, "CLOSE of all ends", said=second.said)
        assert second.end() == 0
        assert not (pins / "podwire").exists()
    events = told(bootstrap, first.node)
    assert set(events.values()) == {1}, events
    assert Counter(kind for kind, _, _ in events) == {"EXISTING": 2, "CONNECT": 2, "ACCEPT": 2, "CLOSE": 6}


def connected(client: Namespace, server: Namespace) -> tuple[socket.socket, socket.socket]:
    """Return both ends of a connection between two namespaces."""
    listener = server.listen("10.91.77.2")
    dialler = client.connect(*listener.getsockname())
    accepted, _ = listener.accept()
    listener.close()
    return dialler, accepted


def told(bootstrap: str, node: str) -> Counter[tuple[str, str, int]]:
    """Return how often each event came, by type, role and socket; repeats count."""
    events = (event for batch in batches_of(bootstrap, node) for event in batch["events"])
    return Counter((event["type"], event["role"], event["socket_cookie"]) for event in events)


def closes(events: Counter[tuple[str, str, int]]) -> int:
    """Return how many of the events are CLOSE."""
    return sum(count for (kind, _, _), count in events.items() if kind == "CLOSE")
