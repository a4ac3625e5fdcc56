"""Which tier is chosen, and what is said when a better one or all are out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from collector.errors import AbiError, CapabilityError, NoBtfError
from collector.node.pins import is_bpffs
from collector.node.tiers import CAP_BPF, CAP_PERFMON, CAP_SYS_ADMIN, Environment, choose

ROOT = Environment(
    capabilities=(1 << 41) - 1,
    btf=True,
    tracefs=Path("/sys/kernel/tracing"),
    perf_event_paranoid=3,
    machine="x86_64",
    release=(6, 18),
)
MINIMAL = replace(ROOT, capabilities=1 << CAP_BPF | 1 << CAP_PERFMON)


def test_root_with_tracefs_gets_tracepoints() -> None:
    """The best tier, and nothing is refused."""
    assert (choose(ROOT).name, choose(ROOT).refused) == ("tracepoint", {})


@pytest.mark.parametrize(
    ("environment", "why"),
    [
        (replace(ROOT, tracefs=None), "tracefs"),
        (MINIMAL, "perf_event_paranoid is 3"),
        (replace(MINIMAL, perf_event_paranoid=2, tracefs=None), "tracefs"),
    ],
    ids=["no-tracefs", "paranoid", "neither"],
)
def test_refused_tracepoints_leave_tp_btf_with_the_reason(environment: Environment, why: str) -> None:
    """The lower tier says why the better one is out."""
    tier = choose(environment)
    assert tier.name == "tp_btf"
    assert why in tier.refused["tracepoint"]


def test_two_capabilities_suffice_where_perf_events_are_allowed() -> None:
    """CAP_BPF and CAP_PERFMON, without CAP_SYS_ADMIN."""
    assert choose(replace(MINIMAL, perf_event_paranoid=2)).name == "tracepoint"


@pytest.mark.parametrize("capabilities", [0, 1 << CAP_BPF, 1 << CAP_PERFMON])
def test_missing_capabilities_are_fatal(capabilities: int) -> None:
    """Said before anything is loaded, with the remedy."""
    with pytest.raises(CapabilityError, match="BPF and PERFMON"):
        choose(replace(ROOT, capabilities=capabilities))


def test_sys_admin_alone_suffices() -> None:
    """Kernels before 5.8 know nothing finer."""
    assert choose(replace(ROOT, capabilities=1 << CAP_SYS_ADMIN)).name == "tracepoint"


def test_kernel_without_btf_is_fatal() -> None:
    """No CO-RE without type information."""
    with pytest.raises(NoBtfError, match="CONFIG_DEBUG_INFO_BTF"):
        choose(replace(ROOT, btf=False))


def test_other_machine_is_fatal() -> None:
    """The ring is read with x86-64's ordering."""
    with pytest.raises(AbiError, match="x86-64"):
        choose(replace(ROOT, machine="aarch64"))


def test_wanted_tier_is_taken_or_refused() -> None:
    """A tier that the settings name is not replaced by another."""
    assert choose(ROOT, "tp_btf").name == "tp_btf"
    with pytest.raises(CapabilityError, match="no readable tracefs"):
        choose(replace(ROOT, tracefs=None), "tracepoint")


MOUNTS = """\
22 1 0:20 / / rw - ext4 /dev/root rw
30 22 0:28 / /sys rw - sysfs sysfs rw
31 30 0:29 / /sys/fs/bpf rw shared:1 - bpf bpf rw
32 22 0:30 / /run/with\\040space rw - bpf bpf rw
"""


@pytest.mark.parametrize(
    ("folder", "expected"),
    [
        ("/sys/fs/bpf", True),
        ("/sys/fs/bpf/podwire", True),
        ("/sys/fs/bpfoo", False),
        ("/var/lib", False),
        ("/run/with space/x", True),
    ],
)
def test_pin_folder_is_on_a_bpffs(folder: str, expected: bool) -> None:
    """The innermost mount above the folder decides."""
    assert is_bpffs(Path(folder), MOUNTS) is expected
