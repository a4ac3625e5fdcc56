"""What the doctor says about a node: which check is bad, how bad, and what to do."""

from __future__ import annotations

import resource
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from collector.errors import (
    BccError,
    CapabilityError,
    FatalError,
    MemlockError,
    NoBtfError,
    SettingsError,
    VerifierError,
)
from collector.node.doctor import Check, Place, Trial, checks, exit_code, tier_states
from collector.node.tiers import CAP_BPF, CAP_PERFMON, Environment
from podwire.doctor import text

MOUNTS = "30 20 0:1 / /sys/fs/bpf rw - bpf bpf rw\n20 1 0:2 / / rw - ext4 /dev/sda rw\n"
HEALTHY = Environment(
    capabilities=1 << CAP_BPF | 1 << CAP_PERFMON,
    btf=True,
    tracefs=Path("/sys/kernel/tracing"),
    perf_event_paranoid=2,
    machine="x86_64",
    release=(6, 1),
)
PLACE = Place("6.1.0-9", resource.RLIM_INFINITY, "0::/\n", MOUNTS, Path("/podwire.bpf.o"), None)
TAKEN = Trial("tracepoint", {})
SECOND = Trial("tp_btf", {"tracepoint": "some reason"})
BARE = replace(HEALTHY, capabilities=0)


def failed(kind: type[FatalError]) -> Trial:
    """Return a trial that ended so."""
    return Trial(None, {}, kind("It went wrong.", "mend it."))


def found(environment: Environment = HEALTHY, place: Place = PLACE, trial: Trial = TAKEN) -> dict[str, Check]:
    """Return the checks that are not fine, by name."""
    return {check.name: check for check in checks(environment, place, trial) if check.status != "ok"}


def test_healthy_node_needs_nothing() -> None:
    """No remedy where nothing is wrong, and exit status 0."""
    everything = checks(HEALTHY, PLACE, TAKEN)
    assert [check.remedy for check in everything] == [None] * len(everything)
    assert exit_code(everything, TAKEN) == 0


@pytest.mark.parametrize(
    ("environment", "place", "trial", "name", "remedy"),
    [
        (replace(HEALTHY, btf=False), PLACE, failed(NoBtfError), "btf", "mend it"),
        (BARE, PLACE, failed(CapabilityError), "capabilities", "BPF and PERFMON"),
        (replace(HEALTHY, capabilities=1 << CAP_BPF), PLACE, failed(CapabilityError), "capabilities", "PERFMON to"),
        (HEALTHY, PLACE, failed(CapabilityError), "capabilities", "mend it"),
        (HEALTHY, PLACE, failed(MemlockError), "memlock", "mend it"),
        (HEALTHY, PLACE, failed(VerifierError), "object", "mend it"),
        (HEALTHY, PLACE, failed(SettingsError), "settings", "mend it"),
    ],
    ids=["btf", "both", "perfmon", "lockdown", "memlock", "verifier", "settings"],
)  # fmt: skip
def test_reason_not_to_start_is_one_failed_check(
    environment: Environment, place: Place, trial: Trial, name: str, remedy: str
) -> None:
    """The error shows once, with its remedy, and its exit code is the doctor's."""
    bad = found(environment, place, trial)
    assert [check.name for check in bad.values() if check.status == "fail"] == [name]
    assert remedy in str(bad[name].remedy)
    assert trial.error is not None
    assert exit_code(list(bad.values()), trial) == trial.error.exit_code


def test_forced_tier_that_fails_says_nothing_of_the_others() -> None:
    """They were not tried."""
    trial = replace(failed(VerifierError), wanted="tp_btf")
    states = {state.name: state.status for state in tier_states(trial)}
    assert states.pop("tp_btf") == "refused"
    assert set(states.values()) == {"not asked for"}


def test_bcc_that_can_not_serve_is_a_check_of_its_own() -> None:
    """Where the settings ask for it."""
    trial = replace(failed(BccError), wanted="bcc")
    assert found(trial=trial)["bcc"].remedy == "mend it, or leave PODWIRE_TIER at auto"


def test_small_memlock_fails_on_old_kernels_only() -> None:
    """5.10 counts maps as locked memory; later kernels do not."""
    small = replace(PLACE, memlock_bytes_max=65536)
    old = replace(HEALTHY, release=(5, 10))
    assert found(old, small, failed(MemlockError))["memlock"].status == "fail"
    assert "memlock" not in found(HEALTHY, small)


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        (replace(HEALTHY, perf_event_paranoid=3), "perf_event_paranoid"),
        (replace(HEALTHY, tracefs=None), "tracefs"),
    ],
    ids=["paranoid", "tracefs"],
)
def test_cost_of_a_lower_tier_is_a_warning(environment: Environment, name: str) -> None:
    """Only where the lower tier was taken for it."""
    assert found(environment, trial=SECOND)[name].status == "warn"
    assert exit_code(checks(environment, PLACE, SECOND), SECOND) == 0
    assert name not in found(environment, trial=Trial("fentry", {}))


@pytest.mark.parametrize(
    ("pin_dir", "release", "status"),
    [("/sys/fs/bpf/podwire", (6, 1), None), ("/sys/fs/bpf/podwire", (5, 10), "warn"), ("/run/podwire", (6, 1), "fail")],
    ids=["fine", "old-kernel", "elsewhere"],
)  # fmt: skip
def test_pin_folder_must_be_on_a_bpffs(pin_dir: str, release: tuple[int, int], status: str | None) -> None:
    """A collector would refuse the folder, so the doctor has its exit code."""
    place, environment = replace(PLACE, pin_dir=Path(pin_dir)), replace(HEALTHY, release=release)
    bad = found(environment, place).get("bpffs")
    assert (bad and bad.status) == status
    assert exit_code(checks(environment, place, TAKEN), TAKEN) == (
        SettingsError.exit_code if status == "fail" else 0
    )


def test_cgroup_v1_is_named() -> None:
    """Its hierarchy, and what it costs."""
    check = found(place=replace(PLACE, proc_self_cgroup="4:memory:/x\n0::/\n"))["cgroups"]
    assert "hierarchy 4, memory" in check.found


def test_each_tier_has_a_state_and_refused_ones_a_reason() -> None:
    """Better ones refused, one taken, others not needed."""
    states = {state.name: (state.status, state.reason) for state in tier_states(SECOND)}
    assert states["tracepoint"] == ("refused", "some reason")
    assert states["tp_btf"] == ("taken", None)
    assert {state.name: state.status for state in tier_states(TAKEN)}["tp_btf"] == "not needed"
    assert {state.reason for state in tier_states(failed(NoBtfError))} == {"It went wrong."}


@pytest.mark.parametrize("trial", [TAKEN, SECOND, failed(NoBtfError)], ids=["taken", "second", "failed"])
def test_text_shows_every_check_and_remedy(trial: Trial) -> None:
    """Nothing of the report is left out."""
    made = checks(replace(HEALTHY, tracefs=None), PLACE, trial)
    report = {
        "tier": trial.tier,
        "exit_code": exit_code(made, trial),
        "tiers": [asdict(state) for state in tier_states(trial)],
        "checks": [asdict(check) for check in made],
    }
    shown = text(report)
    for check in made:
        assert check.found in shown
        assert (check.remedy or "") in shown
    assert ("exit code 11" in shown) == (trial.error is not None)
