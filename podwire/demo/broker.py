"""A real Apache Kafka on loopback from the jars in build/kafka (KRaft, one process a broker), for demo and tests.

Owns the brokers' processes and data folders. Never creates topics. Where a Docker engine has Kafka's image,
the demo (`podwire.demo.compose`) and the tests (`tests.conftest`) use that instead.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient

from podwire.demo.errors import BrokerError

if TYPE_CHECKING:
    from collections.abc import Mapping

ROOT = Path(__file__).parents[2]
JARS = ROOT / "build" / "kafka" / "libs"
LOG4J = ROOT / "deploy" / "kafka" / "log4j2.properties"
DEMO_PORT = 29092
"""Where `podwire observe` looks unless it is told otherwise."""

CLUSTER_ID = "podwire-local-kafka-01"
START_SECONDS_MAX = 90.0

PROPERTIES = """\
process.roles=broker,controller
node.id={number}
controller.quorum.voters={voters}
listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller}
advertised.listeners=PLAINTEXT://127.0.0.1:{port}
controller.listener.names=CONTROLLER
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT
log.dirs={data}
num.partitions=4
offsets.topic.num.partitions=4
offsets.topic.replication.factor={replicas}
transaction.state.log.num.partitions=4
transaction.state.log.replication.factor={replicas}
transaction.state.log.min.isr={in_sync}
min.insync.replicas={in_sync}
group.initial.rebalance.delay.ms=0
auto.create.topics.enable=false
log.segment.delete.delay.ms=1000
"""


def free_port(preferred: int = 0) -> int:
    """Return a TCP port on 127.0.0.1 that was free a moment ago: the preferred one if it was."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections in TIME_WAIT do not count
        try:
            probe.bind(("127.0.0.1", preferred))
        except OSError:
            return free_port()
        return int(probe.getsockname()[1])


def answers(bootstrap: str) -> bool:
    """Return whether a broker answers there within a second."""
    try:
        AdminClient({"bootstrap.servers": bootstrap, "log_level": 0}).list_topics(timeout=1)
    except KafkaException:
        return False
    return True


class Broker:
    """One Kafka broker and its controller in one Java process.

    Attributes:
        number: its id in the cluster.
        bootstrap: what clients connect to, "127.0.0.1:PORT"; the same after a restart.
    """

    def __init__(
        self,
        folder: Path,
        port: int = 0,
        heap_mbytes: int = 512,
        *,
        number: int = 1,
        controllers: Mapping[int, int] | None = None,
    ) -> None:
        """Make one that is not started; `controllers` are the controller ports of a cluster's brokers by number."""
        self._folder = folder
        self._heap_mbytes = heap_mbytes
        self.port = port or free_port()
        self.number = number
        self._controllers = controllers or {number: free_port()}
        self.bootstrap = f"127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """Process id of the running broker, None when it does not run."""
        return self._process.pid if self._process and self._process.poll() is None else None

    def start(self) -> None:
        """Start the broker, formatting its folder the first time, and return once it answers; BrokerError if not."""
        self.launch()
        self.await_answer()

    def launch(self) -> None:
        """Start the broker and return at once; BrokerError when its folder can't be formatted."""
        if not any(JARS.glob("kafka_*.jar")):
            raise BrokerError("Kafka's jars are not in build/kafka: run `make kafka` first.")
        self._folder.mkdir(parents=True, exist_ok=True)
        data, properties = self._folder / "data", self._folder / "server.properties"
        properties.write_text(
            PROPERTIES.format(
                number=self.number,
                port=self.port,
                controller=self._controllers[self.number],
                voters=",".join(f"{number}@127.0.0.1:{port}" for number, port in self._controllers.items()),
                replicas=len(self._controllers),
                in_sync=len(self._controllers) // 2 + 1,
                data=data,
            ),
            encoding="ascii",
        )
        if not (data / "meta.properties").exists():
            format_ = ("kafka.tools.StorageTool", "format", "-t", CLUSTER_ID, "-c", str(properties))
            done = subprocess.run(self._java(*format_), capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise BrokerError(f"Kafka's storage could not be formatted: {done.stdout}{done.stderr}")
        with (self._folder / "kafka.log").open("ab") as log:
            self._process = subprocess.Popen(
                # Whatever ends the thread that starts the broker ends the broker.
                ["setpriv", "--pdeathsig", "KILL", "--", *self._java("kafka.Kafka", str(properties))],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _java(self, *arguments: str) -> list[str]:
        options = [f"-Xmx{self._heap_mbytes}m", "-XX:+UseSerialGC", f"-Dlog4j2.configurationFile={LOG4J}"]
        return [os.environ.get("JAVA", "java"), *options, "-cp", f"{JARS}/*", *arguments]

    def await_answer(self) -> None:
        """Return once the broker answers; BrokerError if it ends or takes too long."""
        assert self._process is not None
        deadline = time.monotonic() + START_SECONDS_MAX
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                break
            if answers(self.bootstrap):
                return
        tail = (self._folder / "kafka.log").read_text(errors="replace")[-2000:]
        raise BrokerError(f"Kafka did not answer on {self.bootstrap}. The end of its log:\n{tail}")

    def stop(self) -> None:
        """Stop the broker in an orderly way; kill it when it does not within 20 s."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """Kill the broker at once, as a crash would."""
        self._end(signal.SIGKILL)

    def _end(self, how: signal.Signals) -> None:
        if self._process is None:
            return
        self._process.send_signal(how)
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None
