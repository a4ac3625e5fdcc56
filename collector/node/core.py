"""Loads, attaches and pins the BPF object: the only module that touches libbpf.

Owns the ctypes signatures, the translation of libbpf's errors, and file descriptors of maps. Never reads a ring
and never decides which programs run. Called by probes.py and pins.py.
"""

from __future__ import annotations

import ctypes
import errno
import os
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from collector.errors import AbiError, FatalError, ObjectMissingError
from collector.node.abi import ABI_VERSION, OPTIONS
from collector.node.load_errors import load_error

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

LIBBPF = "libbpf.so.1"
OPTIONS_MAP = b".rodata.options"
BTF_KIND_FUNC = 12
BTF_INFO, BTF_TYPE, BTF_VLEN_MASK = 1, 2, 0xFFFF
"""Words of struct btf_type: kind and number of members, type (include/uapi/linux/btf.h)."""
TEST_RUN_WORDS = 10
TEST_RUN_CONTEXT, TEST_RUN_CONTEXT_BYTES, TEST_RUN_RESULT = 4, 6, 7
"""struct bpf_test_run_opts of libbpf 1.0 in words of 8 bytes; the first one is its size, 0 elsewhere is the default."""
KEYS_PER_READ = 600
VERIFIER_LOG_BYTES = 1 << 20
WARNINGS_MAX = 20

_Print = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_POINTER, _INT, _TEXT = ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "libbpf_set_print": (_POINTER, [_POINTER]),
    "libbpf_num_possible_cpus": (_INT, []),
    "bpf_object__open_file": (_POINTER, [_TEXT, _POINTER]),
    "bpf_object__next_program": (_POINTER, [_POINTER, _POINTER]),
    "bpf_object__find_map_by_name": (_POINTER, [_POINTER, _TEXT]),
    "bpf_object__load": (_INT, [_POINTER]),
    "bpf_object__close": (None, [_POINTER]),
    "bpf_program__name": (_TEXT, [_POINTER]),
    "bpf_program__set_autoload": (_INT, [_POINTER, ctypes.c_bool]),
    "bpf_program__set_log_buf": (_INT, [_POINTER, _POINTER, ctypes.c_size_t]),
    "bpf_program__attach": (_POINTER, [_POINTER]),
    "bpf_program__attach_iter": (_POINTER, [_POINTER, _POINTER]),
    "bpf_iter_create": (_INT, [_INT]),
    "bpf_map__initial_value": (_POINTER, [_POINTER, ctypes.POINTER(ctypes.c_size_t)]),
    "bpf_map__set_max_entries": (_INT, [_POINTER, ctypes.c_uint32]),
    "bpf_map__fd": (_INT, [_POINTER]),
    "bpf_link__fd": (_INT, [_POINTER]),
    "bpf_link__destroy": (_INT, [_POINTER]),
    "bpf_obj_pin": (_INT, [_INT, _TEXT]),
    "bpf_obj_get": (_INT, [_TEXT]),
    "bpf_map_lookup_elem": (_INT, [_INT, _POINTER, _POINTER]),
    "bpf_map_lookup_batch": (_INT, [_INT, *[_POINTER] * 5, _POINTER]),
    "bpf_map_delete_elem": (_INT, [_INT, _POINTER]),
    "bpf_map_update_elem": (_INT, [_INT, _POINTER, _POINTER, ctypes.c_uint64]),
    "bpf_program__fd": (_INT, [_POINTER]),
    "bpf_prog_test_run_opts": (_INT, [_INT, _POINTER]),
    "btf__load_vmlinux_btf": (_POINTER, []),
    "btf__find_by_name_kind": (_INT, [_POINTER, _TEXT, ctypes.c_uint32]),
    "btf__type_by_id": (ctypes.POINTER(ctypes.c_uint32), [_POINTER, ctypes.c_uint32]),
    "btf__free": (None, [_POINTER]),
}
_warnings: list[str] = []


def _keep_warning(level: int, form: bytes, arguments: int | None) -> int:
    """Keep libbpf's warnings instead of letting them go to stderr; `arguments` is a va_list."""
    if level == 0:
        text = ctypes.create_string_buffer(1024)
        ctypes.CDLL(None).vsnprintf(text, ctypes.c_size_t(1024), form, ctypes.c_void_p(arguments))
        _warnings.append(text.value.decode(errors="replace").strip())
        del _warnings[:-WARNINGS_MAX]
    return 0


_KEEP_WARNING = _Print(_keep_warning)


@cache
def _libbpf() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(LIBBPF, use_errno=True)
    except OSError as error:
        raise ObjectMissingError(
            f"{LIBBPF} can't be loaded ({error}).", "install it: apt-get install libbpf1."
        ) from error
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    library.libbpf_set_print(_KEEP_WARNING)
    return library


@dataclass(frozen=True)
class LoadPlan:
    """What to load and how.

    Attributes:
        object_path: the compiled object.
        programs: names of the programs to load; all others are left out.
        map_entries: max_entries by map name; bytes for rings.
        options: read-only options by member of struct podwire_options.
        map_contents: entries (key, value) by map name, there before a program is attached.
        unattached: those of `programs` that are run by hand.
        iterators: names of the iterator programs to load.
    """

    object_path: Path
    programs: tuple[str, ...]
    map_entries: dict[str, int]
    options: dict[str, int]
    map_contents: dict[str, tuple[tuple[bytes, bytes], ...]] = field(default_factory=dict)
    iterators: tuple[str, ...] = ()
    unattached: tuple[str, ...] = ()

    def attached(self) -> tuple[str, ...]:
        """Return the programs that run by themselves."""
        return tuple(program for program in self.programs if program not in self.unattached)


class BpfObject:
    """An object that is loaded into the kernel; programs are attached by `attach`."""

    def __init__(self, plan: LoadPlan) -> None:
        """Open, configure and load.

        Raises:
            ObjectMissingError: no object at the path, or it can't be read.
            AbiError: the object was built for another ABI.
            VerifierError, MemlockError, CapabilityError: the kernel refused it.
        """
        self._library = _libbpf()
        self._links: dict[str, int] = {}
        if not plan.object_path.is_file():
            raise ObjectMissingError(
                f"The BPF object {plan.object_path} does not exist.",
                "build it (make -C bpf), or point PODWIRE_OBJECT to it.",
            )
        _warnings.clear()
        handle = self._library.bpf_object__open_file(os.fsencode(plan.object_path), None)
        if not handle:
            raise ObjectMissingError(
                f"The BPF object {plan.object_path} can't be opened: {_reason(ctypes.get_errno())}.",
                "build it again (make -C bpf).",
            )
        self._handle = handle
        self._programs = self._find_programs()
        try:
            self._configure(plan)
            self._load(plan)
            for name, entries in plan.map_contents.items():
                self._fill(name, entries)
        except FatalError:
            self.close()
            raise

    def _find_programs(self) -> dict[str, int]:
        programs = {}
        program = self._library.bpf_object__next_program(self._handle, None)
        while program:
            programs[self._library.bpf_program__name(program).decode()] = program
            program = self._library.bpf_object__next_program(self._handle, program)
        return programs

    def _configure(self, plan: LoadPlan) -> None:
        for name, program in self._programs.items():
            self._library.bpf_program__set_autoload(program, name in plan.programs or name in plan.iterators)
        for name, entries in plan.map_entries.items():
            self._library.bpf_map__set_max_entries(self._map(name.encode()), entries)
        size = ctypes.c_size_t()
        address = self._library.bpf_map__initial_value(self._map(OPTIONS_MAP), ctypes.byref(size))
        if not address or size.value < OPTIONS.itemsize:
            raise _abi_error("its options have another size")
        memory = (ctypes.c_char * OPTIONS.itemsize).from_address(address)
        options = np.frombuffer(memoryview(memory).cast("B"), OPTIONS, count=1)
        if options["abi_version"][0] != ABI_VERSION:
            raise _abi_error(f"it has version {options['abi_version'][0]}")
        for name, value in plan.options.items():
            options[name] = value

    def _map(self, name: bytes) -> int:
        found: int | None = self._library.bpf_object__find_map_by_name(self._handle, name)
        if not found:
            raise _abi_error(f"it has no map {name.decode()}")
        return found

    def _load(self, plan: LoadPlan) -> None:
        logs = {
            name: ctypes.create_string_buffer(VERIFIER_LOG_BYTES)
            for name in (*plan.programs, *plan.iterators)
        }
        for name, log in logs.items():
            self._library.bpf_program__set_log_buf(self._programs[name], log, VERIFIER_LOG_BYTES)
        code = -self._library.bpf_object__load(self._handle)
        if code:
            said = {name: log.value.decode(errors="replace") for name, log in logs.items()}
            raise load_error(code, _reason(code), said, _warnings)
        for name in logs:
            self._library.bpf_program__set_log_buf(self._programs[name], None, 0)

    def _fill(self, name: str, entries: tuple[tuple[bytes, bytes], ...]) -> None:
        descriptor = self.map_descriptor(name)
        for key, value in entries:
            code = self._library.bpf_map_update_elem(descriptor, key, value, 0)
            assert code == 0, f"{name}: {os.strerror(-code)}"

    def map_descriptor(self, name: str) -> int:
        """Return the map's file descriptor, which belongs to this object."""
        descriptor: int = self._library.bpf_map__fd(self._map(name.encode()))
        return descriptor

    def program_descriptor(self, program: str) -> int:
        """Return a loaded program's file descriptor, which belongs to this object."""
        descriptor: int = self._library.bpf_program__fd(self._programs[program])
        return descriptor

    def attach(self, program: str) -> None:
        """Attach one program to the hook that its section names; it stays until `close`.

        Raises:
            OSError: the kernel refused.
        """
        self._keep_link(program, self._library.bpf_program__attach)

    def attach_iterator(self, program: str) -> None:
        """Make one iterator program ready for `link_descriptor` and `start_iterator`; OSError as `attach`."""
        self._keep_link(program, self._library.bpf_program__attach_iter, None)

    def _keep_link(self, program: str, attach: Callable[..., int | None], *more: None) -> None:
        _warnings.clear()
        link = attach(self._programs[program], *more)
        if not link:
            code = ctypes.get_errno()
            raise OSError(code, f"can't attach {program}: {_reason(code)}")
        self._links[program] = link

    def link_descriptor(self, program: str) -> int:
        """Return the file descriptor of an attached program's link, which belongs to this object."""
        descriptor: int = self._library.bpf_link__fd(self._links[program])
        return descriptor

    def pin_links(self, folder: Path) -> None:
        """Pin every link as `link_<program>`: the programs then outlive this process.

        Raises:
            OSError: not on a bpffs, or a link that can't be pinned (perf events before kernel 5.15).
        """
        for program, link in self._links.items():
            pin(self._library.bpf_link__fd(link), folder / f"link_{program}")

    def detach(self) -> None:
        """Drop the links: programs stop, unless their links are pinned."""
        for link in self._links.values():
            self._library.bpf_link__destroy(link)
        self._links.clear()

    def close(self) -> None:
        """Drop links and maps; what is pinned goes on."""
        self.detach()
        self._library.bpf_object__close(self._handle)


def runner(descriptor: int, arguments: np.ndarray | None = None) -> Callable[[], int]:
    """Return what runs a program of type raw_tp once, in this process, and returns what the program does.

    `arguments`: u64, contiguous, 12 at most; the program gets what is in them at each run, for as long as the
    caller keeps the array. A run raises OSError if the kernel refuses (before 5.10).
    """
    options = (ctypes.c_uint64 * TEST_RUN_WORDS)(TEST_RUN_WORDS * 8)
    if arguments is not None:
        options[TEST_RUN_CONTEXT], options[TEST_RUN_CONTEXT_BYTES] = arguments.ctypes.data, arguments.nbytes
    call, address = _libbpf().bpf_prog_test_run_opts, ctypes.addressof(options)

    def run() -> int:
        code = -call(descriptor, address)
        if code:
            raise OSError(code, os.strerror(code))
        return options[TEST_RUN_RESULT] & 0xFFFFFFFF

    return run


def map_entries(descriptor: int, value_bytes: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield keys (u64) and values (u1) of a hash map, some hundreds at a time, each pair good until the next one.

    What is inserted or deleted meanwhile may be there or not; what stays is there once. OSError before kernel 5.6.
    """
    keys, values = np.empty(KEYS_PER_READ, "<u8"), np.empty(KEYS_PER_READ * value_bytes, "u1")
    position, count, more = ctypes.c_uint32(), ctypes.c_uint32(), False
    while True:
        count.value = KEYS_PER_READ
        code = -_libbpf().bpf_map_lookup_batch(
            descriptor,
            ctypes.byref(position) if more else None,
            ctypes.byref(position),
            keys.ctypes.data,
            values.ctypes.data,
            ctypes.byref(count),
            None,
        )
        if code not in {0, errno.ENOENT}:
            raise OSError(code, os.strerror(code))
        if count.value:
            yield keys[: count.value], values[: count.value * value_bytes]
        if code:
            return
        more = True


def delete_keys(descriptor: int, keys: Iterable[int]) -> None:
    """Delete entries of a hash map with keys of u64; one that is gone already is no error."""
    for key in keys:
        _libbpf().bpf_map_delete_elem(descriptor, ctypes.byref(ctypes.c_uint64(key)))


def function_arguments(name: str) -> int | None:
    """Return how many arguments a function of the running kernel takes, None if its BTF does not know it."""
    library = _libbpf()
    btf = library.btf__load_vmlinux_btf()
    if not btf:
        return None
    try:
        found = library.btf__find_by_name_kind(btf, name.encode(), BTF_KIND_FUNC)
        if found < 0:
            return None
        prototype = library.btf__type_by_id(btf, found)[BTF_TYPE]
        arguments: int = library.btf__type_by_id(btf, prototype)[BTF_INFO] & BTF_VLEN_MASK
        return arguments
    finally:
        library.btf__free(btf)


def pin(descriptor: int, path: Path) -> None:
    """Pin a map, a link or a program; raises OSError if the kernel refuses."""
    _checked(_libbpf().bpf_obj_pin(descriptor, os.fsencode(path)), f"pin {path}")


def open_pinned(path: Path) -> int:
    """Return a file descriptor of what is pinned there, which the caller closes; raises OSError if nothing is."""
    return _checked(_libbpf().bpf_obj_get(os.fsencode(path)), f"open {path}")


def start_iterator(link: int) -> int:
    """Return a file descriptor that walks an iterator's objects as it is read; raises OSError if refused."""
    return _checked(_libbpf().bpf_iter_create(link), "start an iterator")


def skipped_runs(program: int) -> int:
    """Return how often the kernel skipped a program, by its descriptor, because it ran on that CPU already.

    0 before kernel 5.12, which does not count.
    """
    lines = Path(f"/proc/self/fdinfo/{program}").read_text(encoding="ascii").splitlines()
    return next((int(line.split()[1]) for line in lines if line.startswith("recursion_misses:")), 0)


def sum_over_cpus(descriptor: int, entries: int) -> list[int]:
    """Return the sums over all CPUs of a per-CPU array of u64."""
    values = np.zeros(_libbpf().libbpf_num_possible_cpus(), "<u8")
    sums = []
    for index in range(entries):
        key = ctypes.c_uint32(index)
        code = _libbpf().bpf_map_lookup_elem(descriptor, ctypes.byref(key), values.ctypes.data)
        assert code == 0, os.strerror(-code)
        sums.append(int(values.sum()))
    return sums


# ---- libbpf's errors in our words ----


def _checked(made: int, what: str) -> int:
    if made < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"can't {what}: {os.strerror(code)}")
    return made


def _reason(code: int) -> str:
    warning = _warnings[-1].removeprefix("libbpf: ") if _warnings else ""
    return f"{os.strerror(code)} ({warning})" if warning else os.strerror(code)


def _abi_error(how: str) -> AbiError:
    return AbiError(
        f"The BPF object was built for another ABI than version {ABI_VERSION}: {how}.",
        "build object and collector from the same source (make -C bpf abi).",
    )
