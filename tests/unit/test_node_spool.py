"""The spool: whole files or none, in order, bounded, and never an exception for a broken disk."""

from __future__ import annotations

import resource
from typing import TYPE_CHECKING, Any

import pytest

from collector.node.batches import Batch
from collector.node.spool import Spool

if TYPE_CHECKING:
    from pathlib import Path

BATCHES = [Batch(0, 3, b"\0abc\n\xff"), Batch(2, 1, b""), Batch(3, 5, b"x" * 1000)]


def make(folder: Path, *, epoch: int = 5, size_bytes_max: int = 1 << 20, partitions: int = 4) -> Spool:
    """Return a spool in `folder`."""
    return Spool(folder, size_bytes_max, "boot", epoch, partitions)


def test_file_gives_back_what_was_written(tmp_path: Path) -> None:
    """Partitions, event counts and values come back byte for byte."""
    spool = make(tmp_path)
    file = spool.write(BATCHES)
    assert file is not None
    assert spool.read(file) == BATCHES
    assert (spool.waiting_events, file.events) == (9, 9)
    assert spool.used_bytes == file.size_bytes == file.path.stat().st_size


def test_leftovers_come_in_the_order_of_epochs_and_writes(tmp_path: Path) -> None:
    """A later process replays oldest first, and counts the files in."""
    for epoch in (12, 9):
        spool = make(tmp_path, epoch=epoch)
        for number in range(11):
            spool.write([Batch(0, 1, f"{epoch}/{number}".encode())])
    later = make(tmp_path, epoch=13)
    files = later.leftovers()
    values = [batch.value.decode() for file in files for batch in later.read(file) or []]
    assert values == [f"{epoch}/{number}" for epoch in (9, 12) for number in range(11)]
    assert later.waiting_events == 22


def test_delete_forgets(tmp_path: Path) -> None:
    """A delivered file is gone from disk and from the counts."""
    spool = make(tmp_path)
    file = spool.write(BATCHES)
    assert file is not None
    spool.delete(file)
    assert (spool.used_bytes, spool.waiting_events, list(tmp_path.iterdir())) == (0, 0, [])


def test_bound_refuses_and_takes_again_after_a_delete(tmp_path: Path) -> None:
    """Above its bound the spool takes nothing, below it again."""
    spool = make(tmp_path, size_bytes_max=1500)
    first = spool.write(BATCHES)
    assert first is not None
    assert spool.write(BATCHES) is None
    spool.delete(first)
    assert spool.write(BATCHES) is not None


def test_refusing_disk_is_a_value_and_leaves_nothing_behind(tmp_path: Path) -> None:
    """A write that the kernel cuts short gives None and no half file, and the next write works."""
    spool = make(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, before[1]))
    try:
        assert spool.write(BATCHES) is None
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []
    assert spool.used_bytes == 0
    assert spool.write(BATCHES) is not None


@pytest.mark.parametrize("position", [0, 40, -5, -1], ids=["head", "middle", "value", "checksum"])
def test_damaged_file_is_set_aside_and_counted(tmp_path: Path, position: int) -> None:
    """One flipped bit anywhere: the file is kept under another name and not replayed."""
    file = make(tmp_path).write(BATCHES)
    assert file is not None
    content = bytearray(file.path.read_bytes())
    content[position] ^= 1
    file.path.write_bytes(bytes(content))
    later = make(tmp_path, epoch=6)
    assert [later.read(left) for left in later.leftovers()] in ([], [None])
    assert (later.unreadable_files, later.waiting_events, later.used_bytes) == (1, 0, 0)
    assert [path.suffix for path in tmp_path.iterdir()] == [".unreadable"]


def test_file_of_another_partition_count_is_set_aside(tmp_path: Path) -> None:
    """Batches made for four partitions can't go to a topic of eight."""
    make(tmp_path).write(BATCHES)
    later = make(tmp_path, epoch=6, partitions=8)
    assert [later.read(file) for file in later.leftovers()] == [None]
    assert later.unreadable_files == 1


def test_half_written_file_of_a_crash_is_removed(tmp_path: Path) -> None:
    """What was not renamed was never promised."""
    (tmp_path / "00-00.tmp").write_bytes(b"half")
    assert make(tmp_path).leftovers() == []
    assert list(tmp_path.iterdir()) == []


def test_vanished_file_is_counted_not_raised(tmp_path: Path) -> None:
    """A file that someone removed is a loss to count, not a crash."""
    spool = make(tmp_path)
    file: Any = spool.write(BATCHES)
    file.path.unlink()
    assert spool.read(file) is None
    assert (spool.unreadable_files, spool.waiting_events) == (1, 0)
