"""The bcc tier: the other tiers' life cycle tests on probes that BCC compiles here, and what is BCC's own."""

from __future__ import annotations

import errno
import os
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from collector.errors import BccError, MemlockError, NoBtfError, VerifierError
from collector.node import bcc
from collector.node.abi import ClosedBy, EventType, Owner, Role
from collector.node.probes import ProbeOptions, Probes
from collector.node.tiers import BTF_FILE, KPROBE_EVENTS, NAMES
from tests.kernel import (
    test_accept,
    test_close,
    test_failed,
    test_filters,
    test_lifecycle,
    test_losses,
    test_nat,
    test_owner,
)
from tests.kernel.node import Since, Watch, text
from tests.kernel.printing import Printing, Surrounding

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.kernel.node import Namespace

NEEDS_FRESH_PROBES = {"test_open_connections_of_before_are_untracked"}
OTHER_TIERS = {
    "test_tp_btf_tier_tells_accept_at_establishment",
    "test_closer_is_known_though_the_last_ack_comes_late",
}
for _module in (test_accept, test_lifecycle, test_close, test_failed, test_owner, test_losses, test_nat):
    globals().update(
        {
            name: value
            for name, value in vars(_module).items()
            if name not in globals() and not name.startswith("_") and name not in OTHER_TIERS
        }
    )
open_filtered = test_filters.open_filtered
test_network_namespace_that_is_left_out_costs_nothing = (
    test_filters.test_network_namespace_that_is_left_out_costs_nothing
)
test_own_connections_cost_nothing = test_filters.test_own_connections_cost_nothing
test_cgroup_that_is_left_out_costs_nothing = test_filters.test_cgroup_that_is_left_out_costs_nothing

no_kprobes = pytest.mark.skipif(not KPROBE_EVENTS.exists(), reason="the kernel has no kprobes")


@pytest.fixture(scope="module")
def shared_probes() -> Iterator[bcc.BccProbes]:
    """Probes with the usual options, compiled once: it takes a minute in a guest."""
    if not Path("/usr/lib/python3/dist-packages/bcc").is_dir():
        pytest.skip("python3-bpfcc is not installed")
    probes = bcc.open(ProbeOptions(state_dir=None))
    yield probes
    probes.close()


@pytest.fixture
def open_probes(
    shared_probes: bcc.BccProbes, request: pytest.FixtureRequest
) -> Iterator[Callable[..., bcc.BccProbes | Since]]:
    """Return the shared probes; or probes of its own to a test that wants other options."""
    opened: list[bcc.BccProbes] = []

    def start(**options: object) -> bcc.BccProbes | Since:
        if options or request.node.name in NEEDS_FRESH_PROBES:
            opened.append(bcc.open(ProbeOptions(state_dir=None, **options)))
            return opened[-1]
        return Since(shared_probes)

    yield start
    for probes in opened:
        probes.close()


@no_kprobes
@pytest.mark.parametrize(
    ("address", "error"), [("192.0.2.1", errno.ENETUNREACH), ("2001:db8::1", errno.ENETUNREACH)]
)
def test_failed_route_is_told_once(watch: Watch, client: Namespace, address: str, error: int) -> None:
    """No transition tells of it: the connect call's return value does, with the address that was dialled."""
    with pytest.raises(OSError, match="unreachable"):
        client.connect(address, 4711)
    event = watch.one(EventType.CONNECT_FAILED, Role.CLIENT)
    assert event["error"] == error
    assert event["owner"] == Owner.PROCESS
    assert event["tgid"] == os.getpid()
    assert text(event["remote_address"]).removeprefix("::ffff:") == address
    assert event["remote_port"] == 4711
    assert event["closed_by"] == ClosedBy.NONE


@pytest.mark.skipif(KPROBE_EVENTS.exists(), reason="the kernel has kprobes")
def test_missing_kprobes_cost_their_edges_only(shared_probes: bcc.BccProbes) -> None:
    """The rest is attached, and the reason is told for each."""
    assert shared_probes.refused.keys() == {"connect", "accept_return"}
    assert all("no kprobes" in reason for reason in shared_probes.refused.values())


@no_kprobes
def test_full_tier_refuses_nothing(shared_probes: bcc.BccProbes) -> None:
    """Where kprobes are allowed every edge is attached."""
    assert shared_probes.refused == {}


def test_port_and_network_that_are_left_out_cost_nothing(
    open_filtered: Callable[..., Watch], client: Namespace, server: Namespace
) -> None:
    """Two filters at once, as each of them takes a compilation."""
    watch = open_filtered(not_ports=str(test_filters.LEFT_OUT), not_cidrs="fd91:1::/64")
    test_filters.talk(client, server, test_filters.V4, test_filters.LEFT_OUT)
    test_filters.talk(client, server, test_filters.V6, test_filters.FOLLOWED)
    test_filters.expect_only_followed(watch, client, server)


def test_tier_is_opened_by_its_name(
    client: Namespace, server: Namespace, shared_probes: bcc.BccProbes
) -> None:
    """`Probes.open` gives the same, and says why it is not a better tier."""
    probes = Probes.open(ProbeOptions(state_dir=None, tier="bcc"))
    try:
        watch = Watch(probes, client, server)
        test_losses.talk(client, server, "10.91.1.2", 1)
        watch.count(EventType.CLOSE, None, 2)
        assert probes.tier == "bcc"
        assert probes.refused["tp_btf"] == "the settings ask for bcc"
    finally:
        probes.close()


def test_sources_give_no_warning(monkeypatch: pytest.MonkeyPatch, shared_probes: bcc.BccProbes) -> None:
    """As the Makefile demands of the other tiers' object; on a node a warning, perhaps of its headers, does no harm."""
    plan = bcc.plan

    def strict(*arguments: Any) -> dict[str, Any]:
        told = plan(*arguments)
        return told | {"cflags": [*told["cflags"], "-Wall", "-Werror"]}

    monkeypatch.setattr(bcc, "plan", strict)
    bcc.open(ProbeOptions(state_dir=None)).close()


@pytest.mark.parametrize("python", ["/nonexistent/python3", sys.executable], ids=["no-python", "no-package"])
def test_missing_package_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, shared_probes: bcc.BccProbes, python: str
) -> None:
    """The system's Python, or python3-bpfcc for it."""
    monkeypatch.setattr(bcc, "PYTHON", python)
    with pytest.raises(BccError, match="apt-get install python3-bpfcc"):
        bcc.open(ProbeOptions(state_dir=None))


def test_missing_headers_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither the running kernel's nor, with BTF, another's."""
    for name in ("MODULES", "SOURCES", "KERNEL_ARCHIVE"):
        monkeypatch.setattr(bcc, name, tmp_path / "none")
    with pytest.raises(BccError, match=r"no headers of the kernel .*apt-get install linux-headers"):
        bcc.open(ProbeOptions(state_dir=None))


@pytest.mark.parametrize(
    ("good", "bad", "error", "message"),
    [
        ("int state_first(", "intt state_first(", BccError, "error: unknown type name 'intt'"),
        (
            "return transition(context->args[0], context->args[1], context->args[2], 0);",
            "return *(int *)context->args[0];",
            VerifierError,
            "state_first.*invalid mem access",
        ),
    ],
    ids=["compiler", "verifier"],
)
def test_refusal_has_its_reason(
    monkeypatch: pytest.MonkeyPatch,
    shared_probes: bcc.BccProbes,
    good: str,
    bad: str,
    error: type[Exception],
    message: str,
) -> None:
    """One line of what the compiler or the verifier said."""
    text = bcc.source_text()
    assert good in text
    monkeypatch.setattr(bcc, "source_text", lambda: text.replace(good, bad))
    with pytest.raises(error, match=message) as caught:
        bcc.open(ProbeOptions(state_dir=None))
    assert len(str(caught.value)) < 400


def test_ring_that_the_kernel_refuses_is_told(shared_probes: bcc.BccProbes) -> None:
    """Which map, and what to change."""
    with pytest.raises(MemlockError, match=r"events.*make ring_bytes smaller"):
        bcc.open(ProbeOptions(state_dir=None, ring_bytes=1 << 40))


# ---- a node without BTF: the collector's own choice ----

no_headers = not (bcc.MODULES / platform.release() / "build").is_dir() and not bcc.KERNEL_ARCHIVE.exists()


@pytest.fixture
def without_btf() -> Iterator[Printing]:
    """A collector to which the kernel shows no type information; it takes the best tier."""
    printing = Printing(Surrounding("mount -t tmpfs none /sys/kernel/btf"))
    yield printing
    printing.stop()


@pytest.mark.skipif(no_headers, reason="the kernel has no headers here, which a choice of bcc needs")
def test_node_without_btf_gets_bcc(without_btf: Printing, client: Namespace, server: Namespace) -> None:
    """Nobody asked for it: the better tiers are refused for the lack of BTF, and connections are told."""
    started = without_btf.log("started")
    assert started["tier"] == "bcc"
    for tier in NAMES[:-1]:
        assert "no BTF" in started["refused"][tier]
    test_losses.talk(client, server, "10.91.1.2", 1)
    opened = without_btf.of(client.inode, "CONNECT")
    assert (opened["pid"], opened["tcp_key"]) == (
        os.getpid(),
        without_btf.of(server.inode, "ACCEPT")["tcp_key"],
    )
    assert without_btf.end() == 0


@pytest.mark.skipif(not no_headers, reason="the kernel has headers here, and bcc works")
def test_node_without_btf_and_headers_is_told_both(without_btf: Printing) -> None:
    """The tier bcc was tried, as nothing else could be: the fatal line names BTF, the headers, and both remedies."""
    assert without_btf.wait() == NoBtfError.exit_code
    (fatal,) = (line for line in without_btf.logs if line["event"] == "fatal")
    for words in (str(BTF_FILE), f"no headers of the kernel {platform.release()}", "CONFIG_DEBUG_INFO_BTF"):
        assert words in fatal["message"]
    assert "apt-get install linux-headers" in fatal["message"]
