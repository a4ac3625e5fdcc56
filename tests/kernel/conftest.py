"""What the kernel tests share: the built object, tracefs, two wired namespaces and probes on the running kernel.

PODWIRE_TEST_TIER forces the probe tier. With several, separated by commas, tests of scenarios run in each of them and
others in the best. PODWIRE_TEST_SCENARIOS chooses scenarios. A refused tier is skipped with the kernel's reason. With
-v each scenario's outcome gets a line of its own, which the guests' matrix is made of.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from collector.errors import CapabilityError
from collector.node.probes import DEFAULT_OBJECT, ProbeOptions, Probes
from collector.node.tiers import BTF_FILE, read_environment
from tests.kernel.node import Cgroup, Namespace, Process, Since, Watch, wire
from tests.kernel.scenarios import CELL, SCENARIOS
from tests.kernel.wire import HeldWire

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.kernel.scenarios import Scenario

TIERS = os.environ.get("PODWIRE_TEST_TIER", "auto").split(",")
TRACEFS = Path("/sys/kernel/tracing")
SUMS = "sums"
EVENT_LOSSES = ("lost_ring_full", "lost_socket_map_full", "lost_missed_open", "lost_missed_close")
AssertExact = Callable[[Probes, int], dict[str, int]]


@pytest.fixture(scope="session", autouse=True)
def kernel() -> Iterator[None]:
    """Skip where probes can't be tried; build the object; mount tracefs where it is not mounted."""
    # So that a contributor without root or BTF can run the rest; CI fails on both skips (tests/conftest.py).
    if os.geteuid() != 0:
        pytest.skip("kernel tests need root")
    if not BTF_FILE.exists():
        pytest.skip(f"kernel tests need BTF ({BTF_FILE})")
    subprocess.run(["make", "-C", str(DEFAULT_OBJECT.parents[2] / "bpf")], check=True, capture_output=True)
    mounted = read_environment().tracefs is None
    if mounted:
        subprocess.run(["mount", "-t", "tracefs", "tracefs", TRACEFS], check=True)
    yield
    if mounted:
        subprocess.run(["umount", TRACEFS], check=False)


def pytest_configure(config: pytest.Config) -> None:
    """Name the marker."""
    config.addinivalue_line(
        "markers", "scenario(name): the row of tests/kernel/scenarios.py that the test plays"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run tests of scenarios in each tier that is asked for, if there are several."""
    if len(TIERS) > 1 and {"scenario", "probe_tier"} <= set(metafunc.fixturenames):
        metafunc.parametrize("probe_tier", TIERS, scope="module")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Note each test's scenario and tier; keep only the scenarios of PODWIRE_TEST_SCENARIOS, semicolon between."""
    chosen = os.environ.get("PODWIRE_TEST_SCENARIOS")
    left_out = []
    for item in items:
        marker = item.get_closest_marker("scenario")
        if marker and "scenario" in getattr(item, "fixturenames", ()):
            parameters = getattr(getattr(item, "callspec", None), "params", {})
            tier = "bcc" if item.path.name == "test_bcc.py" else parameters.get("probe_tier", TIERS[0])
            item.user_properties += [("scenario", marker.args[0]), ("tier", tier)]
        if chosen is not None and not (marker and marker.args[0] in chosen.split(";")):
            left_out.append(item)
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


class Cells:
    """Says how each test of a scenario ended: at once, so that a guest that dies has told what it did."""

    def __init__(self, terminal: pytest.TerminalReporter) -> None:
        self._terminal = terminal

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Write a line per test: when it was called, or when it got no further than its fixtures."""
        properties = dict(report.user_properties)
        if "scenario" not in properties or (report.when != "call" and report.passed):
            return
        self._terminal.ensure_newline()
        self._terminal.write_line(f"{CELL}\t{properties['tier']}\t{report.outcome}\t{properties['scenario']}")


@pytest.hookimpl(trylast=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    """Tell the scenarios' outcomes where tests are named one by one (-v)."""
    terminal = session.config.pluginmanager.get_plugin("terminalreporter")
    if terminal and session.config.get_verbosity() > 0:
        session.config.pluginmanager.register(Cells(terminal))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the sums that tests checked, whatever became of them."""
    reports = [*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")]
    sums = [(one.nodeid, text) for one in reports for name, text in one.user_properties if name == SUMS]
    if sums:
        terminalreporter.section("attempted = received + lost")
        for test, text in sums:
            terminalreporter.write_line(f"{test.rpartition('::')[2]}: {text}")


@pytest.fixture
def assert_exact(record_property: Callable[[str, object], None]) -> AssertExact:
    """Check the books of probes, which must stand still, against the events received; return the counters.

    The sum is printed at the end of pytest's output.
    """

    def check(probes: Probes, received: int) -> dict[str, int]:
        counters = probes.counters()
        lost = {reason: counters[reason] for reason in EVENT_LOSSES}
        beside = {name: count for name, count in counters.items() if name not in {"attempted", *lost}}
        beside["names_told_again"] = probes.cgroups.told_again
        reasons = ", ".join(f"{name} {count:,}" for name, count in (lost | beside).items() if count)
        total = f"{counters['attempted']:,} = {received:,} + {sum(lost.values()):,}"
        record_property(SUMS, f"{total} ({reasons or 'nothing lost'})")
        assert counters["attempted"] == received + sum(lost.values())
        return counters

    return check


@pytest.fixture
def scenario(request: pytest.FixtureRequest) -> Scenario:
    """The row of the table that the test's marker names."""
    return SCENARIOS[request.node.get_closest_marker("scenario").args[0]]


@pytest.fixture(scope="module")
def probe_tier() -> str:
    """The tier that probes are opened with, unless a test says another."""
    return TIERS[0] if len(TIERS) == 1 else "auto"


@pytest.fixture(scope="module")
def shared_core_probes(probe_tier: str) -> Iterator[Callable[[], Probes]]:
    """Probes for all scenarios of a module, loaded once: in a guest that takes seconds."""
    opened: list[Probes] = []

    def get() -> Probes:
        if not opened:
            opened.append(_open(ProbeOptions(state_dir=None, tier=probe_tier)))
        return opened[0]

    yield get
    for probes in opened:
        probes.close()


def _open(options: ProbeOptions) -> Probes:
    """Open probes; skip where the kernel refuses the tier that the environment asks for."""
    try:
        return Probes.open(options)
    except CapabilityError as error:
        # Only the kernel knows whether it takes a tier; the guests' kernels take all, and there a skip is no "ok".
        if options.tier in TIERS:
            pytest.skip(f"tier {options.tier} refused: {error}")
        raise


@pytest.fixture
def make_namespace() -> Iterator[Callable[[str], Namespace]]:
    """Make namespaces that are removed at the end."""
    made: list[Namespace] = []

    def make(name: str) -> Namespace:
        made.append(Namespace(name))
        return made[-1]

    yield make
    for namespace in made:
        namespace.remove()


@pytest.fixture
def client(make_namespace: Callable[[str], Namespace]) -> Namespace:
    """The client's namespace, 10.91.1.1 and fd91:1::1."""
    return make_namespace("c")


@pytest.fixture
def server(make_namespace: Callable[[str], Namespace], client: Namespace) -> Namespace:
    """The server's namespace, 10.91.1.2 and fd91:1::2, wired to the client's."""
    made = make_namespace("s")
    wire(client, made, 1)
    return made


@pytest.fixture
def open_probes(
    tmp_path: Path,
    request: pytest.FixtureRequest,
    probe_tier: str,
    shared_core_probes: Callable[[], Probes],
) -> Iterator[Callable[..., Probes | Since]]:
    """Open probes with some options, detached at the end; a scenario without any takes the module's shared ones."""
    opened: list[Probes] = []
    shares = "scenario" in request.fixturenames

    def start(**options: object) -> Probes | Since:
        if shares and not options:
            return Since(shared_core_probes())
        chosen = ProbeOptions(**{"state_dir": tmp_path / "state", "tier": probe_tier} | options)
        opened.append(Probes.open(chosen) if "tier" in options else _open(chosen))
        return opened[-1]

    yield start
    for probes in opened:
        probes.close()


@pytest.fixture
def watch(open_probes: Callable[..., Probes], client: Namespace, server: Namespace) -> Watch:
    """Probes of the best tier, watching client and server."""
    return Watch(open_probes(), client, server)


@pytest.fixture
def held_wire(
    make_namespace: Callable[[str], Namespace],
) -> Iterator[tuple[HeldWire, Namespace, Namespace]]:
    """A client and a server, 10.91.1.1 and 10.91.1.2, on a wire in the test's hands."""
    ends = make_namespace("c"), make_namespace("s")
    made = HeldWire(*ends, make_namespace("w"))
    yield made, *ends
    made.cut()


@pytest.fixture
def make_cgroup() -> Iterator[Callable[[str], Cgroup]]:
    """Make cgroups that are removed at the end."""
    made: list[Cgroup] = []

    def make(path: str) -> Cgroup:
        made.append(Cgroup(f"/pwt{os.getpid()}{path}"))
        return made[-1]

    yield make
    for cgroup in made:
        cgroup.remove()


@pytest.fixture
def make_process(make_cgroup: Callable[[str], Cgroup]) -> Iterator[Callable[..., Process]]:
    """Make processes that are ended before their cgroups are removed."""
    made: list[Process] = []

    def make(namespace: Namespace, cgroup: Cgroup | None = None, **options: object) -> Process:
        made.append(Process(namespace, cgroup, **options))
        return made[-1]

    yield make
    for process in made:
        process.stop()
