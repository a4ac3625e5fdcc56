"""The whole cluster watcher as a process, from a manifest file or an API server to a real Kafka."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from typing import TYPE_CHECKING, Any

import pytest
from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

from podwire import topics
from podwire.demo.broker import Broker, free_port
from schemas import catalog, codec
from tests.apiserver import ApiServer
from tests.objects import listing, node, pod, service
from tests.waiting import DEADLINE_SECONDS, until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.conftest import RunningBroker

Records = dict[str, dict[str, Any] | None]
STATUS_LAG_US = 10_000_000


def end_of(consumer: Consumer, topic: catalog.Topic) -> int | None:
    """Return one more than the offset behind a topic's last message; None while a broker that starts can't tell."""
    try:
        return 1 + consumer.get_watermark_offsets(TopicPartition(topic.name, 0), timeout=5)[1]
    except KafkaException:
        return None


def read(bootstrap: str, topic: catalog.Topic) -> tuple[Records, int]:
    """Return a topic's last committed value by key, and the offset up to which a reader has come with them."""
    consumer = Consumer(
        {
            "bootstrap.servers": bootstrap,
            "group.id": "test",
            "isolation.level": "read_committed",
            "enable.auto.commit": False,
            "enable.partition.eof": True,
            "fetch.wait.max.ms": 20,
        }
    )
    end = until(lambda: end_of(consumer, topic)) - 1
    consumer.assign([TopicPartition(topic.name, 0, 0)])
    found: Records = {}
    while True:
        message = consumer.poll(DEADLINE_SECONDS)
        assert message is not None
        if message.error() is None:
            value, key = message.value(), message.key()
            found[key.decode()] = None if value is None else codec.decode(topic.schema, value)
        else:
            assert message.error().code() == KafkaError._PARTITION_EOF, message.error()
        if message.error() is not None or message.offset() >= end - 1:
            position = message.offset() + (message.error() is None)
            consumer.close()
            return found, position


class Watcher:
    """A watcher process of a cluster of its own, since all tests share the topics."""

    def __init__(self, bootstrap: str, folder: Path) -> None:
        self.bootstrap = bootstrap
        self.cluster = f"test-{uuid.uuid4().hex[:8]}"
        self.prefix = self.cluster
        self.manifests = folder / "manifests.json"
        self.log = folder / "watcher.log"
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None

    def uid(self, name: str) -> str:
        """Return a uid that no other test uses."""
        return f"{self.prefix}-{name}"

    def write(self, *items: dict[str, Any]) -> None:
        """Replace the manifest file at once."""
        new = self.manifests.with_suffix(".new")
        new.write_text(json.dumps(listing(*items)))
        new.rename(self.manifests)

    def start(self, *arguments: str, **variables: str) -> None:
        """Start the process."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PODWIRE_")}
        environment |= {
            "PODWIRE_CLUSTER": self.cluster,
            "PODWIRE_BOOTSTRAP": self.bootstrap,
            "PODWIRE_HTTP_PORT": str(self.port),
            "PODWIRE_WATERMARK_INTERVAL_MS": "200",
        }
        command = [
            sys.executable,
            "-m",
            "collector",
            "cluster",
            *(arguments or ("--manifests", str(self.manifests))),
        ]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, env=environment | variables, stdout=log, stderr=log)

    def healthy(self) -> bool:
        """Return whether /healthz says so; fail when the process has ended."""
        assert self.process is not None
        assert self.process.poll() is None, self.log.read_text()
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/healthz", timeout=5):
                return True
        except (urllib.error.URLError, OSError):
            return False

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        """End the process and return its exit status."""
        assert self.process is not None
        self.process.send_signal(how)
        return self.process.wait(30)

    def present_pods(self) -> int | None:
        """Return how many pods the watcher sees at present, written or not."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=5) as answer:
            for line in answer.read().decode().splitlines():
                if line.startswith('podwire_watcher_objects{kind="pods"}'):
                    return round(float(line.split()[-1]))
        return None

    def pods(self) -> Records:
        """Return this cluster's pods, by name of the test."""
        found, _ = read(self.bootstrap, catalog.PODS)
        return {
            key.removeprefix(f"{self.prefix}-"): one
            for key, one in found.items()
            if key.startswith(self.prefix)
        }

    def pod_until(self, name: str, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Return a pod's record once it meets a condition."""
        return until(lambda: (one := self.pods().get(name)) and condition(one) and one)

    def watermarks(self) -> dict[str, dict[str, Any]]:
        """Return the watermarks, if they are this cluster's."""
        found, _ = read(self.bootstrap, catalog.WATERMARKS)
        return {one["kind"]: one for one in found.values() if one and one["cluster"] == self.cluster}


@pytest.fixture
def watcher(broker: RunningBroker, tmp_path: Path) -> Iterator[Watcher]:
    """A watcher that isn't started yet, with topics in place."""
    topics.create(broker.bootstrap, partitions=4)
    watcher = Watcher(broker.bootstrap, tmp_path)
    yield watcher
    if watcher.process is not None and watcher.process.poll() is None:
        watcher.process.kill()
        watcher.process.wait()


def test_manifests_become_committed_records_and_watermarks(watcher: Watcher) -> None:
    """Pods, services and nodes can be read, and a reader at a watermark's end offset has them."""
    watcher.write(
        pod("a", uid=watcher.uid("a")), service("s", uid=watcher.uid("s")), node("n", uid=watcher.uid("n"))
    )
    before_us = time.time_ns() // 1000
    watcher.start()
    until(watcher.healthy)
    record = until(lambda: watcher.pods().get("a"))
    assert (record["cluster"], record["name"], record["workload"]) == (watcher.cluster, "a", "api")
    for topic, name in ((catalog.SERVICES, "s"), (catalog.NODES, "n")):
        uid = watcher.uid(name)
        until(lambda topic=topic, uid=uid: read(watcher.bootstrap, topic)[0].get(uid))
    marks = until(lambda: len(found := watcher.watermarks()) == 3 and found)
    for kind, topic in zip(("pods", "services", "nodes"), catalog.METADATA, strict=True):
        assert before_us <= marks[kind]["complete_until_us"] <= time.time_ns() // 1000
        assert (marks[kind]["topic"], marks[kind]["source"]) == (topic.name, "manifests")
        end = marks[kind]["end_offset"]
        assert end > 0
        until(lambda topic=topic, end=end: end <= read(watcher.bootstrap, topic)[1])
    later_us = marks["pods"]["complete_until_us"]
    until(lambda: watcher.watermarks()["pods"]["complete_until_us"] > later_us)
    assert watcher.stop() == 0


def test_changed_manifests_change_the_records(watcher: Watcher) -> None:
    """A new pod appears, another gives its address up to a third, one vanishes."""
    watcher.write(pod("a", uid=watcher.uid("a")), pod("b", uid=watcher.uid("b"), ip="10.1.0.6"))
    watcher.start()
    until(watcher.healthy)
    watcher.write(
        pod("a", uid=watcher.uid("a"), ip="10.1.0.7"), pod("c", uid=watcher.uid("c"), ip="10.1.0.6")
    )
    watcher.pod_until("c", lambda one: one["addresses"][0]["address"] == "10.1.0.6")
    changed = watcher.pods()["a"]
    gone = watcher.pods()["b"]
    assert changed is not None
    assert gone is not None
    assert [band["to_latest_us"] is None for band in changed["addresses"]] == [False, True]
    assert gone["valid_to_us"] is not None
    assert gone["addresses"][0]["to_latest_us"] is not None


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL], ids=["terminated", "killed"])
def test_restart_goes_on_from_its_own_topics(watcher: Watcher, how: signal.Signals) -> None:
    """What vanished meanwhile is closed since the last watermark, less the lag; what stayed is not written again."""
    watcher.write(pod("a", uid=watcher.uid("a")), pod("b", uid=watcher.uid("b"), ip="10.1.0.6"))
    watcher.start()
    until(watcher.healthy)
    watcher.stop(how)
    # A commit is answered before its marker is written, and until then readers don't see what was committed.
    mark_us = until(lambda: watcher.watermarks().get("pods"))["complete_until_us"]
    kept = until(lambda: watcher.pods().get("a"))
    watcher.write(pod("a", uid=watcher.uid("a")))
    restarted_us = time.time_ns() // 1000
    watcher.start()
    gone = watcher.pod_until("b", lambda one: one["valid_to_us"] is not None)
    (band,) = gone["addresses"]
    assert mark_us <= band["to_earliest_us"] + STATUS_LAG_US < restarted_us <= band["to_latest_us"]
    assert gone["addresses"][0]["to_latest_us"] == gone["valid_to_us"]
    assert watcher.pods()["a"] == kept


def test_vanished_pods_become_tombstones(watcher: Watcher) -> None:
    """After the retention nothing but the tombstone is left, and a restart does not bring it back."""
    watcher.write(pod("a", uid=watcher.uid("a")), pod("b", uid=watcher.uid("b")))
    watcher.start(PODWIRE_HISTORY_RETENTION_HOURS="0.0003")
    until(watcher.healthy)
    watcher.write(pod("a", uid=watcher.uid("a")))
    until(lambda: "b" in (found := watcher.pods()) and found["b"] is None)
    watcher.stop()
    watcher.start()
    until(watcher.healthy)
    assert watcher.pods()["b"] is None
    assert watcher.pods()["a"] is not None


def test_second_watcher_of_a_cluster_fences_the_first(watcher: Watcher, tmp_path: Path) -> None:
    """Only one writes: the older ends with its own exit code and can't overwrite what the newer knows."""
    watcher.write(pod("a", uid=watcher.uid("a")))
    watcher.start()
    until(watcher.healthy)
    (tmp_path / "second").mkdir()
    second = Watcher(watcher.bootstrap, tmp_path / "second")
    second.cluster = second.prefix = watcher.cluster
    second.write(pod("a", uid=watcher.uid("a")))
    second.start()
    try:
        until(second.healthy)
        assert watcher.process is not None
        assert watcher.process.wait(30) == 23
    finally:
        second.stop()


def test_start_order_does_not_matter(tmp_path: Path) -> None:
    """Before Kafka, topics and manifests exist it waits and says so; then it goes on by itself."""
    kafka = Broker(tmp_path / "kafka")
    watcher = Watcher(kafka.bootstrap, tmp_path)
    watcher.start()
    try:
        until(lambda: b"waiting" in watcher.log.read_bytes())
        assert not watcher.healthy()
        kafka.start()
        until(lambda: b"podwire topics create" in watcher.log.read_bytes())
        topics.create(kafka.bootstrap, partitions=4)
        until(lambda: b"manifests_unreadable" in watcher.log.read_bytes())
        watcher.write(pod("a", uid=watcher.uid("a")))
        until(watcher.healthy)
        until(lambda: set(watcher.pods()) == {"a"})
        assert watcher.stop() == 0
    finally:
        if watcher.process is not None:
            watcher.process.kill()
        kafka.stop()


def test_broker_that_was_away_gets_everything_afterwards(tmp_path: Path) -> None:
    """A broker killed and started again finds the same watcher, with all that happened meanwhile."""
    kafka = Broker(tmp_path / "kafka")
    kafka.start()
    topics.create(kafka.bootstrap, partitions=4)
    watcher = Watcher(kafka.bootstrap, tmp_path)
    watcher.write(pod("a", uid=watcher.uid("a")))
    watcher.start()
    try:
        until(watcher.healthy)
        kafka.kill()
        for present in (1, 2, 1):
            watcher.write(*(pod(name, uid=watcher.uid(name)) for name in ("a", "b")[:present]))
            until(lambda present=present: watcher.present_pods() == present)
        kafka.start()
        short_lived = watcher.pod_until("b", lambda one: one["valid_to_us"] is not None)
        assert short_lived["addresses"][0]["to_latest_us"] is not None
        assert watcher.healthy()
        assert watcher.stop() == 0
    finally:
        if watcher.process is not None:
            watcher.process.kill()
        kafka.stop()


def test_stop_does_not_wait_for_kafka(tmp_path: Path) -> None:
    """SIGTERM while it waits for a broker that never comes ends it in order."""
    watcher = Watcher(f"127.0.0.1:{free_port()}", tmp_path)
    watcher.start()
    until(lambda: b"waiting" in watcher.log.read_bytes())
    assert watcher.stop() == 0


def test_wrong_settings_end_with_their_exit_code(tmp_path: Path) -> None:
    """Nothing is touched before the settings are right."""
    watcher = Watcher("127.0.0.1:1", tmp_path)
    watcher.start(PODWIRE_CLUSTER="")
    assert watcher.process is not None
    assert watcher.process.wait(30) == 20
    assert "cluster" in watcher.log.read_text()


def test_api_server_becomes_records(watcher: Watcher, tmp_path: Path) -> None:
    """The same from list and watch, with a kubeconfig, a lapse of versions, and watermarks in a quiet kind."""
    server = ApiServer()
    for item in (
        pod("a", uid=watcher.uid("a")),
        service("s", uid=watcher.uid("s")),
        node("n", uid=watcher.uid("n")),
    ):
        server.put(item)
    context = {"name": "c", "context": {"cluster": "c", "user": "u"}}
    kubeconfig = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "c",
        "clusters": [{"name": "c", "cluster": {"server": server.url}}],
        "users": [{"name": "u", "user": {"token": "t"}}],
        "contexts": [context],
    }
    (tmp_path / "kubeconfig").write_text(json.dumps(kubeconfig))
    watcher.start("--kubeconfig", str(tmp_path / "kubeconfig"), "--watch-quiet-ms", "300")
    try:
        until(watcher.healthy)
        server.put(pod("b", uid=watcher.uid("b"), ip="10.1.0.6"))
        watcher.pod_until("b", lambda one: one["node"] == "node-1")
        with server.changed:
            server.delete("pods", watcher.uid("a"))
            server.forget()
        watcher.pod_until("a", lambda one: one["valid_to_us"] is not None)
        changed_us = time.time_ns() // 1000
        until(
            lambda: (
                watcher.watermarks().get("services", {"complete_until_us": 0})["complete_until_us"]
                > changed_us
            )
        )
        assert watcher.stop() == 0
    finally:
        server.close()
