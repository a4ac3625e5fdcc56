// SPDX-License-Identifier: Apache-2.0
/*
 * The load of bench/kernel.py: a client and a server process on one CPU, each in a network namespace of its own.
 *
 *   kernel_load MODE COUNT CPU CLIENT_NETNS SERVER_NETNS SERVER_ADDRESS
 *
 * connect: COUNT connections one after the other, which the server closes first, so that the client's ports stay free;
 * request: COUNT times 128 bytes there and 512 back on one connection; bulk: COUNT times 64 KiB one way on one connection.
 * Prints two numbers: ns on the wall clock, and ns of CPU time of both processes (without softirqs on some kernels).
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <err.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define REQUEST_BYTES 128
#define RESPONSE_BYTES 512
#define CHUNK_BYTES 65536

static char buffer[CHUNK_BYTES];

static long long now_ns(clockid_t clock)
{
	struct timespec time;

	clock_gettime(clock, &time);
	return time.tv_sec * 1000000000LL + time.tv_nsec;
}

static void enter(const char *netns)
{
	int there = open(netns, O_RDONLY | O_CLOEXEC);

	if (there < 0 || setns(there, CLONE_NEWNET))
		err(1, "%s", netns);
	close(there);
}

static int tcp_socket(void)
{
	int made = socket(AF_INET, SOCK_STREAM, 0), one = 1;

	if (made < 0 || setsockopt(made, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one)))
		err(1, "socket");
	return made;
}

static void take(int peer, size_t bytes)
{
	while (bytes) {
		ssize_t got = read(peer, buffer, bytes);

		if (got <= 0)
			err(1, "read");
		bytes -= got;
	}
}

static void give(int peer, size_t bytes)
{
	if (write(peer, buffer, bytes) != (ssize_t)bytes)
		err(1, "write");
}

static void serve(int listener, char mode, long count)
{
	int peer = 0;

	for (long i = 0; i < count; i++) {
		if (mode == 'c' || i == 0)
			peer = accept(listener, 0, 0);
		if (peer < 0)
			err(1, "accept");
		if (mode == 'c') {
			close(peer);
		} else if (mode == 'r') {
			take(peer, REQUEST_BYTES);
			give(peer, RESPONSE_BYTES);
		} else {
			take(peer, CHUNK_BYTES);
		}
	}
	if (mode == 'b')
		give(peer, 1); /* the client's clock stops when everything has arrived */
}

static void call(const struct sockaddr_in *server, char mode, long count)
{
	int peer = 0;

	for (long i = 0; i < count; i++) {
		if (mode == 'c' || i == 0) {
			peer = tcp_socket();
			if (connect(peer, (const void *)server, sizeof(*server)))
				err(1, "connect");
		}
		if (mode == 'c') {
			if (read(peer, buffer, 1))
				errx(1, "the server did not close");
			close(peer);
		} else if (mode == 'r') {
			give(peer, REQUEST_BYTES);
			take(peer, RESPONSE_BYTES);
		} else {
			give(peer, CHUNK_BYTES);
		}
	}
	if (mode == 'b')
		take(peer, 1);
}

int main(int count, char **words)
{
	struct sockaddr_in address = {.sin_family = AF_INET};
	socklen_t size = sizeof(address);
	long long wall_ns, cpu_ns, server_ns;
	int listener, report[2];
	cpu_set_t cpus;

	if (count != 7)
		errx(2, "usage: MODE COUNT CPU CLIENT_NETNS SERVER_NETNS SERVER_ADDRESS");
	CPU_ZERO(&cpus);
	CPU_SET(atoi(words[3]), &cpus);
	if (sched_setaffinity(0, sizeof(cpus), &cpus))
		err(1, "sched_setaffinity");
	enter(words[5]);
	listener = tcp_socket();
	inet_pton(AF_INET, words[6], &address.sin_addr);
	if (bind(listener, (void *)&address, size) || listen(listener, 128) ||
	    getsockname(listener, (void *)&address, &size) || pipe(report))
		err(1, "listen");
	if (!fork()) {
		serve(listener, words[1][0], atol(words[2]));
		server_ns = now_ns(CLOCK_PROCESS_CPUTIME_ID);
		return write(report[1], &server_ns, sizeof(server_ns)) != sizeof(server_ns);
	}
	close(listener); /* else it would answer for a server that died */
	close(report[1]);
	enter(words[4]);
	wall_ns = now_ns(CLOCK_MONOTONIC);
	cpu_ns = now_ns(CLOCK_PROCESS_CPUTIME_ID);
	call(&address, words[1][0], atol(words[2]));
	wall_ns = now_ns(CLOCK_MONOTONIC) - wall_ns;
	cpu_ns = now_ns(CLOCK_PROCESS_CPUTIME_ID) - cpu_ns;
	if (read(report[0], &server_ns, sizeof(server_ns)) != sizeof(server_ns))
		errx(1, "the server failed");
	wait(0);
	printf("%lld %lld\n", wall_ns, cpu_ns + server_ns);
	return 0;
}
