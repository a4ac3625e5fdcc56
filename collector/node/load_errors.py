"""Says in our words why the kernel did not take the BPF object.

Pure: what libbpf and the verifier said goes in, one of collector.errors comes out. Called by core.py.
"""

from __future__ import annotations

import errno
import os
import re

from collector.errors import CapabilityError, FatalError, MemlockError, VerifierError


def last_useful_line(log: str) -> str:
    """Return the verifier's verdict: its last line that is neither statistics nor empty."""
    skipped = (
        "processed ",
        "verification time",
        "stack depth",
        "-- ",
        "max_states",
        "peak_states",
        "mark_read",
    )
    lines = [line.strip() for line in log.splitlines()]
    useful = [line for line in lines if line and not line.startswith(skipped)]
    return useful[-1] if useful else ""


def load_error(code: int, reason: str, logs: dict[str, str], warnings: list[str]) -> FatalError:
    """Return why an object can't be loaded: errno and its text, the verifier's log by program, libbpf's warnings."""
    if code == errno.ENOMEM:
        return MemlockError(
            f"The kernel refused memory for the maps: {reason}.",
            "make ring_bytes or sockets_max smaller, or raise the memory limit of the container.",
        )
    for program, log in logs.items():
        if verdict := last_useful_line(log):
            return VerifierError(
                f"The kernel's verifier refused {program}: {verdict}",
                "report it with the kernel's version; choosing another tier may help.",
            )
    if code == errno.EPERM and not any("prog" in warning for warning in warnings):
        return MemlockError(
            f"The kernel refused to make maps: {reason}.",
            "on kernels before 5.11 set RLIMIT_MEMLOCK to unlimited or add CAP_SYS_RESOURCE.",
        )
    if code in {errno.EPERM, errno.EACCES}:
        return CapabilityError(
            f"The kernel refused to load {_refused_program(warnings)}: {os.strerror(code)}.",
            "run as root, and check that lockdown or a security module does not forbid BPF.",
        )
    return VerifierError(f"The BPF object can't be loaded: {reason}.", "report it with the kernel's version.")


def _refused_program(warnings: list[str]) -> str:
    named = re.search(r"prog '(\w+)'", "\n".join(warnings))
    return named[1] if named else "the programs"
