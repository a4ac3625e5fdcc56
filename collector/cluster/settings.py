"""Settings of the cluster watcher: flags over environment over defaults, validated before anything is touched.

Never reads files and never connects. Called by `run`.
"""

from __future__ import annotations

import argparse
from pathlib import Path  # noqa: TC003 (pydantic reads the annotation)
from typing import Annotated, Any

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from collector.errors import SettingsError

PREFIX = "PODWIRE_"
HOUR_US = 3_600_000_000


class Settings(BaseSettings):
    """What the cluster watcher can be told; each field is also a flag, `--like-this`."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="ignore")

    cluster: str = Field(min_length=1, description="name of the cluster, as in every record")
    bootstrap: str = Field("127.0.0.1:9092", min_length=1, description="Kafka brokers, host:port,host:port")
    registry_url: str = Field("", description="schema registry; empty takes the ids fixed in the catalog")
    manifests: Path | None = Field(
        None,
        description="file or folder in the form of `kubectl get pods,services,nodes -A -o json` to take "
        "instead of the Kubernetes API",
    )
    kubeconfig: str = Field(
        "", description="kubeconfig file; empty takes the pod's service account, else ~/.kube/config"
    )
    labels: Annotated[tuple[str, ...], NoDecode] = Field(
        ("app", "app.kubernetes.io/name", "app.kubernetes.io/part-of", "app.kubernetes.io/component"),
        description="pod labels that are published, separated by commas; no other label leaves the API server",
    )
    watermark_interval_ms: int = Field(
        1000,
        ge=50,
        le=60_000,
        description="milliseconds between two watermarks, and between two looks at the manifests",
    )
    watch_quiet_ms: int = Field(
        2000,
        ge=0,
        description="milliseconds after which an open watch that stayed quiet counts as having delivered what "
        "existed before; 0 trusts events and bookmarks only, and then watermarks lag by up to a minute",
    )
    status_lag_ms: int = Field(
        10_000, ge=0, description="milliseconds by which a pod's status may follow what happened on its node"
    )
    history_retention_hours: float = Field(
        168.0, gt=0, description="hours that what was deleted stays readable, at least the longest replay"
    )
    http_host: str = Field("127.0.0.1", description="address that /metrics and /healthz listen on")
    http_port: int = Field(0, ge=0, le=65_535, description="their TCP port; 0 takes any free one")

    @field_validator("labels", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @field_validator("manifests", mode="before")
    @classmethod
    def _no_path(cls, value: Any) -> Any:
        return None if value == "" else value

    @property
    def status_lag_us(self) -> int:
        """Return `status_lag_ms` in microseconds."""
        return self.status_lag_ms * 1000

    @property
    def retention_us(self) -> int:
        """Return `history_retention_hours` in microseconds."""
        return int(self.history_retention_hours * HOUR_US)


def parse(arguments: list[str]) -> Settings:
    """Return the settings from flags and environment; SettingsError names each wrong one.

    `--help` prints all flags and leaves by SystemExit, as argparse does.
    """
    parser = argparse.ArgumentParser(
        prog="python -m collector cluster", description="Publishes Kubernetes' pods, services and nodes."
    )
    for name, field in Settings.model_fields.items():
        default = "required" if field.is_required() else f"default {field.default!r}"
        text = f"{field.description} [{PREFIX}{name.upper()}; {default}]"
        parser.add_argument(f"--{name.replace('_', '-')}", dest=name, help=text.replace("%", "%%"))
    given = {name: value for name, value in vars(parser.parse_args(arguments)).items() if value is not None}
    try:
        return Settings(**given)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
        raise SettingsError(
            f"Settings are wrong: {wrong}.",
            "set the flag (--like-this) or the variable (PODWIRE_LIKE_THIS); --help lists them all",
        ) from error
