"""Every fault of the suite: what goes wrong in the middle of traffic, and the world that it needs.

One table, FAULTS; a fault returns when its cause is over and what it ended was started again. Called by `__main__`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, AlterConfigOpType, ConfigEntry, ConfigResource, ResourceType

from collector.errors import KafkaFatalError
from schemas import catalog, codec
from tests.fault.books import NOT_OURS
from tests.fault.brokers import Brokers
from tests.fault.registry_away import REGISTRY, registry_away
from tests.fault.rounds import SETTLE_SECONDS_MAX, Setting, restart

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.fault.rounds import Traffic, World
    from tests.fault.verdicts import Loses

PLAIN = Setting("one broker")
THREE = Setting("three brokers", brokers=3)
SMALL_DISK = Setting("a disk of 256 KiB for the spool", spool_bytes=256 << 10)
NO_ROOM = Setting(
    "a ring of 64 KiB and no spool", node={"PODWIRE_RING_BYTES": "65536", "PODWIRE_SPOOL_BYTES_MAX": "0"}
)
TWO_NODES = Setting("two nodes, one with a clock that can be stepped", second_node=True)
SMALL_QUEUES = Setting(
    "queues of 1 MiB in the collector and 100 records in the worker",
    services={"PODWIRE_IN_FLIGHT_MAX": "100"},
    node={"PODWIRE_QUEUE_BYTES_MAX": str(1 << 20), "PODWIRE_SPOOL_AFTER_MS": "600000"},
)
UNPINNED = Setting("probes that end with their collector", pinned=False)
FLIPPING = Setting("a collector that flips bits", collector=("tests.fault.flipping_collector",))
LEAKY = Setting("a collector that drops halves", collector=("tests.fault.leaky_collector",))
BAD_COPIES = 5
"""Broken copies of each batch that `poison` appends."""
MESSAGE_BYTES_MAX = 1_048_588
"""Kafka's default for a batch of messages."""
REFUSED_BYTES_MAX = 100
"""Less than any of ours takes."""
BAD_BATCHES = 3
"""How many batches `flip_bits` waits for."""
MEANWHILE = 100
"""Connections made while something is away."""


@dataclass(frozen=True)
class Fault:
    """A row of the table.

    Attributes:
        cause: what goes wrong; gets the seconds that it lasts where that is a choice.
        setting: the world it needs.
        seconds: how long it lasts in the long form, and in the short one.
        loses: what it is expected to cost.
        settle_seconds_max: how long to wait for all to be told.
    """

    cause: Callable[[World, Traffic, float], None]
    setting: Setting = PLAIN
    seconds: tuple[float, float] = (0.0, 0.0)
    loses: Loses = "nothing"
    settle_seconds_max: float = SETTLE_SECONDS_MAX


def kill_service(name: str) -> Callable[[World, Traffic, float], None]:
    """Return what kills a service with SIGKILL, lets traffic go on without it, and starts it again."""

    def cause(world: World, traffic: Traffic, _: float) -> None:
        world.services.processes[name].kill()
        traffic.more(MEANWHILE)
        restart(world, name)

    return cause


def kill_broker(world: World, traffic: Traffic, _: float) -> None:
    """Crash Kafka, wait until the collector has put events on its disk, start Kafka again."""
    world.broker.kill()
    traffic.until(lambda: has_spooled(world))
    traffic.more(MEANWHILE)
    world.broker.start()


def has_spooled(world: World) -> bool:
    """Return whether the collector has put events on its disk."""
    spool = world.folder / "services" / "node-state"
    return any(path.suffix == ".flush" for path in spool.rglob("*"))


def kill_spooling(world: World, traffic: Traffic, _: float) -> None:
    """Crash Kafka, and the collector once it has put events on its disk: its successor inherits them."""
    world.broker.kill()
    traffic.until(lambda: has_spooled(world))
    node = world.services.processes["node"]
    node.kill()
    traffic.more(MEANWHILE)
    node.start()
    traffic.until(lambda: node.unhealthy() is None)
    world.broker.start()


def stop_broker(world: World, traffic: Traffic, seconds: float) -> None:
    """End Kafka in an orderly way and start it again later."""
    world.broker.stop()
    traffic.lasting(seconds)
    world.broker.start()


def stall_broker(world: World, traffic: Traffic, seconds: float) -> None:
    """SIGSTOP Kafka: connections stay open and nothing answers."""
    with stopped(world.broker.pid):
        traffic.lasting(seconds)


def kill_one_of_three(world: World, traffic: Traffic, seconds: float) -> None:
    """Crash one of three brokers, with all that it leads, and start it again later."""
    brokers = world.broker
    assert isinstance(brokers, Brokers)
    one = brokers.members[2]
    one.kill()
    traffic.lasting(seconds)
    one.start()


def stall_worker(world: World, traffic: Traffic, seconds: float) -> None:
    """SIGSTOP the worker for longer than its session lasts, and let it go on: what it held is another's, or stale."""
    with stopped(world.services.processes["enricher"].pid):
        traffic.lasting(seconds)


@contextmanager
def stopped(pid: int | None) -> Iterator[None]:
    """Keep a process stopped."""
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def cut_connections(world: World, traffic: Traffic, seconds: float) -> None:
    """Answer every packet to Kafka with a reset for a while."""
    port = world.broker.bootstrap.rpartition(":")[2]
    rules = (
        "add table inet podwire-fault\n"
        "add chain inet podwire-fault out { type filter hook output priority 0; }\n"
        f"add rule inet podwire-fault out tcp dport {port} reject with tcp reset\n"
    )
    subprocess.run(["nft", "-f", "-"], input=rules.encode(), check=True)
    try:
        traffic.lasting(seconds)
    finally:
        subprocess.run(["nft", "delete", "table", "inet", "podwire-fault"], check=True)


def join_and_leave(world: World, traffic: Traffic, _: float) -> None:
    """Let a second worker join under load, and leave again."""
    name = "second-enricher"
    second = world.services.processes.get(name) or world.services.add(name, "enricher")
    second.start()
    second.wait_healthy()
    traffic.until(lambda: "podwire_enricher_assigned_partitions 2.0" in second.metrics())
    traffic.more(MEANWHILE)
    second.stop()


def fill_disk(world: World, traffic: Traffic, _: float) -> None:
    """Take Kafka away until the spool's disk is full and the ring alone holds what comes."""
    world.broker.kill()
    log = world.services.processes["node"].command.log
    traffic.until(lambda: '"spool_not_writable"' in log.read_text())
    traffic.more(MEANWHILE)
    world.broker.start()


def fill_queue(world: World, traffic: Traffic, _: float) -> None:
    """SIGSTOP Kafka until the collector's memory queue is full: what it does not take goes to the disk at once."""
    with stopped(world.broker.pid):
        traffic.until(lambda: has_spooled(world))
        traffic.more(MEANWHILE)


def refuse_batches(world: World, traffic: Traffic, _: float) -> None:
    """Let Kafka refuse every batch as too large until the collector has ended for it, then mend that and start it."""
    node = world.services.processes["node"]
    limit_messages(world, REFUSED_BYTES_MAX)
    while node.pid is not None:
        traffic.more(10)
    assert node.exit_code == KafkaFatalError.exit_code, node.last_words()
    traffic.more(MEANWHILE)
    limit_messages(world, MESSAGE_BYTES_MAX)
    restart(world, "node")


def limit_messages(world: World, bytes_max: int) -> None:
    """Set the largest batch of messages that Kafka takes into the raw topic."""
    entry = ConfigEntry("max.message.bytes", str(bytes_max), incremental_operation=AlterConfigOpType.SET)
    resource = ConfigResource(ResourceType.TOPIC, catalog.RAW.name, incremental_configs=[entry])
    admin = AdminClient({"bootstrap.servers": world.broker.bootstrap, "log_level": 0})
    for done in admin.incremental_alter_configs([resource]).values():
        done.result(30)


def flip_bits(world: World, traffic: Traffic, _: float) -> None:
    """Go on until a few batches whose bits flipped in the collector's memory are set aside."""
    enricher = world.services.processes["enricher"]
    traffic.until(lambda: dead_letters(enricher.metrics()) >= BAD_BATCHES)


def fill_ring(world: World, traffic: Traffic, _: float) -> None:
    """Take Kafka away until the ring is full and the kernel counts what it can't hand over."""
    world.broker.kill()
    node = world.services.processes["node"]
    none_yet = 'podwire_node_lost_events_total{reason="ring_full"} 0.0'
    traffic.until(lambda: none_yet not in node.metrics())
    world.broker.start()


def poison(world: World, traffic: Traffic, _: float) -> None:
    """Append broken copies of real batches: cut, of an unknown schema, empty, with bits flipped in prefix or body."""
    good = last_values(world)
    enricher = world.services.processes["enricher"]
    before = dead_letters(enricher.metrics())
    producer = Producer({"bootstrap.servers": world.broker.bootstrap})
    for partition, value in good.items():
        for bad in (
            value[: world.dice.randrange(1, len(value))],
            value[:1] + (999_999).to_bytes(4, "big") + value[5:],
            b"",
            flipped(value, world.dice.randrange(codec.PREFIX_BYTES)),
            flipped(value, world.dice.randrange(codec.PREFIX_BYTES, len(value))),
        ):
            producer.produce(catalog.RAW.name, bad, key=NOT_OURS, partition=partition)
            traffic.more(3)
    assert producer.flush(30) == 0
    traffic.until(lambda: dead_letters(enricher.metrics()) == before + BAD_COPIES * len(good))


def dead_letters(metrics: str) -> float:
    """Return how many dead letters a worker says it made."""
    lines = [line for line in metrics.splitlines() if line.startswith("podwire_enricher_dead_letters_total{")]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def flipped(value: bytes, place: int) -> bytes:
    """Return the batch with bits of one byte flipped."""
    return value[:place] + bytes((value[place] ^ 0x55,)) + value[place + 1 :]


def last_values(world: World) -> dict[int, bytes]:
    """Return the last value in each partition of the raw topic that has one."""
    consumer = Consumer({"bootstrap.servers": world.broker.bootstrap, "group.id": "poison"})
    found = {}
    listed = consumer.list_topics(catalog.RAW.name, timeout=30)
    for partition in listed.topics[catalog.RAW.name].partitions:
        at = TopicPartition(catalog.RAW.name, partition)
        first, end = consumer.get_watermark_offsets(at, timeout=30)
        if end > first:
            at.offset = end - 1
            consumer.assign([at])
            message = consumer.poll(30)
            assert message is not None
            found[partition] = message.value()
    consumer.close()
    return found


def burst_of_pods(world: World, traffic: Traffic, _: float) -> None:
    """Show the watcher 5,000 pods at once, and take them away again."""
    world.write_manifests(5000)
    watcher = world.services.processes["cluster"]
    traffic.until(lambda: 'podwire_watcher_objects{kind="pods"} 5002.0' in watcher.metrics())
    world.write_manifests()
    traffic.until(lambda: 'podwire_watcher_objects{kind="pods"} 2.0' in watcher.metrics())


def step_clock(seconds: int) -> Callable[[World, Traffic, float], None]:
    """Return what steps the clock of the server's node, and later back; each step shows in the node's reports."""

    def cause(world: World, traffic: Traffic, _: float) -> None:
        for step, other in ((seconds, 0), (0, seconds)):
            world.clock.step(step)
            traffic.until(
                lambda step=step, other=other: abs(ahead_s(world) - step) < abs(ahead_s(world) - other)
            )
            traffic.more(MEANWHILE)

    return cause


def ahead_s(world: World) -> float:
    """Return how many seconds the last report of the second node is ahead of our clock."""
    world.read_books()
    return world.books.last_of(world.nodes[1])["to_unix_us"] / 1e6 - time.time()


def nothing(_: World, traffic: Traffic, __: float) -> None:
    """Let all go well."""
    traffic.more(MEANWHILE)


FAULTS: dict[str, Fault] = {
    "none": Fault(nothing),
    "worker killed": Fault(kill_service("enricher")),
    "collector killed, probes pinned": Fault(kill_service("node")),
    "collector killed with a spool": Fault(kill_spooling),
    "watcher killed": Fault(kill_service("cluster")),
    "worker joins and leaves": Fault(join_and_leave),
    "worker stalled": Fault(stall_worker, seconds=(25.0, 12.0)),
    "broker killed": Fault(kill_broker),
    "broker stopped": Fault(stop_broker, seconds=(60.0, 5.0)),
    "broker stalled": Fault(stall_broker, seconds=(20.0, 5.0)),
    "connections cut": Fault(cut_connections, seconds=(10.0, 3.0)),
    "poison batches": Fault(poison),
    "batches refused": Fault(refuse_batches),
    "5,000 pods at once": Fault(burst_of_pods),
    "spool's disk full": Fault(fill_disk, SMALL_DISK),
    "queue full": Fault(fill_queue, SMALL_QUEUES),
    "ring full": Fault(fill_ring, NO_ROOM, loses="counted"),
    "bits flipped before Kafka": Fault(flip_bits, FLIPPING, loses="dead letters"),
    "collector killed, no pins": Fault(kill_service("node"), UNPINNED, loses="gap"),
    "clock stepped by +5 s": Fault(step_clock(5), TWO_NODES),
    "clock stepped by -5 s": Fault(step_clock(-5), TWO_NODES),
    "registry away": Fault(registry_away, REGISTRY, seconds=(15.0, 3.0)),
    "one of three brokers killed": Fault(kill_one_of_three, THREE, seconds=(30.0, 5.0)),
}
CANARY = Fault(nothing, LEAKY, settle_seconds_max=15.0)
"""A half that is dropped without being counted: a suite that calls this good can't be believed."""
