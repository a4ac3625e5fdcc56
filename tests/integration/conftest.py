"""What the enricher's tests share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.integration.test_enricher_worker import Bench

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.conftest import RunningBroker


@pytest.fixture
def bench(broker: RunningBroker, tmp_path: Path) -> Iterator[Bench]:
    """Topics and a group of the test's own."""
    one = Bench(broker.bootstrap, tmp_path)
    yield one
    one.close()
