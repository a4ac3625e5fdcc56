"""Settings of the node collector: flag over environment over default, and every mistake named."""

from __future__ import annotations

from pathlib import Path

import pytest

from collector.errors import SettingsError
from collector.node.settings import Settings, parse

REQUIRED = ["--cluster", "c", "--node", "n", "--key-file", "/k"]


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the machine's own settings out."""
    for name in Settings.model_fields:
        monkeypatch.delenv(f"PODWIRE_{name.upper()}", raising=False)


def test_flag_wins_over_environment_over_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """The nearest word counts."""
    assert parse(REQUIRED).partitions == 4
    monkeypatch.setenv("PODWIRE_PARTITIONS", "6")
    assert parse(REQUIRED).partitions == 6
    assert parse([*REQUIRED, "--partitions", "8"]).partitions == 8


def test_empty_paths_mean_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty variable, as manifests often have it, is the same as none."""
    monkeypatch.setenv("PODWIRE_PIN_DIR", "")
    assert parse(REQUIRED).pin_dir is None
    monkeypatch.setenv("PODWIRE_PIN_DIR", "/sys/fs/bpf/p")
    assert parse(REQUIRED).pin_dir == Path("/sys/fs/bpf/p")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "cluster"),
        ([*REQUIRED, "--ring-bytes", "1000000"], "ring_bytes"),
        ([*REQUIRED, "--partitions", "0"], "partitions"),
        ([*REQUIRED, "--tier", "magic"], "tier"),
        ([*REQUIRED, "--keep-probes", "perhaps"], "keep_probes"),
        ([*REQUIRED, "--key-id", "-1"], "key_id"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_mistake_is_named(arguments: list[str], named: str) -> None:
    """The error names the setting that is missing or wrong."""
    with pytest.raises(SettingsError, match=named):
        parse(arguments)


def test_every_setting_is_described() -> None:
    """Each setting has a text for --help."""
    assert all(field.description for field in Settings.model_fields.values())
