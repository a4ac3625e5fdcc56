"""A wire between two namespaces that the test holds in its hands: frames can be kept, and let go all at once.

Owns a namespace in the middle and one thread that carries frames; `cut` ends both. Called by the kernel tests, where
segments of two ends must cross: no sleep and no race, also in a slow guest.
"""

from __future__ import annotations

import os
import select
import socket
import threading
from typing import TYPE_CHECKING

from tests.kernel.node import ip

if TYPE_CHECKING:
    from tests.kernel.node import Namespace

ETH_P_ALL = 3
SOL_PACKET, PACKET_VNET_HDR = 263, 15
"""Frames come with a header that says what the sender's card has left to do (include/uapi/linux/if_packet.h)."""
FRAME_BYTES_MAX = 70_000
TCP_OFFSET = 10 + 14 + 20
FLAGS_OFFSET = TCP_OFFSET + 13
FIN, SYN = 1, 2


class HeldWire:
    """Joins two namespaces as 10.91.1.1 and 10.91.1.2; carries frames unless it holds them."""

    def __init__(self, one: Namespace, two: Namespace, middle: Namespace) -> None:
        names = [f"pwh{os.getpid() % 100000}{end}" for end in "ab"]
        macs = [f"02:00:00:00:00:0{number}" for number in (1, 2)]
        for namespace, name, mac, host in zip((one, two), names, macs, (1, 2), strict=True):
            ip("link", "add", name, "netns", namespace.name, "address", mac,
               "type", "veth", "peer", "name", name + "m", "netns", middle.name)  # fmt: skip
            ip("-n", namespace.name, "addr", "add", f"10.91.1.{host}/24", "dev", name)
            ip("-n", namespace.name, "link", "set", name, "up")
            ip("-n", middle.name, "link", "set", name + "m", "up")
            other = 3 - host
            ip("-n", namespace.name, "neigh", "replace", f"10.91.1.{other}", "lladdr", macs[other - 1],
               "dev", name, "nud", "permanent")  # fmt: skip
        with middle.entered():
            self._ends = [
                socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL)) for _ in names
            ]
        for end, name in zip(self._ends, names, strict=True):
            end.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
            end.bind((name + "m", ETH_P_ALL))
        self._stop, self._stopped = os.pipe()
        self._held: list[tuple[int, bytes]] | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._carry, daemon=True)
        self._thread.start()

    def hold(self) -> None:
        """Keep frames from now on."""
        with self._changed:
            self._held = []

    def release(self, flag: int) -> None:
        """Wait until a segment with the TCP flag has come from both ends, then let all go before any answer."""

        def came() -> bool:
            return {end for end, frame in self._held or () if _has(frame, flag)} == {0, 1}

        with self._changed:
            assert self._changed.wait_for(came, timeout=20), "segments of both ends"
            for end, frame in self._held or ():
                self._ends[1 - end].send(frame)
            self._held = None

    def cut(self) -> None:
        """End the thread."""
        os.close(self._stopped)
        self._thread.join()
        for end in self._ends:
            end.close()
        os.close(self._stop)

    def _carry(self) -> None:
        while True:
            ready, _, _ = select.select([*self._ends, self._stop], [], [])
            if self._stop in ready:
                return
            for number, end in enumerate(self._ends):
                if end in ready:
                    self._pass_on(number, *end.recvfrom(FRAME_BYTES_MAX))

    def _pass_on(self, number: int, frame: bytes, origin: tuple[str, int, int, int, bytes]) -> None:
        if origin[2] == socket.PACKET_OUTGOING:  # what we sent ourselves
            return
        with self._changed:
            if self._held is None:
                self._ends[1 - number].send(frame)
            else:
                self._held.append((number, frame))
                self._changed.notify_all()


def _has(frame: bytes, flag: int) -> bool:
    """Return whether an IPv4 frame is TCP with the flag."""
    return len(frame) > FLAGS_OFFSET and frame[22:24] == b"\x08\x00" and frame[33] == socket.IPPROTO_TCP and bool(
        frame[FLAGS_OFFSET] & flag
    )  # fmt: skip
