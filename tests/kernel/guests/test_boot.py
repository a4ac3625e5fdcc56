"""A few scenarios on the oldest and the newest kernel of the matrix, each in a guest: what CI runs of them."""

from __future__ import annotations

import pytest

from tests.kernel.guests import cells, fetch, guest, image
from tests.kernel.guests.__main__ import PYTEST, scenario_command

TIERS = ("fentry", "kprobe", "tp_btf")
SCENARIOS = ("IPv4", "Fast Open", "accept", "never accepted", "refused", "no route")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("line", ["5.10", "7"])
def test_scenarios_go_as_the_table_says_on_another_kernel(line: str) -> None:
    """The same object, in the tiers that the running kernel may lack: the two best, and the least."""
    found: cells.Cells = {}
    try:
        result = guest.run(
            fetch.kernel(line),
            scenario_command(TIERS, SCENARIOS),
            timeout_seconds=500,
            on_line=lambda text: cells.note(found, text),
        )
    except (fetch.FetchError, image.ImageError) as error:
        pytest.skip(f"no guest with kernel {line}: {error}")
    assert cells.good(found, SCENARIOS, TIERS), (
        f"{cells.matrix({line: found}, SCENARIOS, {line: TIERS})}\n{result.output}"
    )


@pytest.mark.timeout(600)
def test_books_are_exact_where_the_kernel_gives_no_cookies() -> None:
    """On 5.10 no connection is counted as lost that was not, and each that was is swept and counted."""
    try:
        result = guest.run(
            fetch.kernel("5.10"),
            [*PYTEST, "tests/kernel/test_progress.py"],
            timeout_seconds=500,
        )
    except (fetch.FetchError, image.ImageError) as error:
        pytest.skip(f"no guest with kernel 5.10: {error}")
    assert result.exit_code == 0, result.output
