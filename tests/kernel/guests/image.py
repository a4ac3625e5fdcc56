"""The files of a guest, as cpio layers: the machine's own Python and tools (cached), a kernel's modules, this checkout.

The guest has the checkout at `/podwire` with an environment of its own in `/podwire/.venv`, made of this Python and
of the distributions in `DISTRIBUTIONS` with what they require. Programs bring their libraries along, found by ldd.
Never changes the machine, but for Python's own byte-code caches in the environment's site-packages. Called by `guest`.
"""

from __future__ import annotations

import compileall
import hashlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from packaging.requirements import Requirement

from tests.kernel.guests import cpio
from tests.kernel.guests.fetch import BUILD, ROOT

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

HOME = "/podwire"
"""Where the checkout is in the guest."""

DISTRIBUTIONS = (
    "confluent-kafka",
    "fastavro",
    "hypothesis",
    "numpy",
    "orjson",
    "prometheus-client",
    "pydantic-settings",
    "pytest",
    "pytest-timeout",
    "structlog",
)
CHECKOUT = ("bench", "bpf", "build/bpf", "collector", "podwire", "schemas", "tests", "pyproject.toml")
TOOLS = (
    "bpftool",
    "busybox",
    "dash",
    "ip",
    "make",
    "mount",
    "nft",
    "nsenter",
    "setpriv",
    "umount",
    "unshare",
)
"""Programs of the guest. `make` finds the BPF object up to date there: times are kept, and there is no compiler."""
LIBRARIES = ("libbpf.so.1",)

_PACKAGE_OF = {"ip": "iproute2", "nft": "nftables"}
_LEFT_OUT_FOLDERS = {
    *("test", "tests", "idlelib", "lib2to3", "tkinter", "turtledemo", "ensurepip"),
    *("site-packages", "dist-packages"),
    f"config-{sys.version_info.major}.{sys.version_info.minor}-x86_64-linux-gnu",
}
_LEFT_OUT_FILES = re.compile(r".*(\.opt-[12]\.pyc|\.(a|c|h|exe|pxd|pyi|pyx|o\.d))$")
_ETC = {
    "/etc/passwd": "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/sh\n",
    "/etc/group": "root:x:0:\nnogroup:x:65534:\n",
    "/etc/hosts": "127.0.0.1 localhost\n::1 localhost\n",
}


class ImageError(RuntimeError):
    """The guest's files can't be had; the message says what to install."""


def base_layer() -> Path:
    """Return the archive with Python, packages and tools, built again only when one of its files changed."""
    entries = [*_python(), *_packages(), *_tools()]
    digest = hashlib.sha256(Path(__file__).read_bytes() + Path(cpio.__file__).read_bytes())
    for entry in entries:
        digest.update(repr(entry).encode())
        if isinstance(entry, cpio.File) and isinstance(entry.source, Path):
            status = entry.source.stat()
            digest.update(b"%d %d" % (status.st_size, status.st_mtime_ns))
    layer = BUILD / f"base-{digest.hexdigest()[:16]}.cpio"
    if not layer.exists():
        for old in BUILD.glob("base-*.cpio"):
            old.unlink()
        sources = [entry.source for entry in entries if isinstance(entry, cpio.File)]
        libraries = _libraries(source for source in sources if isinstance(source, Path))
        by_path: dict[str, cpio.File | cpio.Link] = {entry.path: entry for entry in [*libraries, *entries]}
        with tempfile.TemporaryDirectory(dir=BUILD) as scratch:
            made = Path(scratch) / "base"
            with made.open("wb") as out:
                cpio.write(out, by_path.values())
            made.rename(layer)
    return layer


def kernel_entries(folder: Path) -> Iterator[cpio.File]:
    """Yield a kernel's modules; the guest loads them in the order of their names."""
    for module in sorted((folder / "modules").iterdir()):
        yield cpio.File(f"/modules/{module.name}", module)


def checkout_entries() -> Iterator[cpio.File]:
    """Yield this checkout as it is now, and the guest's first process."""
    yield cpio.File("/init", Path(__file__).with_name("init.sh"), 0o755)
    for name in CHECKOUT:
        for path in _files(ROOT / name, left_out_folders={"guests"}):
            if ".pyc." not in path.name:  # a byte-code cache that is being written
                yield cpio.File(f"{HOME}/{path.relative_to(ROOT)}", path)


def _python() -> Iterator[cpio.File | cpio.Link]:
    """Yield the base Python at its own place (its prefix is found from there), and the guest's environment."""
    executable, standard_library = Path(sys.executable).resolve(), Path(sysconfig.get_path("stdlib"))
    yield cpio.File(str(executable), executable)
    for path in _run_time_files(standard_library):
        yield cpio.File(str(path), path)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    yield cpio.File(
        f"{HOME}/.venv/pyvenv.cfg",
        f"home = {executable.parent}\ninclude-system-site-packages = false\n".encode(),
    )
    for name in ("python", "python3", version):
        yield cpio.Link(f"{HOME}/.venv/bin/{name}", str(executable))


def _packages() -> Iterator[cpio.File]:
    """Yield the distributions and all that they require, with fresh byte code: compiling is slow in a guest."""
    site = Path(sysconfig.get_path("purelib"))
    relative = f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
    for top in sorted(_tops(DISTRIBUTIONS)):
        path = site / top
        if path.is_dir():
            compileall.compile_dir(path, quiet=2)
        for file in _run_time_files(path):
            yield cpio.File(f"{HOME}/.venv/{relative}/{file.relative_to(site)}", file)


def _tops(names: Iterable[str]) -> set[str]:
    """Return the names in site-packages that belong to the distributions and to what they require."""
    todo, done, tops = list(names), set[str](), set[str]()
    while todo:
        name = re.sub(r"[-_.]+", "-", todo.pop()).lower()
        if name in done:
            continue
        done.add(name)
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError as error:
            raise ImageError(
                f"the environment lacks {name}: install the extras collector and dev."
            ) from error
        tops |= {
            file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "__pycache__")
        }
        for text in distribution.requires or ():
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                todo.append(requirement.name)
    return tops


def _tools() -> Iterator[cpio.File | cpio.Link]:
    for tool in TOOLS:
        found = shutil.which(tool, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
        if found is None:
            raise ImageError(f"{tool} is missing: apt-get install {_PACKAGE_OF.get(tool, tool)}")
        yield cpio.File("/bin/busybox" if tool == "busybox" else f"/usr/sbin/{tool}", Path(found).resolve())
    yield cpio.Link(
        "/bin/sh", "/usr/sbin/dash"
    )  # busybox's own shell takes its applets for `ip` and the like
    for path, text in _ETC.items():
        yield cpio.File(path, text.encode())
    for folder in ("dev", "proc", "root", "run", "sys", "tmp", "var/tmp"):
        yield cpio.File(f"/{folder}/.keep", b"")
    for name in LIBRARIES:
        shown = subprocess.run(["/sbin/ldconfig", "-p"], capture_output=True, text=True, check=True).stdout
        found = next((line.split()[-1] for line in shown.splitlines() if line.split()[:1] == [name]), None)
        if found is None:
            raise ImageError(f"{name} is missing: apt-get install {name.split('.')[0]}1")
        yield cpio.File(found, Path(found).resolve())


def _libraries(sources: Iterable[Path]) -> Iterator[cpio.File]:
    """Yield the shared libraries that the programs and libraries among `sources` load, under the paths they ask for."""
    elves = [str(path) for path in sources if path.suffix not in (".py", ".pyc") and _is_elf(path)]
    shown = subprocess.run(["ldd", *elves], capture_output=True, text=True, check=False).stdout
    for found in sorted(set(re.findall(r"(?:=> |^\s)(/\S+) \(0x", shown, re.MULTILINE))):
        if "/site-packages/" not in found:
            yield cpio.File(found, Path(found).resolve())


def _is_elf(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"\x7fELF"


def _files(top: Path, left_out_folders: Collection[str] = ()) -> Iterator[Path]:
    """Yield the files at and below `top` in a fixed order."""
    if top.is_file():
        yield top
    for folder, folders, files in os.walk(top):
        folders[:] = sorted(name for name in folders if name not in left_out_folders)
        yield from (Path(folder) / name for name in sorted(files))


def _run_time_files(top: Path) -> Iterator[Path]:
    """Yield the files at and below `top` that Python may load, and the data beside them."""
    return (path for path in _files(top, _LEFT_OUT_FOLDERS) if not _LEFT_OUT_FILES.fullmatch(path.name))
