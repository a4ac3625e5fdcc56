"""The kernel half as one object: probes loaded or taken over, events to read, names known before them.

Owns the order of things: tier, load or reuse, attach, pin, read names before events, detach. Never encodes and
never publishes. Called by the node collector's run loop and by the kernel tests.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from collector.errors import CapabilityError, SettingsError
from collector.node import core, tiers
from collector.node.abi import ABI_VERSION, Counter
from collector.node.cgroup_paths import choose_hierarchy
from collector.node.cgroups import Cgroups, Journal
from collector.node.pins import PinFolder
from collector.node.ring import EventRing, NameRing

if TYPE_CHECKING:
    from collector.node.ring import Records

DEFAULT_OBJECT = Path(__file__).resolve().parents[2] / "build/bpf/podwire.bpf.o"
STATE_PROGRAMS = ("state_1", "state_2", "state_3", "state_4")  # copies; see transition in bpf/lifecycle.h
ACCEPT_PROGRAMS = ("accept_exit", "accept4_exit")
PINNED_MAPS = ("events", "names", "counters")
SOCKET_COOKIE_SINCE = (5, 12)
PREEMPTIBLE_SINCE = (6, 18)
KNOWN_PER_NAMED = 8
"""We remember so many times more cgroups than the kernel remembers having told."""
PAGE_BYTES = 4096
_log = structlog.get_logger()


@dataclass(frozen=True)
class ProbeOptions:
    """How to load the probes.

    Attributes:
        state_dir: folder for `cgroups.jsonl`.
        object_path: the compiled BPF object.
        ring_bytes: size of the events ring, a power of two; 176 bytes per event.
        names_ring_bytes: size of the cgroup names ring, a power of two; 920 bytes per cgroup.
        sockets_max: connections followed at once; 250 bytes of kernel memory each.
        cgroups_max: cgroups whose name the kernel remembers having told.
        filter_loopback: leave out connections with an end in 127/8, ::1 or ::ffff:127/8.
        pin_dir: folder on a bpffs that keeps the probes while no collector runs; None for no pinning.
        tier: "auto", "tracepoint" or "tp_btf".
    """

    state_dir: Path
    object_path: Path = DEFAULT_OBJECT
    ring_bytes: int = 1 << 24
    names_ring_bytes: int = 1 << 20
    sockets_max: int = 65_536
    cgroups_max: int = 16_384
    filter_loopback: bool = True
    pin_dir: Path | None = None
    tier: str = "auto"

    def __post_init__(self) -> None:
        """Refuse sizes that the kernel would refuse without a word."""
        for name in ("ring_bytes", "names_ring_bytes"):
            size = getattr(self, name)
            if size < PAGE_BYTES or size & (size - 1):
                raise SettingsError(f"{name} is {size}.", "set it to a power of two of at least 4096.")


class Probes:
    """Probes that are attached.

    Attributes:
        tier: which tier they are.
        refused: why something better is not used: tier name or "pinning" -> reason.
        reused: True when an earlier collector's pinned probes were taken over.
        events: the events ring; release its positions as events are delivered.
        cgroups: who owns what; complete for every event that `read` has returned.
    """

    def __init__(
        self,
        *,
        tier: tiers.Tier,
        descriptors: dict[str, int],
        options: ProbeOptions,
        cgroups: Cgroups,
        loaded: core.BpfObject | None,
        pins: PinFolder | None,
    ) -> None:
        self.tier = tier.name
        self.refused = dict(tier.refused)
        self.reused = loaded is None
        self.cgroups = cgroups
        self.events = EventRing(descriptors["events"], options.ring_bytes)
        self._names = NameRing(descriptors["names"], options.names_ring_bytes)
        self._counters = descriptors["counters"]
        self._descriptors = descriptors
        self._loaded = loaded
        self._pins = pins
        self._closed = False

    @classmethod
    def open(cls, options: ProbeOptions) -> Probes:
        """Take over pinned probes that fit, else load and attach fresh ones.

        Raises:
            FatalError: one of collector.errors, with what the operator can do.
        """
        environment = tiers.read_environment()
        tier = tiers.choose(environment, options.tier)
        plan = _plan(options, environment, tier)
        pins = PinFolder(options.pin_dir, identity_of(plan)) if options.pin_dir else None
        try:
            return cls._take_over(options, tier, plan, pins) or cls._load(options, tier, plan, pins)
        except BaseException:
            if pins:
                pins.close()
            raise

    @classmethod
    def _take_over(
        cls, options: ProbeOptions, tier: tiers.Tier, plan: core.LoadPlan, pins: PinFolder | None
    ) -> Probes | None:
        if pins is None or pins.is_empty():
            return None
        if not pins.holds({*PINNED_MAPS, *(f"link_{program}" for program in plan.programs)}):
            _log.warning("pins_replaced", reason="incomplete, or of another object, ABI, tier or settings")
            pins.remove_all()
            return None
        descriptors = {name: core.open_pinned(pins.path / name) for name in PINNED_MAPS}
        cgroups = _cgroups(options)
        cgroups.restore()
        return cls(
            tier=tier, descriptors=descriptors, options=options, cgroups=cgroups, loaded=None, pins=pins
        )

    @classmethod
    def _load(
        cls, options: ProbeOptions, tier: tiers.Tier, plan: core.LoadPlan, pins: PinFolder | None
    ) -> Probes:
        loaded, tier = _load_and_attach(plan, tier, forced=options.tier == "tracepoint")
        descriptors = {name: loaded.map_descriptor(name) for name in PINNED_MAPS}
        cgroups = _cgroups(options)
        cgroups.forget()
        probes = cls(
            tier=tier, descriptors=descriptors, options=options, cgroups=cgroups, loaded=loaded, pins=pins
        )
        if pins:
            probes._pin(pins)
        return probes

    def _pin(self, pins: PinFolder) -> None:
        """Pin maps, then links: whoever finds all links finds all maps."""
        assert self._loaded
        try:
            folder = pins.make()
            for name in PINNED_MAPS:
                core.pin(self._descriptors[name], folder / name)
            self._loaded.pin_links(folder)
        except OSError as error:
            pins.remove_all()
            self.refused["pinning"] = f"{error}; needs kernel 5.15 for accept tracepoints"

    def read(self, records_max: int) -> Records:
        """Return the next events, at most `records_max`, after learning every cgroup name that they need.

        The order makes it so: the events' end first, then all names up to theirs, then the events up to that
        end. A probe submits a name before the event, so a name can be early but never late.
        """
        limit = self.events.producer_position()
        self.cgroups.learn(self._names.drain())
        self._names.release(self._names.read_position)
        return self.events.read_until(limit, records_max)

    def counters(self) -> dict[str, int]:
        """Return the kernel's counters since the probes were loaded, by the names of enum podwire_counter."""
        names = [counter.name.lower() for counter in Counter if counter is not Counter.COUNTERS]
        return dict(zip(names, core.sum_over_cpus(self._counters, len(names)), strict=True))

    def detach(self) -> None:
        """Stop the probes; what is in the rings can still be read."""
        if self._pins:
            self._pins.remove_all()
        if self._loaded:
            self._loaded.detach()

    def close(self, detach: bool = True) -> None:
        """Let go of everything; without `detach`, pinned probes go on filling the ring for the next collector.

        Only the first call does anything.
        """
        if self._closed:
            return
        self._closed = True
        if detach:
            self.detach()
        self.events.close()
        self._names.close()
        if self._loaded:
            self._loaded.close()
        else:
            for descriptor in self._descriptors.values():
                os.close(descriptor)
        if self._pins:
            self._pins.close()


def _cgroups(options: ProbeOptions) -> Cgroups:
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    host_netns = []
    with contextlib.suppress(OSError):
        host_netns.append(Path("/proc/1/ns/net").stat().st_ino)
    journal = Journal(options.state_dir, boot_id)
    return Cgroups(journal, KNOWN_PER_NAMED * options.cgroups_max, host_netns)


def _plan(options: ProbeOptions, environment: tiers.Environment, tier: tiers.Tier) -> core.LoadPlan:
    controller, hierarchy = choose_hierarchy(Path("/proc/self/cgroup").read_text(encoding="utf-8"))
    edge = tier.name == "tracepoint"
    state_programs = STATE_PROGRAMS if environment.release >= PREEMPTIBLE_SINCE else STATE_PROGRAMS[:2]
    return core.LoadPlan(
        object_path=options.object_path,
        programs=state_programs + (ACCEPT_PROGRAMS if edge else ()),
        map_entries={
            "events": options.ring_bytes,
            "names": options.names_ring_bytes,
            "sockets": options.sockets_max,
            "named_cgroups": options.cgroups_max,
        },
        options={
            "cgroup_controller": controller,
            "cgroup_hierarchy": hierarchy,
            "accept_edge": edge,
            "filter_loopback": options.filter_loopback,
            "socket_cookie_helper": environment.release >= SOCKET_COOKIE_SINCE,
        },
    )


def identity_of(plan: core.LoadPlan) -> str:
    """Return what must be equal for a collector to take over probes: ABI, object and everything set in it."""
    digest = hashlib.blake2b(digest_size=12)
    digest.update(plan.object_path.read_bytes() if plan.object_path.is_file() else b"")
    settings = asdict(replace(plan, object_path=Path())) | {"object_path": "", "abi": ABI_VERSION}
    digest.update(json.dumps(settings, sort_keys=True).encode())
    return digest.hexdigest()


def _load_and_attach(
    plan: core.LoadPlan, tier: tiers.Tier, *, forced: bool
) -> tuple[core.BpfObject, tiers.Tier]:
    """Load; where the accept programs can't be attached after all, load again without them."""
    loaded = core.BpfObject(plan)
    try:
        for program in plan.programs:
            loaded.attach(program)
    except OSError as error:
        loaded.close()
        if forced or tier.name == "tp_btf":
            raise CapabilityError(
                f"The kernel refused the probes: {error.strerror}.",
                "run as root, or with the capabilities BPF and PERFMON; the tier auto needs no tracefs.",
            ) from error
        less_programs = tuple(name for name in plan.programs if name not in ACCEPT_PROGRAMS)
        less = replace(plan, programs=less_programs, options=plan.options | {"accept_edge": False})
        return _load_and_attach(less, tiers.Tier("tp_btf", {"tracepoint": str(error.strerror)}), forced=False)
    return loaded, tier
