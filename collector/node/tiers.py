"""Chooses the probe tier: what this kernel and this process allow, and why the better ones are out.

Owns the reading of the environment, the choice, which is pure, and which programs a tier has; never loads anything
and never logs. Called by probes.py, which tries the candidates in turn, and by the doctor.
"""

from __future__ import annotations

import gzip
import os
import platform
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from collector.errors import CapabilityError, NoBtfError
from collector.node.abi import ConnectEdge
from collector.node.core import function_arguments
from collector.node.ring import require_ordered_loads

TierName = Literal["fentry", "kprobe", "tracepoint", "tp_btf", "bcc"]
"""Best first."""
NAMES: tuple[TierName, ...] = get_args(TierName)

CAP_SYS_ADMIN = 21
CAP_PERFMON = 38
CAP_BPF = 39
BTF_FILE = Path("/sys/kernel/btf/vmlinux")
KPROBE_EVENTS = Path("/sys/bus/event_source/devices/kprobe/type")
IPV6_FILE = Path("/proc/net/if_inet6")
TRACEFS_FOLDERS = (Path("/sys/kernel/debug/tracing"), Path("/sys/kernel/tracing"))
CALL_EVENTS = ("sys_exit_accept", "sys_exit_accept4", "sys_enter_connect", "sys_exit_connect")
PARANOID_MAX = 2
"""Above this, Debian's kernels refuse perf_event_open to all but CAP_SYS_ADMIN."""
STATE_PROGRAMS = ("state_1", "state_2", "state_3", "state_4")
"""Copies; see `transition` in bpf/lifecycle.h."""
PREEMPTIBLE_SINCE = (6, 18)
"""From here on a kernel with preemption may preempt programs on tracepoints, and two copies do not suffice."""
CONFIGURATION = Path("/proc/config.gz")
COMMAND_LINE = Path("/proc/cmdline")
ACCEPT_CALL_PROGRAMS = ("accept_exit", "accept4_exit")
CONNECT_CALL_PROGRAMS = ("connect_enter", "connect_exit")
ACCEPT_PROGRAMS = {2: "fexit_accept", 4: "fexit_accept_4"}
"""Tier fentry: by the number of arguments of inet_csk_accept, which is 2 since 6.10."""


@dataclass(frozen=True)
class Environment:
    """What decides about tiers.

    Attributes:
        capabilities: effective set as a bit mask (CapEff of /proc/self/status).
        btf: True if the kernel shows its type information.
        tracefs: the mounted tracefs in which the system call tracepoints can be read, or None.
        perf_event_paranoid: the sysctl of that name; -1 if it can't be read.
        machine: CPU architecture as uname says it.
        release: kernel version, major and minor.
        kprobes: True if perf events know kprobes.
        accept_arguments: number of arguments of inet_csk_accept; None if the BTF does not say.
        ipv6: False if the kernel has no IPv6, whose functions may then be missing.
        preemptible: False if the kernel says that it does not preempt what runs inside it.
    """

    capabilities: int
    btf: bool
    tracefs: Path | None
    perf_event_paranoid: int
    machine: str
    release: tuple[int, int]
    kprobes: bool = False
    accept_arguments: int | None = None
    ipv6: bool = True
    preemptible: bool = True

    def has(self, capability: int) -> bool:
        """Return whether the process has the capability of that number."""
        return bool(self.capabilities >> capability & 1)


@dataclass(frozen=True)
class Tier:
    """A tier, and for each better one the reason it is not taken."""

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
    btf = os.access(BTF_FILE, os.R_OK)
    return Environment(
        capabilities=int(effective, 16),
        btf=btf,
        tracefs=next(filter(_shows_calls, TRACEFS_FOLDERS), None),
        perf_event_paranoid=paranoid,
        machine=platform.machine(),
        release=(int(major), int("".join(filter(str.isdigit, minor)))),
        kprobes=KPROBE_EVENTS.exists(),
        accept_arguments=function_arguments("inet_csk_accept") if btf else None,
        ipv6=IPV6_FILE.exists(),
        preemptible=read_preemptible(CONFIGURATION, COMMAND_LINE),
    )


def read_preemptible(configuration: Path, command_line: Path) -> bool:
    """Return whether the kernel may preempt itself, by its configuration and command line; True if they don't say.

    Root may change it later (debugfs, sched/preempt): what is then not seen is counted, as `skipped_runs`.
    """
    try:
        options = gzip.decompress(configuration.read_bytes()).decode("ascii", "replace").splitlines()
        words = command_line.read_text(encoding="utf-8", errors="replace").split()
    except (OSError, EOFError, zlib.error):
        return True
    if "CONFIG_PREEMPT_RT=y" in options:
        return True
    asked = [word.removeprefix("preempt=") for word in words if word.startswith("preempt=")]
    if asked and "CONFIG_PREEMPT_DYNAMIC=y" in options:
        return asked[-1] not in {"none", "voluntary"}
    return not {"CONFIG_PREEMPT_NONE=y", "CONFIG_PREEMPT_VOLUNTARY=y"} & set(options)


def _shows_calls(tracefs: Path) -> bool:
    return all(os.access(tracefs / "events/syscalls" / event / "id", os.R_OK) for event in CALL_EVENTS)


def candidates(environment: Environment, wanted: str = "auto") -> tuple[Tier, ...]:
    """Return the tiers worth trying, best first, each with what is known against the better ones; never none.

    With a wanted tier, exactly that one. Only the kernel knows whether fentry works, so a candidate may still fail.

    Raises:
        CapabilityError: neither CAP_BPF with CAP_PERFMON nor CAP_SYS_ADMIN, or the wanted tier is refused.
        NoBtfError: the kernel has no BTF, and the wanted tier needs it.
        AbiError: the CPU is not x86-64.
    """
    require_ordered_loads(environment.machine)
    if not environment.btf and wanted not in {"auto", "bcc"}:
        raise NoBtfError(
            f"The kernel shows no type information ({BTF_FILE} is missing or not readable).",
            "run a kernel built with CONFIG_DEBUG_INFO_BTF, as all current distributions are, or choose the tier bcc.",
        )
    if not (environment.has(CAP_SYS_ADMIN) or (environment.has(CAP_BPF) and environment.has(CAP_PERFMON))):
        raise CapabilityError(
            "The process may not load BPF programs.",
            "run it as root, or give it the capabilities BPF and PERFMON.",
        )
    against = refusals(environment)
    if wanted != "auto":
        if reason := against.get(wanted):
            raise CapabilityError(f"Tier {wanted} is not possible: {reason}.", "choose the tier auto.")
        name = next(name for name in NAMES if name == wanted)
        better = NAMES[: NAMES.index(name)]
        return (Tier(name, dict.fromkeys(better, f"the settings ask for {name}")),)
    possible = [name for name in NAMES if name not in against]
    if "tp_btf" in possible:
        possible.remove("bcc")  # whatever refuses tp_btf refuses BCC's programs too
    return tuple(
        Tier(name, {other: against[other] for other in NAMES[: NAMES.index(name)] if other in against})
        for name in possible
    )


def choose(environment: Environment, wanted: str = "auto") -> Tier:
    """Return the best of the `candidates`, and raise what they raise."""
    return candidates(environment, wanted)[0]


def refusals(environment: Environment) -> dict[str, str]:
    """Return why tiers can't work here, as far as that can be known without trying."""
    found: dict[str, str] = {}
    if not environment.btf:
        found |= dict.fromkeys(("fentry", "kprobe", "tracepoint", "tp_btf"), f"no BTF ({BTF_FILE})")
        return found
    if environment.accept_arguments not in ACCEPT_PROGRAMS:
        arguments = environment.accept_arguments
        found["fentry"] = (
            "the kernel's BTF does not know inet_csk_accept"
            if arguments is None
            else f"inet_csk_accept has {arguments} arguments, not 2 or 4"
        )
    perf = _refusal_of_perf_events(environment)
    if not environment.kprobes:
        found["kprobe"] = f"the kernel has no kprobes for perf events ({KPROBE_EVENTS} is missing)"
    elif perf:
        found["kprobe"] = perf
    if environment.tracefs is None:
        found["tracepoint"] = (
            "no readable tracefs at /sys/kernel/tracing (mount -t tracefs tracefs /sys/kernel/tracing)"
        )
    elif perf:
        found["tracepoint"] = perf
    return found


def _refusal_of_perf_events(environment: Environment) -> str | None:
    if environment.perf_event_paranoid > PARANOID_MAX and not environment.has(CAP_SYS_ADMIN):
        return f"kernel.perf_event_paranoid is {environment.perf_event_paranoid}, which needs CAP_SYS_ADMIN"
    return None


# ---- what a tier consists of ----


def programs(tier: TierName, environment: Environment) -> tuple[str, ...]:
    """Return the programs of bpf/podwire.bpf.c that the tier attaches."""
    families = (4, 6) if environment.ipv6 else (4,)
    preempted = environment.preemptible and environment.release >= PREEMPTIBLE_SINCE
    states = STATE_PROGRAMS if preempted else STATE_PROGRAMS[:2]
    match tier:
        case "fentry":
            assert environment.accept_arguments is not None
            accept = ACCEPT_PROGRAMS[environment.accept_arguments]
            return (*states, accept, *(f"fexit_connect{family}" for family in families))
        case "kprobe":
            probes = (f"{kind}_connect{family}" for family in families for kind in ("kretprobe", "kprobe"))
            # Callers that wait in accept use up the kernel's return probes, 10 or twice the CPUs; then the system
            # calls tell. What both see is told once.
            calls = ACCEPT_CALL_PROGRAMS if environment.tracefs else ()
            return (*states, "kretprobe_accept", *calls, *probes)
        case "tracepoint":
            return states + ACCEPT_CALL_PROGRAMS + CONNECT_CALL_PROGRAMS
    return states


def connect_edge(tier: TierName) -> ConnectEdge:
    """Return how the tier learns of connects that fail without a change of state."""
    match tier:
        case "fentry":
            return ConnectEdge.RETURN
        case "kprobe" | "tracepoint":
            return ConnectEdge.ENTERED
    return ConnectEdge.NONE
