"""`podwire doctor`: whether Podwire can run on this machine, what is in the way, and what to do about it.

Asks the node collector, as a process of its own, and shows its answer. Never looks at the kernel itself. Called by
`podwire.cli`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import groupby
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

COLLECTOR = ("-m", "collector", "node", "--doctor")


def run(output: str, options: Sequence[str]) -> int:
    """Show the report as `text` or `json`; `options` go to the collector. Return the collector's exit status.

    0 says that a collector with these settings would start; else it is the status that it would end with.
    """
    asked = subprocess.run(
        [sys.executable, *COLLECTOR, *options], stdout=subprocess.PIPE, text=True, check=False
    )
    try:
        report = json.loads(asked.stdout)
    except ValueError:  # wrong options, or a defect: it has said so on stderr
        sys.stdout.write(asked.stdout)
        return asked.returncode or 1
    sys.stdout.write(asked.stdout if output == "json" else text(report))
    return asked.returncode


def text(report: dict[str, Any]) -> str:
    """Return the report for a reader: what was found, the tiers, then what to do."""
    checks, tiers = report["checks"], report["tiers"]
    width = max(len(row["name"]) for row in (*checks, *tiers))
    lines = ["This node"]
    lines += [f"  {check['status']:4}  {check['name']:{width}}  {check['found']}" for check in checks]
    lines += ["", "Probe tiers, best first"]
    for (status, reason), group in groupby(tiers, key=lambda tier: (tier["status"], tier["reason"])):
        names = ", ".join(tier["name"] for tier in group)
        lines.append(f"        {names:{width}}  {status}{f': {reason}' if reason else ''}")
    remedies = [check for check in checks if check["remedy"]]
    if remedies:
        lines += ["", "To do"]
        lines += [f"  {check['status']:4}  {check['name']:{width}}  {check['remedy']}" for check in remedies]
    status = report["exit_code"]
    verdict = f"a collector would start, in tier {report['tier']}"
    lines += ["", f"Result: {verdict if status == 0 else f'no collector would start (exit code {status})'}"]
    return "\n".join(lines) + "\n"
