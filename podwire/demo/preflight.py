"""What the demo needs before it starts anything: root, capabilities, BTF, tools, the built object.

Never changes anything. Called by `podwire.demo.run`. As a program it asks for what can't be installed, before
deploy/setup.sh installs the rest; therefore it gets by with the standard library.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from podwire.demo.errors import CapabilityError, DemoError, NoBtfError, ObjectMissingError, ToolMissingError

CAP_NET_ADMIN = 12
CAP_SYS_ADMIN = 21
CAP_PERFMON = 38
CAP_BPF = 39
TOOLS = ("ip", "nft", "nsenter", "setpriv", "mount")
OBJECT = Path(__file__).parents[2] / "build" / "bpf" / "podwire.bpf.o"
BTF = Path("/sys/kernel/btf/vmlinux")
STATUS = Path("/proc/self/status")


def capabilities(status: str) -> int:
    """Return the effective capabilities as a bit mask, from the text of /proc/PID/status."""
    line = next(line for line in status.splitlines() if line.startswith("CapEff:"))
    return int(line.split()[1], 16)


def lacking(mask: int) -> list[str]:
    """Return the names of the capabilities that attaching probes and making pods needs and `mask` lacks."""
    wanted = {"CAP_NET_ADMIN": CAP_NET_ADMIN, "CAP_SYS_ADMIN": CAP_SYS_ADMIN}
    if not mask >> CAP_SYS_ADMIN & 1:
        wanted |= {"CAP_BPF": CAP_BPF, "CAP_PERFMON": CAP_PERFMON}
    return [name for name, bit in wanted.items() if not mask >> bit & 1]


def check_machine() -> None:
    """Return when user and kernel will do; raise CapabilityError or NoBtfError of the first thing that is missing."""
    if os.geteuid() != 0:
        raise CapabilityError(
            "The demo attaches probes to the kernel, which only root may: run `sudo make demo`."
        )
    if names := lacking(capabilities(STATUS.read_text(encoding="ascii"))):
        raise CapabilityError(
            f"This root lacks {', '.join(names)}, without which no probe attaches and no pod can be made: "
            "run the demo on the machine itself, or in a container that has these capabilities."
        )
    if not BTF.exists():
        raise NoBtfError(
            f"{BTF} is missing: this kernel carries no BTF, which the probes are adapted with. "
            "Boot a kernel built with CONFIG_DEBUG_INFO_BTF=y (Debian's are, from 5.10)."
        )


def check() -> None:
    """Return when the demo can run here; raise the DemoError of the first thing that is missing."""
    check_machine()
    if not OBJECT.exists():
        raise ObjectMissingError("The BPF object has not been built: run `make setup`.")
    if absent := [tool for tool in TOOLS if shutil.which(tool) is None]:
        raise ToolMissingError(f"Not installed: {', '.join(absent)}. Run `make setup`.")


def main() -> int:
    """Check user and kernel; return the demo's exit status."""
    try:
        check_machine()
    except DemoError as error:
        sys.stderr.write(f"podwire demo: {error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
