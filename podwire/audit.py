"""`podwire audit`: proves from `podwire.completeness.v1` that nothing is missing between two times, or says what is.

Pure but for `run`: what is found is a function of the records. Says complete only where, for every node, COMPLETE
intervals join end to end from before the first time to after the second, uncertainties of clocks included.
"""

from __future__ import annotations

import json
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from podwire.observe import since
from schemas import catalog, registry

if TYPE_CHECKING:
    from collections.abc import Iterable

Record = dict[str, Any]

EXIT_COMPLETE, EXIT_MISSING, EXIT_UNKNOWN, EXIT_KAFKA = 0, 10, 11, 12
EXIT_CODES = {
    EXIT_COMPLETE: "Complete: every event of every node between the two times is delivered.",
    EXIT_MISSING: "Something is missing, or must be taken for missing; the answer names it.",
    EXIT_UNKNOWN: "Nothing is known to be missing, but not everything is proven: pending, silent or not reported.",
    EXIT_KAFKA: "Kafka, the topic or the registry can't be read.",
}
MARGIN_MS = 600_000
"""How far around the two times records are looked at: nodes' clocks may be ahead of the broker's."""
DECIDED_WITHIN_MS = 86_400_000
"""How long after the second time the topic is read: a node may be cut off for hours, and is followed for hours."""
FINDINGS_SHOWN = 8


@dataclass(frozen=True)
class Finding:
    """Why the answer is not "complete".

    Attributes:
        node: the node; None when no node is known.
        missing: True when events are missing, False when it is not known.
        reason: as in the record, or NOT_REPORTED for times that no record speaks of.
        events: how many are missing; None when unknown.
        from_unix_us, to_unix_us: when, on the node's clock.
    """

    node: str | None
    missing: bool
    reason: str
    events: int | None
    from_unix_us: int
    to_unix_us: int


@dataclass(frozen=True)
class Answer:
    """What the records prove.

    Attributes:
        nodes: how many nodes it speaks of.
        events: events delivered in the intervals that touch the time asked for.
    """

    from_unix_us: int
    to_unix_us: int
    nodes: int
    events: int
    findings: tuple[Finding, ...]

    @property
    def exit_code(self) -> int:
        """Exit status that says the same."""
        if any(finding.missing for finding in self.findings):
            return EXIT_MISSING
        return EXIT_UNKNOWN if self.findings else EXIT_COMPLETE


def judge(
    records: Iterable[Record],
    from_us: int,
    to_us: int,
    wanted: tuple[str, ...] = (),
    cluster: str | None = None,
) -> Answer:
    """Return what the records, in the topic's order, prove of the time between two Unix times in us.

    `wanted` nodes must be among them; without any, all nodes count that some record of that time speaks of. Without a
    cluster those of all clusters do. Memory goes by the time asked for.
    """
    intervals: dict[tuple[str, str], dict[tuple[Any, ...], Record]] = defaultdict(dict)
    silent: dict[tuple[str, str], Record] = {}
    for record in records:
        who = (record["cluster"], record["node"])
        if (wanted and record["node"] not in wanted) or cluster not in {None, record["cluster"]}:
            continue
        if record["outcome"] == "SILENT":
            if record["from_unix_us"] < to_us and record["to_unix_us"] > from_us:
                silent[who] = record
        elif _is_near(record, from_us, to_us):
            key = (record["producer_epoch"], record["boot_id"], record["report_sequence"])
            known = intervals[who].get(key)
            if known is None or known["outcome"] != "COMPLETE":
                intervals[who][key] = record
    findings: list[Finding] = []
    events = 0
    spoken_of = set()
    for who in sorted({*intervals, *silent}):
        chain = _chain(list(intervals[who].values()), from_us, to_us)
        mute = silent.get(who)
        if chain or mute is not None:
            spoken_of.add(who)
            events += sum(record["events"] or 0 for record in chain)
            findings += _findings(who[1], chain, mute, from_us, to_us)
    unheard = sorted(set(wanted) - {node for _, node in spoken_of})
    nodes = len(spoken_of) + len(unheard)
    for node in unheard if nodes else (None,):
        findings.append(Finding(node, False, "NOT_REPORTED", None, from_us, to_us))
    return Answer(from_us, to_us, nodes, events, tuple(findings))


def _is_near(record: Record, from_us: int, to_us: int) -> bool:
    """Return whether a record may speak of the time, or join one that does."""
    margin_us = MARGIN_MS * 1000
    return _earliest(record) - margin_us <= to_us and _latest(record) + margin_us >= from_us


def _chain(records: list[Record], from_us: int, to_us: int) -> list[Record]:
    """Return a node's records that may speak of the time, in order, and the neighbours that reach its ends."""
    records.sort(key=_place)
    touching = [
        number
        for number, record in enumerate(records)
        if _earliest(record) <= to_us and _latest(record) >= from_us
    ]
    if not touching:
        return []
    first, last = touching[0], touching[-1]
    while first > 0 and not _begins_before(records[first], from_us):
        first -= 1
    while last + 1 < len(records) and not _ends_after(records[last], to_us):
        last += 1
    return records[first : last + 1]


def _place(record: Record) -> tuple[int, int]:
    sequence = record["report_sequence"]
    return record["producer_epoch"], -1 if sequence is None else sequence


def _earliest(record: Record) -> int:
    return int(min(record["from_unix_us"], record["to_unix_us"]) - record["uncertainty_us"])


def _latest(record: Record) -> int:
    ends_us = (record["from_unix_us"], record["to_unix_us"], record["losses_until_unix_us"] or 0)
    return int(max(ends_us) + record["uncertainty_us"])


def _begins_before(record: Record, from_us: int) -> bool:
    return bool(record["from_unix_us"] + record["uncertainty_us"] <= from_us)


def _ends_after(record: Record, to_us: int) -> bool:
    return bool(record["to_unix_us"] - record["uncertainty_us"] >= to_us)


def _findings(
    node: str, chain: list[Record], mute: Record | None, from_us: int, to_us: int
) -> Iterable[Finding]:
    """Yield what keeps a node's chain from proving that it is complete."""
    unknown = "NOT_REPORTED" if mute is None else "SILENT"
    if not chain:
        start = from_us if mute is None else max(from_us, mute["from_unix_us"])
        yield Finding(node, False, unknown, None, start, to_us)
        return
    if not _begins_before(chain[0], from_us):
        yield Finding(node, False, "NOT_REPORTED", None, from_us, chain[0]["from_unix_us"])
    found: list[Finding] = []
    for before, record in zip([None, *chain], chain, strict=False):
        if before is not None and before["to_unix_us"] != record["from_unix_us"]:
            found.append(
                Finding(node, False, "NOT_REPORTED", None, before["to_unix_us"], record["from_unix_us"])
            )
        if record["outcome"] != "COMPLETE":
            one = Finding(
                node,
                record["outcome"] == "GAP",
                record["reason"],
                record["missing"],
                record["from_unix_us"],
                record["to_unix_us"],
            )
            found.append(one)
    yield from _merged(found)
    if not _ends_after(chain[-1], to_us):
        yield Finding(node, False, unknown, None, chain[-1]["to_unix_us"], to_us)


def _merged(findings: list[Finding]) -> list[Finding]:
    """Return the findings with those made one that join and have the same reason."""
    merged: list[Finding] = []
    for one in findings:
        last = merged[-1] if merged else None
        if last is None or (last.missing, last.reason, last.to_unix_us) != (
            one.missing,
            one.reason,
            one.from_unix_us,
        ):
            merged.append(one)
            continue
        events = None if last.events is None or one.events is None else last.events + one.events
        merged[-1] = Finding(one.node, one.missing, one.reason, events, last.from_unix_us, one.to_unix_us)
    return merged


def in_words(answer: Answer) -> str:
    """Return the answer in one line."""
    span = f"{_iso(answer.from_unix_us)} to {_iso(answer.to_unix_us)}"
    if not answer.findings:
        nodes = "1 node" if answer.nodes == 1 else f"{answer.nodes} nodes"
        return f"complete: {nodes}, {span}, {answer.events:,} events"
    head = "NOT complete" if answer.exit_code == EXIT_MISSING else "NOT proven"
    ordered = sorted(answer.findings, key=lambda finding: not finding.missing)
    said = [_finding_in_words(finding) for finding in ordered[:FINDINGS_SHOWN]]
    if len(ordered) > FINDINGS_SHOWN:
        said.append(f"and {len(ordered) - FINDINGS_SHOWN} more (-o json has all)")
    return f"{head}: {span}: {'; '.join(said)}"


def _finding_in_words(finding: Finding) -> str:
    node = finding.node or "no node"
    if finding.reason == "SILENT":
        return f"{node} silent since {_iso(finding.from_unix_us)}"
    span = f"{_iso(finding.from_unix_us)}-{_iso(finding.to_unix_us)}"
    if not finding.missing:
        return f"{node} unknown {span} {finding.reason}"
    count = "an unknown number of" if finding.events is None else f"{finding.events:,}"
    return f"{node} gap {span} {finding.reason} {count} events"


def _iso(unix_us: int) -> str:
    return datetime.fromtimestamp(unix_us / 1e6, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def as_json(answer: Answer) -> str:
    """Return the answer as one line of JSON."""
    return json.dumps({"complete": not answer.findings} | asdict(answer), separators=(",", ":"))


def run(
    *,
    bootstrap: str,
    registry_url: str | None,
    from_text: str,
    to_text: str,
    nodes: tuple[str, ...],
    cluster: str | None,
    output: str,
) -> int:
    """Read the topic, print the answer, return the exit status; ValueError for times that make no sense."""
    from confluent_kafka import KafkaException  # noqa: PLC0415

    now_ms = int(time.time() * 1000)
    from_ms, to_ms = since(from_text, now_ms, "--from"), since(to_text, now_ms, "--to")
    if from_ms >= to_ms:
        raise ValueError("--from must be before --to")
    ids = registry.connect(registry_url or "")
    try:
        answer, unreadable = ask(bootstrap, ids, from_ms, to_ms, nodes, cluster)
    except KafkaException as error:
        sys.stderr.write(f"podwire audit: {error.args[0].str()}. Is Kafka at {bootstrap}, with its topics?\n")
        return EXIT_KAFKA
    except registry.RegistryAwayError as error:
        sys.stderr.write(f"podwire audit: {error} does not answer.\n")
        return EXIT_KAFKA
    print(as_json(answer) if output == "json" else in_words(answer))
    if unreadable:
        sys.stderr.write(f"podwire audit: {unreadable} records could not be decoded.\n")
        return answer.exit_code or EXIT_UNKNOWN
    return answer.exit_code


def ask(
    bootstrap: str,
    ids: registry.SchemaIds,
    from_ms: int,
    to_ms: int,
    nodes: tuple[str, ...] = (),
    cluster: str | None = None,
) -> tuple[Answer, int]:
    """Return the answer and how many records could not be decoded; KafkaException when the topic can't be read."""
    from podwire.flows import FlowReader  # noqa: PLC0415

    reader = FlowReader(bootstrap, ids, catalog.COMPLETENESS.name, catalog.COMPLETENESS.schema)
    try:
        start = reader.offsets_at(max(0, from_ms - MARGIN_MS))
        end = reader.offsets_at(to_ms + DECIDED_WITHIN_MS)
        answer = judge(reader.span(start, end), from_ms * 1000, to_ms * 1000, nodes, cluster)
        return answer, reader.unreadable
    finally:
        reader.close()
