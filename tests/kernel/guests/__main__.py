"""`python -m tests.kernel.guests`: the scenarios in every tier, or any command, on several kernels, and a matrix.

The command behind `make kernels`. Other kernel tests run too, in the tier that the guest's kernel chooses. Progress
and the guests' output go to standard error, the matrix to standard output.
Exit status: 0 when all was as the table says and no test failed (of a command of one's own: it succeeded) in every
guest, 1 when it was not in one, 2 when a guest could not be had.
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from typing import TYPE_CHECKING

from tests.kernel.guests import cells, fetch, guest, image
from tests.kernel.scenarios import CORE_TIERS, SCENARIOS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

KERNELS = "5.10,6.1,6.12,7"
BCC_KERNELS = "6.1"
"""Debian's BCC comes from the same release as this kernel, and reads its headers."""
MORE_KERNELS = "5.10,6.12"
MORE = tuple(
    f"tests/kernel/test_{name}.py"
    for name in ("books", "existing", "filters", "pins", "privilege", "progress")
)
"""What runs in the tier that the kernel chooses: on the oldest kernel and a recent one, since it takes minutes."""
PYTEST = ("python", "-m", "pytest", "-v", "--tb=short", "--color=no", "-p", "no:cacheprovider")
_OUTCOME = re.compile(r"^(tests/\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b")

Column = dict[str, str]
"""One guest's outcomes: by test, and by "exit status" for the whole command."""


def main(arguments: Sequence[str]) -> int:
    """Run the scenarios, or the command of `arguments`, in every guest, print the matrix, return the exit status."""
    options = _options(arguments)
    columns: dict[str, Column] = {}
    found: dict[str, cells.Cells] = {}
    try:
        kernels = [
            fetch.kernel(line, suites=options.suites.split(","), refresh=options.refresh)
            for line in options.kernels.split(",")
        ]
        if options.fetch_only:
            sys.stdout.writelines(
                f"{kernel.line:8} {kernel.release:32} {kernel.folder}\n" for kernel in kernels
            )
            return 0
        subprocess.run(["make", "-C", str(fetch.ROOT / "bpf")], check=True, stdout=subprocess.DEVNULL)
        for kernel in kernels:
            for cgroup in options.cgroup.split(","):
                name = f"{kernel.line} {cgroup}"
                found[name] = {}
                columns[name] = _column(kernel, cgroup, options, found[name])
    except (fetch.FetchError, image.ImageError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    ends = [column["exit status"] for column in columns.values()]
    if options.command:
        sys.stdout.write(matrix(columns))
        good = all(end == "0" for end in ends)
    else:
        tiers = {name: _tiers(name.split()[0], options) for name in found}
        sys.stdout.write(cells.matrix(found, options.scenarios, tiers))
        if any(kernel.line in options.more.split(",") for kernel in kernels):
            sys.stdout.write("\n" + cells.sums(columns, MORE))
        good = all(end == "0" for end in ends) and all(
            cells.good(outcomes, options.scenarios, tiers[name]) for name, outcomes in found.items()
        )
    return 2 if "none" in ends else int(not good)


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.kernel.guests", description=__doc__)
    parser.add_argument(
        "--kernels", default=KERNELS, help="version lines, comma between; 7 is the newest 7.x"
    )
    parser.add_argument(
        "--suites", default=",".join(fetch.SUITES), help="Debian suites that they come from, comma between"
    )
    parser.add_argument("--cgroup", default="v2", help="v2, hybrid (v1 with v2 beside it) or v2,hybrid")
    parser.add_argument("--tiers", default=",".join(CORE_TIERS), help="probe tiers, comma between")
    parser.add_argument(
        "--scenarios",
        default=";".join(SCENARIOS),
        help="rows of tests/kernel/scenarios.py, semicolon between",
    )
    parser.add_argument("--timeout", type=float, default=1800, metavar="SECONDS", help="per guest")
    parser.add_argument("--refresh", action="store_true", help="look for newer kernels in the Debian mirror")
    parser.add_argument(
        "--fetch-only", action="store_true", help="fetch the kernels and name them, boot none"
    )
    parser.add_argument(
        "--bcc",
        default=None,
        metavar="KERNELS",
        help=f"those that get BCC and their headers, and play tier bcc too; {BCC_KERNELS} unless a command is given",
    )
    parser.add_argument(
        "--more",
        default=MORE_KERNELS,
        metavar="KERNELS",
        help=f"those that also run {', '.join(MORE)}; comma between",
    )
    parser.add_argument(
        "--instructions", action="store_true", help="one instruction takes one ns: times become counts"
    )
    parser.add_argument(
        "command", nargs="*", help="what to run in the checkout's copy instead of the scenarios"
    )
    options = parser.parse_args(arguments)
    options.tiers, options.scenarios = options.tiers.split(","), options.scenarios.split(";")
    if options.bcc is None:
        options.bcc = "" if options.command else BCC_KERNELS
    options.bcc = options.bcc.split(",")
    if unknown := set(options.scenarios) - set(SCENARIOS):
        parser.error(f"--scenarios: the table has no {', '.join(sorted(unknown))}")
    if not set(options.cgroup.split(",")) <= {"v2", "hybrid"}:
        parser.error(f"--cgroup {options.cgroup}: v2, hybrid or v2,hybrid")
    return options


def _tiers(line: str, options: argparse.Namespace) -> list[str]:
    """Return the tiers that the guest with this kernel plays."""
    return [*options.tiers, *(["bcc"] if line in options.bcc else [])]


def scenario_command(tiers: Sequence[str], scenarios: Sequence[str], tests: Sequence[str] = ()) -> list[str]:
    """Return what plays the scenarios in the tiers, in one run of pytest, and then the files `tests` in another."""
    kernel_tests = (fetch.ROOT / "tests" / "kernel").glob("test_*.py")
    files = sorted(
        f"tests/kernel/{path.name}" for path in kernel_tests if ".mark.scenario(" in path.read_text()
    )
    if "bcc" in tiers:
        files.append("tests/kernel/test_bcc.py")
    environment = {
        "PODWIRE_TEST_TIER": ",".join(tier for tier in tiers if tier != "bcc") or "auto",
        "PODWIRE_TEST_SCENARIOS": ";".join(scenarios),
    }
    play = ["env", *(f"{name}={value}" for name, value in environment.items()), *PYTEST, *files]
    if not tests:
        return play
    others = shlex.join([*PYTEST, *tests])
    return ["sh", "-c", f"{shlex.join(play)}; played=$?; {others} && exit $played"]


def _column(
    kernel: fetch.Kernel, cgroup: guest.Cgroup, options: argparse.Namespace, found: cells.Cells
) -> Column:
    """Run the command in one guest and return its outcomes; a guest that did not end has the exit status "none"."""
    sys.stderr.write(f"[{kernel.line} {cgroup}] booting {kernel.release}\n")

    def show(line: str) -> None:
        sys.stderr.write(f"[{kernel.line} {cgroup}] {line}\n")

    column: Column = {}
    tiers = _tiers(kernel.line, options)
    more = MORE if kernel.line in options.more.split(",") else ()

    def hear(line: str) -> None:
        show(line)
        column.update(outcomes(line))
        cells.note(found, line)

    try:
        result = guest.run(
            kernel,
            options.command or scenario_command(tiers, options.scenarios, more),
            cgroup=cgroup,
            timeout_seconds=options.timeout,
            on_line=hear,
            with_compiler="bcc" in tiers,
            instructions_as_ns=options.instructions,
        )
    except guest.GuestError as error:
        show(str(error))
        return column | {"exit status": "none"}
    show(f"exit status {result.exit_code} after {result.seconds:.1f} s")
    return column | {"exit status": str(result.exit_code), "seconds": f"{result.seconds:.0f}"}


def outcomes(line: str) -> Column:
    """Return the test and its outcome if the line of `pytest -v` names one, else nothing."""
    match = _OUTCOME.match(line)
    return {match[1]: match[2].lower()} if match else {}


def matrix(columns: Mapping[str, Column]) -> str:
    """Return a table: one row per test in the order of its first guest, one column per guest."""
    rows = list(
        dict.fromkeys(name for column in columns.values() for name in sorted(column, key="::".__contains__))
    )
    rows.sort(key=lambda row: "::" not in row)
    width = max(map(len, rows), default=0)
    widths = {head: max(len(head), 8) for head in columns}
    lines = [" ".join([" " * width, *(head.ljust(widths[head]) for head in columns)])]
    lines += [
        " ".join(
            [
                row.ljust(width),
                *(column.get(row, "-").ljust(widths[head]) for head, column in columns.items()),
            ]
        )
        for row in rows
    ]
    return "".join(line.rstrip() + "\n" for line in lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
