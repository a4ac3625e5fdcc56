"""The topic that a replay writes into: made like the flows topic, and empty unless told otherwise.

Never changes or deletes a topic. Called by `podwire.replay.run`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AdminClient, NewTopic

from podwire.flows import FlowReader
from podwire.replay.errors import KafkaAwayError, TopicNotEmptyError
from schemas import catalog
from schemas.registry import CatalogIds

if TYPE_CHECKING:
    from podwire.replay.plan import Plan

ANSWER_SECONDS_MAX = 10.0


def prepare(bootstrap: str, plan: Plan, *, append: bool) -> int:
    """Make the plan's topic where it isn't there and return its partition count.

    KafkaAwayError, or TopicNotEmptyError where it holds records and `append` is false.
    """
    try:
        admin = AdminClient({"bootstrap.servers": bootstrap, "log_level": 2})
        present = admin.list_topics(timeout=ANSWER_SECONDS_MAX).topics
        for topic in (catalog.RAW, catalog.FLOWS):
            if topic.name not in present:
                raise KafkaAwayError(f"{bootstrap} has no topic {topic.name}. Is it the right Kafka?")
        count = len(present[catalog.FLOWS.name].partitions)
        if not _create(admin, plan, count, present[catalog.FLOWS.name]) and not append:
            _refuse_records(bootstrap, plan.topic)
    except KafkaException as error:
        raise KafkaAwayError(f"{error.args[0].str()}. Is Kafka at {bootstrap}?") from error
    return count


def _create(admin: AdminClient, plan: Plan, partitions: int, like: Any) -> bool:
    """Return whether the topic was created now."""
    replication = min(len(partition.replicas) for partition in like.partitions.values())
    # Records carry their event's time, so retention begins then: it must not delete what was written now.
    retention_ms = catalog.FLOWS.retention_ms + plan.now_ms - plan.from_ms
    config = catalog.FLOWS.config() | {"retention.ms": str(retention_ms)}
    new = NewTopic(plan.topic, num_partitions=partitions, replication_factor=replication, config=config)
    try:
        admin.create_topics([new], operation_timeout=ANSWER_SECONDS_MAX)[plan.topic].result(
            ANSWER_SECONDS_MAX
        )
    except KafkaException as error:
        if error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
            raise
        return False
    return True


def _refuse_records(bootstrap: str, topic: str) -> None:
    reader = FlowReader(bootstrap, CatalogIds(), topic)
    try:
        if any(end > first for first, end in reader.bounds().values()):
            raise TopicNotEmptyError(f"{topic} holds records. Give another --name, delete it, or --append.")
    finally:
        reader.close()
