"""Compiles, loads and attaches the probes by BCC, hands their file descriptors over, and ends: a program.

The only importer of `bcc`, which is Debian's python3-bpfcc; PyPI's package of that name is something else. Therefore
it runs under the system's Python, with the standard library alone, and in a process of its own: the compiler's memory
and its text on standard error stay here. Reads a plan as JSON from standard input, answers by one message on the Unix
socket whose number is its argument. Never reads a ring and never decides what is attached. Started by bcc.py.

The plan: text and cflags; `headers`, a folder or null for BCC's own search; `contents`, keys and values in hex digits
by map; `probes`, in the order of attaching, each
with program, kind, place and group (probes of a group live or fail together).
The answer: `descriptors`, names of the file descriptors that come along (maps by name, `program_` and its name, and
what keeps a probe attached, with colons); `refused`, reasons by group; or `error`, with
`step` (package, rings, compile, load), `code` (errno or 0) and `reason`.
"""

from __future__ import annotations

import ctypes
import json
import os
import socket
import sys
from typing import Any

MAPS = ("events", "names", "counters", "dials")
RING_BUFFER_TYPE, RING_BUFFER_BYTES = 27, 4096
REQUIRED = "state"
ACCEPT = "accept"
UNATTACHED = "note_self"
"""Run by the other process."""


class StepError(Exception):
    """A step failed: its name, errno or 0, and the reason."""


def main(channel: socket.socket) -> None:
    """Do what the plan on standard input says, and answer."""
    plan = json.load(sys.stdin)
    descriptors: dict[str, int] = {}
    try:
        answer: dict[str, Any] = {"refused": _run(plan, descriptors)}
    except StepError as error:
        step, code, reason = error.args
        answer, descriptors = {"error": {"step": step, "code": code, "reason": reason}}, {}
    answer["descriptors"] = list(descriptors)
    socket.send_fds(channel, [json.dumps(answer).encode()], list(descriptors.values()))


def _run(plan: dict[str, Any], descriptors: dict[str, int]) -> dict[str, str]:
    """Fill `descriptors`, which then belong to the answer, and return the reasons of what was refused by group."""
    try:
        import bcc  # type: ignore[import-not-found]  # noqa: PLC0415 only the system's Python has it
    except (ImportError, OSError) as error:
        raise StepError("package", 0, str(error)) from error
    if bcc.lib.bcc_create_map(RING_BUFFER_TYPE, b"probe", 0, 0, RING_BUFFER_BYTES, 0) < 0:
        raise StepError("rings", ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    if plan["headers"]:
        os.environ["BCC_KERNEL_SOURCE"] = plan["headers"]
    try:
        module = bcc.BPF(text=plan["text"], cflags=plan["cflags"])
    except Exception as error:  # bcc raises nothing narrower; its reason is on standard error
        raise StepError("compile", 0, str(error)) from error
    for name in MAPS:
        descriptors[name] = bcc.lib.bpf_table_fd(module.module, name.encode())
    _fill(bcc, module, plan["contents"])
    _load(module, UNATTACHED, bcc.BPF.RAW_TRACEPOINT)
    refused: dict[str, str] = {}
    for group in dict.fromkeys(probe["group"] for probe in plan["probes"]):
        if group == REQUIRED and any(name.startswith(ACCEPT) for name in descriptors):
            module["accept_edge"][ctypes.c_int(0)] = ctypes.c_uint(1)
        try:
            descriptors |= _attach_all(bcc, module, [one for one in plan["probes"] if one["group"] == group])
        except StepError as error:
            if group == REQUIRED:
                raise
            refused[group] = str(error.args[2])
    descriptors |= {f"program_{name.decode()}": loaded.fd for name, loaded in module.funcs.items()}
    return refused


def _attach_all(bcc: Any, module: Any, probes: list[dict[str, str]]) -> dict[str, int]:
    """Attach all probes, or none; return what keeps each attached."""
    attached: dict[str, int] = {}
    try:
        for probe in probes:
            name = f"{probe['group']}:{probe['program']}:{probe['place']}"
            attached[name] = _attach(bcc, module, probe)
    except StepError:
        for descriptor in attached.values():
            os.close(descriptor)
        raise
    return attached


def _fill(bcc: Any, module: Any, contents: dict[str, list[tuple[str, str]]]) -> None:
    for name, entries in contents.items():
        descriptor = bcc.lib.bpf_table_fd(module.module, name.encode())
        for key, value in entries:
            if bcc.lib.bpf_update_elem(descriptor, bytes.fromhex(key), bytes.fromhex(value), 0) < 0:
                raise StepError("load", ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")


def _load(module: Any, program: str, kind: int) -> int:
    """Load a program, if it is not; return its file descriptor, which belongs to the module."""
    try:
        return int(module.load_func(program, kind).fd)
    except Exception as error:  # bcc raises nothing narrower
        raise StepError("load", ctypes.get_errno(), f"{program}: {error}") from error


def _attach(bcc: Any, module: Any, probe: dict[str, str]) -> int:
    """Attach a program; return what keeps it attached."""
    program, kind, place = probe["program"], probe["kind"], probe["place"].encode()
    types = {"raw_tracepoint": bcc.BPF.RAW_TRACEPOINT, "tracepoint": bcc.BPF.TRACEPOINT}
    loaded = _load(module, program, types.get(kind, bcc.BPF.KPROBE))
    if kind == "raw_tracepoint":
        descriptor = bcc.lib.bpf_attach_raw_tracepoint(loaded, place)
    elif kind == "tracepoint":
        descriptor = bcc.lib.bpf_attach_tracepoint(loaded, *place.split(b":"))
    else:
        name = b"podwire_%s_%s_%d" % (kind.encode(), place, os.getpid())
        descriptor = bcc.lib.bpf_attach_kprobe(loaded, int(kind == "kretprobe"), name, place, 0, 0)
    if descriptor < 0:
        code = ctypes.get_errno()
        raise StepError("load", code, f"{kind} {probe['place']}: {os.strerror(code)}")
    return int(descriptor)


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])))
    os._exit(0)  # BCC's own ending would disable what the other process now holds
