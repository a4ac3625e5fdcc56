"""The kernel half as one object: probes loaded or taken over, events to read, names known before them.

Owns the order of things: tier, load or reuse, attach, pin, read names before events, detach. Never encodes and
never publishes. Called by the node collector's run loop and by the kernel tests.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import structlog

from collector.errors import BccError, CapabilityError, NoBtfError, SettingsError, VerifierError
from collector.node import core, tiers
from collector.node.abi import EVENT
from collector.node.cgroups import Cgroups, Journal
from collector.node.counters import Counters
from collector.node.existing import IteratorPass, SweepPass, Walks
from collector.node.filters import Filters
from collector.node.pins import PinFolder, life_of
from collector.node.plan import (
    FIND_EXISTING,
    NOTE_SELF,
    PINNED_MAPS,
    SWEEP,
    identity_of,
    kept_names,
    pinned_names,
    plan_of,
)
from collector.node.ring import EventRing, NameRing

if TYPE_CHECKING:
    from collector.node.existing import Pass
    from collector.node.ring import Records

DEFAULT_OBJECT = Path(__file__).resolve().parents[2] / "build/bpf/podwire.bpf.o"
KNOWN_PER_NAMED = 8
"""We remember so many times more cgroups than the kernel remembers having told."""
PAGE_BYTES = 4096
NAMED_BYTES = 1
"""Value of `named_cgroups` in bpf/maps.h."""
SWEEP_KEYS = 12
"""bpf/existing.h"""
_log = structlog.get_logger()


@dataclass(frozen=True)
class ProbeOptions:
    """How to load the probes.

    Attributes:
        state_dir: folder for `cgroups.jsonl`; None keeps none, which is enough without a pin_dir.
        object_path: the compiled BPF object.
        ring_bytes: size of the events ring, a power of two; 176 bytes per event.
        names_ring_bytes: size of the cgroup names ring, a power of two; 920 bytes per cgroup.
        sockets_max: connections followed at once; 250 bytes of kernel memory each.
        cgroups_max: cgroups whose name the kernel remembers having told.
        connects_max: calls of connect() under way that the kernel remembers; the longest unasked are forgotten.
        filter_loopback: leave out connections with an end in 127/8, ::1 or ::ffff:127/8.
        filter_own: leave out this process's own connections; a server end's is known from accept() on.
        filters: what else to leave out.
        pin_dir: folder on a bpffs that keeps the probes while no collector runs; None for no pinning.
        tier: "auto", or one of `tiers.TierName`.
        existing: tell of connections that were open before the probes.
        progress_interval_s: seconds between two PROGRESS events of a connection; 0 for none.
        walk_events_max: EXISTING and PROGRESS events made by one `Probes.tend`, each.
    """

    state_dir: Path | None
    object_path: Path = DEFAULT_OBJECT
    ring_bytes: int = 1 << 24
    names_ring_bytes: int = 1 << 20
    sockets_max: int = 65_536
    cgroups_max: int = 16_384
    connects_max: int = 8192
    filter_loopback: bool = True
    filter_own: bool = False
    filters: Filters = field(default_factory=Filters)
    pin_dir: Path | None = None
    tier: str = "auto"
    existing: bool = True
    progress_interval_s: float = 60.0
    walk_events_max: int = 1000

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
        life: which ring and counters these are; a successor that takes them over has the same.
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
        self.life = life_of(descriptors["events"])
        self._names = NameRing(descriptors["names"], options.names_ring_bytes)
        self._counters = Counters(descriptors)
        self._descriptors = descriptors
        self._walks = Walks(
            find_existing=self._walk_files if f"link_{FIND_EXISTING}" in descriptors else None,
            sweep=self._walk_sockets,
            progress_interval_s=options.progress_interval_s,
            events_max=options.walk_events_max,
        )
        self._loaded = loaded
        self._pins = pins
        self._closed = False

    @classmethod
    def open(cls, options: ProbeOptions) -> Probes:
        """Take over pinned probes that fit, else load and attach the best tier that the kernel takes.

        Raises:
            FatalError: one of collector.errors, with what the operator can do.
        """
        environment = tiers.read_environment()
        candidates = tiers.candidates(environment, options.tier)
        pins = PinFolder(options.pin_dir) if options.pin_dir else None
        try:
            taken = cls._take_over(options, environment, candidates, pins) if pins else None
            return taken or cls._load_best(options, environment, candidates, pins)
        except BaseException:
            if pins:
                pins.close()
            raise

    @classmethod
    def _take_over(
        cls,
        options: ProbeOptions,
        environment: tiers.Environment,
        candidates: tuple[tiers.Tier, ...],
        pins: PinFolder,
    ) -> Probes | None:
        if pins.is_empty():
            return None
        better: dict[str, str] = {}
        for tier in candidates:
            plan = plan_of(options, environment, tier)
            if pins.holds(identity_of(plan), pinned_names(plan)):
                return cls._adopt(options, tiers.Tier(tier.name, tier.refused | better), plan, pins)
            better[tier.name] = "the probes that an earlier collector left are of another tier"
        _log.warning("pins_replaced", reason="incomplete, or of another object, ABI, tier or settings")
        pins.remove_all()
        return None

    @classmethod
    def _adopt(cls, options: ProbeOptions, tier: tiers.Tier, plan: core.LoadPlan, pins: PinFolder) -> Probes:
        folder = pins.subfolder(identity_of(plan))
        descriptors = {name: core.open_pinned(folder / name) for name in kept_names(plan)}
        if options.filter_own:
            core.runner(descriptors[f"program_{NOTE_SELF}"])()
        cgroups = _cgroups(options)
        cgroups.restore()
        probes = cls(
            tier=tier, descriptors=descriptors, options=options, cgroups=cgroups, loaded=None, pins=pins
        )
        probes._hear_names_again()
        return probes

    @classmethod
    def _load_best(
        cls,
        options: ProbeOptions,
        environment: tiers.Environment,
        candidates: tuple[tiers.Tier, ...],
        pins: PinFolder | None,
    ) -> Probes:
        """Load the first candidate that the kernel takes; what it said of the better ones is kept."""
        said: dict[str, str] = {}
        for tier in candidates:
            try:
                if tier.name == "bcc":
                    probes = _open_bcc(options, wanted=options.tier == "bcc")
                else:
                    probes = cls._load(options, tier, plan_of(options, environment, tier), pins)
            except (CapabilityError, VerifierError) as error:
                if tier is candidates[-1]:
                    raise
                said[tier.name] = str(error).partition(" Operator action:")[0]
            else:
                refused = tier.refused | said
                ordered = {name: refused[name] for name in tiers.NAMES if name in refused}
                probes.refused = ordered | probes.refused
                return probes
        raise AssertionError("there is always a candidate")

    @classmethod
    def _load(
        cls, options: ProbeOptions, tier: tiers.Tier, plan: core.LoadPlan, pins: PinFolder | None
    ) -> Probes:
        loaded = core.BpfObject(plan)
        try:
            if options.filter_own:
                core.runner(loaded.program_descriptor(NOTE_SELF))()
            for program in plan.attached():
                loaded.attach(program)
            for program in plan.iterators:
                loaded.attach_iterator(program)
        except OSError as error:
            loaded.close()
            raise CapabilityError(
                f"The kernel refused the probes: {error.strerror}.",
                "run as root, or with the capabilities BPF and PERFMON; the tier auto takes what is allowed.",
            ) from error
        descriptors = {name: loaded.map_descriptor(name) for name in PINNED_MAPS}
        descriptors |= {f"link_{name}": loaded.link_descriptor(name) for name in plan.iterators}
        descriptors |= {f"program_{name}": loaded.program_descriptor(name) for name in plan.programs}
        cgroups = _cgroups(options)
        cgroups.forget()
        probes = cls(
            tier=tier, descriptors=descriptors, options=options, cgroups=cgroups, loaded=loaded, pins=pins
        )
        if pins:
            probes._pin(pins, plan)
        return probes

    @property
    def pinned(self) -> bool:
        """Whether the probes, and what is in their ring, outlive this process."""
        return self._pins is not None and "pinning" not in self.refused

    def _pin(self, pins: PinFolder, plan: core.LoadPlan) -> None:
        """Pin maps, then links: whoever finds all links finds all maps."""
        assert self._loaded
        try:
            folder = pins.make(identity_of(plan))
            for name, descriptor in self._descriptors.items():
                if not name.startswith("link_"):
                    core.pin(descriptor, folder / name)
            self._loaded.pin_links(folder)
        except OSError as error:
            pins.remove_all()
            self.refused["pinning"] = f"{error}; needs kernel 5.15 for kprobes and accept tracepoints"

    def read(self, records_max: int) -> Records:
        """Return the next events, at most `records_max`, after learning every cgroup name that they need.

        The order makes it so: the events' end first, then all names up to theirs, then the events up to that
        end. A probe submits a name before the event, so a name can be early but never late.
        """
        limit = self.events.producer_position()
        self._learn_names()
        return self.events.read_until(limit, records_max)

    def _learn_names(self) -> None:
        self.cgroups.learn(self._names.drain())
        self._names.release(self._names.read_position)

    def _hear_names_again(self) -> None:
        """Let the kernel forget to have told what a predecessor's journal, which may be gone, does not have."""
        self._learn_names()
        told = self._descriptors["named_cgroups"]
        keys = [int(key) for some, _ in core.map_entries(told, NAMED_BYTES) for key in some]
        core.delete_keys(told, [key for key in keys if self.cgroups.path(key) is None])

    def counters(self) -> dict[str, int]:
        """Return the kernel's counters since the probes were loaded, as `Counters.read` does."""
        return self._counters.read()

    def tend(self, now_s: float) -> int:
        """Ask a little for EXISTING and PROGRESS at monotonic time `now_s`; return how many events were made."""
        return self._walks.step(now_s)

    def _walk_files(self) -> Pass:
        return IteratorPass(core.start_iterator(self._descriptors[f"link_{FIND_EXISTING}"]))

    def _walk_sockets(self) -> Pass:
        row = np.zeros(SWEEP_KEYS, "<u8")
        run = core.runner(self._descriptors[f"program_{SWEEP}"], row)

        def look_at(keys: np.ndarray) -> int:
            if len(keys) < SWEEP_KEYS:
                row[len(keys) :] = 0
            row[: len(keys)] = keys
            return run()

        entries = core.map_entries(self._descriptors["sockets"], EVENT.itemsize)
        return SweepPass((keys for keys, _ in entries), look_at, SWEEP_KEYS)

    def detach(self) -> None:
        """Stop the probes; what is in the rings can still be read."""
        self._walks.close()
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
        self._walks.close()
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


def _open_bcc(options: ProbeOptions, *, wanted: bool) -> Probes:
    """Return BCC's probes, which answer like these; on a kernel without BTF, that is why nothing works."""
    from collector.node import bcc  # noqa: PLC0415 (only nodes without BTF need it)

    try:
        return cast("Probes", bcc.open(options))
    except BccError as error:
        if wanted:
            raise
        reason = str(error).partition(" Operator action:")[0]
        raise NoBtfError(
            f"The kernel shows no type information ({tiers.BTF_FILE} is missing or not readable), and: {reason}",
            f"run a kernel built with CONFIG_DEBUG_INFO_BTF, as all current distributions are, or {error.action}",
        ) from error
