"""Chooses the probe tier: what this kernel and this process allow, and why the better ones are out.

Owns the reading of the environment and the choice, which is pure; never loads anything and never logs.
Called by probes.py.
"""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from collector.errors import CapabilityError, NoBtfError
from collector.node.ring import require_ordered_loads

TierName = Literal["tracepoint", "tp_btf"]

CAP_SYS_ADMIN = 21
CAP_PERFMON = 38
CAP_BPF = 39
BTF_FILE = Path("/sys/kernel/btf/vmlinux")
TRACEFS_FOLDERS = (Path("/sys/kernel/debug/tracing"), Path("/sys/kernel/tracing"))
ACCEPT_EVENTS = ("sys_exit_accept", "sys_exit_accept4")
PARANOID_MAX = 2
"""Above this, Debian's kernels refuse perf_event_open to all but CAP_SYS_ADMIN."""


@dataclass(frozen=True)
class Environment:
    """What decides about tiers.

    Attributes:
        capabilities: effective set as a bit mask (CapEff of /proc/self/status).
        btf: True if the kernel shows its type information.
        tracefs: the mounted tracefs in which the accept tracepoints can be read, or None.
        perf_event_paranoid: the sysctl of that name; -1 if it can't be read.
        machine: CPU architecture as uname says it.
        release: kernel version, major and minor.
    """

    capabilities: int
    btf: bool
    tracefs: Path | None
    perf_event_paranoid: int
    machine: str
    release: tuple[int, int]

    def has(self, capability: int) -> bool:
        """Return whether the process has the capability of that number."""
        return bool(self.capabilities >> capability & 1)


@dataclass(frozen=True)
class Tier:
    """The chosen tier, and for each better one the reason it is not taken."""

    name: TierName
    refused: dict[str, str] = field(default_factory=dict)


def read_environment() -> Environment:
    """Read what decides about tiers from /proc and /sys."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    effective = next(line.split()[1] for line in status.splitlines() if line.startswith("CapEff:"))
    try:
        paranoid = int(Path("/proc/sys/kernel/perf_event_paranoid").read_text(encoding="ascii"))
    except (OSError, ValueError):
        paranoid = -1
    major, minor = platform.release().split(".")[:2]
    return Environment(
        capabilities=int(effective, 16),
        btf=os.access(BTF_FILE, os.R_OK),
        tracefs=next(filter(_shows_accept, TRACEFS_FOLDERS), None),
        perf_event_paranoid=paranoid,
        machine=platform.machine(),
        release=(int(major), int("".join(filter(str.isdigit, minor)))),
    )


def _shows_accept(tracefs: Path) -> bool:
    return all(os.access(tracefs / "events/syscalls" / event / "id", os.R_OK) for event in ACCEPT_EVENTS)


def choose(environment: Environment, wanted: str = "auto") -> Tier:
    """Return the best tier that the environment allows, or exactly the wanted one.

    Raises:
        CapabilityError: neither CAP_BPF with CAP_PERFMON nor CAP_SYS_ADMIN, or the wanted tier is refused.
        NoBtfError: the kernel has no BTF.
        AbiError: the CPU is not x86-64.
    """
    require_ordered_loads(environment.machine)
    if not environment.btf:
        raise NoBtfError(
            f"The kernel shows no type information ({BTF_FILE} is missing or not readable).",
            "run a kernel built with CONFIG_DEBUG_INFO_BTF, as all current distributions are.",
        )
    if not (environment.has(CAP_SYS_ADMIN) or (environment.has(CAP_BPF) and environment.has(CAP_PERFMON))):
        raise CapabilityError(
            "The process may not load BPF programs.",
            "run it as root, or give it the capabilities BPF and PERFMON.",
        )
    refusal = None if wanted == "tp_btf" else _refusal_of_tracepoints(environment)
    if wanted == "tracepoint" and refusal:
        raise CapabilityError(f"Tier tracepoint is not possible: {refusal}.", "choose the tier auto.")
    if wanted == "tp_btf":
        return Tier("tp_btf", {"tracepoint": "the settings ask for tp_btf"})
    return Tier("tp_btf", {"tracepoint": refusal}) if refusal else Tier("tracepoint")


def _refusal_of_tracepoints(environment: Environment) -> str | None:
    if environment.tracefs is None:
        return "no readable tracefs at /sys/kernel/tracing (mount -t tracefs tracefs /sys/kernel/tracing)"
    if environment.perf_event_paranoid > PARANOID_MAX and not environment.has(CAP_SYS_ADMIN):
        return f"kernel.perf_event_paranoid is {environment.perf_event_paranoid}, which needs CAP_SYS_ADMIN"
    return None
