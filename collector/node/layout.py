"""Where members of kernel structures are, for probes that are compiled without the kernel's own headers.

Owns the reading of the kernel's type information (BTF), and the writing of its numbers into C text. Never compiles
and never loads. Called by bcc.py.

The format: kernel, Documentation/bpf/btf.rst.
"""

from __future__ import annotations

import re
import struct
from functools import cache
from typing import NamedTuple

OFFSET = re.compile(r"\boffsetof\(struct (\w+), ([\w.]+)\)")
RENAMED = {("kernfs_node", "parent"): "__parent"}
"""Members by the name of our headers, and what later kernels call them: 6.15."""

_HEADER = struct.Struct("<HBBIIIII")
_TYPE = struct.Struct("<III")
_MEMBER = struct.Struct("<III")
_ENUMERATOR = struct.Struct("<Ii")
_MAGIC = b"\x9f\xeb"
_INT, _ARRAY, _STRUCT, _UNION, _ENUM = 1, 3, 4, 5, 6
_PASSED_THROUGH = {8, 9, 10, 11, 18}
"""typedef, volatile, const, restrict, type tag: their type is the one that counts."""
_EXTRA_BYTES = {_INT: 4, _ARRAY: 12, 14: 4, 17: 4}
_EXTRA_BYTES_EACH = {_STRUCT: 12, _UNION: 12, _ENUM: 8, 13: 8, 15: 12, 19: 12}
_BIT_OFFSET = (1 << 24) - 1


class UnknownMemberError(LookupError):
    """The kernel's type information lacks a structure, a member or an enumerator."""


class _Type(NamedTuple):
    name: int
    kind: int
    length: int
    target: int
    extra: int


class Btf:
    """The kernel's types, from the bytes of /sys/kernel/btf/vmlinux: half a second for 10 MB."""

    def __init__(self, data: bytes) -> None:
        if not data.startswith(_MAGIC) or len(data) < _HEADER.size:
            raise UnknownMemberError("no type information of this byte order")
        _, _, _, header_bytes, type_at, type_bytes, text_at, text_bytes = _HEADER.unpack_from(data)
        self._types = data[header_bytes + type_at : header_bytes + type_at + type_bytes]
        self._text = data[header_bytes + text_at : header_bytes + text_at + text_bytes]
        self._places = [0]
        self._structs: dict[int, int] = {}
        at = 0
        while at < len(self._types):
            name, info, _ = _TYPE.unpack_from(self._types, at)
            kind, length = info >> 24 & 0x1F, info & 0xFFFF
            if kind == _STRUCT:
                self._structs.setdefault(name, len(self._places))
            self._places.append(at)
            at += _TYPE.size + _EXTRA_BYTES.get(kind, 0) + _EXTRA_BYTES_EACH.get(kind, 0) * length
        self._name = cache(self._read_name)

    def _read_name(self, at: int) -> str:
        return self._text[at : self._text.index(0, at)].decode()

    def _type(self, number: int) -> _Type:
        at = self._places[number]
        name, info, target = _TYPE.unpack_from(self._types, at)
        return _Type(name, info >> 24 & 0x1F, info & 0xFFFF, target, at + _TYPE.size)

    def offset(self, structure: str, path: str) -> int:
        """Return the offset in bytes of a member, which may be one of members (`a.b`) or of anonymous members.

        Raises:
            UnknownMemberError: there is none.
        """
        number = next((number for name, number in self._structs.items() if self._name(name) == structure), 0)
        total = 0
        for wanted in path.split("."):
            names = (wanted, RENAMED.get((structure, wanted), wanted))
            found = self._member(number, names) if number else None
            if found is None:
                raise UnknownMemberError(f"the kernel has no struct {structure} with {path}")
            total, number = total + found[0], found[1]
        return total // 8

    def _member(self, number: int, names: tuple[str, ...]) -> tuple[int, int] | None:
        """Return the bit offset and type of a member of a structure or of its anonymous members."""
        within = self._type(number)
        while within.kind in _PASSED_THROUGH:
            within = self._type(within.target)
        if within.kind not in (_STRUCT, _UNION):
            return None
        for index in range(within.length):
            name, target, offset = _MEMBER.unpack_from(self._types, within.extra + index * _MEMBER.size)
            if name and self._name(name) in names:
                return offset & _BIT_OFFSET, target
            if not name and (found := self._member(target, names)):
                return (offset & _BIT_OFFSET) + found[0], found[1]
        return None

    def enumerator(self, name: str) -> int:
        """Return the value of an enumerator; raises UnknownMemberError if there is none."""
        for number in range(1, len(self._places)):
            kind = self._type(number)
            if kind.kind == _ENUM:
                for index in range(kind.length):
                    text, value = _ENUMERATOR.unpack_from(self._types, kind.extra + index * _ENUMERATOR.size)
                    if self._name(text) == name:
                        return int(value)
        raise UnknownMemberError(f"the kernel has no enumerator {name}")


def with_offsets(source: str, btf: Btf) -> str:
    """Return the C text with a number in the place of every `offsetof(struct type, member)`.

    Raises:
        UnknownMemberError: the kernel lacks one of them.
    """
    return OFFSET.sub(lambda match: str(btf.offset(match[1], match[2])), source)
