"""The keyed hash that joins the two halves of a connection: SipHash-2-4 over numpy arrays, and the secret's file.

Owns tcp_key. Sequence numbers go in here and nowhere else, so none leaves the node. Called by `node.columns` and
`node.run`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from collector.errors import SettingsError

if TYPE_CHECKING:
    from pathlib import Path

Words = npt.NDArray[np.uint64]
_U = np.uint64
_HEX_DIGITS = 32
_CREATE = "write 32 hex digits into it, the same on every node (for example with `openssl rand -hex 16`)"


@dataclass(frozen=True)
class Secret:
    """SipHash's 128-bit key as its two little-endian halves; never shown by repr."""

    low: int = field(repr=False)
    high: int = field(repr=False)

    @classmethod
    def from_bytes(cls, key: bytes) -> Secret:
        """Return the secret of 16 bytes."""
        assert len(key) == _HEX_DIGITS // 2
        return cls(int.from_bytes(key[:8], "little"), int.from_bytes(key[8:], "little"))


def read_secret(path: Path) -> Secret:
    """Return the cluster's secret from a file of 32 hex digits; SettingsError says what is wrong, never the content."""
    try:
        text = path.read_text(encoding="ascii").strip()
    except OSError as error:
        raise SettingsError(f"The key file {path} can't be read: {error.strerror}.", _CREATE) from error
    except UnicodeDecodeError:
        text = ""
    if not re.fullmatch(r"[0-9a-fA-F]{32}", text):
        raise SettingsError(f"The key file {path} does not hold exactly {_HEX_DIGITS} hex digits.", _CREATE)
    return Secret.from_bytes(bytes.fromhex(text))


def _rotate(word: Words, bits: int) -> Words:
    return (word << _U(bits)) | (word >> _U(64 - bits))


def siphash(secret: Secret, *words: Words) -> Words:
    """Return SipHash-2-4 of the messages made of 64-bit little-endian words, one message per array index.

    Source: Aumasson and Bernstein, "SipHash: a fast short-input PRF", section 2. About 0.1 us per short message.
    """
    low, high = _U(secret.low), _U(secret.high)
    v0, v1 = low ^ _U(0x736F6D6570736575), high ^ _U(0x646F72616E646F6D)
    v2, v3 = low ^ _U(0x6C7967656E657261), high ^ _U(0x7465646279746573)
    state = tuple(np.full(len(words[0]), v, np.uint64) for v in (v0, v1, v2, v3))
    last = np.full(len(words[0]), len(words) * 8 << 56, np.uint64)
    for word in (*words, last):
        state = (*state[:3], state[3] ^ word)
        state = _rounds(state, 2)
        state = (state[0] ^ word, *state[1:])
    state = _rounds((state[0], state[1], state[2] ^ _U(0xFF), state[3]), 4)
    return state[0] ^ state[1] ^ state[2] ^ state[3]


def _rounds(state: tuple[Words, ...], count: int) -> tuple[Words, ...]:
    v0, v1, v2, v3 = state
    for _ in range(count):
        v0 = v0 + v1
        v1 = _rotate(v1, 13) ^ v0
        v0 = _rotate(v0, 32)
        v2 = v2 + v3
        v3 = _rotate(v3, 16) ^ v2
        v0 = v0 + v3
        v3 = _rotate(v3, 21) ^ v0
        v2 = v2 + v1
        v1 = _rotate(v1, 17) ^ v2
        v2 = _rotate(v2, 32)
    return v0, v1, v2, v3


def node_word(cluster: str, node: str, boot_id: str) -> int:
    """Return 64 bits that stand for one boot of one node, for keys that no other node must share."""
    digest = blake2b(f"{cluster}\0{node}\0{boot_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def connection_keys(
    secret: Secret, client_isn: npt.NDArray[np.uint32], server_isn: npt.NDArray[np.uint32]
) -> Words:
    """Return tcp_key of established connections: the hash of le32(client_isn) and le32(server_isn)."""
    return siphash(secret, client_isn.astype(np.uint64) | (server_isn.astype(np.uint64) << _U(32)))


def attempt_keys(secret: Secret, node: int, cookies: Words, start_ns: Words) -> Words:
    """Return tcp_key of attempts that failed: the hash of `node_word`, socket cookie and start time."""
    return siphash(secret, np.full(len(cookies), node, np.uint64), cookies, start_ns)
