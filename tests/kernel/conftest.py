"""What the kernel tests share: the built object, tracefs, two wired namespaces and probes on the running kernel."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from collector.node.probes import DEFAULT_OBJECT, ProbeOptions, Probes
from collector.node.tiers import BTF_FILE, read_environment
from tests.kernel.node import Cgroup, Namespace, Process, Watch, wire

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

TRACEFS = Path("/sys/kernel/tracing")


@pytest.fixture(scope="session", autouse=True)
def kernel() -> Iterator[None]:
    """Skip where probes can't be tried; build the object; mount tracefs where it is not mounted."""
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
def open_probes(tmp_path: Path) -> Iterator[Callable[..., Probes]]:
    """Open probes with some options; they are detached at the end."""
    opened: list[Probes] = []

    def start(**options: object) -> Probes:
        opened.append(Probes.open(ProbeOptions(state_dir=tmp_path / "state", **options)))
        return opened[-1]

    yield start
    for probes in opened:
        probes.close()


@pytest.fixture
def watch(open_probes: Callable[..., Probes], client: Namespace, server: Namespace) -> Watch:
    """Probes of the best tier, watching client and server."""
    return Watch(open_probes(), client, server)


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
