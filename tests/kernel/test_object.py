"""The built object: its ABI as Python knows it, and what is said when it does not load."""

from __future__ import annotations

import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from collector.errors import AbiError, ObjectMissingError, VerifierError
from collector.node.core import BpfObject, LoadPlan
from collector.node.load_errors import last_useful_line
from collector.node.probes import DEFAULT_OBJECT

if TYPE_CHECKING:
    from pathlib import Path

REPOSITORY = DEFAULT_OBJECT.parents[2]
BROKEN = r"""
#include "kernel_types.h"
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>
#include "event.h"
#include "maps.h"
char podwire_license[] SEC("license") = "Dual BSD/GPL";
SEC("tp_btf/inet_sock_set_state")
int BPF_PROG(wild, struct sock *sk, int old_state, int new_state)
{
	return *(int *)((char *)sk + old_state);
}
"""


def test_abi_module_is_what_the_object_says() -> None:
    """`make -C bpf abi` would change nothing."""
    generator = [sys.executable, str(REPOSITORY / "bpf/generate_abi.py"), str(DEFAULT_OBJECT)]
    made = subprocess.run(generator, check=True, capture_output=True, text=True).stdout
    assert made == (REPOSITORY / "collector/node/abi.py").read_text()


def test_missing_object_says_how_to_build_it(tmp_path: Path) -> None:
    """The path and the remedy."""
    with pytest.raises(ObjectMissingError, match="make -C bpf"):
        BpfObject(LoadPlan(tmp_path / "none.o", (), {}, {}))


def test_object_that_is_none_is_said(tmp_path: Path) -> None:
    """A file of something else."""
    (tmp_path / "text.o").write_text("not an object")
    with pytest.raises(ObjectMissingError, match="can't be opened"):
        BpfObject(LoadPlan(tmp_path / "text.o", (), {}, {}))


def test_object_of_another_abi_is_refused(tmp_path: Path) -> None:
    """The version in the read-only options decides, before the kernel sees the object."""
    older = compiled(tmp_path, BROKEN.replace('#include "maps.h"', "#undef PODWIRE_ABI_VERSION\n"
                     '#define PODWIRE_ABI_VERSION 99\n#include "maps.h"'))  # fmt: skip
    with pytest.raises(AbiError, match="version 99"):
        BpfObject(LoadPlan(older, ("wild",), {}, {}))


def test_verifiers_verdict_names_program_and_reason(tmp_path: Path) -> None:
    """One line of the verifier's log, not thousands."""
    with pytest.raises(VerifierError, match="refused wild: ") as caught:
        BpfObject(LoadPlan(compiled(tmp_path, BROKEN), ("wild",), {}, {}))
    assert "processed" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_last_useful_line_skips_statistics() -> None:
    """The verdict stands before the verifier's statistics."""
    log = "0: (bf) r6 = r1\ninvalid bpf_context access off=8\nprocessed 1 insns (limit 1000000)\n\n"
    assert last_useful_line(log) == "invalid bpf_context access off=8"


def compiled(folder: Path, source: str) -> Path:
    """Compile a source beside the project's headers."""
    (folder / "wild.bpf.c").write_text(source)
    target = folder / "wild.bpf.o"
    flags = ["-O2", "-g", "-target", "bpf", "-D__TARGET_ARCH_x86", f"-I{REPOSITORY / 'bpf'}"]
    if shutil.which("clang") is None:
        pytest.skip("needs clang")
    subprocess.run(["clang", *flags, "-c", folder / "wild.bpf.c", "-o", target], check=True)
    return target
