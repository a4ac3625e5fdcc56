"""`python -m collector node --doctor`: whether the probes can run here, what is in the way, and what to do about it.

Owns the checks, which are pure, and one trial: the probes are opened as a collector would, and closed at once. Prints
one JSON object; `podwire doctor` shows it. Never pins. Called by `collector.__main__`.
"""

from __future__ import annotations

import json
import platform
import resource
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from collector.errors import (
    AbiError,
    BccError,
    CapabilityError,
    FatalError,
    MemlockError,
    NoBtfError,
    ObjectMissingError,
    SettingsError,
    VerifierError,
)
from collector.node import tiers
from collector.node.abi import Controller
from collector.node.cgroup_paths import choose_hierarchy
from collector.node.pins import is_bpffs
from collector.node.probes import Probes
from collector.node.settings import parse_doctor

if TYPE_CHECKING:
    from collector.node.settings import DoctorSettings

KERNEL_MIN = (5, 10)
MEMLOCK_UNTIL = (5, 11)
PINNED_TRACEPOINTS_SINCE = (5, 15)
CAP_SYS_RESOURCE = 24
CAPABILITIES = {
    "BPF": tiers.CAP_BPF,
    "PERFMON": tiers.CAP_PERFMON,
    "SYS_ADMIN": tiers.CAP_SYS_ADMIN,
    "SYS_RESOURCE": CAP_SYS_RESOURCE,
}
CHECK_OF_ERROR: dict[type[FatalError], str] = {
    CapabilityError: "capabilities",
    NoBtfError: "btf",
    VerifierError: "object",
    MemlockError: "memlock",
    AbiError: "object",
    ObjectMissingError: "object",
    BccError: "bcc",
}
SAID_BETTER = ("kernel", "capabilities", "memlock")
"""Checks whose own words are more exact than the error's."""
BPFFS = Path("/sys/fs/bpf")

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        status: "warn" costs a better tier or some facts, "fail" keeps the collector from starting.
        found: what is there.
        remedy: what to do about it, None where nothing need be done.
    """

    name: str
    status: Status
    found: str
    remedy: str | None = None


@dataclass(frozen=True)
class TierState:
    """One tier: "taken", "refused" with the reason, "not needed" as a better one works, or "not asked for"."""

    name: str
    status: Literal["taken", "refused", "not needed", "not asked for"]
    reason: str | None = None


@dataclass(frozen=True)
class Trial:
    """What opening the probes led to: a tier and the reasons against better ones, or an error.

    `wanted` is the tier that the settings ask for, "auto" for the best.
    """

    tier: str | None
    refused: dict[str, str]
    error: FatalError | None = None
    wanted: str = "auto"


@dataclass(frozen=True)
class Place:
    """What else the checks look at.

    Attributes:
        release: the kernel's version as it calls itself.
        memlock_bytes_max: hard limit of locked memory, -1 for none.
        proc_self_cgroup: text of the file of that name.
        mountinfo: text of /proc/self/mountinfo.
        object_path: the BPF object.
        pin_dir: where probes shall be pinned, None for nowhere.
    """

    release: str
    memlock_bytes_max: int
    proc_self_cgroup: str
    mountinfo: str
    object_path: Path
    pin_dir: Path | None


def run(arguments: list[str]) -> int:
    """Print the report; return 0 when the collector would start, else the exit code that it would end with."""
    settings = parse_doctor(arguments)
    environment = tiers.read_environment()
    trial = try_probes(settings)
    place = Place(
        release=platform.release(),
        memlock_bytes_max=resource.getrlimit(resource.RLIMIT_MEMLOCK)[1],
        proc_self_cgroup=Path("/proc/self/cgroup").read_text(encoding="utf-8"),
        mountinfo=Path("/proc/self/mountinfo").read_text(encoding="utf-8"),
        object_path=settings.probe_options().object_path,
        pin_dir=settings.pin_dir,
    )
    found = checks(environment, place, trial)
    status = exit_code(found, trial)
    report = {
        "tier": trial.tier,
        "exit_code": status,
        "tiers": [asdict(state) for state in tier_states(trial)],
        "checks": [asdict(check) for check in found],
    }
    sys.stdout.write(json.dumps(report, indent=1) + "\n")
    return status


def try_probes(settings: DoctorSettings) -> Trial:
    """Open the probes and close them: only the kernel knows what it allows."""
    try:
        probes = Probes.open(settings.probe_options())
    except FatalError as error:
        return Trial(None, {}, error, settings.tier)
    probes.close()
    return Trial(probes.tier, probes.refused, None, settings.tier)


def tier_states(trial: Trial) -> list[TierState]:
    """Return every tier, best first."""
    states = []
    for name in get_args(tiers.TierName):
        if name == trial.tier:
            states.append(TierState(name, "taken"))
        elif trial.wanted not in {"auto", name}:
            states.append(TierState(name, "not asked for"))
        elif trial.error or name in trial.refused:
            reason = _cause(trial.error) if trial.error else trial.refused[name]
            states.append(TierState(name, "refused", reason))
        else:
            states.append(TierState(name, "not needed"))
    return states


def exit_code(found: list[Check], trial: Trial) -> int:
    """Return what the collector would end with: the trial's error, else that of a wrong pin folder, else 0."""
    if trial.error:
        return trial.error.exit_code
    return SettingsError.exit_code if any(check.status == "fail" for check in found) else 0


def checks(environment: tiers.Environment, place: Place, trial: Trial) -> list[Check]:
    """Return all checks; the trial's error shows in the one that it belongs to."""
    found = [
        _kernel(environment, place, trial),
        _btf(environment, trial),
        _capabilities(environment, trial),
        _perf_events(environment, trial),
        _tracefs(environment, trial),
        _bpffs(environment, place),
        _cgroups(place),
        _memlock(environment, place, trial),
        Check("object", "ok", str(place.object_path)),
    ]
    return found if trial.error is None else _with_error(found, trial.error, trial.wanted)


def _with_error(found: list[Check], error: FatalError, wanted: str) -> list[Check]:
    """Return the checks with the trial's error in them, unless one says it already and better."""
    blamed = CHECK_OF_ERROR.get(type(error), "settings")
    said = {check.name for check in found if check.status == "fail" and check.name in SAID_BETTER}
    if said & {blamed, "kernel"}:
        return found
    remedy = error.action.rstrip(".") + ("" if wanted == "auto" else ", or leave PODWIRE_TIER at auto")
    check = Check(blamed, "fail", _cause(error), remedy)
    return [*(one for one in found if one.name != blamed), check]


def _cause(error: FatalError) -> str:
    return str(error).partition(" Operator action:")[0]


def _judge(name: str, found: str, remedy: str | None, trial: Trial) -> Check:
    """Return a check that is bad where it has a remedy: fatal if no tier works, else it costs something."""
    if remedy is None:
        return Check(name, "ok", found)
    return Check(name, "warn" if trial.tier else "fail", found, remedy)


def _kernel(environment: tiers.Environment, place: Place, trial: Trial) -> Check:
    remedy = None
    if environment.machine != "x86_64":
        remedy = "run the collector on x86-64 nodes only"
    elif environment.release < KERNEL_MIN:
        remedy = "run kernel 5.10 or later; older ones are not tested"
    return _judge("kernel", f"{place.release}, {environment.machine}", remedy, trial)


def _btf(environment: tiers.Environment, trial: Trial) -> Check:
    if environment.btf:
        return Check("btf", "ok", str(tiers.BTF_FILE))
    remedy = "run a kernel built with CONFIG_DEBUG_INFO_BTF, and let the collector see /sys/kernel/btf"
    return _judge("btf", f"{tiers.BTF_FILE} is missing or not readable", remedy, trial)


def _capabilities(environment: tiers.Environment, trial: Trial) -> Check:
    held = [name for name, number in CAPABILITIES.items() if environment.has(number)]
    enough = "SYS_ADMIN" in held or {"BPF", "PERFMON"} <= set(held)
    lacking = " and ".join(name for name in ("BPF", "PERFMON") if name not in held)
    remedy = (
        None
        if enough
        else f"add {lacking} to the capabilities (securityContext.capabilities.add), or run as root"
    )
    return _judge("capabilities", ", ".join(held) or "none", remedy, trial)


def _perf_events(environment: tiers.Environment, trial: Trial) -> Check:
    """At 3, which Debian's kernels know, perf events are for CAP_SYS_ADMIN alone; tp_btf and fentry need none."""
    level = environment.perf_event_paranoid
    refused = level > tiers.PARANOID_MAX and not environment.has(tiers.CAP_SYS_ADMIN)
    remedy = f"sysctl -w kernel.perf_event_paranoid={tiers.PARANOID_MAX}, or add the capability SYS_ADMIN"
    matters = refused and trial.tier == "tp_btf"
    return _judge("perf_event_paranoid", str(level), remedy if matters else None, trial)


def _tracefs(environment: tiers.Environment, trial: Trial) -> Check:
    if environment.tracefs:
        return Check("tracefs", "ok", str(environment.tracefs))
    remedy = "mount it (mount -t tracefs tracefs /sys/kernel/tracing) and let the collector read it (user 0)"
    missing = "not mounted, not readable, or without the accept tracepoints"
    return _judge("tracefs", missing, remedy if trial.tier == "tp_btf" else None, trial)


def _bpffs(environment: tiers.Environment, place: Place) -> Check:
    if place.pin_dir is None:
        mounted = "mounted" if is_bpffs(BPFFS, place.mountinfo) else "not mounted"
        return Check("bpffs", "ok", f"{mounted} at {BPFFS}; not needed, as PODWIRE_PIN_DIR is empty")
    if not is_bpffs(place.pin_dir.resolve(), place.mountinfo):
        remedy = f"mount one (mount -t bpf bpf {BPFFS}), or leave PODWIRE_PIN_DIR empty"
        return Check("bpffs", "fail", f"PODWIRE_PIN_DIR {place.pin_dir} is not on one", remedy)
    if environment.release < PINNED_TRACEPOINTS_SINCE:
        remedy = "run kernel 5.15 or later, or --tier tp_btf: before, tracepoints can't be pinned"
        return Check("bpffs", "warn", str(place.pin_dir), remedy)
    return Check("bpffs", "ok", str(place.pin_dir))


def _cgroups(place: Place) -> Check:
    controller, number = choose_hierarchy(place.proc_self_cgroup)
    if controller is Controller.DEFAULT:
        return Check("cgroups", "ok", "version 2")
    found = f"version 1: hierarchy {number}, {controller.name.lower()}"
    remedy = "boot with systemd.unified_cgroup_hierarchy=1: in version 1 a server's pod is known from accept() on only"
    return Check("cgroups", "warn", found, remedy)


def _memlock(environment: tiers.Environment, place: Place, trial: Trial) -> Check:
    """Since 5.11 maps count towards the memory cgroup instead (kernel/bpf/syscall.c)."""
    limit = place.memlock_bytes_max
    text = "unlimited" if limit == resource.RLIM_INFINITY else f"{limit} bytes"
    if environment.release >= MEMLOCK_UNTIL:
        return Check("memlock", "ok", f"{text}; not used since kernel 5.11")
    enough = limit == resource.RLIM_INFINITY or environment.has(CAP_SYS_RESOURCE)
    remedy = (
        None if enough else "set RLIMIT_MEMLOCK to unlimited (LimitMEMLOCK=infinity), or add SYS_RESOURCE"
    )
    return _judge("memlock", text, remedy, trial)
