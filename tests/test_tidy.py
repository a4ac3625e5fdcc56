"""The code base about itself: sizes, docstrings, import doors, documents against code."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from collector import errors as collector_errors
from enricher import errors as enricher_errors
from podwire import audit
from podwire.demo import errors as demo_errors
from podwire.demo.processes import PERMANENT
from podwire.replay import errors as replay_errors
from schemas import catalog

if TYPE_CHECKING:
    from types import ModuleType

ROOT = Path(__file__).parents[1]
PACKAGES = ("collector", "enricher", "schemas", "podwire")
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
LINES_MAX = 400
FUNCTION_LINES_MAX = 60
DOORS = {
    "confluent_kafka": {
        "collector/kafka.py",
        "enricher/kafka.py",
        "schemas/registry.py",
        "podwire/audit.py",
        "podwire/flows.py",
        "podwire/observe.py",
        "podwire/cli.py",
        "podwire/topics.py",
        "podwire/demo/",
        "podwire/replay/output.py",
    },
    "faust": {"enricher/app.py"},
    "kubernetes": {"collector/cluster/source.py"},
    "bcc": {"collector/node/bcc_compile.py"},
    "ctypes": {
        "collector/node/bcc_compile.py",
        "collector/node/core.py",
        "collector/node/memory.py",
        "podwire/demo/workload.py",
    },
}


def name(path: Path) -> str:
    """Return a path as it stands in the repository."""
    return str(path.relative_to(ROOT))


def imports(path: Path) -> set[str]:
    """Return the top-level packages that a module imports anywhere."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_module_has_a_docstring_and_fits(path: Path) -> None:
    """Each module says what it owns and stays short; functions fit a screen."""
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "no module docstring"
    if path.name == "abi.py":
        return
    assert len(path.read_text().splitlines()) <= LINES_MAX
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < FUNCTION_LINES_MAX, node.name


@pytest.mark.parametrize("library", DOORS)
def test_library_is_imported_through_its_door_only(library: str) -> None:
    """One named module per service imports Kafka, Faust, Kubernetes and libbpf."""
    for path in MODULES:
        if library in imports(path):
            assert any(name(path).startswith(door) for door in DOORS[library]), (
                f"{name(path)} imports {library}"
            )


def test_bpf_sources_stay_short() -> None:
    """A `.bpf.c` holds entry points, the headers one stage each."""
    for path in (ROOT / "bpf").glob("*.c"):
        assert len(path.read_text().splitlines()) <= 250, path.name


def exit_codes(module: ModuleType) -> dict[str, int]:
    """Return the exit codes that a module gives to causes, by the name of the class or constant."""
    found = vars(module).items()
    constants = {name: value for name, value in found if name.startswith("EXIT_") and isinstance(value, int)}
    errors = {
        name: value for name, value in found if isinstance(value, type) and issubclass(value, Exception)
    }
    return constants | {name: error.exit_code for name, error in errors.items() if "exit_code" in vars(error)}


@pytest.mark.parametrize(
    "module",
    [collector_errors, enricher_errors, demo_errors, replay_errors, audit],
    ids=lambda module: module.__name__,
)
def test_exit_codes_are_distinct(module: ModuleType) -> None:
    """Each fatal cause of a service or command has an exit code of its own."""
    codes = exit_codes(module)
    assert len(set(codes.values())) == len(codes) > 3


@pytest.mark.parametrize("module", [collector_errors, enricher_errors], ids=lambda module: module.__name__)
def test_demo_gives_no_exit_code_of_a_service_another_meaning(module: ModuleType) -> None:
    """The demo ends with the status of the service that failed, so its own causes have other ones or mean the same."""
    demo, service = exit_codes(demo_errors), exit_codes(module)
    shared = {name for name, code in demo.items() if code in service.values()}
    assert all(demo[name] == service.get(name) for name in shared)


def test_exit_codes_say_whether_a_restart_mends_the_cause() -> None:
    """Only what the operator must mend keeps a service down; the rest is started again."""
    started_again = {"FatalError", "KafkaFatalError", "StalledError", "ProcessingError"}
    of_replay = {"UnreachableError", "DeletedInputError"}
    codes = exit_codes(collector_errors) | exit_codes(enricher_errors)
    assert {name for name, code in codes.items() if code not in PERMANENT} == started_again | of_replay


def test_reference_is_what_the_code_says() -> None:
    """docs/reference.md is generated: settings, exit codes, metrics, topics and fields."""
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    assert (ROOT / "docs" / "reference.md").read_text() == generate.reference(), "run `make docs`"


def test_topics_are_documented() -> None:
    """Every topic of the catalog stands in the README."""
    text = (ROOT / "README.md").read_text()
    for topic in catalog.TOPICS:
        assert topic.name in text


def test_every_test_that_architecture_names_exists() -> None:
    """A promise that names its proof has it."""
    named = set(re.findall(r"\btest_\w+", (ROOT / "ARCHITECTURE.md").read_text()))
    files = list((ROOT / "tests").rglob("test_*.py"))
    present = {path.stem for path in files}
    for path in files:
        present |= set(re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE))
    assert len(named) > 20
    assert named - present == set()


def test_nothing_names_a_registry_or_a_machine() -> None:
    """No download address, home folder or steering file is named in a tracked file."""
    forbidden = (
        r"https?://[a-z0-9.-]*(debian|pypi|pythonhosted|maven\.org|maven\.apache|npmjs|crates\.io|golang)"
    )
    found = subprocess.run(
        ["git", "grep", "-nIE", forbidden, "--", ".", ":!tests/test_tidy.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert found.stdout == ""


def test_lock_has_hashes_and_no_addresses() -> None:
    """Locked packages are pinned by version and hash, wherever they come from."""
    text = (ROOT / "requirements" / "all.txt").read_text()
    assert "://" not in text
    assert text.count("--hash=sha256:") > text.count("==") > 50
