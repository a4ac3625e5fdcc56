/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Connections between their open and their close: those that were open before the probes (EXISTING), those that
 * live long (PROGRESS), and entries whose end the kernel did not show (lost: missed_close).
 *
 * Both read sockets without their lock, by probe reads: what must fit together is read until it twice
 * says the same, and an entry's socket is recognised before and after.
 */
#ifndef PODWIRE_EXISTING_H
#define PODWIRE_EXISTING_H

#define UNSTABLE_READS_MAX 4
#define OPENING_GRACE_NS 1000000000ULL /* an attempt's entry is made before its socket leaves CLOSE */
#define NS_PER_MS 1000000ULL
#define SWEEP_KEYS 12 /* arguments that a test run takes: include/linux/filter.h, MAX_BPF_FUNC_ARGS */

/* ---- reading without the lock ---- */

/* What tells sequence numbers and payload: changes together with every segment. */
struct sequence {
	__u64 bytes_received;
	__u64 bytes_acked;
	__u64 bytes_sent;
	__u64 bytes_retrans;
	__u32 rcv_nxt;
	__u32 snd_una;
	__u32 snd_nxt;
	__u32 write_seq;
	__u32 state;
	__u32 unused;
};

static __always_inline void read_sequence(struct sequence *sequence, const struct tcp_sock *tcp)
{
	const struct sock *sk = (const struct sock *)tcp;

	sequence->bytes_received = BPF_CORE_READ(tcp, bytes_received);
	sequence->bytes_acked = BPF_CORE_READ(tcp, bytes_acked);
	sequence->bytes_sent = BPF_CORE_READ(tcp, bytes_sent);
	sequence->bytes_retrans = BPF_CORE_READ(tcp, bytes_retrans);
	sequence->rcv_nxt = BPF_CORE_READ(tcp, rcv_nxt);
	sequence->snd_una = BPF_CORE_READ(tcp, snd_una);
	sequence->snd_nxt = BPF_CORE_READ(tcp, snd_nxt);
	sequence->write_seq = BPF_CORE_READ(tcp, write_seq);
	sequence->state = BPF_CORE_READ(sk, __sk_common.skc_state);
}

static __always_inline int same_sequence(const struct sequence *one, const struct sequence *two)
{
	return one->bytes_received == two->bytes_received && one->bytes_acked == two->bytes_acked &&
	       one->bytes_sent == two->bytes_sent && one->bytes_retrans == two->bytes_retrans &&
	       one->rcv_nxt == two->rcv_nxt && one->snd_una == two->snd_una && one->snd_nxt == two->snd_nxt &&
	       one->write_seq == two->write_seq && one->state == two->state;
}

/* Returns 0 when two readings in a row agree; a socket that is too busy for that is left for the next pass. */
static __noinline int read_stable(struct sequence *sequence, const struct tcp_sock *tcp)
{
	struct sequence again;
	int tries;

	if (!sequence)
		return -1;
	read_sequence(sequence, tcp);
	for (tries = 0; tries < UNSTABLE_READS_MAX; tries++) {
		read_sequence(&again, tcp);
		if (same_sequence(sequence, &again))
			return 0;
		*sequence = again;
	}
	return -1;
}

static __always_inline void read_tuple(struct podwire_event *entry, const struct sock *sk)
{
	const struct tcp_sock *tcp = (const struct tcp_sock *)sk;

	if (BPF_CORE_READ(sk, __sk_common.skc_family) == AF_INET6) {
		BPF_CORE_READ_INTO(&entry->local_address, sk, __sk_common.skc_v6_rcv_saddr);
		BPF_CORE_READ_INTO(&entry->remote_address, sk, __sk_common.skc_v6_daddr);
	} else {
		map_v4(entry->local_address, BPF_CORE_READ(sk, __sk_common.skc_rcv_saddr));
		map_v4(entry->remote_address, BPF_CORE_READ(sk, __sk_common.skc_daddr));
	}
	entry->local_port = bpf_ntohs(BPF_CORE_READ(tcp, inet_conn.icsk_inet.inet_sport));
	entry->remote_port = bpf_ntohs(BPF_CORE_READ(sk, __sk_common.skc_dport));
	entry->netns_ino = BPF_CORE_READ(sk, __sk_common.skc_net.net, ns.inum);
}

static __always_inline void read_counters(struct podwire_event *entry, const struct tcp_sock *tcp,
					  const struct sequence *sequence)
{
	const struct sock *sk = (const struct sock *)tcp;
	unsigned long flags = BPF_CORE_READ(sk, __sk_common.skc_flags);

	entry->bytes_sent = sequence->bytes_sent - sequence->bytes_retrans;
	entry->bytes_received = sequence->bytes_received - (flags >> SOCK_DONE & 1);
	entry->segments_sent = BPF_CORE_READ(tcp, segs_out);
	entry->segments_received = BPF_CORE_READ(tcp, segs_in);
	entry->retransmits = BPF_CORE_READ(tcp, total_retrans);
	entry->rtt_us = BPF_CORE_READ(tcp, srtt_us) >> 3;
	entry->rtt_min_us = BPF_CORE_READ(tcp, rtt_min.s[0].v);
}

/* ---- EXISTING ---- */

static __always_inline int was_established(int state)
{
	return state == TCP_ESTABLISHED || state == TCP_FIN_WAIT1 || state == TCP_FIN_WAIT2 ||
	       state == TCP_CLOSE_WAIT || state == TCP_LAST_ACK || state == TCP_CLOSING;
}

/*
 * Which end an open socket is, which the kernel does not remember. connect() takes a port by a bucket that no bind()
 * may share (net/ipv4/inet_hashtables.c, __inet_hash_connect: fastreuse -1); a socket that bind() gave the port keeps
 * a lock bit that accepted ones lose (net/core/sock.c, sk_clone). What remains are accepted sockets and, rarely, a
 * client after bind() to port 0. Their counters tell them apart: bytes_acked counts the SYN of an active open
 * alone, and bytes_sent counts neither SYN nor FIN.
 */
static __always_inline int role_of(const struct tcp_sock *tcp, const struct sequence *sequence)
{
	const struct sock *sk = (const struct sock *)tcp;
	const struct inet_bind_bucket *bucket = BPF_CORE_READ(tcp, inet_conn.icsk_bind_hash);
	int shut = sequence->state != TCP_ESTABLISHED && sequence->state != TCP_CLOSE_WAIT;
	__u32 fin = shut && sequence->snd_nxt == sequence->write_seq; /* else it waits behind data */
	__u32 sent = (__u32)sequence->bytes_sent - (__u32)sequence->bytes_retrans + fin;
	__u32 first = sequence->snd_una - (__u32)sequence->bytes_acked;

	if (BPF_CORE_READ_BITFIELD_PROBED(sk, sk_userlocks) & SOCK_BINDPORT_LOCK)
		return PODWIRE_CLIENT;
	if (bucket && BPF_CORE_READ(bucket, fastreuse) < 0)
		return PODWIRE_CLIENT;
	return sequence->snd_nxt - sent - first == 1 ? PODWIRE_CLIENT : PODWIRE_SERVER;
}

static __always_inline int closed_first(int state)
{
	if (state == TCP_ESTABLISHED)
		return PODWIRE_CLOSED_NONE;
	if (state == TCP_CLOSING)
		return PODWIRE_CLOSED_BOTH;
	return state == TCP_CLOSE_WAIT || state == TCP_LAST_ACK ? PODWIRE_CLOSED_REMOTE : PODWIRE_CLOSED_LOCAL;
}

static __always_inline int is_tcp(const struct sock *sk)
{
	__u16 family = BPF_CORE_READ(sk, __sk_common.skc_family);

	return (family == AF_INET || family == AF_INET6) && BPF_CORE_READ(sk, sk_protocol) == IPPROTO_TCP &&
	       was_established(BPF_CORE_READ(sk, __sk_common.skc_state));
}

/* Returns 0 when `entry` says all but owner and cookie about an open connection that we want. */
static __always_inline int describe(struct podwire_event *entry, const struct sock *sk)
{
	const struct tcp_sock *tcp = (const struct tcp_sock *)sk;
	struct sequence sequence = {};
	__u32 local, remote;

	read_tuple(entry, sk);
	if (options.filter_loopback && (is_loopback(entry->local_address) || is_loopback(entry->remote_address)))
		return -1; /* before anything that costs: these receive often */
	if (read_stable(&sequence, tcp) || !was_established(sequence.state))
		return -1;
	entry->role = role_of(tcp, &sequence);
	if (filtered(entry)) /* the port's filter asks for the role */
		return -1;
	entry->time_ns = bpf_ktime_get_boot_ns();
	local = sequence.snd_una - (__u32)sequence.bytes_acked;
	remote = sequence.rcv_nxt - (__u32)sequence.bytes_received - 1;
	entry->client_isn = entry->role == PODWIRE_CLIENT ? local : remote;
	entry->server_isn = entry->role == PODWIRE_CLIENT ? remote : local - 1;
	entry->closed_by = closed_first(sequence.state);
	entry->flags = PODWIRE_OPEN_UNSEEN;
	read_counters(entry, tcp, &sequence);
	return 0;
}

/*
 * Remembered before it is told, so that an end that comes in between finds the entry; an end that came before is
 * seen by the state, which the kernel stores after its tracepoint.
 */
static __always_inline int adopt(struct podwire_event *entry, const struct sock *sk, int complain)
{
	__u64 key = (__u64)sk;

	if (bpf_map_update_elem(&sockets, &key, entry, BPF_NOEXIST)) {
		if (complain && entry->type != SILENT && !bpf_map_lookup_elem(&sockets, &key)) {
			count(PODWIRE_ATTEMPTED);
			count(PODWIRE_LOST_SOCKET_MAP_FULL);
		}
		return -1;
	}
	if (BPF_CORE_READ(sk, __sk_common.skc_state) == TCP_CLOSE) {
		bpf_map_delete_elem(&sockets, &key);
		return -1;
	}
	emit(entry, PODWIRE_EXISTING, entry->time_ns);
	return entry->type == SILENT;
}

/* The kernel makes a cookie only for who asks, and before 5.12 it does not let us ask. */
static __always_inline struct sock *sock_of_file(struct file *file)
{
	struct socket *socket;

	if ((BPF_CORE_READ(file, f_inode, i_mode) & S_IFMT) != S_IFSOCK)
		return 0;
	socket = BPF_CORE_READ(file, private_data);
	return BPF_CORE_READ(socket, sk);
}

static __always_inline __u64 cookie_of_file(struct file *file, const struct sock *sk)
{
	struct socket *socket;

	if (!options.socket_cookie_helper)
		return BPF_CORE_READ(sk, __sk_common.skc_cookie.counter) ?: bpf_ktime_get_boot_ns();
	socket = bpf_sock_from_file(file);
	return socket && socket->sk ? bpf_get_socket_cookie(socket->sk) : 0;
}

/* One open file of one process; returns 1 if it was a connection that nobody had told of. */
static __always_inline int found_in_file(struct task_struct *task, struct file *file)
{
	struct podwire_event entry = {};
	struct sock *sk = sock_of_file(file);
	__u64 key = (__u64)sk;

	if (!sk || !is_tcp(sk) || bpf_map_lookup_elem(&sockets, &key) || describe(&entry, sk))
		return 0;
	entry.socket_cookie = cookie_of_file(file, sk);
	own_by_task(&entry, task);
	entry.type = task_left_out(task) ? SILENT : PODWIRE_EXISTING;
	return !adopt(&entry, sk, 1);
}

/* A process receives, under the socket's lock: where /proc of the node can't be walked. */
static __always_inline void found_receiving(struct sock *sk)
{
	struct podwire_event entry = {};
	__u64 key = (__u64)sk;

	if (options.filter_loopback && sk->__sk_common.skc_family == AF_INET &&
	    (sk->__sk_common.skc_daddr & bpf_htonl(0xff000000)) == bpf_htonl(LOOPBACK_NET << 24))
		return; /* what is left out has no entry, and would be described at each receive */
	if (bpf_map_lookup_elem(&sockets, &key) || !sk->sk_lock.owned || !is_tcp(sk) || describe(&entry, sk))
		return;
	entry.socket_cookie = cookie_of(sk);
	own_by_process(&entry);
	entry.type = current_left_out() ? SILENT : PODWIRE_EXISTING;
	adopt(&entry, sk, 0);
}

/* ---- PROGRESS, and ends that were not shown ---- */

/* Without cookies (before 5.12) the two ends of the connection say which socket it is. */
static __always_inline int same_socket(const struct podwire_event *event, const struct sock *sk)
{
	const struct tcp_sock *tcp = (const struct tcp_sock *)sk;

	if (options.socket_cookie_helper)
		return BPF_CORE_READ(sk, __sk_common.skc_cookie.counter) == event->socket_cookie;
	return !event->local_port ||
	       (bpf_ntohs(BPF_CORE_READ(tcp, inet_conn.icsk_inet.inet_sport)) == event->local_port &&
		bpf_ntohs(BPF_CORE_READ(sk, __sk_common.skc_dport)) == event->remote_port &&
		BPF_CORE_READ(sk, __sk_common.skc_net.net, ns.inum) == event->netns_ino);
}

/*
 * The kernel stores CLOSE after its tracepoint, and `closed` deletes the entry inside: an entry of a socket in CLOSE
 * was missed. The address of a freed socket stays readable, or the probe read gives 0.
 */
static __always_inline int is_dead(const struct podwire_event *event, const struct sock *sk, __u64 now_ns)
{
	__u8 state = BPF_CORE_READ(sk, __sk_common.skc_state);

	if (!is_open(event) && now_ns - event->start_ns < OPENING_GRACE_NS)
		return 0;
	if (!event->socket_cookie) /* accept_early */
		return state != TCP_SYN_RECV;
	return state == TCP_CLOSE || !same_socket(event, sk);
}

static __always_inline void bury(const struct podwire_event *event, __u64 key)
{
	struct podwire_event *entry = bpf_map_lookup_elem(&sockets, &key);

	if (!entry || entry->socket_cookie != event->socket_cookie || bpf_map_delete_elem(&sockets, &key) ||
	    event->type == SILENT)
		return;
	count(PODWIRE_ATTEMPTED);
	count(PODWIRE_LOST_MISSED_CLOSE);
}

/*
 * Returns 1 if an event was made. The entry's element may be given away under our hands. Not static, so that the
 * verifier reads it once and not at each of its calls.
 */
__noinline int sweep_socket(__u64 key)
{
	struct podwire_event *entry = bpf_map_lookup_elem(&sockets, &key);
	const struct sock *sk = (const struct sock *)key;
	__u64 now_ns = bpf_ktime_get_boot_ns(), told_ns;
	struct sequence sequence = {};
	struct podwire_event event;

	if (!entry)
		return 0;
	__builtin_memcpy(&event, entry, sizeof(event));
	if (is_dead(&event, sk, now_ns)) {
		bury(&event, key);
		return 0;
	}
	told_ns = event.time_ns > event.established_ns ? event.time_ns : event.established_ns;
	if (!is_open(&event) || event.type == SILENT || !options.progress_interval_ms ||
	    now_ns < told_ns + options.progress_interval_ms * NS_PER_MS)
		return 0;
	if (read_stable(&sequence, (const struct tcp_sock *)sk) || !was_established(sequence.state))
		return 0;
	read_counters(&event, (const struct tcp_sock *)sk, &sequence);
	if (!same_socket(&event, sk) || entry->socket_cookie != event.socket_cookie)
		return 0;
	event.progress_seq++;
	entry->progress_seq = event.progress_seq;
	entry->time_ns = now_ns;
	emit(&event, PODWIRE_PROGRESS, now_ns);
	return 1;
}

#endif
