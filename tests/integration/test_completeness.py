"""`podwire audit` over a real Kafka and real workers: complete, lost, killed, silent, and never a false answer."""

from __future__ import annotations

import json
import signal
import subprocess
import time
import uuid
from contextlib import ExitStack
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from podwire.audit import EXIT_COMPLETE, EXIT_KAFKA, EXIT_MISSING, EXIT_UNKNOWN
from podwire.cli import main
from podwire.demo.broker import free_port
from tests.integration.test_enricher_worker import Bench
from tests.integration.test_node_delivery import Rig
from tests.integration.test_node_process import Collector, connect, needs_kernel, wire
from tests.node_events import events
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.conftest import RunningBroker

__all__ = ["wire"]  # a fixture

REPORT_S = 0.3
pytestmark = pytest.mark.timeout(240)


class Audited(Bench):
    """Workers of a cluster of the test's own, and the audit of it."""

    def __init__(self, bootstrap: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        super().__init__(bootstrap, folder)
        self.cluster = f"cluster-{uuid.uuid4().hex[:8]}"
        self._capsys = capsys

    def work(self, name: str = "one") -> subprocess.Popen[bytes]:
        """Start a worker."""
        return self.start(
            name, PODWIRE_CLUSTER=self.cluster, PODWIRE_WINDOW_MS="1000", PODWIRE_METADATA_WAIT_MS="0"
        )

    def rig(self, node: str, **options: Any) -> Rig:
        """Return a collector without a kernel."""
        return Rig(
            self.bootstrap,
            self.folder / node,
            node,
            cluster=self.cluster,
            report_interval_s=REPORT_S,
            **options,
        )

    def audit(self, start_s: float, end_s: float, node: str) -> tuple[int, dict[str, Any]]:
        """Return exit status and answer for a node between two Unix times."""
        start, end = (datetime.fromtimestamp(at, UTC).isoformat() for at in (start_s, end_s))
        self._capsys.readouterr()
        status = main(
            f"audit --from {start} --to {end} --node {node} -o json --bootstrap {self.bootstrap}".split()
        )
        said = self._capsys.readouterr()
        assert said.out, said.err
        return status, json.loads(said.out)

    def await_audit(
        self,
        status: int,
        start_s: float,
        end_s: float,
        node: str,
        between: Callable[[], Any] = lambda: None,
        *,
        events: int | None = None,
    ) -> dict[str, Any]:
        """Return the answer once it has this exit status, and this number of events where one is given.

        Before each attempt `between` lets the collector go on.
        """
        found: tuple[int, dict[str, Any]] = (-1, {})

        def answered() -> bool:
            nonlocal found
            between()
            found = self.audit(start_s, end_s, node)
            return found[0] == status and events in {None, found[1]["events"]}

        until(answered, f"status {status}", said=lambda: f"{found}\n{self.logs()}")
        return found[1]


@pytest.fixture
def audited(broker: RunningBroker, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Audited]:
    """A cluster of the test's own."""
    one = Audited(broker.bootstrap, tmp_path, capsys)
    yield one
    one.close()


def turn(rig: Rig, seconds: float = 0.5) -> None:
    """Let a collector go on for a while."""
    over = time.monotonic() + seconds
    rig.turn_until(lambda: time.monotonic() > over)


def feed(rig: Rig, first: int, count: int) -> None:
    """Feed one half each of the connections first, first + 1, ..."""
    numbers = np.arange(first, first + count)
    rig.probes.feed(
        events(count, socket_cookie=numbers, client_isn=numbers + 1, server_isn=numbers + 1_000_001)
    )


def only(wire: tuple[str, str]) -> str:
    """Return the filter that leaves out what else happens on this machine."""
    return ",".join(f"/var/run/netns/{name}" for name in wire)


def ended(collector: Collector) -> None:
    """Let a collector be gone, with all that it held, however its test has ended."""
    collector.process.kill()
    collector.process.wait()


def new_node() -> str:
    """Return a name that no test has used."""
    return f"node-{uuid.uuid4().hex[:8]}"


def test_audit_tells_quiet_busy_and_lossy_times_of_a_node_apart(audited: Audited) -> None:
    """Quiet and busy spans are complete with their events; one in which the ring ran over is a gap with the count."""
    worker, node = audited.work(), new_node()
    try:
        rig = audited.rig(node, ring_bytes=1 << 17)
        quiet = time.time()
        turn(rig, 1.0)
        busy = time.time()
        for first in range(0, 2000, 500):
            feed(rig, first, 500)
            rig.turn_until(rig.is_settled)
        turn(rig, 1.0)
        lossy = time.time()
        feed(rig, 2000, 5000)
        lost = rig.probes.lost
        assert lost > 0
        turn(rig, 1.0)
        calm = time.time()
        turn(rig, 1.5)
        end = time.time() - 1.0
        assert (
            audited.await_audit(EXIT_COMPLETE, quiet + 0.3, busy - 0.5, node, lambda: turn(rig))["events"]
            == 0
        )
        assert audited.await_audit(EXIT_COMPLETE, quiet + 0.3, lossy - 0.5, node)["events"] == 2000
        assert audited.await_audit(EXIT_COMPLETE, calm + 0.2, end, node, lambda: turn(rig))["events"] == 0
        answer = audited.await_audit(
            EXIT_MISSING, quiet + 0.3, end, node, lambda: turn(rig), events=7000 - lost
        )
        assert [(one["reason"], one["events"]) for one in answer["findings"]] == [("RING_FULL", lost)]
        status, answer = audited.audit(quiet + 0.3, time.time() + 60, node)
        assert status == EXIT_MISSING
        assert [one["missing"] for one in answer["findings"]] == [True, False]
        assert audited.audit(quiet - 3600, quiet - 3500, node)[0] == EXIT_UNKNOWN
        rig.finish()
    finally:
        worker.kill()
        worker.wait()


def test_killed_worker_leaves_no_false_gap(audited: Audited) -> None:
    """Kill -9 of the worker in mid-stream, twice: its successor covers the rest, and the whole time is complete."""
    worker, node = audited.work(), new_node()
    try:
        rig = audited.rig(node)
        start = time.time()
        turn(rig, 0.8)
        for number in range(30):
            feed(rig, number * 200, 200)
            turn(rig, 0.2)
            if number in (10, 20):
                audited.await_audit(EXIT_COMPLETE, start + 0.3, start + 0.5, node, lambda: turn(rig))
                worker.kill()
                worker.wait()
                worker = audited.work(f"successor-{number}")
        end = time.time()
        turn(rig, 1.0)
        answer = audited.await_audit(EXIT_COMPLETE, start + 0.3, end, node, lambda: turn(rig))
        assert answer["events"] == 6000
        rig.finish()
    finally:
        worker.kill()
        worker.wait()


def test_pending_times_are_not_proven_and_silence_is_told(audited: Audited) -> None:
    """Without a worker nothing is proven; with one, a node that stops to report is silent from its last report on."""
    node = new_node()
    rig = audited.rig(node)
    start = time.time()
    feed(rig, 0, 1000)
    turn(rig, 1.5)
    assert audited.audit(start + 0.3, start + 1.0, node)[0] == EXIT_UNKNOWN
    worker = audited.work()
    try:
        audited.await_audit(EXIT_COMPLETE, start + 0.3, start + 1.0, node)

        def silent() -> bool:
            status, answer = audited.audit(start + 0.3, time.time(), node)
            assert status == EXIT_UNKNOWN
            return bool(answer["findings"][-1]["reason"] == "SILENT")

        until(silent, "the node is silent")
    finally:
        worker.kill()
        worker.wait()


def test_audit_without_kafka_or_with_nonsense_has_its_own_exit_status(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """No broker is not "incomplete", and times in the wrong order are a usage error."""
    nowhere = ["--bootstrap", f"127.0.0.1:{free_port()}"]
    assert main(["audit", "--from", "5m", "--to", "1m", *nowhere]) == EXIT_KAFKA
    assert main(["audit", "--from", "1m", "--to", "5m", *nowhere]) == 2
    assert main(["audit", "--from", "yesterday", "--to", "5m", *nowhere]) == 2
    assert "--from 'yesterday'" in capsys.readouterr().err


@needs_kernel
@pytest.mark.parametrize(
    ("how", "pinned"),
    [(signal.SIGKILL, True), (signal.SIGTERM, True), (signal.SIGKILL, False)],
    ids=["killed", "restarted", "killed_not_pinned"],
)
def test_ended_collector_is_a_gap_unless_its_probes_were_pinned(
    audited: Audited, tmp_path: Path, wire: tuple[str, str], how: signal.Signals, pinned: bool
) -> None:
    """The successor of pinned probes proves that time too; without pins a kill -9 is a gap of unknown count."""
    worker, node = audited.work(), new_node()
    settings: dict[str, object] = {
        "node": node,
        "cluster": audited.cluster,
        "report_interval_s": REPORT_S,
        "state_dir": tmp_path / "state",
        "only_netns": only(wire),
    }
    with ExitStack() as cleanup:
        cleanup.callback(worker.wait)
        cleanup.callback(worker.kill)
        if pinned:
            pins = tmp_path / "bpf"
            pins.mkdir()
            subprocess.run(["mount", "-t", "bpf", "bpf", str(pins)], check=True)
            cleanup.callback(subprocess.run, ["umount", str(pins)], check=True)
            settings["pin_dir"] = pins / "podwire"
        first = Collector(tmp_path, audited.bootstrap, **settings)
        cleanup.callback(ended, first)
        first.await_line("topics_found")
        start = time.time()
        connect(wire, 20)
        audited.await_audit(EXIT_COMPLETE, start + 0.3, start + 0.5, node)
        first.end(how)
        connect(wire, 20)
        second = Collector(tmp_path, audited.bootstrap, **settings)
        cleanup.callback(ended, second)
        second.await_line("topics_found")
        back = time.time()
        connect(wire, 20)
        end = time.time()
        if pinned:
            audited.await_audit(EXIT_COMPLETE, start, end, node)
            _, whole = audited.audit(
                start - 60, end, node
            )  # what was read ahead counts in the interval before
            assert whole["events"] == 60 * 4
        else:
            answer = audited.await_audit(EXIT_MISSING, start + 0.3, end, node)
            reasons = {one["reason"]: one["events"] for one in answer["findings"] if one["missing"]}
            assert reasons == {"COLLECTOR_KILLED": None}
            audited.await_audit(EXIT_COMPLETE, back + 0.3, back + 0.8, node)
        assert second.end() == 0


@needs_kernel
def test_ring_that_runs_over_is_a_gap_with_the_kernels_count(
    audited: Audited, tmp_path: Path, wire: tuple[str, str]
) -> None:
    """A ring of one page under a burst of connections loses events; the audit names how many, and the books balance."""
    worker, node = audited.work(), new_node()
    with ExitStack() as cleanup:
        cleanup.callback(worker.wait)
        cleanup.callback(worker.kill)
        collector = Collector(
            tmp_path,
            audited.bootstrap,
            node=node,
            cluster=audited.cluster,
            report_interval_s=REPORT_S,
            ring_bytes=4096,
            flush_interval_ms=500,
            only_netns=only(wire),
        )
        cleanup.callback(ended, collector)
        collector.await_line("topics_found")
        start = time.time()
        connect(wire, 200)
        end = time.time()
        answer = audited.await_audit(EXIT_MISSING, start, end, node)
        (gap,) = [one for one in answer["findings"] if one["missing"]]
        assert gap["reason"] == "RING_FULL"
        assert gap["events"] > 0
        assert collector.end() == 0
