"""What the bcc tier needs in a guest: Debian's Python with python3-bpfcc, BCC's LLVM, and the kernel's headers.

A third of a gigabyte, so only for guests that ask for it. Called by `guest` and by `__main__`.
"""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from tests.kernel.guests import cpio, fetch, image

if TYPE_CHECKING:
    from collections.abc import Iterator

PYTHON = Path("/usr/bin/python3")
PACKAGE = Path("/usr/lib/python3/dist-packages/bcc")
MEMORY_MBYTES = 3072
"""The files are in memory twice while the kernel unpacks them, and the compiler takes some 200 MB."""
_HEADERS = ("include", "arch/x86/include")


def entries(kernel: fetch.Kernel) -> Iterator[cpio.File | cpio.Link]:
    """Yield the compiler's files, and the kernel's headers where Debian puts them.

    Raises:
        ImageError: python3-bpfcc is not installed on this machine.
        FetchError: the headers can't be had.
    """
    if not PACKAGE.is_dir():
        raise image.ImageError("BCC is missing: apt-get install python3-bpfcc")
    shown = subprocess.run(
        [
            PYTHON,
            "-I",
            "-c",
            "import sysconfig, _ctypes; print(sysconfig.get_path('stdlib'), _ctypes.__file__)",
        ],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    files = [PYTHON.resolve(), *image._run_time_files(Path(shown[0])), *image._run_time_files(PACKAGE)]
    libraries = subprocess.run(["/sbin/ldconfig", "-p"], capture_output=True, text=True, check=True).stdout
    files += [Path(line.split()[-1]) for line in libraries.splitlines() if "libbcc.so.0 " in line]
    made: dict[str, cpio.File | cpio.Link] = {file.path: file for file in image._libraries(files)}
    made |= {str(path): cpio.File(str(path), path.resolve()) for path in files}
    made[str(PYTHON)] = cpio.Link(str(PYTHON), str(PYTHON.resolve()))
    yield from made.values()
    yield from _headers(kernel)


def _headers(kernel: fetch.Kernel) -> Iterator[cpio.File | cpio.Link]:
    """Yield the headers of the kernel's flavour and those common to its flavours, fetched once."""
    flavour = f"linux-headers-{kernel.release}"
    common = flavour.replace("-cloud-amd64", "-common")
    kept = kernel.folder / "headers"
    if not kept.exists():
        with tempfile.TemporaryDirectory(dir=fetch.BUILD) as scratch:
            fetch.unpacked([flavour, common], kernel, Path(scratch)).rename(kept)
    for name, link in ((flavour, "build"), (common, "source")):
        yield cpio.Link(f"/lib/modules/{kernel.release}/{link}", f"/usr/src/{name}")
        for part in _HEADERS:
            for path in image._files(kept / "usr/src" / name / part):
                if path.is_file():
                    yield cpio.File(f"/{path.relative_to(kept)}", path)
