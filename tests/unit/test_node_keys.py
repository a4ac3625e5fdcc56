"""tcp_key: SipHash-2-4 against its authors' test vectors, and the secret's file."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from collector.errors import SettingsError
from collector.node import keys

if TYPE_CHECKING:
    from pathlib import Path

PAPER_KEY = keys.Secret.from_bytes(bytes(range(16)))
# vectors.h of the reference implementation, messages 00 01 02 ... of 8, 16 and 24 bytes, outputs in byte order
VECTORS = {8: "6224939a79f5f593", 16: "db9bc2577fcc2a3f", 24: "94af49f6c650adb8"}


@pytest.mark.parametrize("length", VECTORS)
def test_siphash_gives_the_reference_vectors(length: int) -> None:
    """Each row of an array is hashed as the reference implementation hashes that message."""
    words = np.frombuffer(bytes(range(length)), "<u8")
    hashed = keys.siphash(PAPER_KEY, *(np.full(3, word, np.uint64) for word in words))
    assert [row.tobytes().hex() for row in hashed.astype("<u8")] == [VECTORS[length]] * 3


def test_connection_keys_are_equal_on_both_ends_only() -> None:
    """The pair (client, server) decides, in that order; another secret gives another key."""
    client, server = np.array([7, 9], np.uint32), np.array([9, 7], np.uint32)
    found = keys.connection_keys(PAPER_KEY, client, server)
    assert found[0] != found[1]
    assert found[1] == keys.connection_keys(PAPER_KEY, server, client)[0]
    assert found[0] != keys.connection_keys(keys.Secret(1, 2), client, server)[0]


def test_connection_keys_hash_little_endian_sequence_numbers() -> None:
    """The message is le32(client) followed by le32(server), as the contract says."""
    client, server = np.array([0x03020100], np.uint32), np.array([0x07060504], np.uint32)
    assert keys.connection_keys(PAPER_KEY, client, server).astype("<u8").tobytes().hex() == VECTORS[8]


def test_attempt_keys_differ_by_node_and_boot() -> None:
    """The same cookie and start on another node or after a reboot is another attempt."""
    cookie, start = np.array([5], np.uint64), np.array([6], np.uint64)
    nodes = [keys.node_word("c", node, boot) for node, boot in (("a", "1"), ("b", "1"), ("a", "2"))]
    found = {int(keys.attempt_keys(PAPER_KEY, node, cookie, start)[0]) for node in nodes}
    assert len(found) == 3


def test_secret_is_read_and_never_shown(tmp_path: Path) -> None:
    """A file of 32 hex digits and a newline is a secret; its repr shows nothing of it."""
    file = tmp_path / "key"
    file.write_text("000102030405060708090A0B0C0D0E0F\n")
    assert keys.read_secret(file) == PAPER_KEY
    assert repr(keys.read_secret(file)) == "Secret()"


@pytest.mark.parametrize("content", ["", "0" * 31, "0" * 33, "g" * 32, "ä" * 32], ids=repr)
def test_secret_of_another_form_is_refused_without_showing_it(tmp_path: Path, content: str) -> None:
    """Anything but 32 hex digits is refused, and the error does not repeat what was in the file."""
    file = tmp_path / "key"
    file.write_text(content)
    with pytest.raises(SettingsError, match="32 hex digits") as raised:
        keys.read_secret(file)
    assert not content or content not in str(raised.value)


def test_missing_secret_is_fatal(tmp_path: Path) -> None:
    """Without the file there is no key, and the error says what to do."""
    with pytest.raises(SettingsError, match="Operator action"):
        keys.read_secret(tmp_path / "none")
