"""The programs that run inside the demo's pods: a shop's web front and its API.

A script of its own without any import from Podwire: the pods know nothing of it. Started by
`podwire.demo.run` inside a pod.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import signal
import socket
import sys
import time

PR_SET_NAME = 15
TIMEOUT_SECONDS = 3.0
REFUSED_EVERY, REFUSED_AT = 15, 4
ANSWER = b"HTTP/1.0 200 OK\r\nContent-Type: application/json\r\n\r\n" + b'{"orders": []}' * 20


def serve(port: int) -> None:
    """Answer one request per connection, for ever; says "listening" when it does."""
    with socket.create_server(
        ("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=128
    ) as server:
        print("listening", flush=True)
        while True:
            connection, _ = server.accept()
            with connection:
                connection.settimeout(TIMEOUT_SECONDS)
                try:
                    connection.recv(4096)
                    connection.sendall(ANSWER)
                except OSError:
                    continue  # this caller went away; the next one counts


def ask(address: str, port: int, refused_port: int, interval_ms: int) -> None:
    """Ask for orders on a new connection every interval; now and then dial a port that refuses."""
    for number in itertools.count():
        wrong = number % REFUSED_EVERY == REFUSED_AT
        try:
            request(address, refused_port if wrong else port, number)
        except OSError as error:
            print(f"request {number}: {error}", file=sys.stderr, flush=True)
        time.sleep(interval_ms / 1000)  # the pace of the traffic, for eyes


def request(address: str, port: int, number: int) -> None:
    """Make one request and read its answer to the end; OSError when that fails."""
    with socket.create_connection((address, port), TIMEOUT_SECONDS) as connection:
        connection.sendall(b"GET /orders/%d HTTP/1.0\r\nHost: api.shop\r\n\r\n" % number)
        while connection.recv(65536):
            pass


def main() -> None:
    """Become the named process and play its part until SIGTERM."""
    parser = argparse.ArgumentParser()
    parser.add_argument("part", choices=("serve", "ask"))
    parser.add_argument("--process-name", required=True)
    parser.add_argument("--address", default="")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--refused-port", type=int, default=0)
    parser.add_argument("--interval-ms", type=int, default=200)
    options = parser.parse_args()
    ctypes.CDLL(None).prctl(PR_SET_NAME, options.process_name.encode(), 0, 0, 0)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    if options.part == "serve":
        serve(options.port)
    else:
        ask(options.address, options.port, options.refused_port, options.interval_ms)


if __name__ == "__main__":
    main()
