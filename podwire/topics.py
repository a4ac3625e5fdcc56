"""`podwire topics`: creates the topics of the catalog, and describes what the broker has.

Never changes or deletes an existing topic: one that differs is reported. Called by the command, the demo and
the tests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AdminClient, ConfigResource, NewTopic

from schemas import catalog

if TYPE_CHECKING:
    from schemas.catalog import Topic

ADMIN_SECONDS_MAX = 30.0


@dataclass(frozen=True)
class TopicState:
    """A topic as the broker has it.

    Attributes:
        topic: what the catalog says.
        partitions: partition count on the broker, 0 when the topic does not exist.
        differences: settings that differ from the catalog, "name: broker's value, not ours".
    """

    topic: Topic
    partitions: int
    differences: tuple[str, ...]


def _admin(bootstrap: str) -> AdminClient:
    return AdminClient({"bootstrap.servers": bootstrap, "log_level": 2})


def create(
    bootstrap: str, partitions: int = catalog.PARTITIONS_DEFAULT, replication: int = 1
) -> dict[str, bool]:
    """Create the topics that are missing and return, by name, whether each was created now.

    `partitions` counts for the topics of events: raw, flows, corrections. KafkaException when the broker refuses one.
    """
    admin = _admin(bootstrap)  # kept: a temporary client would be destroyed before it acts
    wanted = [
        NewTopic(
            topic.name,
            num_partitions=topic.partitions or partitions,
            replication_factor=replication,
            config=topic.config(),
        )
        for topic in catalog.TOPICS
    ]
    created = {}
    for name, future in admin.create_topics(wanted, operation_timeout=ADMIN_SECONDS_MAX).items():
        try:
            future.result(ADMIN_SECONDS_MAX)
            created[name] = True
        except KafkaException as error:
            if error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
                raise
            created[name] = False
    return created


def describe(bootstrap: str) -> list[TopicState]:
    """Return every topic of the catalog as the broker has it."""
    admin = _admin(bootstrap)
    present = admin.list_topics(timeout=ADMIN_SECONDS_MAX).topics
    resources = {
        topic.name: ConfigResource(ConfigResource.Type.TOPIC, topic.name)
        for topic in catalog.TOPICS
        if topic.name in present
    }
    asked = admin.describe_configs(list(resources.values())) if resources else {}
    configs = {resource.name: future.result(ADMIN_SECONDS_MAX) for resource, future in asked.items()}
    states = []
    for topic in catalog.TOPICS:
        if topic.name not in present:
            states.append(TopicState(topic, 0, ()))
            continue
        has = configs[topic.name]
        differences = tuple(
            f"{name}: {has[name].value}, not {value}"
            for name, value in topic.config().items()
            if has[name].value != value
        )
        states.append(TopicState(topic, len(present[topic.name].partitions), differences))
    return states


def run_create(bootstrap: str, partitions: int, replication: int) -> int:
    """Create what is missing, print one line per topic, return the exit status."""
    for name, created in create(bootstrap, partitions, replication).items():
        print(f"{'created' if created else 'exists '}  {name}")
    return 0


def run_describe(bootstrap: str) -> int:
    """Print one line per topic; exit status 1 when one is missing or differs from the catalog."""
    fine = True
    for state in describe(bootstrap):
        topic = state.topic
        note = "; ".join(state.differences) if state.partitions else "missing: run `podwire topics create`"
        fine = fine and not note
        print(
            f"{topic.name:<28} {topic.schema:<16} key={topic.key:<10} partitions={state.partitions:<3} "
            f"{topic.policy:<8}{note}"
        )
    return 0 if fine else 1
