"""Which modules a guest needs, and in which order the kernel takes them.

Pure but for `read`. Called by `fetch`. No depmod: a module names what it needs in its own `.modinfo` section.
"""

from __future__ import annotations

import lzma
import subprocess
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

WANTED = (
    "veth",
    "bridge",
    "dummy",
    "sch_netem",  # delay: crossing FINs, slow handshakes
    "nf_tables",
    "nft_counter",
    "nft_ct",
    "nft_chain_nat",
    "nft_nat",
    "nft_masq",
    "nft_redir",
    "nft_numgen",
    "nft_hash",
    "nft_fib_inet",
    "nft_limit",
    "nft_reject_inet",
    "nft_reject_ipv4",
    "nft_reject_ipv6",
    "nft_synproxy",
    "tcp_diag",
)
"""Modules of the demo's and the tests' networks; a kernel that has one built in or merged has no such file."""


def index(folder: Path) -> dict[str, Path]:
    """Return the path of every module below `folder` by its name, `-` written as `_`."""
    return {name_of(path): path for path in folder.rglob("*.ko*")}


def name_of(path: Path) -> str:
    """Return a module's name from its file's: `nf-nat.ko.xz` is `nf_nat`."""
    return path.name.split(".")[0].replace("-", "_")


def read(path: Path) -> bytes:
    """Return the module's ELF file, unpacked; the guest's loader takes no compressed one."""
    packed = path.read_bytes()
    if path.suffix == ".xz":
        return lzma.decompress(packed)
    if path.suffix == ".zst":
        return subprocess.run(["zstd", "-dc"], input=packed, capture_output=True, check=True).stdout
    return packed


def needs(elf: bytes) -> list[str]:
    """Return the names on the module's `depends=` line (kernel: scripts/mod/modpost.c, add_depends)."""
    _, found, rest = elf.partition(b"\0depends=")
    names = rest.partition(b"\0")[0].decode("ascii") if found else ""
    return [name.replace("-", "_") for name in names.split(",") if name]


def load_order(wanted: Sequence[str], needs_of: Mapping[str, Sequence[str]]) -> list[str]:
    """Return `wanted` and all that it needs, each after its needs; names that the kernel lacks are left out."""
    order: dict[str, None] = {}

    def add(name: str) -> None:
        if name in order or name not in needs_of:
            return
        for need in needs_of[name]:
            add(need)
        order[name] = None

    for name in wanted:
        add(name)
    return list(order)
