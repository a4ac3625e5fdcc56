"""The node collector with bad memory: a bit of one batch in 20 flips after it was encoded and before Kafka has it.

`python -m tests.fault.flipping_collector`. What Kafka checks on the way is whole; only the batch's own checksum tells.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from collector.node import batches, run

if TYPE_CHECKING:
    from collector.node.clock import ClockOffset

ONE_OF = 20
PLACE = -10
"""In the last event, whose fields end 5 bytes before the message does."""


class FlippingBatcher(batches.Batcher):
    """Spoils batches."""

    _made = 0

    def _batch(self, partition: int, message: list[Any], clock: ClockOffset) -> batches.Batch:
        batch = super()._batch(partition, message, clock)
        self._made += 1
        if self._made % ONE_OF:
            return batch
        value = bytearray(batch.value)
        value[PLACE] ^= 1
        return replace(batch, value=bytes(value))


if __name__ == "__main__":
    run.Batcher = FlippingBatcher  # type: ignore[misc]
    sys.exit(run.run(sys.argv[1:]))
