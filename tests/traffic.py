"""Programs that tests run inside pods: a counting server and clients that say what they did, as JSON lines.

A script of its own, without imports from Podwire. `serve` answers on a port until it is ended: a request is
two little-endian 32-bit numbers, how many bytes follow and how many to send back, and the bytes. `talk` makes
connections one after the other, or up to N at a time, and prints one JSON object per connection. `proxy` stands
between the two.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import selectors
import signal
import socket
import struct
import sys
import time

PR_SET_NAME = 15
CHUNK = 65536


def receive_exactly(connection: socket.socket, count: int) -> None:
    """Read `count` bytes; ConnectionError when the other side ends before."""
    while count:
        data = connection.recv(min(count, CHUNK))
        if not data:
            raise ConnectionError("ended early")
        count -= len(data)


def serve(port: int) -> None:
    """Answer requests, many connections at a time, until SIGTERM."""
    listener = socket.create_server(
        ("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024, reuse_port=False
    )
    print("listening", flush=True)
    waiting = selectors.DefaultSelector()
    waiting.register(listener, selectors.EVENT_READ)
    while True:
        for key, _ in waiting.select():
            if key.fileobj is listener:
                connection, _ = listener.accept()
                waiting.register(connection, selectors.EVENT_READ)
                continue
            connection = key.fileobj
            assert isinstance(connection, socket.socket)
            try:
                going_on = answer(connection)
            except OSError:
                going_on = False
            if not going_on:
                waiting.unregister(connection)
                connection.close()


def answer(connection: socket.socket) -> bool:
    """Serve one request of a connection; False at its end."""
    header = connection.recv(8, socket.MSG_WAITALL)
    if len(header) < 8:
        return False
    up, down = struct.unpack("<II", header)
    receive_exactly(connection, up)
    connection.sendall(b"r" * down)
    return True


def proxy(port: int, address: str, onward_port: int) -> None:
    """Answer each connection from one of its own to another server, one after the other, until SIGTERM."""
    listener = socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=128)
    print("listening", flush=True)
    while True:
        incoming, _ = listener.accept()
        with incoming, socket.create_connection((address, onward_port)) as onward:
            header = incoming.recv(8, socket.MSG_WAITALL)
            up, down = struct.unpack("<II", header)
            receive_exactly(incoming, up)
            onward.sendall(header + b"s" * up)
            receive_exactly(onward, down)
            say(onward, sent=8 + up, received=down)
            incoming.sendall(b"r" * down)


def talk(address: str, port: int, count: int, send: int, receive: int, at_once: int) -> None:
    """Make `count` connections, `at_once` open at a time; each sends 8 + `send` bytes and gets `receive` back."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    done = 0
    while done < count:
        open_now = []
        begin_ns = time.time_ns()
        for _ in range(min(at_once, count - done)):
            connection = socket.socket(family, socket.SOCK_STREAM)
            connection.connect((address, port))
            open_now.append(connection)
        for connection in open_now:
            connection.sendall(struct.pack("<II", send, receive) + b"s" * send)
        for connection in open_now:
            receive_exactly(connection, receive)
            say(connection, sent=8 + send, received=receive, begin_unix_ns=begin_ns)
            connection.close()
        done += len(open_now)


def keep_talking(address: str, port: int) -> None:
    """Make small connections, one after the other with short pauses, until standard input ends."""
    waiting = selectors.DefaultSelector()
    waiting.register(sys.stdin, selectors.EVENT_READ)
    while not waiting.select(0.02):
        talk(address, port, count=1, send=10, receive=20, at_once=1)


def tick(address: str, port: int, count: int, pause_ms: int) -> None:
    """Make `count` small connections at scheduled times, and say when connect() was called."""
    start_ns = time.time_ns()
    for number in range(count):
        due_ns = start_ns + number * pause_ms * 1_000_000
        time.sleep(max(0, due_ns - time.time_ns()) / 1e9)
        begin_ns = time.time_ns()
        with socket.create_connection((address, port)) as connection:
            connection.sendall(struct.pack("<II", 10, 20) + b"s" * 10)
            receive_exactly(connection, 20)
            say(connection, begin_unix_ns=begin_ns)


def fail(address: str, port: int, syn_count: int) -> None:
    """Try one connection and print the errno it failed with."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as connection:
        if syn_count:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_SYNCNT, syn_count)
        connection.bind(("::" if family == socket.AF_INET6 else "0.0.0.0", 0))
        local_port = connection.getsockname()[1]
        error = connection.connect_ex((address, port))
        print(json.dumps({"pid": os.getpid(), "port": local_port, "errno": error}), flush=True)


def hold(address: str, port: int) -> None:
    """Make one connection, exchange a little, say so, then wait for whatever comes."""
    with socket.create_connection((address, port)) as connection:
        connection.sendall(struct.pack("<II", 10, 20) + b"s" * 10)
        receive_exactly(connection, 20)
        say(connection, sent=18, received=20)
        signal.pause()


def say(connection: socket.socket, **more: int) -> None:
    """Print what a connection was, as one JSON line."""
    name = connection.getsockname()
    print(json.dumps({"pid": os.getpid(), "address": name[0], "port": name[1], **more}), flush=True)


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser()
    parser.add_argument("part", choices=("serve", "proxy", "talk", "keep-talking", "tick", "fail", "hold"))
    parser.add_argument("--name", required=True, help="process name")
    parser.add_argument("--address", default="")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--onward-port", type=int, default=0)
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--send", type=int, default=100)
    parser.add_argument("--receive", type=int, default=1000)
    parser.add_argument("--at-once", type=int, default=1)
    parser.add_argument("--syn-count", type=int, default=0)
    parser.add_argument("--pause-ms", type=int, default=50)
    given = parser.parse_args()
    ctypes.CDLL(None).prctl(PR_SET_NAME, os.fsencode(given.name), 0, 0, 0)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    if given.part == "serve":
        serve(given.port)
    elif given.part == "proxy":
        proxy(given.port, given.address, given.onward_port)
    elif given.part == "talk":
        talk(given.address, given.port, given.count, given.send, given.receive, given.at_once)
    elif given.part == "keep-talking":
        keep_talking(given.address, given.port)
    elif given.part == "tick":
        tick(given.address, given.port, given.count, given.pause_ms)
    elif given.part == "fail":
        fail(given.address, given.port, given.syn_count)
    else:
        hold(given.address, given.port)


if __name__ == "__main__":
    main()
