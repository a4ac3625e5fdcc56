"""The offset between boot clock and Unix time."""

from __future__ import annotations

from collector.node.clock import measure


def test_measure_takes_the_tightest_bracket() -> None:
    """A reading that was interrupted between its two boot times loses against a quick one."""
    boot = iter([0, 9_000_000, 10_000_000, 10_004_000, 20_000_000, 20_900_000])
    unix = iter([1_000_000_000, 1_010_002_000, 1_020_900_000])
    clock = measure(lambda: next(boot), lambda: next(unix), readings=3)
    assert clock.offset_us == 1_000_000
    assert clock.error_us == 3


def test_measure_bounds_the_error() -> None:
    """Wherever in the bracket Unix time was read, the true offset lies within the bound."""
    for late_ns in range(0, 50_001, 10_000):
        boot = iter([100_000, 150_000])
        clock = measure(lambda boot=boot: next(boot), lambda late=late_ns: 7_000_100_000 + late, readings=1)
        assert abs(clock.offset_us - 7_000_000) <= clock.error_us


def test_measure_reads_this_machine() -> None:
    """The real clocks give an offset between 2020 and 2100, with a bound."""
    clock = measure()
    assert 1_577_000_000_000_000 < clock.offset_us < 4_102_000_000_000_000
    assert clock.error_us >= 1
