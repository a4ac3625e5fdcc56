"""The cluster watcher's settings: flags over environment over defaults."""

from __future__ import annotations

from pathlib import Path

import pytest

from collector.cluster.settings import Settings, parse
from collector.errors import SettingsError


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"PODWIRE_{name.upper()}", raising=False)


def test_flags_win_over_environment_over_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each way of saying it works, in the documented order."""
    monkeypatch.setenv("PODWIRE_CLUSTER", "environment")
    monkeypatch.setenv("PODWIRE_WATERMARK_INTERVAL_MS", "500")
    monkeypatch.setenv("PODWIRE_LABELS", "app, tier")
    settings = parse(["--cluster", "flag", "--manifests", "m.json"])
    assert (settings.cluster, settings.watermark_interval_ms) == ("flag", 500)
    assert (settings.labels, settings.manifests, settings.http_port) == (("app", "tier"), Path("m.json"), 0)
    assert settings.status_lag_us == 10_000_000


def test_empty_manifests_variable_means_the_api(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compose file may pass the variable on although it is empty."""
    monkeypatch.setenv("PODWIRE_MANIFESTS", "")
    assert parse(["--cluster", "c"]).manifests is None


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "cluster"),
        (["--cluster", ""], "cluster"),
        (["--cluster", "c", "--http-port", "70000"], "http_port"),
        (["--cluster", "c", "--watermark-interval-ms", "soon"], "watermark_interval_ms"),
        (["--cluster", "c", "--history-retention-hours", "0"], "history_retention_hours"),
    ],
    ids=["missing", "empty", "range", "type", "zero"],
)
def test_wrong_setting_is_named(arguments: list[str], named: str) -> None:
    """The error names the setting and what to do."""
    with pytest.raises(SettingsError, match=named) as caught:
        parse(arguments)
    assert "Operator action" in str(caught.value)


def test_every_setting_says_what_it_is() -> None:
    """The reference in the documents is made from these."""
    assert all(field.description for field in Settings.model_fields.values())
