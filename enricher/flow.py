"""Makes the bytes of a Flow: identities encoded once and remembered, measurements spliced from the raw halves.

Pure but for its caches. The order of the parts is the field order of schemas/Flow.avsc; a property test
re-encodes every kind of flow with fastavro and compares the bytes. Called by `engine`.
"""

from __future__ import annotations

from functools import lru_cache
from hashlib import blake2b
from typing import TYPE_CHECKING, NamedTuple

from enricher import avro, raw, resolve
from enricher.networks import parsed, scope
from schemas import codec

if TYPE_CHECKING:
    from enricher.history import History, ServicePort
    from enricher.networks import Networks
    from enricher.pair import Pair
    from enricher.raw import Half
    from enricher.resolve import Resolution

RECORD_TYPES = {
    raw.CONNECT: "OPEN",
    raw.ACCEPT: "OPEN",
    raw.CONNECT_FAILED: "FAILED",
    raw.CLOSE: "CLOSE",
    raw.EXISTING: "EXISTING",
    raw.PROGRESS: "PROGRESS",
}
OUTCOMES = (
    "UNKNOWN",
    "ESTABLISHED",
    "REFUSED",
    "TIMEOUT",
    "UNREACHABLE",
    "ABORTED",
    "CLOSED",
    "RESET",
    "OTHER",
)
OWNERS = ("UNKNOWN", "NONE", "PROCESS", "CGROUP", "NAMESPACE")
_CLOSED_BY = {  # by what the half's closed_by byte says: (from the client's half, from the server's)
    4: ("CLIENT", "SERVER"),  # LOCAL
    6: ("SERVER", "CLIENT"),  # REMOTE
    8: ("BOTH", "BOTH"),
    10: ("TIMER", "TIMER"),
}
_PLAIN_CLOSES = frozenset(("UNKNOWN", "CLOSED"))
_NO_SERVICE = avro.NULL * 4
_CACHE = 200_000

_OUTCOME_BYTES = {2 * place: name for place, name in enumerate(OUTCOMES)}
_OWNER_BYTES = {2 * place: avro.optional_text(name) for place, name in enumerate(OWNERS)}

_UNOBSERVED_SIDE_RUN = avro.NULL * 14
_UNOBSERVED_SIDE_END = avro.NULL * 8
_STAYS, _CROSSES = avro.PRESENT + b"\x00", avro.PRESENT + b"\x01"


class Flow(NamedTuple):
    """One record for podwire.flows.v1.

    Attributes:
        key: flow_id in ASCII.
        value: framed Avro.
        event_ms: when it happened, Unix time in ms on the node's clock.
        kinds: how client and server were resolved.
        grades: how good the answers for client and server are, as `Resolution.grade`; None when both are settled.
    """

    key: bytes
    value: bytes
    event_ms: int
    kinds: tuple[str, str]
    grades: tuple[int, int] | None


class Moment(NamedTuple):
    """When flows are made (Unix time in ms), with emitted_at and metadata_age_ms encoded once for many."""

    now_ms: int
    encoded: bytes

    @classmethod
    def at(cls, now_ms: int, pods_complete_until_us: int | None) -> Moment:
        """Return the moment `now_ms` (Unix time in ms) with metadata complete until a time in us."""
        age_ms = None if pods_complete_until_us is None else now_ms - pods_complete_until_us // 1000
        return cls(now_ms, avro.long(now_ms) + avro.optional_long(age_ms))


def cluster_prefix(cluster: str) -> str:
    """Return the 8 hex digits that begin every flow_id of a cluster."""
    return blake2b(cluster.encode(), digest_size=4).hexdigest()


class FlowBuilder:
    """Builds the flows of one cluster.

    Attributes:
        cluster: its name.
    """

    def __init__(
        self, cluster: str, schema_id: int, history: History, networks: Networks, resolver: resolve.Resolver
    ) -> None:
        self.cluster = cluster
        self._prefix = codec.prefix(schema_id)
        self._cluster = avro.text(cluster)
        self._flow_id_start = cluster_prefix(cluster).encode() + b"-"
        self._history = history
        self._resolver = resolver

        self._network = networks.name
        self._front = lru_cache(maxsize=_CACHE)(encode_front)

    def build(self, pair: Pair, moment: Moment, *, final: bool, revision: int = 0) -> Flow | None:
        """Return the flow of a pair; None when metadata to come could better it and `final` is false.

        A corrected record, `revision` above 0, must be settled unless `final`: see `Resolution.grade`.
        """
        client, server = pair
        first = client or server
        assert first is not None
        as_of_us = first.as_of_us
        service, client_address, client_is, server_address, server_is = self._ends(client, server, as_of_us)
        dialed_at = b"" if client is None else client.data[raw.REMOTE]
        late = service is None and self._may_be_a_service(dialed_at, server, server_is, as_of_us)
        grades = None
        if late or client_is.correctable or server_is.correctable:
            if not final and (revision or late or client_is.provisional or server_is.provisional):
                return None
            grades = (client_is.grade, resolve.LATE.grade if late else server_is.grade)

        data = first.data
        record_type = RECORD_TYPES[data[raw.TYPE_AT]]
        observed_by = "CLIENT" if server is None else "SERVER" if client is None else "BOTH"
        outcome, closed_by = _end(client, server) if record_type == "CLOSE" else (_outcome(first), None)
        key_text = data[:8].hex().encode()
        flow_id = self._flow_id_start + key_text
        time_ms = first.event_unix_us // 1000
        value = b"".join(
            (
                self._prefix,
                avro.cached_long(time_ms),
                data[raw.TIME_AT : raw.TIME_AT + 8],
                _what(record_type, observed_by),
                self._cluster,
                b"\x32",  # 25 characters
                flow_id,
                b"\x20",  # 16 characters
                key_text,
                data[comm_end(data) : first.port_at],  # progress_seq
                avro.cached_long(revision),
                moment.encoded,
                _how(resolve.direction(client_is, server_is), outcome, closed_by),
                data[first.flow_run_at : first.side_run_at],
                _dialed(client, service),
                _source_nat(client, server),
                self._front(client_address, client_is, self._network(client_address)),
                _side(client),
                self._front(server_address, server_is, self._server_network(server_address, dialed_at)),
                _side(server),
                _cross_namespace(client_is, server_is, service),
            )
        )
        return Flow(flow_id, value, time_ms, (client_is.kind, server_is.kind), grades)

    def _ends(
        self, client: Half | None, server: Half | None, as_of_us: int
    ) -> tuple[ServicePort | None, bytes, Resolution, bytes, Resolution]:
        """Return the dialled Service, and who and at which address the client and the server were."""
        service: ServicePort | None = None
        dialed_at = b""
        answered = True
        if client is not None:
            data = client.data
            dialed_at = data[raw.REMOTE]
            dialed_port, _ = avro.read_long(data, client.port_at)
            service = self._history.service(dialed_at, dialed_port, as_of_us)
            client_address = data[raw.LOCAL]
            client_is = self._resolver.own(client)
            answered = data[raw.TYPE_AT] != raw.CONNECT_FAILED
        else:
            assert server is not None
            client_address = server.data[raw.REMOTE]
            client_is = self._resolver.unobserved(client_address, as_of_us, answered=True)
        if server is not None:
            return service, client_address, client_is, server.data[raw.LOCAL], self._resolver.own(server)
        server_is = resolve.SERVICE_ONLY
        if service is None:
            server_is = self._resolver.unobserved(dialed_at, as_of_us, answered=answered)
        return service, client_address, client_is, dialed_at, server_is

    def _may_be_a_service(
        self, dialed_at: bytes, server: Half | None, server_is: Resolution, as_of_us: int
    ) -> bool:
        """Return whether NAT, or nobody to be found, may be the work of a Service that isn't known yet."""
        if not dialed_at or server_is is resolve.EXTERNAL:
            return False
        led_on = server is None or server.data[raw.LOCAL] != dialed_at
        return led_on and not self._history.is_complete("services", as_of_us)

    def _server_network(self, address: bytes, dialed_at: bytes) -> str | None:
        """Return the network of the server's address, else that of the one which NAT led there from."""
        network = self._network(address)
        return self._network(dialed_at) if network is None and dialed_at not in (b"", address) else network


def comm_end(data: bytes) -> int:
    """Return where comm ends and progress_seq begins."""
    return raw.COMM_AT + 1 + (data[raw.COMM_AT] >> 1)


@lru_cache(maxsize=64)
def _what(record_type: str, observed_by: str) -> bytes:
    return avro.text(record_type) + avro.text(observed_by)


@lru_cache(maxsize=1024)
def _how(direction: str, outcome: str, closed_by: str | None) -> bytes:
    return avro.text(direction) + avro.text(outcome) + avro.optional_text(closed_by)


@lru_cache(maxsize=_CACHE)
def _address(address: bytes) -> bytes:
    return avro.optional_text(str(parsed(address)))


@lru_cache(maxsize=4096)
def _process(comm: bytes) -> bytes:
    r"""Return the process name as UTF-8, each byte that is not part of UTF-8 as \xNN; null when empty."""
    return avro.optional_text(comm.decode("utf-8", "backslashreplace") or None)


@lru_cache(maxsize=4096)
def _service(service: ServicePort) -> bytes:
    return b"".join(
        avro.optional_text(value)
        for value in (service.namespace, service.service, service.port_name, service.via)
    )


def _dialed(client: Half | None, service: ServicePort | None) -> bytes:
    if client is None:
        return avro.NULL * 2 + _NO_SERVICE
    port = client.data[client.port_at : client.flow_run_at]
    about = _NO_SERVICE if service is None else _service(service)
    return _address(client.data[raw.REMOTE]) + avro.PRESENT + port + about


def _source_nat(client: Half | None, server: Half | None) -> bytes:
    """Return source_nat_address and source_nat_port, from comparing bytes: one number has one encoding."""
    if client is None or server is None:
        return b"\x00\x00"
    seen = server.data[raw.REMOTE]
    seen_port = avro.PRESENT + server.data[server.port_at : server.flow_run_at]
    same_address = seen == client.data[raw.LOCAL]
    if same_address and client.data.startswith(seen_port, client.side_run_at):
        return b"\x00\x00"
    return (avro.NULL if same_address else _address(seen)) + seen_port


def encode_front(address: bytes, side: Resolution, network: str | None) -> bytes:
    """Return a side's fields from its address to its labels."""
    pod = side.pod
    container = pod.containers.get(side.container_id) if pod else None
    named = side.container_id if side.container_id != resolve.NO_CONTAINER else None
    optional = avro.optional_text
    return b"".join(
        (
            _address(address),
            avro.text(scope(address)),
            avro.text(side.kind),
            optional(side.reason),
            avro.optional_long(side.candidates),
            optional(network),
            optional(pod.namespace if pod else None),
            optional(pod.name if pod else None),
            optional(pod.uid if pod else None),
            optional(pod.workload_kind if pod else None),
            optional(pod.workload if pod else None),
            optional(side.node),
            optional(pod.service_account if pod else None),
            optional(container.name if container else None),
            optional(named.hex() if named else None),
            optional(container.image if container else None),
            avro.text_map(pod.labels if pod else {}),
        )
    )


def _side(half: Half | None) -> bytes:
    """Return a side's fields from its process to its clock_error_us."""
    if half is None:
        return avro.NULL + _UNOBSERVED_SIDE_RUN + _UNOBSERVED_SIDE_END
    data = half.data
    header = half.header
    return b"".join(
        (
            _process(data[raw.COMM_AT + 1 : comm_end(data)]),
            data[half.side_run_at :],
            _OWNER_BYTES[data[raw.OWNER_AT]],
            avro.PRESENT,
            data[raw.TIME_AT : raw.TIME_AT + 8],
            header.run_before_index,
            avro.cached_optional_long(half.index),
            header.run_after_index,
        )
    )


def _cross_namespace(client: Resolution, server: Resolution, service: ServicePort | None) -> bytes:
    """Return Flow's last field; a Service whose backend nobody saw speaks for its backend's namespace."""
    there = server.pod.namespace if server.pod else None
    if service is not None and server is resolve.SERVICE_ONLY:
        there = service.namespace
    if client.pod is None or there is None:
        return avro.NULL
    return _CROSSES if client.pod.namespace != there else _STAYS


def _outcome(half: Half) -> str:
    return _OUTCOME_BYTES[half.data[raw.OUTCOME_AT]]


def _end(client: Half | None, server: Half | None) -> tuple[str, str]:
    """Return outcome and closed_by of a CLOSE; where the sides differ, the one that says more counts.

    Each end believing that it closed first is what crossing FINs look like: BOTH.
    """
    outcome = "UNKNOWN"
    for half in (client, server):
        if half is not None and outcome in _PLAIN_CLOSES:
            outcome = _outcome(half) if _outcome(half) != "UNKNOWN" else outcome
    by_client = _CLOSED_BY.get(client.data[raw.CLOSED_BY_AT], _UNKNOWN_CLOSER)[0] if client else "UNKNOWN"
    by_server = _CLOSED_BY.get(server.data[raw.CLOSED_BY_AT], _UNKNOWN_CLOSER)[1] if server else "UNKNOWN"
    if by_client == "CLIENT" and by_server == "SERVER":
        return outcome, "BOTH"
    return outcome, by_client if by_client != "UNKNOWN" else by_server


_UNKNOWN_CLOSER = ("UNKNOWN", "UNKNOWN")
