"""Settings of the node collector: flags over environment over defaults, validated before anything is touched.

Never reads files and never connects. Called by `run`.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

import collector.settings
from collector.node.filters import Filters
from collector.node.probes import DEFAULT_OBJECT, ProbeOptions
from collector.settings import CollectorSettings, PodwireSettings
from schemas.catalog import PARTITIONS_DEFAULT

PROGRAM = "python -m collector node"


class ProbeSettings(PodwireSettings):
    """What the probes can be told, whatever becomes of their events."""

    object: Path | None = Field(
        None, description="BPF object file; empty takes the one built in this checkout"
    )
    tier: Literal["auto", "fentry", "kprobe", "tracepoint", "tp_btf", "bcc"] = Field(
        "auto", description="probe tier; auto takes the best"
    )
    ring_bytes: int = Field(
        16 << 20, description="size of the events ring in bytes, a power of two; 16 MiB hold 95,000 events"
    )
    names_ring_bytes: int = Field(
        1 << 20, description="size of the ring of cgroup names in bytes, a power of two"
    )
    sockets_max: int = Field(65_536, ge=64, description="connections that the probes follow at the same time")
    cgroups_max: int = Field(16_384, ge=64, description="cgroups whose names the probes remember having told")
    connects_max: int = Field(
        8192, ge=64, description="calls of connect() under way at once that the probes remember"
    )
    filter_loopback: bool = Field(True, description="leave out connections to 127.0.0.0/8 and ::1")
    filter_own: bool = Field(True, description="leave out the collector's own connections")
    only_ports: str = Field("", description="server ports to follow, others are left out: 443,8000-8099")
    not_ports: str = Field("", description="server ports to leave out")
    only_cidrs: str = Field(
        "",
        description="networks of which either end must be in one: 10.0.0.0/8,fd00::/8; others are left out",
    )
    not_cidrs: str = Field(
        "",
        description="networks of which neither end may be in one; where both lists match, the longer prefix wins",
    )
    only_netns: str = Field(
        "", description="network namespaces to follow, by inode or by path, as /proc/1/ns/net"
    )
    not_netns: str = Field("", description="network namespaces to leave out")
    only_cgroups: str = Field(
        "", description="cgroups to follow with all below them, by folder: /sys/fs/cgroup/kubepods.slice"
    )
    not_cgroups: str = Field(
        "", description="cgroups to leave out; where both lists match, the nearest ancestor wins"
    )
    flush_interval_ms: int = Field(
        100,
        ge=10,
        le=5000,
        description="milliseconds between two readings of the ring; shorter when it fills fast",
    )

    existing: bool = Field(
        True, description="tell of connections that were open before the probes, as EXISTING"
    )
    progress_interval_s: float = Field(
        60.0,
        ge=0,
        le=86_400,
        description="seconds between two PROGRESS events of a connection, which may come a fourth of it late; "
        "0 for none",
    )
    walk_events_max: int = Field(
        1000,
        ge=1,
        le=100_000,
        description="EXISTING and PROGRESS events made per reading of the ring, each, so that many long-lived "
        "connections make no burst",
    )

    @field_validator("object", mode="before")
    @classmethod
    def _no_path(cls, value: Any) -> Any:
        return None if value == "" else value

    @field_validator("ring_bytes", "names_ring_bytes")
    @classmethod
    def _power_of_two(cls, value: int) -> int:
        if value < 1 << 12 or value & (value - 1):
            raise ValueError("must be a power of two of at least 4096")
        return value

    @model_validator(mode="after")
    def _filters_are_readable(self) -> Self:
        self._filters()
        return self

    def _filters(self) -> Filters:
        return Filters(**{one.name: getattr(self, one.name) for one in fields(Filters)})

    def probe_options(self, state_dir: Path | None = None, pin_dir: Path | None = None) -> ProbeOptions:
        """Return what the kernel half needs of the settings."""
        return ProbeOptions(
            state_dir=state_dir,
            object_path=self.object or DEFAULT_OBJECT,
            ring_bytes=self.ring_bytes,
            names_ring_bytes=self.names_ring_bytes,
            sockets_max=self.sockets_max,
            cgroups_max=self.cgroups_max,
            connects_max=self.connects_max,
            filter_loopback=self.filter_loopback,
            filter_own=self.filter_own,
            filters=self._filters(),
            pin_dir=pin_dir,
            tier=self.tier,
            existing=self.existing,
            progress_interval_s=self.progress_interval_s,
            walk_events_max=self.walk_events_max,
        )


class PinSettings(PodwireSettings):
    """Where probes are kept alive."""

    pin_dir: Path | None = Field(
        None,
        description="folder on a bpffs where maps and links are pinned, so that no event is missed between a "
        "crash and the next start; empty pins nothing",
    )

    @field_validator("pin_dir", mode="before")
    @classmethod
    def _no_pin_dir(cls, value: Any) -> Any:
        return None if value == "" else value


class DoctorSettings(PinSettings, ProbeSettings):
    """What `--doctor` can be told: what the probes and their pins would be told."""


class PrintSettings(ProbeSettings):
    """What `--print` can be told; pins nothing and writes nothing but to stdout."""

    cluster: str = Field("", description="name of the cluster, which the keys of failed attempts are made of")
    node: str = Field("", description="name of the node, for the same")
    key_file: Path | None = Field(
        None,
        description="file with the cluster's secret, 32 hex digits; empty makes a random one for this run",
    )

    @field_validator("key_file", mode="before")
    @classmethod
    def _no_key_file(cls, value: Any) -> Any:
        return None if value == "" else value


class Settings(PinSettings, ProbeSettings, CollectorSettings):
    """What the node collector can be told."""

    node: str = Field(min_length=1, description="name of the Kubernetes node this process runs on")
    key_file: Path = Field(
        description="file with the cluster's secret, 32 hex digits, the same on every node"
    )
    key_id: int = Field(1, ge=0, le=2**31 - 1, description="number of that secret, in every batch")
    partitions: int = Field(
        PARTITIONS_DEFAULT, ge=1, le=10_000, description="partition count of the raw topic"
    )
    state_dir: Path = Field(Path("/var/lib/podwire"), description="folder for the spool and for cgroup names")
    keep_probes: bool = Field(
        True,
        description="leave pinned probes attached at an orderly end, so that a restart repeats no OPEN or EXISTING; "
        "false removes them, for the last run on a node",
    )
    queue_bytes_max: int = Field(
        64 << 20,
        ge=1 << 20,
        description="bytes of batches that may wait in memory for Kafka's answer, before compression; above, they "
        "go to the spool at once; at least the largest batch, 1 MB",
    )
    spool_after_ms: int = Field(
        2000,
        ge=0,
        description="milliseconds without acknowledgement after which a flush is written to the spool",
    )
    spool_bytes_max: int = Field(1 << 30, ge=0, description="bound of the spool in bytes; 0 spools nothing")
    report_interval_s: float = Field(
        10.0, ge=0.1, description="seconds between two reports of what was collected"
    )
    drain_timeout_s: float = Field(
        10.0,
        ge=0,
        description="seconds for Kafka to acknowledge the rest at an orderly end; what is left is spooled",
    )


def parse(arguments: list[str]) -> Settings:
    """Return the settings from flags and environment, as `collector.settings.parse` does."""
    description = (
        "Publishes the TCP connections of this node. With --print it shows them here instead, as JSON lines, and "
        "needs no Kafka; with --doctor it says whether it could run (--print --help, --doctor --help)."
    )
    return collector.settings.parse(Settings, PROGRAM, description, arguments)


def parse_print(arguments: list[str]) -> PrintSettings:
    """Return the settings of `--print`, as `parse` does."""
    description = "Prints the TCP events of this node as JSON lines, without Kafka, until SIGINT or SIGTERM."
    return collector.settings.parse(PrintSettings, f"{PROGRAM} --print", description, arguments)


def parse_doctor(arguments: list[str]) -> DoctorSettings:
    """Return the settings of `--doctor`, as `parse` does."""
    description = "Says whether the probes can run here, as one JSON object; tries it and leaves nothing."
    return collector.settings.parse(DoctorSettings, f"{PROGRAM} --doctor", description, arguments)
