"""`podwire replay`: starts the processes that enrich the span again, and says how far they are.

Owns the processes, the progress line and the totals; the enriching is the enricher's (`python -m enricher replay`).
Called by `podwire.cli`.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import IO, TYPE_CHECKING, Any

from podwire.replay import errors, output
from podwire.replay.plan import Plan, plan

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

SAY_SECONDS = 2.0
POLL_SECONDS = 0.2
END_SECONDS_MAX = 10.0
STATUSES: dict[int, type[errors.ReplayError]] = {
    kind.exit_code: kind for kind in (errors.KafkaAwayError, errors.SpanTooOldError)
}


@dataclass(frozen=True)
class Options:
    """The command line, as argparse left it; `enricher` are the options that go to the enricher."""

    from_text: str
    to_text: str
    early: str
    late: str
    name: str | None
    workers: int | None
    append: bool
    bootstrap: str
    enricher: Sequence[str]


def run(options: Options) -> int:
    """Replay a span to its end and print one line of totals; return the exit status."""
    try:
        asked = plan(
            from_text=options.from_text,
            to_text=options.to_text,
            early=options.early,
            late=options.late,
            name=options.name,
            now_ms=time.time_ns() // 1_000_000,
        )
        _refuse_own(asked, options.enricher)
    except ValueError as error:
        sys.stderr.write(f"podwire replay: {error}\n")
        return 2
    try:
        return _replay(asked, options)
    except errors.ReplayError as error:
        sys.stderr.write(f"podwire replay: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("podwire replay: interrupted; what was written is incomplete\n")
        return errors.EXIT_INTERRUPTED


def _own(asked: Plan, share: str) -> dict[str, str]:
    """Return the options of the enricher that the command sets."""
    return {
        "--from-us": str(asked.from_ms * 1000),
        "--to-us": str(asked.to_ms * 1000),
        "--early-ms": str(asked.early_ms),
        "--late-ms": str(asked.late_ms),
        "--now-ms": str(asked.now_ms),
        "--topic": asked.topic,
        "--share": share,
    }


def _refuse_own(asked: Plan, given: Sequence[str]) -> None:
    """ValueError where the options that go to the enricher hold one that the command sets."""
    for option in _own(asked, ""):
        if any(word == option or word.startswith(f"{option}=") for word in given):
            raise ValueError(f"{option} is not yours to give; `podwire replay --help` lists what is")


def _replay(asked: Plan, options: Options) -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    began = time.monotonic()
    partitions = output.prepare(options.bootstrap, asked, append=options.append)
    count = min(options.workers or os.cpu_count() or 1, partitions)
    workers: list[Worker] = []
    try:
        for number in range(1, count + 1):
            workers.append(Worker(asked, options, f"{number}/{count}"))  # noqa: PERF401 (what was started is stopped)
        _follow(workers)
    finally:
        for worker in workers:
            worker.stop()
    _conclude(asked, Totals(workers), count, time.monotonic() - began)
    return 0


def _follow(workers: list[Worker]) -> None:
    """Return when all have ended well, saying now and then how far they are; ReplayError when one has not."""
    began = said = time.monotonic()
    while True:
        running = [worker for worker in workers if worker.poll() is None]
        for worker in workers:
            worker.read()
            if worker.poll():
                worker.fail()
        if not running:
            return
        now = time.monotonic()
        if now - said >= SAY_SECONDS:
            said = now
            sys.stderr.write(_progress(workers, now - began) + "\n")
            sys.stderr.flush()
        running[0].wait(POLL_SECONDS)


def _progress(workers: Sequence[Worker], seconds: float) -> str:
    if any(worker.report is None for worker in workers):
        return "reading metadata"
    totals = Totals(workers)
    records = totals.counts["records"]
    return (
        f"{totals.percent:3} % of {totals.messages_all} raw messages read, "
        f"{records} records, {records / seconds:.0f} records/s"
    )


class Totals:
    """What the processes have reported so far, added up.

    Attributes:
        counts: by the names of `enricher.replay.Counts`.
        messages_all: raw messages to be read.
        metadata_until_us: the pods topic is complete up to here; None without a watermark.
    """

    def __init__(self, workers: Sequence[Worker]) -> None:
        reports = [worker.report for worker in workers if worker.report is not None]
        self.counts: Counter[str] = Counter()
        for report in reports:
            self.counts.update(report["counts"])
        self.messages_all: int = sum(report["messages_all"] for report in reports)
        untils = [report["metadata_until_us"] for report in reports]
        self.metadata_until_us: int | None = None if None in untils else min(untils, default=None)

    @property
    def percent(self) -> int:
        """How much of the raw messages was read."""
        messages: int = self.counts["messages"]
        return 100 * messages // max(1, self.messages_all)


def _conclude(asked: Plan, totals: Totals, processes: int, seconds: float) -> None:
    """Print the totals; EmptySpanError where there are none."""
    counts = totals.counts
    notes = "".join(f"; {note}" for note in _notes(totals))
    if not counts["records"]:
        raise errors.EmptySpanError(f"no record from {asked}; {counts['messages']} raw messages read{notes}")
    print(
        f"done: {counts['records']} records from {asked} in {asked.topic}, {counts['messages']} raw messages read, "
        f"{seconds:.1f} s on {processes} process{'es' if processes > 1 else ''}{notes}"
    )


def _notes(totals: Totals) -> Iterator[str]:
    """Yield what a user should know beside the totals."""
    counts = totals.counts
    if counts["unreadable"]:
        yield f"{counts['unreadable']} of them unreadable, as the first time"
    if counts["unsettled"]:
        yield f"{counts['unsettled']} halves left out whose other half may still come"
    if counts["provisional"]:
        until_us = totals.metadata_until_us
        until = "no time" if until_us is None else datetime.fromtimestamp(until_us / 1e6, UTC).isoformat()
        yield (
            f"{counts['provisional']} records may get better: pods are known completely up to {until}; "
            "is the watcher running?"
        )


class Worker:
    """One process of the enricher, which replays its share.

    Attributes:
        report: the last line that it said, as `enricher.replay_run.Report`; None before the first.
    """

    def __init__(self, asked: Plan, options: Options, share: str) -> None:
        own = _own(asked, share) | {"--bootstrap": options.bootstrap}
        flags = [word for option in own.items() for word in option]
        self.report: dict[str, Any] | None = None
        self._share = share
        self._fatal = ""
        self._said: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "enricher", "replay", *options.enricher, *flags],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        pipes = (self._process.stdout, self._process.stderr)
        self._readers = [threading.Thread(target=self._read, args=(pipe,), daemon=True) for pipe in pipes]
        for reader in self._readers:
            reader.start()

    def _read(self, pipe: IO[bytes]) -> None:
        for line in pipe:
            try:
                said = json.loads(line)
            except ValueError:  # argparse's word on a wrong option, or a traceback
                sys.stderr.buffer.write(line)
                sys.stderr.flush()
            else:
                self._said.put(said)

    def poll(self) -> int | None:
        """Return the exit status, None while it runs."""
        return self._process.poll()

    def wait(self, seconds: float) -> None:
        """Wait for its end, at most this long."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return

    def read(self) -> None:
        """Take what it has said."""
        if self._process.poll() is not None:
            for reader in self._readers:
                reader.join(END_SECONDS_MAX)
        while not self._said.empty():
            said = self._said.get()
            if "counts" in said:
                self.report = said
            elif said.get("event") == "fatal":
                self._fatal = said["message"]

    def fail(self) -> None:
        """Raise what its end means: ReplayError."""
        status = self._process.returncode
        kind = STATUSES.get(status, errors.ReplayError)
        said = self._fatal or f"process {self._share} ended with status {status}"
        raise kind(said, status if status > 0 else None)

    def stop(self) -> None:
        """End it, should it still run."""
        if self._process.poll() is None:
            self._process.terminate()
            self.wait(END_SECONDS_MAX)
            self._process.kill()
        self._process.wait()
