# ruff: noqa: E501 (a path is read in one piece)
"""The pod and container that a cgroup's path tells, for every runtime."""

from __future__ import annotations

import pytest

from collector.node.abi import Controller
from collector.node.cgroup_paths import NO_CONTAINER, NO_UID, choose_hierarchy, owner_of

U = "0a1b2c3d-4e5f-6071-8293-a4b5c6d7e8f9"
V = U.replace("-", "_")
OTHER = "ffffffff-eeee-dddd-cccc-bbbbbbbbbbbb"
OTHER_V = OTHER.replace("-", "_")
STATIC = "d41d8cd98f00b204e9800998ecf8427e"
I = "0123456789abcdef" * 4  # noqa: E741 (as the table of runtimes calls it)
J = "fedcba9876543210" * 4
KIND = f"/system.slice/docker-{J}.scope/kubelet.slice/kubelet-kubepods.slice"

IN_A_CONTAINER = {
    "containerd-systemd-burstable": f"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{V}.slice/cri-containerd-{I}.scope",
    "containerd-systemd-besteffort": f"/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{V}.slice/cri-containerd-{I}.scope",
    "containerd-systemd-guaranteed": f"/kubepods.slice/kubepods-pod{V}.slice/cri-containerd-{I}.scope",
    "containerd-cgroupfs-burstable": f"/kubepods/burstable/pod{U}/{I}",
    "containerd-cgroupfs-besteffort": f"/kubepods/besteffort/pod{U}/{I}",
    "containerd-cgroupfs-guaranteed": f"/kubepods/pod{U}/{I}",
    "containerd-driver-mismatch": f"/system.slice/containerd.service/kubepods-burstable-pod{V}.slice:cri-containerd:{I}",
    "containerd-driver-mismatch-guaranteed": f"/system.slice/containerd.service/kubepods-pod{V}.slice:cri-containerd:{I}",
    "containerd-driver-mismatch-at-the-root": f"/kubepods-besteffort-pod{V}.slice:cri-containerd:{I}",
    "crio-systemd": f"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{V}.slice/crio-{I}.scope",
    "crio-systemd-guaranteed": f"/kubepods.slice/kubepods-pod{V}.slice/crio-{I}.scope",
    "crio-container-below": f"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{V}.slice/crio-{I}.scope/container",
    "crio-cgroupfs": f"/kubepods/burstable/pod{U}/crio-{I}",
    "docker-systemd": f"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{V}.slice/docker-{I}.scope",
    "docker-systemd-guaranteed": f"/kubepods.slice/kubepods-pod{V}.slice/docker-{I}.scope",
    "docker-cgroupfs": f"/kubepods/burstable/pod{U}/{I}",
    "kind-burstable": f"{KIND}/kubelet-kubepods-burstable.slice/kubelet-kubepods-burstable-pod{V}.slice/cri-containerd-{I}.scope",
    "kind-besteffort": f"{KIND}/kubelet-kubepods-besteffort.slice/kubelet-kubepods-besteffort-pod{V}.slice/cri-containerd-{I}.scope",
    "kind-guaranteed": f"{KIND}/kubelet-kubepods-pod{V}.slice/cri-containerd-{I}.scope",
    "kind-innermost-seven-of-more": f"/kubelet-kubepods-burstable-pod{V}.slice/cri-containerd-{I}.scope/init.scope",
    "minikube-systemd": f"/system.slice/docker-{J}.scope/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{V}.slice/docker-{I}.scope",
    "minikube-cgroupfs": f"/docker/{J}/kubepods/besteffort/pod{U}/{I}",
    "k3d-cgroupfs": f"/docker/{J}/kubepods/burstable/pod{U}/{I}",
    "k3s": f"/kubepods/burstable/pod{U}/{I}",
    "kubelet-cgroup-root": f"/podwire-lab/kubepods/burstable/pod{U}/{I}",
    "systemd-in-the-container": f"/kubepods/burstable/pod{U}/{I}/system.slice/nginx.service",
    "docker-in-the-container": f"/kubepods/burstable/pod{U}/{I}/docker/{J}",
    "cgroup-v2-delegated-below": f"/kubepods.slice/kubepods-pod{V}.slice/cri-containerd-{I}.scope/payload",
    "pod-in-a-pod": f"/kubepods/burstable/pod{OTHER}/{J}/kubelet/kubepods/besteffort/pod{U}/{I}",
    "pod-in-a-pod-systemd": f"/kubepods.slice/kubepods-pod{OTHER_V}.slice/cri-containerd-{J}.scope/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod{V}.slice/cri-containerd-{I}.scope",
    "outer-levels-cut-off": f"/pod{U}/{I}/a/b/c/d/e",
}
STATIC_PODS = {
    "static-cgroupfs": f"/kubepods/burstable/pod{STATIC}/{I}",
    "static-systemd": f"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{STATIC}.slice/cri-containerd-{I}.scope",
    "static-kind": f"{KIND}/kubelet-kubepods-burstable.slice/kubelet-kubepods-burstable-pod{STATIC}.slice/cri-containerd-{I}.scope",
}
IN_A_POD_ONLY = {
    "pod-itself-cgroupfs": f"/kubepods/burstable/pod{U}",
    "pod-itself-systemd": f"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{V}.slice",
    "crio-conmon": f"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{V}.slice/crio-conmon-{I}.scope",
    "not-an-id": f"/kubepods/burstable/pod{U}/sidecar",
}
IN_NO_POD = {
    "root": "/",
    "empty": "",
    "service": "/system.slice/sshd.service",
    "user": "/user.slice/user-1000.slice/session-2.scope",
    "plain-docker": f"/docker/{I}",
    "plain-docker-systemd": f"/system.slice/docker-{I}.scope",
    "kubelet": "/system.slice/kubelet.service",
    "kind-node-service": f"/system.slice/docker-{J}.scope/system.slice/containerd.service",
    "class-slice": "/kubepods.slice/kubepods-burstable.slice",
    "folder-that-looks-like-a-pod": f"/home/pod{U}/{I}",
    "uid-too-short": f"/kubepods/burstable/pod{U[:-1]}/{I}",
    "upper-case": f"/kubepods/burstable/pod{U.upper()}/{I}",
    "podman": f"/machine.slice/libpod-{I}.scope",
}


def params(table: dict[str, str]) -> pytest.MarkDecorator:
    """Make one case per row."""
    return pytest.mark.parametrize("path", table.values(), ids=list(table))


@params(IN_A_CONTAINER)
def test_container_path_names_pod_and_container(path: str) -> None:
    """Each runtime's path yields the innermost pod and its container."""
    assert owner_of(path) == (bytes.fromhex(U.replace("-", "")), bytes.fromhex(I))


@params(STATIC_PODS)
def test_static_pod_path_names_the_config_hash(path: str) -> None:
    """A static pod's path has the hash of its manifest in place of the UID."""
    assert owner_of(path) == (bytes.fromhex(STATIC), bytes.fromhex(I))


@params(IN_A_POD_ONLY)
def test_pod_path_without_container_names_the_pod_only(path: str) -> None:
    """The pod's own cgroup, and a monitor beside the containers, are in no container."""
    assert owner_of(path) == (bytes.fromhex(U.replace("-", "")), NO_CONTAINER)


@params(IN_NO_POD)
def test_other_path_names_nothing(path: str) -> None:
    """A process outside pods must not be given to one."""
    assert owner_of(path) == (NO_UID, NO_CONTAINER)


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        ("0::/\n", (Controller.DEFAULT, 0)),
        ("0::/system.slice/podwire.service\n", (Controller.DEFAULT, 0)),
        ("1:net_cls:/\n0::/\n", (Controller.DEFAULT, 0)),
        ("9:name=systemd:/\n8:pids:/\n4:memory:/x\n1:cpu:/\n0::/\n", (Controller.MEMORY, 4)),
        ("3:pids:/\n2:cpu,cpuacct:/\n1:name=systemd:/\n0::/\n", (Controller.PIDS, 3)),
        ("2:cpu,cpuacct:/\n1:name=systemd:/\n", (Controller.CPU, 2)),
        ("5:freezer:/\n6:devices:/a:b\n", (Controller.DEVICES, 6)),
    ],
    ids=["v2", "v2-in-a-service", "v2-with-net_cls", "hybrid", "no-v1-memory", "joined", "colon-in-the-path"],
)
def test_hierarchy_is_the_one_that_holds_containers(text: str, chosen: tuple[Controller, int]) -> None:
    """The default hierarchy on pure v2, else the first usual v1 controller that is there."""
    assert choose_hierarchy(text) == chosen
