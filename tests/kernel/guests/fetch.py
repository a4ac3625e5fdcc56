"""Debian's cloud kernels on disk: `kernel("6.1")` returns the newest 6.1 of the suites, fetched once.

Owns `build/kernels/apt` (an apt configuration of its own: lists and cache, nothing shared with the machine's)
and one folder per kernel; for other suites than the usual the same in `build/kernels/SUITES`. The mirror is the
machine's own, read from its apt sources at run time; apt checks signatures and hashes. Never installs a package.
Called by `__main__` and by tests of the guests.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tests.kernel.guests import modules

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).parents[3]
BUILD = ROOT / "build" / "kernels"
SUITES = ("bullseye", "bookworm", "trixie", "trixie-backports", "sid")
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_IMAGE = re.compile(r"linux-image-([0-9]\S*-cloud-amd64)")

APT_CONFIG = """\
Dir::Etc::sourcelist "{folder}/sources.list";
Dir::Etc::sourceparts "-";
Dir::Etc::preferences "{folder}/preferences";
Dir::State "{folder}";
Dir::State::status "{folder}/status";
Dir::Cache "{folder}/cache";
APT::Architectures "amd64";
APT::Sandbox::User "root";
Acquire::Languages "none";
Acquire::IndexTargets::deb::DEP-11::DefaultEnabled "false";
"""


class FetchError(RuntimeError):
    """A kernel could not be had; the message says what to do."""


@dataclass(frozen=True)
class Kernel:
    """A kernel on disk.

    Attributes:
        line: what was asked for, as "6.1"; "7" is the newest 7.x.
        release: what `uname -r` says in the guest.
        folder: has `vmlinuz` and `modules/NNN-name.ko`, to be loaded in the order of their names.
    """

    line: str
    release: str
    folder: Path


def kernel(line: str, *, suites: Sequence[str] = SUITES, refresh: bool = False) -> Kernel:
    """Return the newest cloud-amd64 kernel of the version line, from disk unless it is missing or `refresh`.

    Raises:
        FetchError: no Debian mirror in the machine's apt sources, no such suite or kernel, or apt failed.
    """
    home = BUILD if tuple(suites) == SUITES else BUILD / "+".join(suites)
    folder = home / line
    record = folder / "kernel.json"
    if not refresh and record.exists():
        known = json.loads(record.read_text())
        if known["wanted"] == list(modules.WANTED):
            return Kernel(line, known["release"], folder)
    apt = _Apt(home / "apt")
    if refresh or not apt.has_lists():
        apt.update(suites)
    names = apt.package_names()
    release = newest(line, names)
    if release is None:
        raise FetchError(
            f"no suite of {', '.join(suites)} has a cloud kernel {line}; they have {_lines(names)}. Try --refresh."
        )
    packages = [f"linux-{part}-{release}" for part in ("image", "binary", "modules")]
    with tempfile.TemporaryDirectory(dir=BUILD) as scratch:
        tree = apt.unpacked([name for name in packages if name in names], Path(scratch))
        made = _assemble(tree, release, Path(scratch))
        shutil.rmtree(folder, ignore_errors=True)
        made.rename(folder)
    return Kernel(line, release, folder)


def unpacked(packages: list[str], beside: Kernel, scratch: Path) -> Path:
    """Fetch packages of a kernel's suites and return the one tree that they were unpacked into, below `scratch`.

    Raises:
        FetchError: apt failed.
    """
    return _Apt(beside.folder.parent / "apt").unpacked(packages, scratch)


def _lines(package_names: set[str]) -> str:
    """Return the version lines among the names of packages, for a reader."""
    releases = [match[1] for name in package_names if (match := _IMAGE.fullmatch(name))]
    found = {tuple(map(int, re.findall(r"[0-9]+", release)[:2])) for release in releases}
    return ", ".join(".".join(map(str, line)) for line in sorted(found))


def newest(line: str, package_names: set[str]) -> str | None:
    """Return the highest release of the version line among the names of packages; None when there is none."""
    releases = [match[1] for name in package_names if (match := _IMAGE.fullmatch(name))]
    mine = [release for release in releases if re.match(rf"{re.escape(line)}(?![0-9])", release)]
    return max(
        mine, key=lambda release: [int(number) for number in re.findall(r"[0-9]+", release)], default=None
    )


def _assemble(tree: Path, release: str, scratch: Path) -> Path:
    """Make a kernel's folder from its unpacked packages: the image, the wanted modules, the record last."""
    found = [path for path in tree.rglob("vmlinuz*") if path.is_file()]
    if len(found) != 1:
        raise FetchError(f"the packages of {release} have {len(found)} kernel images instead of one.")
    made = scratch / "made"
    (made / "modules").mkdir(parents=True)
    shutil.copy(found[0], made / "vmlinuz")
    paths = modules.index(tree)
    elves: dict[str, bytes] = {}
    todo = list(modules.WANTED)
    while todo:
        name = todo.pop()
        if name in paths and name not in elves:
            elves[name] = modules.read(paths[name])
            todo += modules.needs(elves[name])
    order = modules.load_order(modules.WANTED, {name: modules.needs(elf) for name, elf in elves.items()})
    for number, name in enumerate(order):
        (made / "modules" / f"{number:03}-{name}.ko").write_bytes(elves[name])
    record = {
        "release": release,
        "wanted": list(modules.WANTED),
        "absent": sorted(set(modules.WANTED) - set(order)),
    }
    (made / "kernel.json").write_text(json.dumps(record, indent=1) + "\n")
    return made


class _Apt:
    """apt with lists and sources of its own, run as whoever we are."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        (folder / "cache" / "archives" / "partial").mkdir(parents=True, exist_ok=True)
        (folder / "lists" / "partial").mkdir(parents=True, exist_ok=True)
        (folder / "status").touch()
        (folder / "apt.conf").write_text(APT_CONFIG.format(folder=folder))
        self._environment = {**os.environ, "APT_CONFIG": str(folder / "apt.conf"), "LC_ALL": "C"}

    def has_lists(self) -> bool:
        return any((self._folder / "lists").glob("*_Packages*"))

    def update(self, suites: Sequence[str]) -> None:
        """Fetch the lists of the suites; one that the mirror no longer has is told by apt and passed over."""
        mirror = _mirror()
        signed = f" [signed-by={KEYRING}]" if KEYRING.exists() else ""
        sources = "".join(f"deb{signed} {mirror} {suite} main\n" for suite in suites)
        (self._folder / "sources.list").write_text(sources)
        subprocess.run(["apt-get", "update"], env=self._environment, stdout=sys.stderr, check=False)
        if not self.has_lists():
            raise FetchError(
                f"apt could read no suite of {', '.join(suites)} from {mirror}; its messages are above."
            )

    def package_names(self) -> set[str]:
        done = subprocess.run(
            ["apt-cache", "pkgnames", "linux-"],
            env=self._environment,
            capture_output=True,
            text=True,
            check=True,
        )
        return set(done.stdout.split())

    def unpacked(self, packages: list[str], scratch: Path) -> Path:
        """Download the packages, checked by apt, and unpack all of them into one tree."""
        done = subprocess.run(
            ["apt-get", "download", *packages],
            env=self._environment,
            cwd=scratch,
            stdout=sys.stderr,
            check=False,
        )
        if done.returncode != 0:
            raise FetchError(
                f"apt could not download {' '.join(packages)}: try --refresh; its messages are above."
            )
        for package in scratch.glob("*.deb"):
            subprocess.run(["dpkg-deb", "-x", str(package), str(scratch / "tree")], check=True)
        return scratch / "tree"


def _mirror() -> str:
    """Return the address that the machine's apt sources give for its own Debian suite."""
    release = Path("/etc/os-release").read_text()
    codename = re.search(r"^VERSION_CODENAME=(\S+)", release, re.MULTILINE)
    shown = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(RELEASE) $(REPO_URI)", "Created-By: Packages"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    for target in shown.splitlines():
        suite, _, address = target.partition(" ")
        if codename and suite == codename[1]:
            return address
    raise FetchError("this machine's apt sources name no Debian mirror: see `apt-get indextargets`.")
