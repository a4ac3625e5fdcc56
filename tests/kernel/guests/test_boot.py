"""A few scenarios on the oldest and the newest kernel of the matrix, each in a guest: what CI runs of them."""

from __future__ import annotations

import pytest

from tests.kernel.guests import cells, fetch, guest, image
from tests.kernel.guests.__main__ import scenario_command

TIERS = ("fentry", "kprobe", "tp_btf")
SCENARIOS = ("IPv4", "Fast Open", "accept", "never accepted", "refused", "no route")


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("line", "tests"),
    [
        # It gives no cookies: no connection is counted as lost that was not, and each that was is swept and counted.
        ("5.10", ["tests/kernel/test_progress.py"]),
        ("7", []),
    ],
)
def test_scenarios_go_as_the_table_says_on_another_kernel(line: str, tests: list[str]) -> None:
    """The same object, in the tiers that the running kernel may lack, and in the least, in one boot."""
    found: cells.Cells = {}
    try:
        result = guest.run(
            fetch.kernel(line),
            scenario_command(TIERS, SCENARIOS, tests),
            timeout_seconds=500,
            on_line=lambda text: cells.note(found, text),
        )
    except (fetch.FetchError, image.ImageError) as error:
        # A contributor's machine may lack QEMU or a Debian mirror; CI fails on this skip.
        pytest.skip(f"no guest with kernel {line}: {error}")
    shown = f"{cells.matrix({line: found}, SCENARIOS, {line: TIERS})}\n{result.output}"
    assert cells.good(found, SCENARIOS, TIERS), shown
    assert result.exit_code == 0, shown
