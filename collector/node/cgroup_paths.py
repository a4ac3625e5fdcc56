"""From a cgroup's path to the pod and the container, for every runtime; and which hierarchy to ask.

Pure: text in, values out. Called by cgroups.py and probes.py.

The walk goes from the right: the innermost pod wins (clusters run inside pods), and its container is the
segment right below the pod. One regular expression over whole paths mis-assigned nested pods.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from collector.node.abi import Controller

NO_UID = bytes(16)
NO_CONTAINER = bytes(32)

UID = r"([0-9a-f]{8}[-_]?[0-9a-f]{4}[-_]?[0-9a-f]{4}[-_]?[0-9a-f]{4}[-_]?[0-9a-f]{12})"
SLICE = re.compile(rf"(?:[^:]*-)?kubepods(?:-besteffort|-burstable|-guaranteed)?-pod{UID}\.slice")
"""systemd driver; kind puts `kubelet-` before it."""
FOLDER = re.compile(rf"pod{UID}")
"""cgroupfs driver, below one of FOLDER_PARENTS."""
FOLDER_PARENTS = ("kubepods", "besteffort", "burstable", "guaranteed")
MISMATCH = re.compile(rf"{SLICE.pattern}:[^:]+:([0-9a-f]{{64}})")
"""containerd is set to cgroupfs and the kubelet to systemd: pod and container in one segment."""
CONTAINER = re.compile(r"(?:[a-z][a-z0-9-]*-)?([0-9a-f]{64})(?:\.scope)?")
"""A bare id, or `runtime-id`, with `.scope` under systemd."""
CONMON = re.compile(r"[a-z]+-conmon-.*")
"""CRI-O's monitor of a container: in the pod, but not a container."""

V1_CONTROLLERS = ("memory", "pids", "cpu", "devices", "freezer")
"""In order of preference; runtimes place containers in all of them."""


class Owner(NamedTuple):
    """Pod UID (16 bytes) and container id (32 bytes); zeros where there is none."""

    pod_uid: bytes
    container_id: bytes


NOBODY = Owner(NO_UID, NO_CONTAINER)


def _pod_of(segment: str, parent: str | None) -> str | None:
    if match := SLICE.fullmatch(segment):
        return match[1]
    match = FOLDER.fullmatch(segment)
    if match and (parent is None or parent in FOLDER_PARENTS or parent.endswith("kubepods")):
        return match[1]
    return None


def _container_of(segment: str) -> bytes:
    match = CONTAINER.fullmatch(segment)
    return bytes.fromhex(match[1]) if match and not CONMON.fullmatch(segment) else NO_CONTAINER


def _uid_bytes(text: str) -> bytes:
    return bytes.fromhex(text.replace("-", "").replace("_", ""))


def owner_of(path: str) -> Owner:
    """Return the pod and the container of a cgroup; zeros for what the path does not say.

    `path` may lack its outermost segments: the probes tell the innermost seven.
    """
    segments = [segment for segment in path.split("/") if segment]
    for at in range(len(segments) - 1, -1, -1):
        if match := MISMATCH.fullmatch(segments[at]):
            return Owner(_uid_bytes(match[1]), bytes.fromhex(match[2]))
        uid = _pod_of(segments[at], segments[at - 1] if at else None)
        if uid is not None:
            below = segments[at + 1] if at + 1 < len(segments) else ""
            return Owner(_uid_bytes(uid), _container_of(below))
    return NOBODY


def choose_hierarchy(proc_self_cgroup: str) -> tuple[Controller, int]:
    """Return which hierarchy places containers, and its number, from the text of /proc/self/cgroup.

    The default hierarchy (v2) unless a v1 hierarchy holds one of the usual controllers (hybrid or v1 node).
    """
    numbers: dict[str, int] = {}
    for line in proc_self_cgroup.splitlines():
        number, controllers, _ = line.split(":", 2)
        numbers |= dict.fromkeys(controllers.split(","), int(number))
    for controller in V1_CONTROLLERS:
        if controller in numbers:
            return Controller[controller.upper()], numbers[controller]
    return Controller.DEFAULT, 0
