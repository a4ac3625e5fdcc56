"""`python -m tests.fault`: the long form of the fault suite, and its table. The command behind `make fault`.

Progress goes to standard error, the table to standard output. Exit status: 0 when nothing is missing unsaid, no pod is
wrong and the canary was caught; 1 otherwise.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from podwire.audit import EXIT_COMPLETE
from tests.fault import reuse
from tests.fault.faults import CANARY, FAULTS, Fault
from tests.fault.rounds import World, play
from tests.fault.verdicts import table

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tests.fault.verdicts import Row


REUSE = "addresses reused"
REUSE_PODS_AND_SECONDS = ((10_000, 60.0), (1_500, 12.0))


def main(arguments: Sequence[str]) -> int:
    """Play the faults, print the table and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.fault", description=__doc__)
    parser.add_argument(
        "--faults", default=";".join([*FAULTS, REUSE]), help="which of them, semicolon between"
    )
    parser.add_argument("--short", action="store_true", help="as short as in `make test`")
    parser.add_argument("--no-canary", action="store_true", help="leave out the one that must be caught")
    parser.add_argument(
        "--seed",
        type=int,
        default=random.randrange(1 << 32),
        help="what chance decides; the last line says which it was",
    )
    options = parser.parse_args(arguments)
    names = options.faults.split(";")
    wanted = [(name, FAULTS[name]) for name in names if name != REUSE]
    if not options.no_canary:
        wanted.append(("canary: halves dropped", CANARY))
    rows = list(play_all(wanted, short=options.short, seed=options.seed))
    if REUSE in names:
        _say(f"{REUSE} ...")
        with tempfile.TemporaryDirectory(prefix="podwire-fault-") as folder:
            rows.append(reuse.play(Path(folder), *REUSE_PODS_AND_SECONDS[options.short], options.seed))
    sys.stdout.write(table(rows))
    canary = [row for row in rows if row.fault.startswith("canary")]
    bad = [row.fault for row in rows if row not in canary and not row.good]
    if canary and canary[0].good:
        bad.append("the canary was not caught")
    if canary and canary[0].audit == EXIT_COMPLETE:
        bad.append("the audit called the canary complete")
    sys.stdout.write(f"{'NOT good: ' + '; '.join(bad) if bad else 'all good'} (--seed {options.seed})\n")
    return int(bool(bad))


def play_all(wanted: Sequence[tuple[str, Fault]], *, short: bool, seed: int) -> Iterator[Row]:
    """Play each fault in its world; worlds are made anew where the next fault needs another one.

    What chance decides in a round goes by `seed` and the fault's name alone.
    """
    with tempfile.TemporaryDirectory(prefix="podwire-fault-") as parent:
        world: World | None = None
        try:
            for number, (name, fault) in enumerate(wanted, 1):
                if world is None or world.setting != fault.setting:
                    if world is not None:
                        world.close()
                    _say(f"[{number}/{len(wanted)}] a world: {fault.setting.name}")
                    folder = Path(parent, str(number))
                    folder.mkdir()
                    world = World(fault.setting, folder)
                    world.open()
                _say(f"[{number}/{len(wanted)}] {name} ...")
                seconds = fault.seconds[short]
                world.dice = random.Random(f"{seed} {name}")
                begun = time.monotonic()
                row = play(
                    world,
                    name,
                    lambda w, t, f=fault, s=seconds: f.cause(w, t, s),
                    loses=fault.loses,
                    settle_seconds_max=fault.settle_seconds_max,
                )
                verdict = "good" if row.good else f"NOT good: {row}"
                _say(f"[{number}/{len(wanted)}] {name}: {verdict}, {time.monotonic() - begun:.0f} s")
                yield row
        finally:
            if world is not None:
                world.close()


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
