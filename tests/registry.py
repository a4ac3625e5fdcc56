"""A real schema registry on loopback, from what `make registry` fetched: Apicurio by its Confluent-compatible API.

Owns the process and its data, which outlive a kill. Started only where a test needs it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import urllib.request
from pathlib import Path

from confluent_kafka.schema_registry import Schema, SchemaRegistryClient

from podwire.demo.broker import free_port
from schemas import catalog, codec
from tests.waiting import until

UNPACKED = Path(__file__).parents[1] / "build" / "registry"
START_SECONDS_MAX = 120.0
OTHERS = 10
"""Schemas of others that are there before ours, so that no id is the catalog's."""


class Registry:
    """The registry.

    Attributes:
        url: what PODWIRE_REGISTRY_URL takes; the same after a restart.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._port = free_port()
        self.url = f"http://127.0.0.1:{self._port}/apis/ccompat/v7"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, unless it runs, and return once it answers."""
        if self._process is not None:
            return
        runners = list(UNPACKED.glob("*-runner.jar"))
        assert runners, "no registry in build/registry: run `make registry` first"
        self._folder.mkdir(parents=True, exist_ok=True)
        settings = {
            "quarkus.http.host": "127.0.0.1",
            "quarkus.http.port": self._port,
            "apicurio.datasource.url": f"jdbc:h2:file:{self._folder}/data;WRITE_DELAY=0",
        }
        java = [os.environ.get("JAVA", "java"), "-Xmx256m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"]
        options = [f"-D{name}={value}" for name, value in settings.items()]
        with (self._folder / "registry.log").open("ab") as log:
            self._process = subprocess.Popen(
                # Whatever ends the thread that starts the registry ends the registry.
                ["setpriv", "--pdeathsig", "KILL", "--", *java, *options, "-jar", str(runners[0])],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        until(self._answers, "the registry answers", START_SECONDS_MAX, self._last_words)

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, f"the registry has ended: {self._last_words()}"
        try:
            with urllib.request.urlopen(f"{self.url}/subjects", timeout=5):
                return True
        except OSError:
            return False

    def _last_words(self) -> str:
        return (self._folder / "registry.log").read_text(errors="replace")[-2000:]

    def stop(self) -> None:
        """End it in an orderly way."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """Kill it at once."""
        self._end(signal.SIGKILL)

    def _end(self, how: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(how)
            self._process.wait(30)
            self._process = None

    def register(self, subject: str, schema: str, kind: str = "AVRO") -> int:
        """Register a schema under a subject and return its id."""
        with SchemaRegistryClient({"url": self.url}) as client:
            return client.register_schema(subject, Schema(schema, kind))


class Registered(Registry):
    """A registry with our schemas.

    Attributes:
        ids: their ids by topic.
    """

    ids: dict[str, int]

    def start(self) -> None:
        """Start it, and the first time register the value schemas of all topics, after some of others."""
        super().start()
        if hasattr(self, "ids"):
            return
        for number in range(OTHERS):
            self.register(f"other-{number}", f'{{"type": "fixed", "name": "Other", "size": {number + 1}}}')
        self.ids = {
            topic.name: self.register(f"{topic.name}-value", codec.text(topic.schema))
            for topic in catalog.TOPICS
        }

    def new_raw_schema(self, field: str) -> int:
        """Register RawBatch with one more optional field, as a later version of ours would be; return its id."""
        schema = json.loads(codec.text(catalog.RAW.schema))
        new = {"name": field, "type": ["null", "string"], "default": None, "doc": "new"}
        schema["fields"].insert(-1, new)  # the checksum stays last
        return self.register(f"{catalog.RAW.name}-value", json.dumps(schema))
