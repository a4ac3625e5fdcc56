"""One accept through io_uring, by bare system calls: what a server does that never calls accept(2).

Owns the ring only while the function runs. Called by the kernel tests. Source: include/uapi/linux/io_uring.h.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import socket
import struct

SYS_SETUP, SYS_ENTER = 425, 426
ENTRIES = 4
PARAMS_BYTES, SQ_OFFSETS_AT, CQ_OFFSETS_AT = 120, 40, 80
SQE_BYTES, CQE_BYTES = 64, 16
OFFSET_CQ, OFFSET_SQES = 0x8000000, 0x10000000
OP_ACCEPT, GET_EVENTS = 13, 1

_LIBC = ctypes.CDLL(None, use_errno=True)


class NoUringError(OSError):
    """The kernel has no io_uring, or does not let us use it."""


def accept(listener: socket.socket) -> socket.socket:
    """Return the next connection of a listener, whose queue must not be empty."""
    params = bytearray(PARAMS_BYTES)
    ring = _LIBC.syscall(SYS_SETUP, ENTRIES, (ctypes.c_char * PARAMS_BYTES).from_buffer(params))
    if ring < 0:
        raise NoUringError(ctypes.get_errno(), "io_uring_setup")
    _, sq_tail, _, _, _, _, sq_array = struct.unpack_from("7I", params, SQ_OFFSETS_AT)
    _, cq_entries = struct.unpack_from("2I", params)
    *_, cqes = struct.unpack_from("6I", params, CQ_OFFSETS_AT)
    try:
        with (
            mmap.mmap(ring, sq_array + 4 * ENTRIES) as sq,
            mmap.mmap(ring, cqes + CQE_BYTES * cq_entries, offset=OFFSET_CQ) as cq,
            mmap.mmap(ring, SQE_BYTES * ENTRIES, offset=OFFSET_SQES) as sqes,
        ):
            struct.pack_into("BBHi", sqes, 0, OP_ACCEPT, 0, 0, listener.fileno())
            struct.pack_into("I", sq, sq_array, 0)
            struct.pack_into("I", sq, sq_tail, 1)
            assert _LIBC.syscall(SYS_ENTER, ring, 1, 1, GET_EVENTS, None, 0) == 1
            _, result = struct.unpack_from("Qi", cq, cqes)
    finally:
        os.close(ring)
    if result < 0:
        raise OSError(-result, os.strerror(-result))
    return socket.socket(fileno=result)
