"""What the demo says when it can't run here."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from podwire.demo import preflight
from podwire.demo.errors import CapabilityError, NoBtfError, ObjectMissingError, ToolMissingError

if TYPE_CHECKING:
    from pathlib import Path

ALL = (1 << 41) - 1


@pytest.fixture
def fine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine on which nothing is missing, as files in a folder."""
    (tmp_path / "status").write_text(f"Name:\tx\nCapEff:\t{ALL:016x}\n")
    for name in ("btf", "object"):
        (tmp_path / name).touch()
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr(preflight, "STATUS", tmp_path / "status")
    monkeypatch.setattr(preflight, "BTF", tmp_path / "btf")
    monkeypatch.setattr(preflight, "OBJECT", tmp_path / "object")
    monkeypatch.setattr("shutil.which", lambda tool: f"/bin/{tool}")
    return tmp_path


@pytest.mark.usefixtures("fine")
def test_check_passes_where_nothing_is_missing() -> None:
    """A capable root on a kernel with BTF may go on."""
    preflight.check()


@pytest.mark.usefixtures("fine")
def test_check_asks_for_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another user is told how to become root, with the collector's status."""
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(CapabilityError, match="sudo make demo") as raised:
        preflight.check()
    assert raised.value.exit_code == 10


def test_check_names_missing_capabilities(fine: Path) -> None:
    """A root in a container without them is told which."""
    (fine / "status").write_text(f"CapEff:\t{1 << preflight.CAP_NET_ADMIN:016x}\n")
    with pytest.raises(CapabilityError, match="CAP_SYS_ADMIN, CAP_BPF, CAP_PERFMON"):
        preflight.check()


@pytest.mark.parametrize(
    ("file", "error", "status"), [("btf", NoBtfError, 11), ("object", ObjectMissingError, 15)], ids=str
)
def test_check_names_a_missing_file(fine: Path, file: str, error: type[NoBtfError], status: int) -> None:
    """A kernel without BTF and a checkout without the object have statuses of their own."""
    (fine / file).unlink()
    with pytest.raises(error) as raised:
        preflight.check()
    assert raised.value.exit_code == status


@pytest.mark.usefixtures("fine")
def test_check_names_missing_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not installed is named with the command that installs it."""
    monkeypatch.setattr("shutil.which", lambda tool: None if tool == "nft" else tool)
    with pytest.raises(ToolMissingError, match=r"nft. Run `make setup`") as raised:
        preflight.check()
    assert raised.value.exit_code == 43
