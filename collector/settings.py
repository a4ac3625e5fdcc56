"""What the settings of both collectors share: common fields, and flags over environment over defaults.

Never reads files and never connects. Called by `node.settings` and `cluster.settings`.
"""

from __future__ import annotations

import argparse
from typing import TypeVar

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from collector.errors import SettingsError

PREFIX = "PODWIRE_"


class PodwireSettings(BaseSettings):
    """Where settings come from: each field is a variable, PODWIRE_LIKE_THIS, and a flag, `--like-this`."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="ignore")


class CollectorSettings(PodwireSettings):
    """The fields that both collectors have."""

    cluster: str = Field(min_length=1, description="name of the cluster, as in every record")
    bootstrap: str = Field("127.0.0.1:9092", min_length=1, description="Kafka brokers, host:port,host:port")
    registry_url: str = Field("", description="schema registry; empty takes the ids fixed in the catalog")
    http_host: str = Field("127.0.0.1", description="address that /metrics and /healthz listen on")
    http_port: int = Field(0, ge=0, le=65_535, description="their TCP port; 0 takes any free one")


Kind = TypeVar("Kind", bound=PodwireSettings)


def parse(kind: type[Kind], program: str, description: str, arguments: list[str]) -> Kind:
    """Return the settings from flags and environment; SettingsError names each wrong one.

    `--help` prints all flags and leaves by SystemExit, as argparse does.
    """
    parser = argparse.ArgumentParser(prog=program, description=description)
    for name, field in kind.model_fields.items():
        default = "required" if field.is_required() else f"default {field.default!r}"
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
