"""What decides inside the guests' machinery, without a guest: names, orders, archives, the matrix."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import pytest

from tests.kernel.guests import cells, cpio, fetch, guest, modules
from tests.kernel.guests.__main__ import matrix, outcomes

if TYPE_CHECKING:
    from pathlib import Path

PACKAGES = {
    "linux-image-5.10.0-30-cloud-amd64",
    "linux-image-5.10.0-32-cloud-amd64",
    "linux-image-6.1.0-9-cloud-amd64",
    "linux-image-6.1.0-47-cloud-amd64",
    "linux-image-6.1.0-50-cloud-amd64-dbg",
    "linux-image-6.12.94+deb13-cloud-amd64",
    "linux-image-6.12.107+deb13-cloud-amd64",
    "linux-image-6.12.108+deb13-cloud-amd64-unsigned",
    "linux-image-7.2.13+deb14-cloud-amd64",
    "linux-image-7.3.4+deb13-cloud-amd64",
    "linux-image-6.11.10+bpo-cloud-amd64",
    "linux-image-6.0.0-0.deb11.6-cloud-amd64",
    "linux-image-6.0.0-0.deb11.2-cloud-amd64",
    "linux-image-cloud-amd64",
}


@pytest.mark.parametrize(
    ("line", "release"),
    [
        ("5.10", "5.10.0-32-cloud-amd64"),
        ("6.1", "6.1.0-47-cloud-amd64"),
        ("6.12", "6.12.107+deb13-cloud-amd64"),
        ("7", "7.3.4+deb13-cloud-amd64"),
        ("7.2", "7.2.13+deb14-cloud-amd64"),
        ("5", "5.10.0-32-cloud-amd64"),
        ("6.11", "6.11.10+bpo-cloud-amd64"),
        ("6.0", "6.0.0-0.deb11.6-cloud-amd64"),
        ("4.19", None),
    ],
)
def test_newest_compares_numbers_within_the_version_line(line: str, release: str | None) -> None:
    """6.1 is not 6.12, 107 is newer than 94, and debug and unsigned images are none."""
    assert fetch.newest(line, PACKAGES) == release


def test_load_order_puts_needs_first_and_leaves_out_what_the_kernel_lacks() -> None:
    """Each module comes once, after all that it needs, however deep."""
    needs_of = {
        "nft_nat": ["nf_nat", "nf_tables"],
        "nf_nat": ["nf_conntrack"],
        "nf_conntrack": [],
        "nf_tables": [],
    }
    order = modules.load_order(["nft_nat", "nft_counter", "nf_tables"], needs_of)
    assert order == ["nf_conntrack", "nf_nat", "nf_tables", "nft_nat"]


def test_needs_reads_the_depends_line_of_a_module() -> None:
    """A dash in a name counts as an underscore; an empty line means no needs."""
    assert modules.needs(b"\x7fELF..\0license=GPL\0depends=nf_nat,nf-tables\0intree=Y\0") == [
        "nf_nat",
        "nf_tables",
    ]
    assert modules.needs(b"\x7fELF..\0depends=\0intree=Y\0") == []


def members(archive: bytes) -> dict[str, tuple[int, bytes]]:
    """Return mode and bytes by name, read as the format's description says: 13 hex fields, all padded to 4."""
    found: dict[str, tuple[int, bytes]] = {}
    offset = 0
    while True:
        assert archive[offset : offset + 6] == b"070701"
        fields = [int(archive[offset + 6 + 8 * index : offset + 14 + 8 * index], 16) for index in range(13)]
        name = archive[offset + 110 : offset + 110 + fields[11] - 1].decode()
        start = (offset + 110 + fields[11] + 3) // 4 * 4
        offset = (start + fields[6] + 3) // 4 * 4
        if name == "TRAILER!!!":
            assert offset == len(archive)
            return found
        found[name] = (fields[1], archive[start : start + fields[6]])


def test_cpio_archive_has_folders_before_files_with_modes_and_bytes(tmp_path: Path) -> None:
    """Folders are made without being listed, an execute bit of the source stays, a link's bytes are its target."""
    source = tmp_path / "source"
    source.write_bytes(b"odd")
    source.chmod(0o755)
    entries: list[cpio.File | cpio.Link] = [
        cpio.File("/usr/sbin/b", source),
        cpio.File("/etc/a", b"12345"),
        cpio.Link("/bin/c", "../usr/sbin/b"),
    ]
    archive = io.BytesIO()
    cpio.write(archive, entries)
    assert list(members(archive.getvalue()).items()) == [
        ("bin", (0o040755, b"")),
        ("bin/c", (0o120777, b"../usr/sbin/b")),
        ("etc", (0o040755, b"")),
        ("etc/a", (0o100644, b"12345")),
        ("usr", (0o040755, b"")),
        ("usr/sbin", (0o040755, b"")),
        ("usr/sbin/b", (0o100755, b"odd")),
    ]


def test_outcomes_takes_only_the_lines_of_tests() -> None:
    """A parameter with spaces belongs to the name; a traceback line is no outcome."""
    line = "tests/kernel/test_a.py::test_b[v4 mapped] PASSED        [ 10%]"
    assert outcomes(line) == {"tests/kernel/test_a.py::test_b[v4 mapped]": "passed"}
    assert outcomes("tests/kernel/test_a.py:12: AssertionError") == {}


def test_matrix_shows_a_dash_where_a_guest_did_not_run_the_test() -> None:
    """Rows come in the first guest's order, what is about the whole guest comes last."""
    table = matrix(
        {
            "6.1 v2": {"exit status": "0", "t.py::b": "passed", "t.py::a": "passed"},
            "7 v2": {"exit status": "none", "t.py::b": "failed"},
        }
    )
    rows = [line.split() for line in table.splitlines()[1:]]
    assert rows == [
        ["t.py::b", "passed", "failed"],
        ["t.py::a", "passed", "-"],
        ["exit", "status", "0", "none"],
    ]


def test_boot_keeps_output_apart_from_the_exit_status() -> None:
    """The last line of an output without a newline at its end is not lost, and the marker is not shown."""
    heard: list[str] = []
    script = "printf 'one\\ntwo'; echo podwire-guest-exit 3"
    assert guest.converse(["sh", "-c", script], 10, heard.append) == ("one\ntwo", 3, False)
    assert heard == ["one", "two"]


def test_boot_kills_a_guest_that_does_not_end() -> None:
    """Time that runs out leaves no process, keeps the output so far and says so."""
    assert guest.converse(["sh", "-c", "echo one; exec sleep 1000"], 0.2, print) == ("one", None, True)


def test_cells_show_the_worst_outcome_and_what_a_tier_cannot_see() -> None:
    """Good is what went as the table says, in every tier and scenario that was asked for; nothing less."""
    found: cells.Cells = {}
    for line in (
        "podwire-cell\tfentry\tpassed\tno route",
        "podwire-cell\ttp_btf\tpassed\tno route",
        "podwire-cell\tfentry\tpassed\trefused",
        "podwire-cell\tfentry\tfailed\trefused",
        "tests/kernel/test_failed.py::test_a PASSED",
    ):
        cells.note(found, line)
    rows = [
        line.split("  ")
        for line in cells.matrix(
            {"7": found}, ["no route", "refused"], {"7": ["fentry", "tp_btf"]}
        ).splitlines()
    ]
    assert [[cell.strip() for cell in row if cell] for row in rows] == [
        ["kernel", "7", "7"],
        ["tier", "fentry", "tp_btf"],
        ["no route", "ok", "less"],
        ["refused", "FAILED", "-"],
        ["good of 2", "1", "1"],
    ]
    assert cells.good(found, ["no route"], ["fentry", "tp_btf"])
    assert not cells.good(found, ["no route", "refused"], ["fentry"])
    assert not cells.good(found, ["refused"], ["tp_btf"])


def test_sums_count_a_files_tests_by_how_they_ended() -> None:
    """A guest that ran none shows a dash; a failure shows beside the rest."""
    ends = {"a.py::b": "passed", "a.py::c": "failed", "aa.py::d": "passed", "exit status": "1"}
    rows = [line.split("  ") for line in cells.sums({"5.10 v2": ends, "7 v2": {}}, ["a.py"]).splitlines()]
    assert [[cell.strip() for cell in row if cell] for row in rows] == [
        ["in the tier chosen there", "5.10 v2", "7 v2"],
        ["a.py", "1 failed, 1 passed", "-"],
    ]
