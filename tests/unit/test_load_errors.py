"""What is said when the kernel refuses the probes: one error each, with its exit code, its cause and a remedy."""

from __future__ import annotations

import errno
import os

import pytest

from collector.errors import (
    AbiError,
    CapabilityError,
    FatalError,
    MemlockError,
    NoBtfError,
    VerifierError,
)
from collector.node.load_errors import load_error

VERDICT = (
    "0: R1=ctx()\ninvalid bpf_context access off=8 size=8\nprocessed 1 insns (limit 1000000) max_states 0\n"
)


@pytest.mark.parametrize(
    ("error", "code"),
    [(CapabilityError, 10), (NoBtfError, 11), (VerifierError, 12), (MemlockError, 13), (AbiError, 14)],
)
def test_exit_codes_stay_as_they_are(error: type[FatalError], code: int) -> None:
    """Alerts and runbooks hold the numbers."""
    assert error.exit_code == code


@pytest.mark.parametrize(
    ("code", "logs", "warnings", "error", "words"),
    [
        (errno.ENOMEM, {}, [], MemlockError, ("memory for the maps", "ring_bytes", "memory limit")),
        (
            errno.EPERM,
            {},
            ["map 'sockets': failed to create"],
            MemlockError,
            ("RLIMIT_MEMLOCK", "CAP_SYS_RESOURCE"),
        ),
        (
            errno.EPERM,
            {"state_1": ""},
            ["prog 'state_1': BPF program load failed: Operation not permitted"],
            CapabilityError,
            ("state_1", "run as root", "lockdown"),
        ),
        (
            errno.EACCES,
            {"sweep": "", "state_2": VERDICT},
            ["prog 'state_2': BPF program load failed: Permission denied"],
            VerifierError,
            ("refused state_2: invalid bpf_context access off=8 size=8", "kernel's version"),
        ),
        (errno.EINVAL, {"state_1": ""}, [], VerifierError, ("can't be loaded", os.strerror(errno.EINVAL))),
    ],
    ids=["memory", "locked memory", "capability", "verifier", "anything else"],
)
def test_refusal_becomes_its_error(
    code: int, logs: dict[str, str], warnings: list[str], error: type[FatalError], words: tuple[str, ...]
) -> None:
    """The verifier's verdict goes before the errno, which is the same as that of a missing capability."""
    made = load_error(code, os.strerror(code), logs, warnings)
    assert type(made) is error
    for word in (*words, "Operator action: "):
        assert word in str(made)
