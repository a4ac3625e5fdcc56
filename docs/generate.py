"""Writes docs/reference.md: settings, exit codes, metrics, topics and fields, each from the code that owns it.

`python docs/generate.py` rewrites the file; a test compares it with what this would write. Never edit the file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from collector import errors as collector_errors
from collector.cluster.metrics import Metrics as WatcherMetrics
from collector.cluster.settings import Settings as ClusterSettings
from collector.node.abi import Counter
from collector.node.metrics import Metrics as NodeMetrics
from collector.node.metrics import Snapshot
from collector.node.report import Counts as NodeCounts
from collector.node.settings import Settings as NodeSettings
from enricher import errors as enricher_errors
from enricher import metrics as enricher_metrics
from enricher.settings import Settings as EnricherSettings
from podwire import audit
from podwire.demo import errors as demo_errors
from podwire.replay import errors as replay_errors
from schemas import catalog, codec

if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import ModuleType

    from pydantic_settings import BaseSettings

REFERENCE = Path(__file__).with_name("reference.md")
KERNEL_COUNTERS = (*(one.name.lower() for one in Counter if one is not Counter.COUNTERS), "skipped_runs")


def table(heads: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """Return a Markdown table."""
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    lines += [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows]
    return "\n".join(lines)


def settings(kind: type[BaseSettings]) -> str:
    """Return the table of a service's settings."""
    rows = []
    for name, field in kind.model_fields.items():
        default = "required" if field.is_required() else str(field.get_default(call_default_factory=True))
        default = {"None": "", "()": "", "{}": ""}.get(default, default)
        rows.append(
            (f"`PODWIRE_{name.upper()}`", f"`{default}`" if default else "empty", str(field.description))
        )
    return table(("variable", "default", "meaning"), rows)


def exit_codes(module: ModuleType) -> str:
    """Return the table of a module's fatal errors."""
    found = {
        (value.exit_code, (value.__doc__ or "").splitlines()[0])
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Exception) and getattr(value, "exit_code", 1) != 1
    }
    if module is demo_errors:
        found |= {
            (demo_errors.EXIT_NOT_SHOWN, "The Service's flows did not come out two-sided and resolved.")
        }
        found |= {(demo_errors.EXIT_INTERRUPTED, "Interrupted before everything ran.")}
    if module is replay_errors:
        found |= {(replay_errors.EXIT_INTERRUPTED, "Interrupted; what was written is incomplete.")}
        found |= {(status, "A process of the enricher ended so; see there.") for status in (20, 22, 31)}
    return table(("status", "cause"), ((str(code), text) for code, text in sorted(found)))


def metrics(families: Iterable[Any]) -> str:
    """Return the table of Prometheus metric families."""
    rows = []
    for family in families:
        suffix = {"counter": "_total", "info": "_info"}.get(family.type, "")
        rows.append((f"`{family.name}{suffix}`", family.type, family.documentation))
    return table(("metric", "type", "meaning"), sorted(rows))


def node_metrics() -> Iterable[Any]:
    """Yield the node collector's families."""
    counts = NodeCounts(dict.fromkeys(KERNEL_COUNTERS, 0), 0, 0, 0, {})
    shown = NodeMetrics("", "")
    shown.update(Snapshot(counts, 0, 0, 0, 0, 0, 0, 0.0, 0))
    yield from shown.registry.collect()


def enricher_families() -> Iterable[Any]:
    """Yield the enricher's families."""
    gauges: dict[str, float | None] = dict.fromkeys(enricher_metrics.GAUGES, 0.0)
    yield from enricher_metrics.Exporter(enricher_metrics.Counts(), lambda: gauges).collect()


def type_name(avro: Any) -> str:
    """Return an Avro type in words."""
    match avro:
        case str():
            return avro.removeprefix("podwire.v1.")
        case ["null", other]:
            return f"{type_name(other)}, nullable"
        case {"type": "array", "items": items}:
            return f"array of {type_name(items)}"
        case {"type": "map", "values": values}:
            return f"map of {type_name(values)}"
        case {"logicalType": logical}:
            return str(logical)
        case {"type": "fixed", "size": size}:
            return f"fixed({size})"
        case {"type": "enum", "symbols": symbols}:
            return "enum " + ", ".join(symbols)
    return str(avro["name"])


def fields(record: dict[str, Any]) -> str:
    """Return the tables of a record and of the records inside it."""
    parts = [record["doc"], "", table(("field", "type", "meaning"), [
        (f"`{field['name']}`", type_name(field["type"]), field["doc"]) for field in record["fields"]
    ])]  # fmt: skip
    for field in record["fields"]:
        inner = field["type"]
        if isinstance(inner, dict) and isinstance(inner.get("items"), dict):
            parts += ["", f"**{inner['items']['name']}**: " + fields(inner["items"])]
    return "\n".join(parts)


def topic(one: catalog.Topic) -> str:
    """Return a topic's chapter."""
    config = ", ".join(f"`{name}={value}`" for name, value in one.config().items())
    partitions = (
        one.partitions or f"as created, default {catalog.PARTITIONS_DEFAULT}, fixed for the topic's life"
    )
    return "\n".join(
        (
            f"### {one.name}",
            f"Record {one.schema}, schema id {one.schema_id} without a registry. Key: {one.key}. "
            f"Partitions: {partitions}. {config}.",
            "",
            fields(json.loads(codec.text(one.schema))),
            "",
        )
    )


def reference() -> str:
    """Return the whole page."""
    parts = [
        "# Reference",
        "Generated by `docs/generate.py` from the code. All values are Avro in Confluent's wire format: one zero byte, a",
        "4-byte big-endian schema id, Avro binary.",
        "",
        "## Settings",
        "Each is also a flag: `PODWIRE_KEY_FILE` is `--key-file`. A flag wins over the environment.",
        "",
        "### collector node",
        settings(NodeSettings),
        "",
        "### collector cluster",
        settings(ClusterSettings),
        "",
        "### enricher",
        settings(EnricherSettings),
        "",
        "## Exit codes",
        "0 is an orderly end, 2 a wrong command line, 1 a defect of Podwire. A service's 10 to 22 are what no restart mends.",
        "",
    ]
    for name, module in (
        ("collector", collector_errors),
        ("enricher", enricher_errors),
        ("podwire demo", demo_errors),
        ("podwire replay", replay_errors),
    ):
        parts += [f"### {name}", exit_codes(module), ""]
    parts += [
        "### podwire audit",
        table(("status", "cause"), ((str(code), text) for code, text in audit.EXIT_CODES.items())),
        "",
        "## Metrics",
        "",
    ]
    for name, families in (
        ("collector node", node_metrics()),
        ("collector cluster", WatcherMetrics().registry.collect()),
        ("enricher", enricher_families()),
    ):
        parts += [f"### {name}", metrics(families), ""]
    parts += ["## Topics", ""]
    parts += [topic(one) for one in catalog.TOPICS]
    return "\n".join(parts)


if __name__ == "__main__":
    REFERENCE.write_text(reference(), encoding="utf-8")
