"""Settings of the enricher: flags over environment over defaults, validated before anything is touched.

Never reads files and never connects. Called by `run`.
"""

from __future__ import annotations

import argparse
import ipaddress
import json
from typing import Annotated, Any, TypeVar

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from enricher.errors import SettingsError

PREFIX = "PODWIRE_"


class Settings(BaseSettings):
    """What the enricher can be told; each field is also a flag, `--like-this`."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="ignore")

    cluster: str = Field(min_length=1, description="name of the cluster, as in every record and flow_id")
    bootstrap: str = Field("127.0.0.1:9092", min_length=1, description="Kafka brokers, host:port,host:port")
    registry_url: str = Field("", description="schema registry; empty takes the ids fixed in the catalog")
    group: str = Field(
        "", description="consumer group that workers share; empty takes podwire-enricher-CLUSTER"
    )
    window_ms: int = Field(
        5000,
        ge=100,
        le=600_000,
        description="milliseconds of log-append time in which the two halves of a connection must arrive; must "
        "exceed the collectors' flush interval plus the time a flush may wait for Kafka, with a margin",
    )
    idle_slack_ms: int = Field(
        500,
        ge=0,
        description="milliseconds that a quiet partition's windows stay open beyond the window, against the "
        "difference between the broker's clock and ours",
    )
    metadata_wait_ms: int = Field(
        15_000,
        ge=0,
        description="milliseconds that a record may wait for metadata before it goes out as it is: UNRESOLVED, or "
        "IP_AMBIGUOUS; should exceed the watcher's status lag plus the clock skew plus the age of its watermarks",
    )
    clock_skew_ms: int = Field(
        1000,
        ge=0,
        description="milliseconds that the clocks of a node and of the watcher may differ; by so much each end of the "
        "time in which an address is surely a pod's moves inwards, and of that in which it may be, outwards",
    )
    correction_ms: int = Field(
        60_000,
        ge=0,
        description="milliseconds after a record went out unsettled within which an identity that arrives is followed "
        "by a corrected record; 0: never",
    )
    corrections_max: int = Field(
        50_000,
        ge=0,
        description="records that may be pending for a correction at the same time, 1 kB each; above, records go out "
        "without one to come",
    )
    cidr_names: Annotated[dict[str, tuple[str, ...]], NoDecode] = Field(
        default_factory=dict,
        description='named networks as JSON, {"office": ["203.0.113.0/24"]}; the longest range names an address; '
        '"cloud-metadata" is built in (169.254.169.254, fd00:ec2::254) and may be given other ranges, or none',
    )
    cluster_cidrs: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="ranges of pod addresses, separated by commas; an address outside them is external without "
        "waiting for metadata; empty takes any address for a possible pod's",
    )
    in_flight_max: int = Field(
        50_000, ge=100, description="records sent and not acknowledged above which no more input is taken"
    )
    waiting_max: int = Field(
        50_000,
        ge=0,
        description="records that may wait for metadata at the same time; above, the oldest go out as they are",
    )
    stall_seconds: float = Field(
        60.0,
        ge=5,
        description="seconds, beyond metadata_wait_ms, after which the process ends where input waits in a partition "
        "and nothing of it gets done",
    )
    stop_seconds: float = Field(
        15.0, ge=1, description="seconds for an orderly end, after which the process ends anyway"
    )
    session_timeout_ms: int = Field(
        10_000,
        ge=6000,
        description="milliseconds after which Kafka gives a silent worker's partitions to others",
    )
    http_host: str = Field("127.0.0.1", description="address that /metrics and /healthz listen on")
    http_port: int = Field(0, ge=0, le=65_535, description="their TCP port; 0 takes any free one")

    @field_validator("cidr_names", mode="before")
    @classmethod
    def _json(cls, value: Any) -> Any:
        return json.loads(value or "{}") if isinstance(value, str) else value

    @field_validator("cluster_cidrs", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @field_validator("cidr_names", "cluster_cidrs")
    @classmethod
    def _are_networks(cls, value: Any) -> Any:
        lists = value.values() if isinstance(value, dict) else [value]
        for cidrs in lists:
            for cidr in cidrs:
                ipaddress.ip_network(cidr, strict=False)
        return value

    @property
    def clock_skew_us(self) -> int:
        """Return `clock_skew_ms` in microseconds."""
        return self.clock_skew_ms * 1000

    @property
    def group_id(self) -> str:
        """Consumer group, which is also Faust's application id."""
        return self.group or f"podwire-enricher-{self.cluster}"


class ReplaySettings(Settings):
    """What one process of a replay is told beside; `podwire replay` tells it."""

    from_us: int = Field(ge=0, description="event time of the first records wanted, Unix time in us")
    to_us: int = Field(ge=0, description="event time before which the records wanted end, Unix time in us")
    early_ms: int = Field(
        60_000, ge=0, description="milliseconds before it happened that a half may have come"
    )
    late_ms: int = Field(
        3_600_000, ge=0, description="milliseconds after it happened that a half may have come"
    )
    now_ms: int = Field(ge=0, description="Unix time in ms, the same for all processes of a replay")
    topic: str = Field(
        pattern=r"^podwire\.flows\.replay\.[a-zA-Z0-9_-]+\.v1$",
        description="topic for the records; never one that a worker writes to",
    )
    share: str = Field(
        "1/1",
        pattern=r"^[1-9][0-9]*/[1-9][0-9]*$",
        description="which part of the partitions, as 1/2 and 2/2",
    )


Kind = TypeVar("Kind", bound=Settings)


def parse(arguments: list[str]) -> Settings:
    """Return the settings of a worker, as `read` does."""
    return read(Settings, "python -m enricher", arguments)


def read(kind: type[Kind], program: str, arguments: list[str]) -> Kind:
    """Return the settings from flags and environment; SettingsError names each wrong one.

    `--help` prints all flags and leaves by SystemExit, as argparse does.
    """
    parser = argparse.ArgumentParser(
        prog=program, description="Joins the halves of connections and names both ends."
    )
    for name, field in kind.model_fields.items():
        default = (
            "required" if field.is_required() else f"default {field.get_default(call_default_factory=True)!r}"
        )
        text = f"{field.description} [{PREFIX}{name.upper()}; {default}]"
        parser.add_argument(f"--{name.replace('_', '-')}", dest=name, help=text.replace("%", "%%"))
    given = {name: value for name, value in vars(parser.parse_args(arguments)).items() if value is not None}
    try:
        return kind(**given)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
        raise SettingsError(
            f"Settings are wrong: {wrong}.",
            "set the flag (--like-this) or the variable (PODWIRE_LIKE_THIS); --help lists them all",
        ) from error
