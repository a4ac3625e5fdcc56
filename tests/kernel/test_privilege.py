"""The matrix of privileges: with which the probes run and what they then see, without which they say what is missing.

Each row is a surrounding of the collector's process, made of namespaces, mounts and capabilities of its own; the rows'
names are those of the table in docs/operations.md.
"""

from __future__ import annotations

import shlex
import shutil
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from collector.errors import AbiError, CapabilityError, MemlockError, NoBtfError, VerifierError
from collector.node.tiers import read_environment
from tests.kernel.printing import ROOT, Printing, Surrounding
from tests.kernel.test_object import compiled

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from collector.errors import FatalError
    from tests.kernel.node import Cgroup, Namespace, Process


def readable_by_all(*places: Path) -> str:
    """Return shell commands that show `places` to every user, for a mount namespace of one's own.

    A home folder that only its owner may enter is covered by an open one that holds nothing else.
    """
    inside: dict[Path, list[Path]] = {}
    for place in places:
        for folder in reversed(place.parents):
            if not folder.stat().st_mode & 0o1:
                inside.setdefault(folder, []).append(place)
                break
    lines = ["mount -t tmpfs none /mnt"] if inside else []
    for closed, hidden in inside.items():
        stages = {place: f"/mnt/{place.name}{number}" for number, place in enumerate(hidden)}
        lines += [f"mkdir {stage} && mount --bind {place} {stage}" for place, stage in stages.items()]
        lines.append(f"mount -t tmpfs -o mode=755 none {closed}")
        lines += [f"mkdir -p {place} && mount --bind {stage} {place}" for place, stage in stages.items()]
    return "\n".join(lines)


PARANOID = Path("/proc/sys/kernel/perf_event_paranoid")
PARANOID_DEFAULT = "2"
DOCUMENT = ROOT / "docs/operations.md"

# Capabilities by number, as older setpriv knows not all names: 38 is PERFMON, 39 is BPF.
TWO = ("--bounding-set=-all,+cap_38,+cap_39", "--inh-caps=-all", "--no-new-privs")
ONLY_BPF = ("--bounding-set=-all,+cap_39", "--inh-caps=-all", "--no-new-privs")
ONLY_PERFMON = ("--bounding-set=-all,+cap_38", "--inh-caps=-all", "--no-new-privs")
NOBODY = (
    "--bounding-set=-all,+cap_38,+cap_39",
    "--inh-caps=-all,+cap_38,+cap_39",
    "--ambient-caps=-all,+cap_38,+cap_39",
    "--reuid=65534",
    "--regid=65534",
    "--clear-groups",
    "--no-new-privs",
)
NO_TRACEFS = """
mount -t tmpfs none /sys/kernel/tracing
[ ! -d /sys/kernel/debug ] || mount -t tmpfs none /sys/kernel/debug
"""
NO_BTF = "mount -t tmpfs none /sys/kernel/btf"
READ_ONLY_ROOT = f"""
mount -o remount,ro,bind /
! touch {shlex.quote(str(ROOT))}/probe 2>/dev/null || {{ mount --bind {shlex.quote(str(ROOT))} {shlex.quote(str(ROOT))}
mount -o remount,ro,bind {shlex.quote(str(ROOT))}; }}
"""
CONTAINER = ("--pid", "--fork", "--mount-proc", "--net", "--ipc", "--uts")

WITH_TRACEPOINTS = {
    "root": Surrounding(),
    "two capabilities": Surrounding(setpriv=TWO),
    "read-only root": Surrounding(READ_ONLY_ROOT, setpriv=TWO),
    "own pid, mount and network namespace": Surrounding(unshare=CONTAINER, setpriv=TWO),
}
WITHOUT_TRACEPOINTS = {
    "no tracefs": (Surrounding(NO_TRACEFS, setpriv=TWO), "tracefs"),
    "user 65534": (
        Surrounding(readable_by_all(ROOT, Path(sys.prefix), Path(sys.base_prefix)), setpriv=NOBODY),
        "tracefs",
    ),
    "a container with all of it": (
        Surrounding(NO_TRACEFS + READ_ONLY_ROOT, CONTAINER, TWO),
        "tracefs",
    ),
}


@pytest.fixture
def start() -> Iterator[Callable[..., Printing]]:
    """Start collectors that print; they are ended at the end."""
    started: list[Printing] = []

    def make(surrounding: Surrounding, *options: str) -> Printing:
        started.append(Printing(surrounding, *options))
        return started[-1]

    yield make
    for one in started:
        one.stop()


@pytest.fixture
def paranoid() -> Iterator[Callable[[str], None]]:
    """Set kernel.perf_event_paranoid, which the whole machine has, until the test's end."""
    before = PARANOID.read_text()

    def write(value: str) -> None:
        PARANOID.write_text(value)

    yield write
    PARANOID.write_text(before)


@pytest.fixture
def ends(
    client: Namespace,
    server: Namespace,
    make_cgroup: Callable[[str], Cgroup],
    make_process: Callable[..., Process],
) -> tuple[Process, Process]:
    """A client process and a server process in namespaces and cgroups of their own, not yet started."""
    return make_process(client, make_cgroup("/c")), make_process(server, make_cgroup("/s"))


def connect(ends: tuple[Process, Process]) -> None:
    """Let the one process connect to the other one."""
    dialler, acceptor = ends
    acceptor.start("accept", "10.91.1.2", 7777)
    acceptor.expect("listening")
    dialler.start("connect", "10.91.1.2", 7777)
    for process in (dialler, acceptor):
        process.expect("ready")
    for process in (dialler, acceptor):
        process.go_on()
        process.expect("closed")


def check_events(printing: Printing, ends: tuple[Process, Process], *, accepts: bool) -> None:
    """Require both ends' events with the pids and network namespaces of the initial namespace, and a good end."""
    dialler, acceptor = ends
    assert dialler.cgroup
    connect(ends)
    opened = printing.of(dialler.namespace.inode, "CONNECT")
    assert (opened["pid"], opened["owner_source"], opened["comm"]) == (dialler.pid, "PROCESS", "peer")
    assert opened["cgroup_path"].endswith(dialler.cgroup.path)
    accepted = printing.of(acceptor.namespace.inode, "ACCEPT")
    assert accepted["tcp_key"] == opened["tcp_key"]
    assert accepted["pid"] == (acceptor.pid if accepts else None)
    assert printing.of(acceptor.namespace.inode, "CLOSE")["pid"] == acceptor.pid
    assert printing.end(signal.SIGTERM) == 0


@pytest.mark.parametrize("row", WITH_TRACEPOINTS)
def test_tier_and_facts_stay_the_same(
    row: str,
    start: Callable[..., Printing],
    paranoid: Callable[[str], None],
    ends: tuple[Process, Process],
) -> None:
    """Two capabilities are as good as root's, in a container too, without a writable file."""
    paranoid(PARANOID_DEFAULT)
    printing = start(WITH_TRACEPOINTS[row])
    assert printing.log("started")["tier"] != "tp_btf"
    check_events(printing, ends, accepts=True)


@pytest.mark.parametrize("row", WITHOUT_TRACEPOINTS)
def test_tier_without_tracefs_keeps_pids_and_namespaces(
    row: str,
    start: Callable[..., Printing],
    paranoid: Callable[[str], None],
    ends: tuple[Process, Process],
) -> None:
    """The tracepoint tier is refused with the reason; where nothing better is allowed, accept names no process."""
    paranoid(PARANOID_DEFAULT)
    surrounding, why = WITHOUT_TRACEPOINTS[row]
    printing = start(surrounding)
    started = printing.log("started")
    assert started["tier"] != "tracepoint"
    if started["tier"] == "tp_btf":
        assert why in started["refused"]["tracepoint"]
    check_events(printing, ends, accepts=started["tier"] != "tp_btf")


def test_perf_event_paranoid_3_refuses_tracepoints_to_two_capabilities(
    start: Callable[..., Printing], paranoid: Callable[[str], None], ends: tuple[Process, Process]
) -> None:
    """Debian's default: a tier that needs perf events is out, and the reason names the sysctl."""
    paranoid("3")
    printing = start(Surrounding(setpriv=TWO))
    started = printing.log("started")
    assert started["tier"] not in {"kprobe", "tracepoint"}
    if started["tier"] == "tp_btf":
        assert "perf_event_paranoid is 3" in started["refused"]["tracepoint"]
    check_events(printing, ends, accepts=started["tier"] != "tp_btf")


def test_perf_event_paranoid_3_leaves_root_alone(
    start: Callable[..., Printing], paranoid: Callable[[str], None], ends: tuple[Process, Process]
) -> None:
    """CAP_SYS_ADMIN is above the sysctl."""
    paranoid("3")
    printing = start(Surrounding())
    assert printing.log("started")["tier"] != "tp_btf"
    check_events(printing, ends, accepts=True)


# ---- what keeps a collector from starting ----


def check_refusal(printing: Printing, error: type[FatalError], *words: str) -> None:
    """Require the error's exit code and its words in the one fatal log line."""
    assert printing.wait() == error.exit_code, printing.logs
    (fatal,) = (line for line in printing.logs if line["event"] == "fatal")
    assert fatal["cause"] == error.__name__
    for word in (*words, "Operator action: "):
        assert word in fatal["message"], fatal


@pytest.mark.parametrize(
    ("surrounding", "error", "words"),
    [
        (Surrounding(setpriv=ONLY_PERFMON), CapabilityError, ("capabilities BPF and PERFMON",)),
        (Surrounding(setpriv=ONLY_BPF), CapabilityError, ("capabilities BPF and PERFMON",)),
        (Surrounding(NO_BTF), NoBtfError, ("/sys/kernel/btf/vmlinux", "CONFIG_DEBUG_INFO_BTF")),
    ],
    ids=["without CAP_BPF", "without CAP_PERFMON", "without BTF"],
)
def test_missing_privilege_is_said(
    start: Callable[..., Printing], surrounding: Surrounding, error: type[FatalError], words: tuple[str, ...]
) -> None:
    """An exit code of its own, and what the operator can do."""
    check_refusal(start(surrounding, "--tier", "tp_btf"), error, *words)


def test_memory_limit_is_said(start: Callable[..., Printing], make_cgroup: Callable[[str], Cgroup]) -> None:
    """A ring larger than the memory cgroup allows is MemlockError, not a kill."""
    folders = [folder for folder in make_cgroup("/small").folders if limit_of(folder).exists()]
    if not folders:
        pytest.skip("needs a writable memory cgroup")
    limit_of(folders[0]).write_text(str(256 << 20))
    surrounding = Surrounding(f"echo 0 > {folders[0]}/cgroup.procs")
    printing = start(surrounding, "--ring-bytes", str(1 << 29), "--tier", "tp_btf")
    check_refusal(printing, MemlockError, "memory", "ring_bytes")


@pytest.mark.skipif(read_environment().release >= (5, 11), reason="needs a kernel before 5.11")
def test_locked_memory_limit_is_said(start: Callable[..., Printing]) -> None:
    """Kernel 5.10 counts maps as locked memory of the user."""
    printing = start(Surrounding("ulimit -l 64", setpriv=TWO), "--tier", "tp_btf")
    check_refusal(printing, MemlockError, "RLIMIT_MEMLOCK")


def limit_of(folder: Path) -> Path:
    """Return the file of a cgroup's memory limit, in version 1 or 2."""
    old = folder / "memory.limit_in_bytes"
    return old if old.exists() else folder / "memory.max"


@pytest.mark.parametrize(
    ("before", "after", "error", "words"),
    [
        (
            '#include "event.h"',
            '#include "event.h"\n#undef PODWIRE_ABI_VERSION\n#define PODWIRE_ABI_VERSION 99',
            AbiError,
            ("version 99", "make -C bpf abi"),
        ),
        (
            "transition(sk, old_state, new_state, 1);",
            "return *(int *)((char *)sk + old_state);",
            VerifierError,
            ("refused state_1: ", "out of bounds"),
        ),
    ],
    ids=["another ABI", "refused by the verifier"],
)
def test_doctored_object_is_said(
    start: Callable[..., Printing],
    tmp_path: Path,
    before: str,
    after: str,
    error: type[FatalError],
    words: tuple[str, ...],
) -> None:
    """The real object with one change: the program and the last useful line, or the versions."""
    if shutil.which("clang") is None:
        pytest.skip("needs clang")
    source = (ROOT / "bpf/podwire.bpf.c").read_text()
    assert before in source
    doctored = compiled(tmp_path, source.replace(before, after))
    check_refusal(start(Surrounding(), "--object", str(doctored), "--tier", "tp_btf"), error, *words)


@pytest.mark.skipif(not DOCUMENT.exists(), reason="needs docs/, which guests have not")
def test_every_row_is_published() -> None:
    """The operator's table has the rows that are tested."""
    text = DOCUMENT.read_text()
    for row in (*WITH_TRACEPOINTS, *WITHOUT_TRACEPOINTS):
        assert f"| {row} |" in text, row
