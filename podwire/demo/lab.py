"""A node with pods on this machine: network namespaces, a bridge, kubepods-like cgroups, Services by nftables.

Owns everything whose name starts with `podwire-<lab>`: network namespaces, cgroup folders and the processes in
them. All addresses, rules and connection tracking live in the lab's own "node" namespace; the host's network
stays as it is. Knows neither Kafka nor Podwire's services. Called by `podwire.demo.run` and the tests.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import socket
import subprocess
import uuid
import zlib
from dataclasses import dataclass, field
from datetime import UTC, datetime
from ipaddress import ip_network
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, cast

from podwire.demo import cgroup, manifest, nat
from podwire.demo.errors import LabBusyError, LabError
from podwire.demo.manifest import Port

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["Lab", "LabBusyError", "LabError", "Pod", "Port", "remove_leftovers"]

END_SECONDS_MAX = 3.0

# Puts itself into the cgroups, then becomes the program: it never runs outside its pod.
_ENTER = 'while [ "$1" != -- ]; do echo 0 >"$1/cgroup.procs" || exit 125; shift; done; shift; exec "$@"'


def _run(*command: str, stdin: str = "") -> str:
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise LabError(f"`{' '.join(command)}` failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def _run_in(netns: str, *command: str, stdin: str = "") -> str:
    """Run in a network namespace; unlike `ip netns exec`, without new mounts of /sys."""
    return _run("nsenter", f"--net=/run/netns/{netns}", "--", *command, stdin=stdin)


@dataclass(frozen=True)
class Pod:
    """One pod of a lab.

    Attributes:
        ip6: IPv6 address, None where the kernel has no IPv6.
        netns: name of its network namespace, a file in /run/netns.
        cgroups: its container's folder in each hierarchy.
    """

    spec: manifest.PodSpec
    ip: str
    ip6: str | None
    netns: str
    cgroups: tuple[Path, ...]
    _started: list[subprocess.Popen[bytes]] = field(repr=False)

    @property
    def name(self) -> str:
        """Pod name."""
        return self.spec.name

    @property
    def namespace(self) -> str:
        """Kubernetes namespace."""
        return self.spec.namespace

    @property
    def uid(self) -> str:
        """metadata.uid."""
        return self.spec.uid

    @property
    def container_id(self) -> str:
        """Container id, 64 hex digits."""
        return self.spec.container_id

    @property
    def netns_ino(self) -> int:
        """Inode of the network namespace, as in `stat /proc/PID/ns/net`."""
        return Path("/run/netns", self.netns).stat().st_ino

    def argv(self, *command: str) -> list[str]:
        """Return the command line that runs `command` inside the pod; its pid becomes the command's.

        The command gets SIGTERM when the thread that starts it ends.
        """
        folders = [str(folder) for folder in self.cgroups]
        inside = ["nsenter", f"--net=/run/netns/{self.netns}", "--", "setpriv", "--pdeathsig", "TERM", "--"]
        return ["sh", "-c", _ENTER, "pod", *folders, "--", *inside, *command]

    def popen(self, command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
        """Start `command` in the pod; the lab ends it when it closes. `options` are those of Popen."""
        options = {"stdin": subprocess.DEVNULL, "start_new_session": True} | options
        process = cast("subprocess.Popen[bytes]", subprocess.Popen(self.argv(*command), **options))
        self._started.append(process)
        return process

    def run(self, command: Sequence[str], timeout: float = 30) -> subprocess.CompletedProcess[str]:
        """Run `command` in the pod to its end and return what it said; TimeoutExpired after `timeout` s."""
        return subprocess.run(
            self.argv(*command), capture_output=True, text=True, timeout=timeout, check=False
        )


class Lab:
    """A node of its own with pods and Services; close it, or use it in a `with`.

    Attributes:
        node: name of the node, in the manifest and for PODWIRE_NODE.
        node_ip: the node's address; masqueraded connections come from it.
        node_ip6: the same for IPv6, None where the kernel has none.
        prefix: what the name of everything that the lab makes starts with.
    """

    def __init__(self, name: str, node: str = "") -> None:
        """Build the empty node.

        Raises:
            LabBusyError: a lab of this name is open, in this process or another one.
            LabError: a command failed, with what it said.
        """
        self.prefix = f"podwire-{name}"
        self.node = node or f"{name}-node"
        self._lock = _lock(self.prefix)
        remove_leftovers(name)
        self._netns = f"{self.prefix}-node"
        self._ipv6 = Path("/proc/sys/net/ipv6").exists()
        self._created = _now()
        self._pods: list[Pod] = []
        self._services: list[dict[str, Any]] = []
        self._forwardings: list[nat.Forwarding] = []
        self._started: list[subprocess.Popen[bytes]] = []
        self._number = zlib.crc32(name.encode()) % 256
        self._pod_net, self._service_net = _free_nets(self._number)
        self._service_net6 = f"fd00:10:{self._number:x}:96::"
        self.node_ip = f"{self._pod_net}.1"
        self.node_ip6 = self._ip6(1) if self._ipv6 else None
        try:
            self._build()
        except BaseException:
            self.close()
            raise

    def _ip6(self, host: int) -> str:
        return f"fd00:10:{self._number:x}::{host:x}"

    def _build(self) -> None:
        self._netns_add(self._netns)
        lines = [
            "link set lo up",
            "link add br0 type bridge forward_delay 0",
            f"address add {self.node_ip}/24 dev br0",
            "link set br0 up",
            # A process of the node itself dials a Service: it needs a route before NAT looks at the packet.
            f"route add {self._service_net}.0/24 dev br0 src {self.node_ip}",
        ]
        if self.node_ip6:
            lines.append(f"address add {self.node_ip6}/64 dev br0 nodad")
            lines.append(f"route add {self._service_net6}/112 dev br0 src {self.node_ip6}")
        self._ip(self._netns, lines)
        self._sysctl(self._netns, "net/ipv4/ip_forward", "1")
        if self._ipv6:
            self._sysctl(self._netns, "net/ipv6/conf/all/forwarding", "1")

    def _netns_add(self, netns: str) -> None:
        _run("ip", "netns", "add", netns)
        if self._ipv6:  # without: no neighbour is found in the second that duplicate detection takes
            self._sysctl(netns, "net/ipv6/conf/default/accept_dad", "0")

    @staticmethod
    def _ip(netns: str, lines: Sequence[str]) -> None:
        _run_in(netns, "ip", "-batch", "-", stdin="\n".join(lines) + "\n")

    @staticmethod
    def _sysctl(netns: str, name: str, value: str) -> None:
        _run_in(netns, "sh", "-c", f"echo {value} >/proc/sys/{name}")

    def pod(
        self,
        name: str,
        namespace: str = "default",
        *,
        deployment: str = "",
        labels: Mapping[str, str] | None = None,
        container: str = "app",
        service_account: str = "default",
        host_network: bool = False,
    ) -> Pod:
        """Make a pod: namespace, veth to the node's bridge, cgroup of class burstable.

        With `deployment`, `name` reads `<deployment>-<template hash>-<suffix>` and the pod gets the label `app`.
        """
        number = len(self._pods) + 2
        uid, container_id = str(uuid.uuid4()), secrets.token_hex(32)
        if host_network:
            netns, ip, ip6 = self._netns, self.node_ip, self.node_ip6
        else:
            netns, ip = f"{self.prefix}-{namespace}-{name}", f"{self._pod_net}.{number}"
            ip6 = self._ip6(number) if self._ipv6 else None
            self._plug(netns, number, ip, ip6)
        spec = manifest.PodSpec(
            name=name,
            namespace=namespace,
            uid=uid,
            node=self.node,
            node_address=self.node_ip,
            created=_now(),
            container=container,
            container_id=container_id,
            image=f"registry.example/{container}:1.0",
            addresses=(ip, ip6) if ip6 else (ip,),
            deployment=deployment,
            service_account=service_account,
            host_network=host_network,
            labels=labels or {},
        )
        folders = cgroup.make(f"{self.prefix}/kubepods/burstable/pod{uid}/{container_id}")
        pod = Pod(spec, ip, ip6, netns, tuple(folders), self._started)
        self._pods.append(pod)
        return pod

    def _plug(self, netns: str, number: int, ip: str, ip6: str | None) -> None:
        self._netns_add(netns)
        self._ip(
            self._netns,
            [
                f"link add pod{number} type veth peer name eth0 netns {netns}",
                f"link set pod{number} master br0 up",
                # A pod that a Service leads back to itself gets what came in here out of here again.
                f"link set pod{number} type bridge_slave hairpin on",
            ],
        )
        lines = ["link set lo up", f"address add {ip}/24 dev eth0", "link set eth0 up"]
        routes = [f"route add default via {self.node_ip}"]
        if ip6:
            lines.append(f"address add {ip6}/64 dev eth0 nodad")
            routes.append(f"route add ::/0 via {self.node_ip6}")
        self._ip(netns, lines + routes)

    def service(
        self,
        name: str,
        pods: Sequence[Pod],
        port: int | Sequence[Port],
        *,
        namespace: str = "default",
        family: Literal[4, 6] = 4,
        snat_ports: tuple[int, int] | None = None,
    ) -> str:
        """Make a Service in front of `pods`, in turn, behind DNAT and masquerade; return its cluster IP.

        `snat_ports` forces the source port, which NAT otherwise keeps, into that range.
        """
        ports = (Port(port),) if isinstance(port, int) else tuple(port)
        host = len(self._services) + 10
        address = f"{self._service_net}.{host}" if family == 4 else f"{self._service_net6}{host:x}"  # noqa: PLR2004
        selector = {"app": pods[0].spec.deployment or pods[0].name} if pods else {}
        self._services.append(
            manifest.service(name, namespace, address, ports, selector=selector, created=_now())
        )
        backends = tuple(str(pod.ip6 if ":" in address else pod.ip) for pod in pods)
        self._forwardings.append(nat.Forwarding(address, ports, backends, snat_ports))
        _run_in(self._netns, "nft", "-f", "-", stdin=nat.rules(self._forwardings))
        return address

    def manifest(self) -> dict[str, Any]:
        """Return the node, its pods and Services as `kubectl get pods,services,nodes -A -o json` would."""
        addresses = [self.node_ip, *([self.node_ip6] if self.node_ip6 else [])]
        return manifest.items(
            [
                *(manifest.pod(pod.spec) for pod in self._pods),
                *self._services,
                manifest.node(self.node, addresses, self._created),
            ]
        )

    def close(self) -> None:
        """End the pods' processes and remove all that the lab made; safe to call twice."""
        for process in self._started:
            if process.poll() is None:
                process.terminate()
        for process in self._started:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(END_SECONDS_MAX)
            if process.poll() is None:
                process.kill()
                process.wait()
        self._started.clear()
        _remove(self.prefix)
        self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def remove_leftovers(name: str) -> None:
    """Remove what a killed run left of the lab `name`; for callers that know that no such lab is open."""
    _remove(f"podwire-{name}")


def _remove(prefix: str) -> None:
    cgroup.remove(prefix)
    for line in _run("ip", "netns", "list").splitlines():
        netns = line.split()[0]
        if netns.startswith(f"{prefix}-"):
            _run("ip", "netns", "delete", netns)


def _lock(prefix: str) -> socket.socket:
    """Take the lab's name: a name in the abstract namespace goes away with its holder, whatever ends it."""
    lock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        lock.bind(f"\0{prefix}")
    except OSError as error:
        lock.close()
        raise LabBusyError(f"{prefix} runs already on this machine; end that one first.") from error
    return lock


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _free_nets(number: int) -> tuple[str, str]:
    """Return the first three octets of a pod and a Service network that the host has no route into."""
    shown = json.loads(_run("ip", "-json", "-4", "route", "show", "table", "all") or "[]")
    routed = [ip_network(route["dst"], strict=False) for route in shown if route["dst"] != "default"]

    def free(octets: range) -> int:
        return next(
            octet
            for octet in octets
            if not any(ip_network(f"10.{octet}.0.0/16").overlaps(net) for net in routed)
        )

    return f"10.{free(range(244, 192, -1))}.{number}", f"10.{free(range(96, 192))}.{number}"
