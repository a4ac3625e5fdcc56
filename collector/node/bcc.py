"""The bcc tier: the same life cycle, compiled on the node by BCC, for kernels where CO-RE can't serve.

Owns the plan (what is compiled, against which headers, what is attached where), the other process that does it, and
the file descriptors that come back; reads rings as every tier does. Never compiles in this process. Called by
probes.py: `open(options)` is all that the choice of a tier needs, and what it returns answers like `Probes`.

Why it is last, measured: see ARCHITECTURE.md, "The bcc tier".
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import re
import socket
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from collector.errors import BccError, CapabilityError, FatalError, MemlockError, VerifierError
from collector.node import core
from collector.node.abi import CGROUP_NAME, EVENT, Controller
from collector.node.cgroup_paths import choose_hierarchy
from collector.node.cgroups import Cgroups, Journal
from collector.node.counters import Counters
from collector.node.layout import Btf, UnknownMemberError, with_offsets
from collector.node.load_errors import last_useful_line
from collector.node.pins import life_of
from collector.node.ring import EventRing, NameRing, require_ordered_loads
from collector.node.tiers import BTF_FILE, KPROBE_EVENTS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from collector.node.probes import ProbeOptions
    from collector.node.ring import Records

SOURCE = Path(__file__).resolve().parents[2] / "bpf/podwire.bcc.c"
COMPILER = Path(__file__).with_name("bcc_compile.py")
PYTHON = "/usr/bin/python3"
"""Debian builds python3-bpfcc for the system's Python, so that one runs it: nothing of its packages can be taken for
one of this process's, nor the other way round, as a common import path would allow."""
COMPILE_SECONDS_MAX = 600
"""4 s on a common machine, a minute under emulation; above this something hangs."""
PAGE_BYTES = 4096
KNOWN_PER_NAMED = 8
MODULES, SOURCES = Path("/lib/modules"), Path("/usr/src")
KERNEL_ARCHIVE = Path("/sys/kernel/kheaders.tar.xz")
ACTION_HEADERS = "install the headers of the running kernel (apt-get install linux-headers-$(uname -r))."
ACTION_PACKAGE = "install Debian's python3-bpfcc (apt-get install python3-bpfcc)."

PROBES = (
    ("connect", "connect4_enter", "kprobe", "tcp_v4_connect"),
    ("connect", "connect4_exit", "kretprobe", "tcp_v4_connect"),
    ("connect", "connect6_enter", "kprobe", "tcp_v6_connect"),
    ("connect", "connect6_exit", "kretprobe", "tcp_v6_connect"),
    ("accept_return", "accept_return", "kretprobe", "inet_csk_accept"),
    ("accept_exit", "accept_exit", "tracepoint", "syscalls:sys_exit_accept"),
    ("accept_exit", "accept_exit", "tracepoint", "syscalls:sys_exit_accept4"),
    ("state", "state_first", "raw_tracepoint", "inet_sock_set_state"),
    ("state", "state_second", "raw_tracepoint", "inet_sock_set_state"),
)
"""Group, program, kind and place, in the order of attaching: what the state programs rely on comes before them."""


def open(options: ProbeOptions) -> BccProbes:  # noqa: A001 read as `bcc.open`
    """Compile, load and attach; takes seconds, and some 200 MB in another process meanwhile.

    Takes all options but `object_path` and `pin_dir`: it pins nothing, as its probes end with their file descriptors.

    Raises:
        BccError: no python3-bpfcc, no headers, no ring buffers in this kernel, or it does not compile.
        CapabilityError, MemlockError, VerifierError: the kernel refused it.
        AbiError: the CPU is not x86-64.
    """
    require_ordered_loads(platform.machine())
    with _headers() as headers:
        answer, descriptors = _compile(plan(options, headers))
    if error := answer.get("error"):
        raise _fatal(**error)
    return BccProbes(options, descriptors, without_kprobes() | answer["refused"])


class BccProbes:
    """Probes that are attached; the same attributes and methods as `collector.node.probes.Probes`.

    Attributes:
        tier: "bcc".
        refused: what is not used, and why: "connect" (routes that fail), "accept_return" (accepts by io_uring),
            "accept_exit", "pinning".
        reused, pinned: False, for nothing is pinned.
        events: the events ring; release its positions as events are delivered.
        cgroups: who owns what; complete for every event that `read` has returned.
        life: which ring and counters these are.
    """

    tier = "bcc"
    reused = pinned = False

    def __init__(self, options: ProbeOptions, descriptors: dict[str, int], refused: dict[str, str]) -> None:
        self.refused = dict(refused)
        if options.pin_dir:
            self.refused["pinning"] = "BCC's probes end with the collector"
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        host_netns = []
        with contextlib.suppress(OSError):
            host_netns.append(Path("/proc/1/ns/net").stat().st_ino)
        self.cgroups = Cgroups(
            Journal(options.state_dir, boot_id), KNOWN_PER_NAMED * options.cgroups_max, host_netns
        )
        self.cgroups.forget()
        self.events = EventRing(descriptors["events"], options.ring_bytes)
        self.life = life_of(descriptors["events"])
        self._names = NameRing(descriptors["names"], options.names_ring_bytes)
        self._counters = Counters(descriptors)
        if options.filter_own:
            core.runner(descriptors["program_note_self"])()
        self._links = [number for name, number in descriptors.items() if ":" in name]
        self._kept = [number for name, number in descriptors.items() if ":" not in name]
        self._closed = False

    def read(self, records_max: int) -> Records:
        """Return the next events, at most `records_max`, after every cgroup name that they need; as `Probes.read`."""
        limit = self.events.producer_position()
        self.cgroups.learn(self._names.drain())
        self._names.release(self._names.read_position)
        return self.events.read_until(limit, records_max)

    def counters(self) -> dict[str, int]:
        """Return what `Probes.counters` does."""
        return self._counters.read()

    def tend(self, now_s: float) -> int:
        """Make no events: EXISTING needs an iterator, so BTF; PROGRESS is not written in BCC's words."""
        del now_s
        return 0

    def detach(self) -> None:
        """Stop the probes; what is in the rings can still be read."""
        while self._links:
            os.close(self._links.pop())

    def close(self, detach: bool = True) -> None:
        """Let go of everything, and so stop the probes, whatever `detach` says. Only the first call does anything."""
        del detach
        if self._closed:
            return
        self._closed = True
        self.detach()
        self.events.close()
        self._names.close()
        for descriptor in self._kept:
            os.close(descriptor)


# ---- the plan ----


class Headers(NamedTuple):
    """Headers to compile against: a folder, None where BCC finds them itself; `matching` if they are this kernel's."""

    folder: Path | None
    matching: bool


def plan(options: ProbeOptions, headers: Headers) -> dict[str, Any]:
    """Return what bcc_compile.py is told.

    Raises:
        BccError: the kernel's type information lacks a member that the probes read.
    """
    controller, hierarchy = choose_hierarchy(Path("/proc/self/cgroup").read_text(encoding="utf-8"))
    subsystem = f"{controller.name.lower()}_cgrp_id"
    filters = options.filters.map_contents()
    text = source_text()
    values: dict[str, object] = {
        "EVENT_BYTES": EVENT.itemsize,
        "EVENTS_PAGES": options.ring_bytes // PAGE_BYTES,
        "NAMES_PAGES": options.names_ring_bytes // PAGE_BYTES,
        "SOCKETS_MAX": options.sockets_max,
        "CGROUPS_MAX": options.cgroups_max,
        "DIALS_MAX": options.connects_max,
        "CGROUP_CONTROLLER": int(controller),
        "CGROUP_HIERARCHY": hierarchy,
        "CGROUP_SUBSYSTEM": 0 if controller is Controller.DEFAULT else subsystem,
        "FILTER_LOOPBACK": int(options.filter_loopback),
        "FILTER_OWN": int(options.filter_own),
    }
    for name, mode in options.filters.modes().items():
        values[name.upper()] = mode
        values[f"{name.upper()}_MAX"] = max(1, len(filters.get(name, ())))
    if not headers.matching:
        try:
            btf = Btf(BTF_FILE.read_bytes())
            text = with_offsets(text, btf)
            if controller is not Controller.DEFAULT:
                values["CGROUP_SUBSYSTEM"] = btf.enumerator(subsystem)
        except (UnknownMemberError, OSError) as error:
            raise BccError(f"The probes do not fit this kernel: {error}.", ACTION_HEADERS) from error
        values["PODWIRE_LAYOUT_KNOWN"] = 1
    assert CGROUP_NAME.itemsize < options.names_ring_bytes
    return {
        "text": text,
        "cflags": [f"-I{SOURCE.parent}", *(f"-D{name}={value}" for name, value in values.items())],
        "headers": headers.folder and str(headers.folder),
        "contents": {
            name: [(key.hex(), value.hex()) for key, value in entries] for name, entries in filters.items()
        },
        "probes": [
            {"group": group, "program": program, "kind": kind, "place": place}
            for group, program, kind, place in PROBES
            if group not in without_kprobes()
        ],
    }


def without_kprobes() -> dict[str, str]:
    """Return the groups of probes that can't be had here, with the reason; nothing where there are kprobes."""
    if KPROBE_EVENTS.exists():
        return {}
    groups = [group for group, _, kind, _ in PROBES if kind in {"kprobe", "kretprobe"}]
    return dict.fromkeys(groups, f"the kernel has no kprobes for perf events ({KPROBE_EVENTS} is missing)")


def source_text() -> str:
    """Return the C text in one piece: BCC knows maps by their names in the main file only."""
    lines = []
    for number, line in enumerate(SOURCE.read_text(encoding="utf-8").splitlines(), 1):
        if match := re.fullmatch(r'#include "(bcc/\w+\.h)"', line):
            lines += [f'#line 1 "{match[1]}"', (SOURCE.parent / match[1]).read_text(encoding="utf-8")]
            lines += [f'#line {number + 1} "{SOURCE.name}"']
        else:
            lines.append(line)
    return "\n".join(lines) + "\n"


@contextlib.contextmanager
def _headers() -> Iterator[Headers]:
    """Yield the running kernel's headers; with BTF, any headers that were installed do.

    Raises:
        BccError: there are none.
    """
    release = platform.release()
    if folder := os.environ.get("BCC_KERNEL_SOURCE"):
        yield Headers(Path(folder), _release_of(Path(folder)) == release)
    elif (MODULES / release / "build").is_dir() or KERNEL_ARCHIVE.exists():
        yield Headers(None, matching=True)
    elif BTF_FILE.exists() and (others := _installed_headers()):
        with tempfile.TemporaryDirectory(prefix="podwire-headers-") as folder:
            _merge(others[0], Path(folder))
            yield Headers(Path(folder), matching=False)
    else:
        raise BccError(f"There are no headers of the kernel {release}.", ACTION_HEADERS)


def _release_of(folder: Path) -> str | None:
    """Return which kernel's headers a folder holds."""
    with contextlib.suppress(OSError):
        text = (folder / "include/generated/utsrelease.h").read_text(encoding="ascii", errors="replace")
        if match := re.search(r'UTS_RELEASE "(.*)"', text):
            return match[1]
    return None


def _installed_headers() -> list[Path]:
    """Return the headers of other kernels, oldest first: later ones need a later compiler than BCC has."""
    folders = (path.parents[2] for path in SOURCES.glob("linux-headers-*/include/generated/utsrelease.h"))
    return sorted(folders, key=lambda path: [int(number) for number in re.findall(r"\d+", path.name)])


def _merge(build: Path, into: Path) -> None:
    """Make one tree of links of Debian's two, the one of a kernel's flavour and the one common to its flavours."""
    common = build.with_name(re.sub(r"(-[a-z]+)*-[a-z0-9]+$", "-common", build.name))
    for part in ("include", "arch/x86/include"):
        (into / part).mkdir(parents=True)
        for tree in (build, common):
            for path in (tree / part).glob("*"):
                (into / part / path.name).symlink_to(path)


# ---- the other process ----


def _compile(told: dict[str, Any]) -> tuple[dict[str, Any], dict[str, int]]:
    """Run bcc_compile.py; return its answer, an error with what it wrote, and descriptors by name."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with here, there, tempfile.TemporaryFile() as written:
        command = [PYTHON, "-I", str(COMPILER), str(there.fileno())]
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=written, stderr=written, pass_fds=[there.fileno()]
            )
        except OSError as error:
            return {"error": {"step": "package", "code": 0, "reason": f"{PYTHON}: {error.strerror}"}}, {}
        there.close()
        with process:
            assert process.stdin
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(json.dumps(told).encode())
                process.stdin.close()
            here.settimeout(COMPILE_SECONDS_MAX)
            try:
                message, numbers, _, _ = socket.recv_fds(here, 1 << 16, 64, socket.MSG_CMSG_CLOEXEC)
            except TimeoutError:
                message, numbers = b"", []
                process.kill()
        written.seek(0)
        said = written.read().decode(errors="replace")
    if not message:
        answer = {"error": {"step": "compile", "code": 0, "reason": "the compiler died or did not end"}}
    else:
        answer = json.loads(message)
    if "error" in answer:
        answer["error"]["said"] = said
        return answer, {}
    return answer, dict(zip(answer["descriptors"], numbers, strict=True))


def _fatal(step: str, code: int, reason: str, said: str = "") -> FatalError:
    """Return the error that the operator sees; `said` is what BCC wrote to standard error."""
    if step == "package":
        return BccError(f"BCC is not there: {reason}.", ACTION_PACKAGE)
    if code == errno.EPERM:
        return CapabilityError(
            f"The kernel refused BCC's probes: {reason}.",
            "run as root, or with the capabilities BPF, PERFMON and SYS_RESOURCE.",
        )
    if step == "rings":
        return BccError(f"The kernel has no BPF ring buffers ({reason}).", "run a kernel of 5.8 or later.")
    if step == "compile":
        if refusal := re.search(r"could not open bpf map.*", said):
            return MemlockError(f"The kernel refused the maps: {refusal[0]}.", "make ring_bytes smaller.")
        errors = re.findall(r".*\berror: .*", said) or said.strip().splitlines()[-1:] or [reason]
        return BccError(f"BCC can't compile the probes: {errors[0].strip()}.", ACTION_HEADERS)
    return VerifierError(
        f"The kernel refused BCC's probes: {reason} ({last_useful_line(said)}).",
        "report it with the kernel's version.",
    )
