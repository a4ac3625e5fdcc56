"""What is loaded for a tier and a set of options, and under which names it is pinned.

Owns no state: options in, plan out, but for what it asks /proc and the filters' paths. Never loads. Called by
probes.py.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from collector.node import tiers
from collector.node.abi import ABI_VERSION
from collector.node.cgroup_paths import choose_hierarchy
from collector.node.core import LoadPlan
from collector.node.existing import sees_all_processes

if TYPE_CHECKING:
    from collector.node.probes import ProbeOptions

NOTE_SELF = "note_self"
SWEEP, FIND_EXISTING, RECEIVE = "sweep", "find_existing", "receive"
UNATTACHED_PROGRAMS = (SWEEP, NOTE_SELF)
"""Loaded to be run, or attached by others."""
PINNED_MAPS = ("events", "names", "counters", "sockets", "named_cgroups", "dials")
SOCKET_COOKIE_SINCE = (5, 12)


def plan_of(options: ProbeOptions, environment: tiers.Environment, tier: tiers.Tier) -> LoadPlan:
    """Return what the tier loads with these options."""
    controller, hierarchy = choose_hierarchy(Path("/proc/self/cgroup").read_text(encoding="utf-8"))
    filters = options.filters.map_contents()
    walks_files = options.existing and sees_all_processes()
    programs = (*tiers.programs(tier.name, environment), SWEEP)
    if options.filter_own:
        programs += (NOTE_SELF,)
    if options.existing and not walks_files:
        programs += (RECEIVE,)
    return LoadPlan(
        object_path=options.object_path,
        programs=programs,
        unattached=UNATTACHED_PROGRAMS,
        iterators=(FIND_EXISTING,) if walks_files else (),
        map_entries={
            "events": options.ring_bytes,
            "names": options.names_ring_bytes,
            "sockets": options.sockets_max,
            "named_cgroups": options.cgroups_max,
            "dials": options.connects_max,
            **{name: len(entries) for name, entries in filters.items()},
        },
        options={
            "cgroup_controller": controller,
            "cgroup_hierarchy": hierarchy,
            "accept_edge": tier.name != "tp_btf",
            "connect_edge": tiers.connect_edge(tier.name),
            "filter_loopback": options.filter_loopback,
            "filter_own": options.filter_own,
            **options.filters.modes(),
            "socket_cookie_helper": environment.release >= SOCKET_COOKIE_SINCE,
            "progress_interval_ms": round(1000 * options.progress_interval_s),
        },
        map_contents=filters,
    )


def kept_names(plan: LoadPlan) -> list[str]:
    """Return what a collector holds open, as it is named in the pin folder: maps, programs, links to iterators."""
    programs = [f"program_{program}" for program in plan.programs]
    return [*PINNED_MAPS, *programs, *(f"link_{iterator}" for iterator in plan.iterators)]


def pinned_names(plan: LoadPlan) -> set[str]:
    """Return what must be pinned for a collector to take the probes over."""
    links = {f"link_{program}" for program in plan.attached()}
    return {*kept_names(plan), *links}


def identity_of(plan: LoadPlan) -> str:
    """Return what must be equal for a collector to take over probes: ABI, object and everything set in it."""
    digest = hashlib.blake2b(digest_size=12)
    digest.update(plan.object_path.read_bytes() if plan.object_path.is_file() else b"")
    settings = asdict(replace(plan, object_path=Path())) | {"object_path": "", "abi": ABI_VERSION}
    digest.update(json.dumps(settings, sort_keys=True, default=bytes.hex).encode())
    return digest.hexdigest()
