"""Offsets from type information: a few hand-made types, written as the kernel writes them."""

from __future__ import annotations

import struct

import pytest

from collector.node.layout import Btf, UnknownMemberError, with_offsets

INT, STRUCT, UNION, ENUM, TYPEDEF = 1, 4, 5, 6, 8
PARTS_FLAG = 1 << 31
"""kind_flag: the upper byte of a member's offset is the size of a bit field."""


class Types:
    """Collects types and names; the first type has the id 1."""

    def __init__(self) -> None:
        self.text, self.types = b"\0", b""

    def name(self, name: str) -> int:
        """Return where the name is."""
        if not name:
            return 0
        self.text += name.encode() + b"\0"
        return len(self.text) - len(name) - 1

    def add(self, kind: int, name: str, target: int = 0, *parts: tuple[int, ...], extra: bytes = b"") -> None:
        """Add a type; `parts` are a structure's (name, type, offset) or an enumeration's (name, value)."""
        flag = PARTS_FLAG if kind == STRUCT else 0
        self.types += struct.pack("<III", self.name(name), kind << 24 | len(parts) | flag, target) + extra
        for part in parts:
            self.types += struct.pack(f"<{len(part)}I", *part)

    def data(self) -> bytes:
        """Return the whole, with the header."""
        size = len(self.types)
        return (
            struct.pack("<HBBIIIII", 0xEB9F, 1, 0, 24, 0, size, size, len(self.text)) + self.types + self.text
        )


@pytest.fixture
def btf() -> Btf:
    """Struct outer has an anonymous union at 4, an inner by another name at 8, and a bit field behind it."""
    types = Types()
    types.add(INT, "int", 4, extra=bytes(4))
    types.add(STRUCT, "inner", 8, (types.name("a"), 1, 0), (types.name("b"), 1, 32))
    types.add(UNION, "", 4, (types.name("either"), 1, 0), (types.name("or"), 1, 0))
    types.add(TYPEDEF, "inner_t", 2)
    types.add(
        STRUCT,
        "outer",
        20,
        (types.name("first"), 1, 0),
        (0, 3, 32),
        (types.name("in"), 4, 64),
        (types.name("bits"), 1, 3 << 24 | 128),
    )
    types.add(ENUM, "ids", 4, (types.name("none"), 0), (types.name("memory_cgrp_id"), 4))
    types.add(STRUCT, "kernfs_node", 16, (types.name("__parent"), 1, 64))
    return Btf(types.data())


@pytest.mark.parametrize(
    ("structure", "path", "offset"),
    [
        ("outer", "first", 0),
        ("outer", "or", 4),
        ("outer", "in", 8),
        ("outer", "in.b", 12),
        ("outer", "bits", 16),
    ],
)
def test_offset_goes_through_anonymous_and_named_types(
    btf: Btf, structure: str, path: str, offset: int
) -> None:
    """In bytes, from the outermost structure, as offsetof gives it."""
    assert btf.offset(structure, path) == offset


def test_offset_knows_the_later_name_of_a_member(btf: Btf) -> None:
    """The sources name members as in the headers of the kernels that BCC can read."""
    assert btf.offset("kernfs_node", "parent") == 8


@pytest.mark.parametrize(("structure", "path"), [("none", "a"), ("outer", "c"), ("outer", "first.a")])
def test_offset_of_what_the_kernel_lacks_is_an_error(btf: Btf, structure: str, path: str) -> None:
    """An unknown structure, an unknown member, a member of a number."""
    with pytest.raises(UnknownMemberError, match=f"{structure} with {path}"):
        btf.offset(structure, path)


def test_enumerator_is_found_by_its_name(btf: Btf) -> None:
    """The index of a cgroup controller differs with the kernel's configuration."""
    assert btf.enumerator("memory_cgrp_id") == 4
    with pytest.raises(UnknownMemberError):
        btf.enumerator("pids_cgrp_id")


def test_offsets_take_the_places_of_offsetof(btf: Btf) -> None:
    """Nothing else in the text changes."""
    text = "A = offsetof(struct outer, in.b), /* offsetof */ B = offsetof(struct inner, b);"
    assert with_offsets(text, btf) == "A = 12, /* offsetof */ B = 4;"


@pytest.mark.parametrize("data", [b"", b"\x9f\xeb\x01", bytes(64)], ids=["empty", "cut", "other"])
def test_bytes_of_something_else_are_refused(data: bytes) -> None:
    """The magic number says what it is."""
    with pytest.raises(UnknownMemberError, match="no type information"):
        Btf(data)
