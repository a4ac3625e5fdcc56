"""Settings, metrics, log repeats and Avro primitives of the enricher."""

from __future__ import annotations

import io
import logging

import fastavro
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest

from enricher import avro
from enricher.__main__ import Repeats
from enricher.errors import SettingsError
from enricher.metrics import COUNTERS, GAUGES, LABELLED, Counts, Exporter
from enricher.settings import Settings, parse


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"PODWIRE_{name.upper()}", raising=False)


def test_flag_beats_environment_beats_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flag wins over the environment, which wins over the default."""
    monkeypatch.setenv("PODWIRE_CLUSTER", "from-environment")
    monkeypatch.setenv("PODWIRE_WINDOW_MS", "7000")
    found = parse(["--cluster", "from-flag"])
    assert (found.cluster, found.window_ms, found.idle_slack_ms) == ("from-flag", 7000, 500)
    assert found.group_id == "podwire-enricher-from-flag"


def test_networks_are_read_from_json_and_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    """Named ranges come as JSON, cluster ranges separated by commas."""
    monkeypatch.setenv("PODWIRE_CIDR_NAMES", '{"office": ["203.0.113.0/24"]}')
    found = parse(["--cluster", "c", "--cluster-cidrs", "10.0.0.0/8, fd00::/8"])
    assert found.cidr_names == {"office": ("203.0.113.0/24",)}
    assert found.cluster_cidrs == ("10.0.0.0/8", "fd00::/8")


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ([], "cluster"),
        (["--cluster", "c", "--window-ms", "1"], "window_ms"),
        (["--cluster", "c", "--cidr-names", "{"], "cidr_names"),
        (["--cluster", "c", "--cidr-names", '{"x": ["300.0.0.0/8"]}'], "cidr_names"),
        (["--cluster", "c", "--cluster-cidrs", "ten"], "cluster_cidrs"),
    ],
)
def test_wrong_setting_is_named(arguments: list[str], field: str) -> None:
    """The error names the field that is wrong, and has an exit code of its own."""
    with pytest.raises(SettingsError, match=field) as caught:
        parse(arguments)
    assert caught.value.exit_code == 20


def test_every_setting_has_words() -> None:
    """A setting without a description can't be documented."""
    assert all(field.description for field in Settings.model_fields.values())


def test_exporter_tells_every_metric_of_the_tables() -> None:
    """Each counter, labelled counter and present gauge appears under its name."""
    counts = Counts(batches=3)
    counts.dead_letters["UNDECODABLE"] += 2
    counts.resolutions["SOCKET"] += 1
    registry = CollectorRegistry()
    registry.register(Exporter(counts, lambda: dict.fromkeys(GAUGES, 1.0) | {"metadata_age_seconds": None}))
    text = generate_latest(registry).decode()
    assert "podwire_enricher_raw_batches_total 3.0" in text
    assert 'podwire_enricher_dead_letters_total{reason="UNDECODABLE"} 2.0' in text
    missing = [
        name
        for name in (*COUNTERS, *LABELLED, *GAUGES)
        if f"podwire_enricher_{name}" not in text and name != "metadata_age_seconds"
    ]
    assert missing == []
    assert "metadata_age_seconds" not in text


def test_library_message_comes_through_once_per_interval() -> None:
    """The same message of a library is dropped for a while, another one is not."""
    repeats = Repeats(30)

    def record(text: str, created: float) -> logging.LogRecord:
        made = logging.LogRecord("aiokafka", logging.ERROR, "", 0, text, (created,), None)
        made.created = created
        return made

    assert repeats.filter(record("Unable to connect %s", 0))
    assert not repeats.filter(record("Unable to connect %s", 29))
    assert repeats.filter(record("Something else %s", 29))
    assert repeats.filter(record("Unable to connect %s", 30))


@given(st.integers(-(2**63), 2**63 - 1))
def test_long_is_what_fastavro_writes_and_reads_back(value: int) -> None:
    """Every 64-bit number has fastavro's encoding and comes back."""
    out = io.BytesIO()
    fastavro.schemaless_writer(out, "long", value)
    assert avro.long(value) == out.getvalue()
    assert avro.read_long(avro.long(value), 0) == (value, len(out.getvalue()))


@given(st.integers(2**48, 2**55 - 1) | st.integers(-(2**55), -(2**48) - 1))
def test_eight_byte_long_reads_what_long_writes(value: int) -> None:
    """The loop-free reader agrees wherever a varint takes eight bytes."""
    encoded = avro.long(value)
    assert len(encoded) == 8
    assert avro.eight_byte_long(b"xx" + encoded, 2) == value


@pytest.mark.parametrize("broken", [b"\xff" * 11, b"\xff" * 9 + b"\x02", b"\x80" * 10 + b"\x00"], ids=len)
def test_varint_beyond_64_bits_is_an_error(broken: bytes) -> None:
    """A number that no long holds is refused instead of growing."""
    with pytest.raises(ValueError, match="64 bits"):
        avro.read_long(broken, 0)
