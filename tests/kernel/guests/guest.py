"""Boot one guest, run one command in it, bring back its output and exit status.

Owns the QEMU process and its scratch folder, which are gone when `run` returns, however it does. The guest has no
network, no disk, and software emulation only. KVM is not needed, and not asked for: virtual machines may have a
/dev/kvm that makes a virtual machine and then never gets Debian's kernels to their first line, which no fallback of
QEMU notices. Called by `__main__` and by tests.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tests.kernel.guests import compiler, cpio, image
from tests.kernel.guests.fetch import BUILD

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tests.kernel.guests.fetch import Kernel

Cgroup = Literal["v2", "hybrid"]
MEMORY_MBYTES = 1536
CPU = "max,la57=off"
PARAMETERS = "console=ttyS0 panic=-1 oops=panic quiet clearcpuid=141"
"""141 is cx16: QEMU 7.2's cmpxchg16b now and then returns wrong flags, of which 6.12 died in 3 of 5 boots. Only the
kernel goes without it; numpy refuses to run on a CPU that has none."""
QEMU = "qemu-system-x86_64"
_EXIT = "podwire-guest-exit "
_EMULATORS_FAULT = "int3: 0000 [#"
"""The kernel changes its code under a breakpoint (arch/x86/kernel/alternative.c, text_poke_bp). QEMU 7.2 with several
threads may run that breakpoint after it is gone: so read from one death of 6.12, a byte into a patched instruction."""


class GuestError(RuntimeError):
    """The guest did not run the command to its end; the message has the end of the kernel's console."""


@dataclass(frozen=True)
class Result:
    """What a command did in a guest.

    Attributes:
        exit_code: the command's exit status.
        output: its standard output and error, as they came.
        seconds: from the start of QEMU to its end.
    """

    exit_code: int
    output: str
    seconds: float


def run(
    kernel: Kernel,
    argv: Sequence[str],
    *,
    cgroup: Cgroup = "v2",
    timeout_seconds: float = 300,
    on_line: Callable[[str], None] = lambda _: None,
    with_compiler: bool = False,
    instructions_as_ns: bool = False,
) -> Result:
    """Run `argv` as root in the checkout's copy in a guest; `on_line` gets each line of its output as it comes.

    `with_compiler` adds BCC and the kernel's headers, and memory for them. With `instructions_as_ns` every instruction
    takes one ns of the guest's clocks, so that its times are counts that repeat on any machine.

    Raises:
        GuestError: the kernel died, or the command did not end in time.
        ImageError: QEMU, a program or a package for the guest is missing.
        FetchError: the kernel's headers can't be had.
    """
    if shutil.which(QEMU) is None:
        raise image.ImageError(f"{QEMU} is missing: apt-get install qemu-system-x86")
    BUILD.mkdir(parents=True, exist_ok=True)
    base = image.base_layer()
    with tempfile.TemporaryDirectory(dir=BUILD, prefix="run-") as scratch:
        initrd, console = Path(scratch) / "initrd", Path(scratch) / "console"
        with initrd.open("wb") as out:
            with base.open("rb") as layer:
                shutil.copyfileobj(layer, out, 1 << 20)
            command = cpio.File("/command", f"exec {shlex.join(argv)}\n".encode())
            cpio.write(out, [*image.kernel_entries(kernel.folder), *image.checkout_entries(), command])
            if with_compiler:
                cpio.write(out, compiler.entries(kernel))
        qemu = _qemu(
            kernel, initrd, console, cgroup, compiler.MEMORY_MBYTES if with_compiler else MEMORY_MBYTES
        )
        if instructions_as_ns:
            qemu += ["-accel", "tcg,thread=single", "-icount", "shift=0,sleep=off"]
        else:
            qemu += ["-accel", "tcg,thread=multi"]
        started = time.monotonic()
        output, exit_code, timed_out = converse(qemu, timeout_seconds, on_line)
        if exit_code is None and not timed_out and _EMULATORS_FAULT in _said(console):
            on_line(f"QEMU broke kernel {kernel.release} while it changed its own code; once more")
            output, exit_code, timed_out = converse(qemu, timeout_seconds, on_line)
        seconds = time.monotonic() - started
        if exit_code is None:
            why = f"did not end within {timeout_seconds:.0f} s" if timed_out else "died"
            said = _said(console)[-8000:]
            raise GuestError(f"kernel {kernel.release} {why}. The end of its console:\n{said}")
        return Result(exit_code, output, seconds)


def _said(console: Path) -> str:
    return console.read_text(errors="replace") if console.exists() else ""


def _qemu(kernel: Kernel, initrd: Path, console: Path, cgroup: Cgroup, memory_mbytes: int) -> list[str]:
    return [
        *("setpriv", "--pdeathsig", "KILL", "--"),  # a guest does not outlive a killed caller
        *(QEMU, "-nodefaults", "-display", "none", "-no-reboot", "-nic", "none"),
        *("-cpu", CPU, "-smp", "2", "-m", str(memory_mbytes)),
        *("-serial", f"file:{console}"),
        *("-chardev", "stdio,id=output,signal=off", "-serial", "chardev:output"),
        *("-kernel", str(kernel.folder / "vmlinuz"), "-initrd", str(initrd)),
        *("-append", f"{PARAMETERS} podwire.cgroup={cgroup}"),
    ]


def converse(
    argv: list[str], timeout_seconds: float, on_line: Callable[[str], None]
) -> tuple[str, int | None, bool]:
    """Run QEMU to its end; return the command's output and exit status, None if unknown, and whether time ran out."""
    lines: list[str] = []
    exit_code = None
    timed_out = threading.Event()
    with subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, encoding="utf-8", errors="backslashreplace"
    ) as process:

        def end() -> None:
            timed_out.set()
            process.kill()

        timer = threading.Timer(timeout_seconds, end)
        timer.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                text, found, status = line.rstrip("\n").rpartition(_EXIT)
                if found:
                    exit_code = int(status)
                else:
                    text = status
                if text or not found:
                    lines.append(text)
                    on_line(text)
        finally:
            timer.cancel()
            process.kill()
    return "\n".join(lines), exit_code, timed_out.is_set()
