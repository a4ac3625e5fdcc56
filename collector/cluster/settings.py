"""Settings of the cluster watcher: flags over environment over defaults, validated before anything is touched.

Never reads files and never connects. Called by `run`.
"""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 (pydantic reads the annotation)
from typing import Annotated, Any

from pydantic import Field, field_validator
from pydantic_settings import NoDecode

import collector.settings
from collector.settings import CollectorSettings

HOUR_US = 3_600_000_000


class Settings(CollectorSettings):
    """What the cluster watcher can be told; each field is also a flag, `--like-this`."""

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
    """Return the settings from flags and environment, as `collector.settings.parse` does."""
    program, description = "python -m collector cluster", "Publishes Kubernetes' pods, services and nodes."
    return collector.settings.parse(Settings, program, description, arguments)
