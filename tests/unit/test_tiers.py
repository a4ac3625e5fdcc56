"""Which tier is chosen, and what is said when a better one or all are out."""

from __future__ import annotations

import gzip
from dataclasses import replace
from pathlib import Path

import pytest

from collector.errors import AbiError, CapabilityError, NoBtfError
from collector.node.abi import ConnectEdge
from collector.node.metrics import Metrics
from collector.node.pins import is_bpffs
from collector.node.tiers import (
    CAP_BPF,
    CAP_PERFMON,
    CAP_SYS_ADMIN,
    NAMES,
    STATE_PROGRAMS,
    Environment,
    Tier,
    TierName,
    candidates,
    choose,
    connect_edge,
    programs,
    read_preemptible,
    refusals,
)

ROOT = Environment(
    capabilities=(1 << 41) - 1,
    btf=True,
    tracefs=Path("/sys/kernel/tracing"),
    perf_event_paranoid=3,
    machine="x86_64",
    release=(6, 18),
    kprobes=True,
    accept_arguments=2,
)
MINIMAL = replace(ROOT, capabilities=1 << CAP_BPF | 1 << CAP_PERFMON)


def names(environment: Environment) -> list[str]:
    """Return the candidates' names."""
    return [tier.name for tier in candidates(environment)]


def test_candidates_come_best_first_without_reasons() -> None:
    """All that root may try on a common kernel; BCC only where there is no BTF."""
    assert names(ROOT) == ["fentry", "kprobe", "tracepoint", "tp_btf"]
    assert choose(ROOT).refused == {}


@pytest.mark.parametrize(
    ("environment", "left", "refused", "why"),
    [
        (replace(ROOT, tracefs=None), ["fentry", "kprobe", "tp_btf"], "tracepoint", "tracefs"),
        (replace(ROOT, kprobes=False), ["fentry", "tracepoint", "tp_btf"], "kprobe", "no kprobes"),
        (MINIMAL, ["fentry", "tp_btf"], "kprobe", "perf_event_paranoid is 3"),
        (MINIMAL, ["fentry", "tp_btf"], "tracepoint", "perf_event_paranoid is 3"),
        (replace(ROOT, accept_arguments=None), ["kprobe", "tracepoint", "tp_btf"], "fentry", "does not know"),
        (replace(ROOT, accept_arguments=3), ["kprobe", "tracepoint", "tp_btf"], "fentry", "has 3 arguments"),
        (replace(ROOT, btf=False, accept_arguments=None), ["bcc"], "tp_btf", "no BTF"),
    ],
)
def test_refused_tier_is_left_out_with_its_reason(
    environment: Environment, left: list[str], refused: str, why: str
) -> None:
    """What can't work is not tried, and every lesser tier says why the better one is out."""
    assert names(environment) == left
    assert why in refusals(environment)[refused]
    for tier in candidates(environment):
        worse = NAMES.index(tier.name) > [*NAMES].index(refused)  # type: ignore[arg-type]
        assert (why in tier.refused.get(refused, "")) is worse


def test_two_capabilities_suffice_where_perf_events_are_allowed() -> None:
    """CAP_BPF and CAP_PERFMON, without CAP_SYS_ADMIN."""
    assert names(replace(MINIMAL, perf_event_paranoid=2)) == names(ROOT)


@pytest.mark.parametrize(("arguments", "program"), [(4, "fexit_accept_4"), (2, "fexit_accept")])
def test_accept_program_fits_the_kernels_function(arguments: int, program: str) -> None:
    """The wrong one would load on some kernels and read garbage."""
    chosen = programs("fentry", replace(ROOT, accept_arguments=arguments))
    assert [name for name in chosen if "accept" in name] == [program]


@pytest.mark.parametrize("tier", ["fentry", "kprobe"])
def test_kernel_without_ipv6_gets_no_programs_for_it(tier: TierName) -> None:
    """Its functions do not exist there, and one hook that fails would cost the whole tier."""
    assert "6" not in "".join(programs(tier, replace(ROOT, ipv6=False)))
    assert "6" in "".join(programs(tier, ROOT))


def test_kprobes_are_backed_by_the_accept_tracepoints_where_there_are_some() -> None:
    """Return probes run out while many callers wait in accept."""
    assert "accept4_exit" in programs("kprobe", ROOT)
    assert "accept4_exit" not in programs("kprobe", replace(ROOT, tracefs=None))


def test_state_programs_belong_to_every_core_tier() -> None:
    """One event machine for all."""
    for tier in NAMES[:-1]:
        assert programs(tier, ROOT)[:2] == ("state_1", "state_2")
        assert (connect_edge(tier) == ConnectEdge.NONE) is (tier == "tp_btf")


@pytest.mark.parametrize(
    ("options", "command_line", "expected"),
    [
        ("PREEMPT_NONE PREEMPT_DYNAMIC", "quiet", False),
        ("PREEMPT_VOLUNTARY", "quiet", False),
        ("PREEMPT_LAZY PREEMPT_DYNAMIC", "quiet", True),
        ("PREEMPT_NONE PREEMPT_DYNAMIC", "preempt=none quiet preempt=full", True),
        ("PREEMPT_LAZY PREEMPT_DYNAMIC", "preempt=voluntary", False),
        ("PREEMPT PREEMPT_RCU", "preempt=none", True),  # the kernel does not listen
        ("PREEMPT_RT PREEMPT_LAZY PREEMPT_DYNAMIC", "preempt=none", True),
    ],
)
def test_preemption_is_read_from_configuration_and_command_line(
    tmp_path: Path, options: str, command_line: str, expected: bool
) -> None:
    """The last word on the command line counts, where the kernel can change its mind at all."""
    lines = "".join(f"CONFIG_{option}=y\n" for option in options.split())
    (tmp_path / "config.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "cmdline").write_text(command_line)
    assert read_preemptible(tmp_path / "config.gz", tmp_path / "cmdline") is expected


@pytest.mark.parametrize("content", [None, b"", b"no gzip", gzip.compress(b"CONFIG_PREEMPT_NONE=y\n")[:-9]])
def test_kernel_that_does_not_say_is_taken_for_preemptible(tmp_path: Path, content: bytes | None) -> None:
    """Without a readable configuration the safe answer is yes."""
    if content is not None:
        (tmp_path / "config.gz").write_bytes(content)
    (tmp_path / "cmdline").write_text("quiet")
    assert read_preemptible(tmp_path / "config.gz", tmp_path / "cmdline")


def test_four_state_programs_only_where_they_may_be_preempted() -> None:
    """Two where interrupts alone can come between."""
    assert programs("tp_btf", ROOT) == STATE_PROGRAMS
    assert programs("tp_btf", replace(ROOT, preemptible=False)) == STATE_PROGRAMS[:2]
    assert programs("tp_btf", replace(ROOT, release=(6, 17))) == STATE_PROGRAMS[:2]


@pytest.mark.parametrize("capabilities", [0, 1 << CAP_BPF, 1 << CAP_PERFMON])
def test_missing_capabilities_are_fatal(capabilities: int) -> None:
    """Said before anything is loaded, with the remedy."""
    with pytest.raises(CapabilityError, match="BPF and PERFMON"):
        choose(replace(ROOT, capabilities=capabilities))


def test_sys_admin_alone_suffices() -> None:
    """Kernels before 5.8 know nothing finer."""
    assert names(replace(ROOT, capabilities=1 << CAP_SYS_ADMIN)) == names(ROOT)


def test_kernel_without_btf_is_fatal_for_what_needs_it() -> None:
    """No CO-RE without type information."""
    with pytest.raises(NoBtfError, match="CONFIG_DEBUG_INFO_BTF"):
        choose(replace(ROOT, btf=False), "tp_btf")


def test_other_machine_is_fatal() -> None:
    """The ring is read with x86-64's ordering."""
    with pytest.raises(AbiError, match="x86-64"):
        choose(replace(ROOT, machine="aarch64"))


def test_wanted_tier_is_taken_or_refused() -> None:
    """A tier that the settings name is not replaced by another."""
    assert candidates(ROOT, "tp_btf") == (
        Tier("tp_btf", dict.fromkeys(["fentry", "kprobe", "tracepoint"], "the settings ask for tp_btf")),
    )
    assert choose(ROOT, "bcc").name == "bcc"
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


def test_refused_tiers_are_in_the_metrics() -> None:
    """One sample for each with its reason, of bounded length, so that an alert finds nodes that run a lesser tier."""
    (family,) = (
        family
        for family in Metrics("tp_btf", "1", {"fentry": "no trampolines", "kprobe": "no\n" * 200}).collect()
        if family.name == "podwire_node_refused"
    )
    reasons = {sample.labels["what"]: sample.labels["reason"] for sample in family.samples}
    assert reasons.keys() == {"fentry", "kprobe"}
    assert reasons["fentry"] == "no trampolines"
    assert reasons["kprobe"].startswith("no no no ")
    assert len(reasons["kprobe"]) <= 200
