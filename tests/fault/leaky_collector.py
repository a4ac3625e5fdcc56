"""The node collector with a hole: it drops one event in 20 before it is encoded, and counts it nowhere.

`python -m tests.fault.leaky_collector`, for the canary: a suite that calls this one's run good can't be believed.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from collector.node import batches, run

if TYPE_CHECKING:
    from collector.node.clock import ClockOffset
    from collector.node.columns import Events, Owners

KEPT_OF = 20


class LeakyBatcher(batches.Batcher):
    """Loses events on purpose."""

    _seen = 0

    def _encode(self, events: Events, owners: Owners, clock: ClockOffset, stretches: list[Any]) -> None:
        places = range(self._seen, self._seen + len(events))
        self._seen += len(events)
        kept = [place % KEPT_OF != 0 for place in places]
        some = batches.Owners(*(column[kept] for column in owners))
        super()._encode(events[kept], some, clock, stretches)


if __name__ == "__main__":
    run.Batcher = LeakyBatcher  # type: ignore[misc]
    sys.exit(run.run(sys.argv[1:]))
