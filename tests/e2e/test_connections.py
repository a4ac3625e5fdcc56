"""Connections of every kind, made by pods, come out once, with the right pods, processes, bytes and errno."""

from __future__ import annotations

import io
import json
import signal
import subprocess
from typing import TYPE_CHECKING, Any

import avro.io
import avro.schema
import pytest
from confluent_kafka import Consumer, TopicPartition

from podwire.demo.lab import Port
from schemas import catalog, codec
from tests.pipeline import Pipeline, need_root_and_btf, program, said_by, serve

if TYPE_CHECKING:
    from collections.abc import Iterator

    from podwire.demo.lab import Pod
    from podwire.flows import Flow

OPEN_AND_CLOSE = {("OPEN", "BOTH"), ("CLOSE", "BOTH")}
PORT = 8080
SNAT_PORTS = (61000, 61999)


class Shop(Pipeline):
    """A client, two servers of one workload, and three Services in front of them."""

    def build(self) -> None:
        """Make pods and Services, start servers and Podwire's services."""
        lab = self.lab
        self.client = lab.pod("buyer-6d8f9c4b7-x7k2p", "shop", deployment="buyer", container="buyer")
        self.servers = [
            lab.pod(f"till-5b9c7d6f8-{suffix}", "shop", deployment="till") for suffix in ("aaaaa", "bbbbb")
        ]
        self.plain = lab.service("till", self.servers, (Port(80, PORT, "http"), Port(81)), namespace="shop")
        self.snat = lab.service(
            "till-snat", self.servers[:1], (Port(443, PORT),), namespace="shop", snat_ports=SNAT_PORTS
        )
        self.six = lab.service("till-six", self.servers, (Port(80, PORT),), namespace="shop", family=6)
        self.write_manifests()
        for server in self.servers:
            serve(server, "till", PORT)
        self.run()


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    """The shop, with everything running."""
    need_root_and_btf()
    with Shop("e2e", tmp_path_factory.mktemp("shop")) as shop:
        shop.build()
        yield shop


def check_client(flow: Flow, pod: Pod, process: str, said: dict[str, Any]) -> None:
    """Compare the client's side of a flow with the pod and what its program said."""
    assert flow["client_resolution"] == "SOCKET"
    assert flow["client_pod_uid"] == pod.uid
    assert flow["client_pod"] == pod.name
    assert flow["client_namespace"] == pod.namespace
    assert flow["client_container_id"] == pod.container_id
    assert flow["client_process"] == process
    assert flow["client_pid"] == said["pid"]
    assert flow["client_netns_ino"] == pod.netns_ino
    assert flow["client_workload"] == "buyer"
    assert flow["client_workload_kind"] == "Deployment"


def check_server(flow: Flow, pods: list[Pod]) -> None:
    """Compare the server's side with the pods, one of which it must be."""
    assert flow["server_resolution"] == "SOCKET"
    pod = next(pod for pod in pods if pod.uid == flow["server_pod_uid"])
    assert flow["server_address"] in (pod.ip, pod.ip6)
    assert flow["server_port"] == PORT
    assert flow["server_process"] == "till"
    assert flow["server_netns_ino"] == pod.netns_ino
    assert flow["server_container_id"] == pod.container_id


def check_pair(flows: list[Flow], said: dict[str, Any]) -> None:
    """One OPEN and one CLOSE, both two-sided; bytes equal to what the programs moved, on both sides."""
    assert sorted((flow["record_type"], flow["observed_by"]) for flow in flows) == sorted(OPEN_AND_CLOSE)
    assert len({flow["flow_id"] for flow in flows}) == 1
    close = next(flow for flow in flows if flow["record_type"] == "CLOSE")
    assert close["client_bytes_sent"] == close["server_bytes_received"] == said["sent"]
    assert close["client_bytes_received"] == close["server_bytes_sent"] == said["received"]
    assert close["errno"] == 0


@pytest.mark.parametrize("which", ["plain", "snat", "six", "direct", "direct_six"])
def test_connection_comes_out_once_opened_and_once_closed(shop: Shop, which: str) -> None:
    """Through DNAT with masquerade, SNAT to another port, IPv6, and straight to the pod."""
    server = shop.servers[0]
    address, port = {
        "plain": (shop.plain, 80),
        "snat": (shop.snat, 443),
        "six": (shop.six, 80),
        "direct": (server.ip, PORT),
        "direct_six": (server.ip6, PORT),
    }[which]
    options = {"address": address, "count": 3, "send": 70_000, "receive": 200_000}
    said = said_by(shop.client, program("talk", "buy", port, **options))
    found = shop.settled(shop.client, said, OPEN_AND_CLOSE)
    for one in said:
        flows = found[one["port"]]
        check_pair(flows, one)
        for flow in flows:
            check_client(flow, shop.client, "buy", one)
            check_server(flow, shop.servers if which in ("plain", "six") else [server])
            assert flow["dialed_address"] == address
            assert flow["dialed_port"] == port
            assert flow["direction"] in ("INTERNAL", "NODE_LOCAL")
            name = {"plain": "till", "snat": "till-snat", "six": "till-six"}.get(which)
            assert flow["service_name"] == name
            assert flow["service_namespace"] == ("shop" if name else None)
            if which == "snat":
                assert SNAT_PORTS[0] <= flow["source_nat_port"] <= SNAT_PORTS[1]
                assert flow["source_nat_port"] != flow["client_port"]
            if which in ("direct", "direct_six"):
                assert flow["source_nat_address"] is None


def test_refused_connection_comes_out_once_as_failed(shop: Shop) -> None:
    """A port that nobody listens on: REFUSED with ECONNREFUSED, the Service still named."""
    said = said_by(shop.client, program("fail", "hope", 81, address=shop.plain))
    assert said[0]["errno"] == 111
    flows = shop.settled(shop.client, said, {("FAILED", "CLIENT")})[said[0]["port"]]
    assert len(flows) == 1
    check_client(flows[0], shop.client, "hope", said[0])
    assert (flows[0]["outcome"], flows[0]["errno"]) == ("REFUSED", 111)
    assert flows[0]["service_name"] == "till"


def test_connection_into_a_black_hole_comes_out_as_timed_out(shop: Shop) -> None:
    """No answer at all: TIMEOUT with ETIMEDOUT, from the kernel's timer, still with the client's process."""
    pod = shop.client
    rules = ["nft", "-f", "-"]
    drop = "table inet hole { chain out { type filter hook output priority 0; tcp dport 7777 drop; }; }"
    namespace = ["ip", "netns", "exec", pod.netns]
    subprocess.run([*namespace, *rules], input=drop, text=True, check=True)
    said = said_by(pod, program("fail", "lost", 7777, address=shop.servers[0].ip, syn_count=1))
    subprocess.run([*namespace, "nft", "delete", "table", "inet", "hole"], check=True)
    assert said[0]["errno"] == 110
    flows = shop.settled(pod, said, {("FAILED", "CLIENT")})[said[0]["port"]]
    assert len(flows) == 1
    check_client(flows[0], pod, "lost", said[0])
    assert (flows[0]["outcome"], flows[0]["errno"]) == ("TIMEOUT", 110)
    assert flows[0]["server_pod_uid"] == shop.servers[0].uid


def test_killed_client_is_closed_with_its_process_on_record(shop: Shop) -> None:
    """A client that dies by SIGKILL: the kernel closes its socket, and the CLOSE still names the process."""
    client = shop.client.popen(program("hold", "doomed", 80, address=shop.plain), stdout=subprocess.PIPE)
    assert client.stdout is not None
    said = [json.loads(client.stdout.readline())]
    client.send_signal(signal.SIGKILL)
    client.wait()
    flows = shop.settled(shop.client, said, OPEN_AND_CLOSE)[said[0]["port"]]
    check_pair(flows, said[0])
    for flow in flows:
        check_client(flow, shop.client, "doomed", said[0])
        check_server(flow, shop.servers)
    close = next(flow for flow in flows if flow["record_type"] == "CLOSE")
    assert close["closed_by"] == "CLIENT"


def test_burst_of_connections_is_complete(shop: Shop) -> None:
    """2,000 connections in a burst: each once as OPEN and once as CLOSE, two-sided, none lost in the kernel."""
    options = {"address": shop.plain, "count": 2000, "at_once": 200, "send": 10, "receive": 10}
    said = said_by(shop.client, program("talk", "burst", 80, **options))
    assert len({one["port"] for one in said}) == 2000
    found = shop.settled(shop.client, said, OPEN_AND_CLOSE, 120)
    for one in said:
        check_pair(found[one["port"]], one)
        for flow in found[one["port"]]:
            check_client(flow, shop.client, "burst", one)
            check_server(flow, shop.servers)
    assert (
        'podwire_node_lost_events_total{reason="ring_full"} 0.0' in shop.services.processes["node"].metrics()
    )


def test_new_pod_is_named_from_its_first_connection(shop: Shop) -> None:
    """A pod that the watcher learns of while its first connection is under way is named all the same."""
    pod = shop.lab.pod("late-6d8f9c4b7-zzzzz", "shop", deployment="late")
    said = said_by(pod, program("talk", "early", 80, address=shop.plain))
    shop.write_manifests()
    flows = shop.settled(pod, said, OPEN_AND_CLOSE)[said[0]["port"]]
    assert {flow["client_pod"] for flow in flows} == {pod.name}
    assert {flow["client_resolution"] for flow in flows} == {"SOCKET"}


@pytest.mark.parametrize("topic", [catalog.RAW, catalog.FLOWS], ids=lambda topic: topic.name)
def test_message_decodes_with_a_stock_avro_library(shop: Shop, topic: catalog.Topic) -> None:
    """The `.avsc` and the bytes after the prefix are enough for a foreign reader, raw and enriched."""
    schema = avro.schema.parse(codec.text(topic.schema))
    consumer = Consumer({"bootstrap.servers": shop.broker.bootstrap, "group.id": "stock"})
    consumer.assign([TopicPartition(topic.name, partition, 0) for partition in range(4)])
    messages = consumer.consume(50, 30)
    consumer.close()
    assert messages
    for message in messages:
        schema_id, payload = codec.split(message.value())
        assert schema_id == topic.schema_id
        record = avro.io.DatumReader(schema).read(avro.io.BinaryDecoder(io.BytesIO(payload)))
        assert record["cluster"] == shop.name
        if topic is catalog.RAW:
            assert len(record["events"]) == len(record["event_sizes"])
