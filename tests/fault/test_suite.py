"""The fault suite in its short form: faults that need worlds of their own, and the canary.

Each is held to what `make fault` asks: the books balance, the audit agrees, no pod is wrong. Outages of one process
that comes back are in test_outages.
"""

from __future__ import annotations

import pytest

from podwire.audit import EXIT_COMPLETE
from tests.fault.__main__ import play_all
from tests.fault.faults import CANARY, FAULTS
from tests.fault.verdicts import table
from tests.pipeline import need_root_and_btf


@pytest.mark.parametrize("name", ["poison batches", "ring full", "clock stepped by -5 s", "registry away"])
def test_books_balance_and_the_audit_agrees(name: str) -> None:
    """What was connected is in a flow, or counted as lost where the fault is one that loses."""
    need_root_and_btf()
    (row,) = play_all([(name, FAULTS[name])], short=True)
    assert row.good, table([row])


def test_half_that_is_dropped_uncounted_is_caught() -> None:
    """A suite that called this collector good could not be believed, nor could an audit."""
    need_root_and_btf()
    (row,) = play_all([("canary", CANARY)], short=True)
    assert row.unaccounted > 0, table([row])
    assert not row.good
    assert row.audit != EXIT_COMPLETE, table([row])
