"""The fault suite in its short form: faults that need worlds of their own, and the canary.

Each is held to what `make fault` asks: the books balance, the audit agrees, no pod is wrong. Outages of one process
that comes back are in test_outages.
"""

from __future__ import annotations

import random

import pytest

from podwire.audit import EXIT_COMPLETE
from tests.fault.__main__ import play_all
from tests.fault.faults import CANARY, FAULTS
from tests.fault.verdicts import Row, table
from tests.pipeline import need_root_and_btf

SEED = random.randrange(1 << 32)


def played(name: str) -> tuple[Row, str]:
    """Return the verdict on a fault, or on the canary, and what to show of it; the seed plays it again by hand."""
    need_root_and_btf()
    (row,) = play_all([(name, FAULTS.get(name, CANARY))], short=True, seed=SEED)
    return row, f"python -m tests.fault --short --seed {SEED}\n{table([row])}"


@pytest.mark.parametrize(
    "name",
    [
        "poison batches",
        "queue full",
        "ring full",
        "collector killed with a spool",
        "collector killed, no pins",
        "clock stepped by -5 s",
        "registry away",
    ],
)
def test_books_balance_and_the_audit_agrees(name: str) -> None:
    """What was connected is in a flow, or accounted for where the fault is one that loses."""
    row, said = played(name)
    assert row.good, said


def test_half_that_is_dropped_uncounted_is_caught() -> None:
    """A suite that called this collector good could not be believed, nor could an audit."""
    row, said = played("canary")
    assert row.unaccounted > 0, said
    assert not row.good
    assert row.audit != EXIT_COMPLETE, said
