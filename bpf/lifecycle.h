/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * The life of a connection: connect, established, close. One section per stage; each turns one change of a socket's
 * state into at most two events. All of it runs under the socket's lock.
 *
 * `sk->sk_lock.owned` tells the contexts apart (net/core/sock.c, lock_sock): 1 is process context, and `current`
 * owns the socket; 0 is softirq or timer, and `current` is anyone.
 */
#ifndef PODWIRE_LIFECYCLE_H
#define PODWIRE_LIFECYCLE_H

/* ---- facts of a socket ---- */

static __always_inline void copy_v6(__u8 *address, const struct in6_addr *v6)
{
	__u32 *words = (__u32 *)address;

	words[0] = v6->in6_u.u6_addr32[0];
	words[1] = v6->in6_u.u6_addr32[1];
	words[2] = v6->in6_u.u6_addr32[2];
	words[3] = v6->in6_u.u6_addr32[3];
}

/* The source port is 0 before SYN_SENT is left, and `skc_num` is 0 again at CLOSE: inet_sport stays. */
static __always_inline void fill_tuple(struct podwire_event *entry, const struct sock *sk, const struct tcp_sock *tcp)
{
	if (sk->__sk_common.skc_family == AF_INET6) {
		copy_v6(entry->local_address, &sk->__sk_common.skc_v6_rcv_saddr);
		copy_v6(entry->remote_address, &sk->__sk_common.skc_v6_daddr);
	} else {
		map_v4(entry->local_address, sk->__sk_common.skc_rcv_saddr);
		map_v4(entry->remote_address, sk->__sk_common.skc_daddr);
	}
	entry->local_port = bpf_ntohs(tcp->inet_conn.icsk_inet.inet_sport);
	entry->remote_port = bpf_ntohs(sk->__sk_common.skc_dport);
	entry->netns_ino = sk->__sk_common.skc_net.net->ns.inum;
}

/* With Fast Open the SYN's data is inside these counters; so normalised, the pair is the same in every state. */
static __always_inline void fill_isn(struct podwire_event *entry, const struct tcp_sock *tcp)
{
	__u32 local = tcp->snd_una - (__u32)tcp->bytes_acked;
	__u32 remote = tcp->rcv_nxt - (__u32)tcp->bytes_received - 1;

	if (entry->role == PODWIRE_CLIENT) {
		entry->client_isn = local;
		entry->server_isn = remote;
	} else {
		entry->client_isn = remote;
		entry->server_isn = local - 1; /* the SYN of a passive open is not in bytes_acked */
	}
}

static __always_inline __u64 cookie_of(struct sock *sk)
{
	if (options.socket_cookie_helper)
		return bpf_get_socket_cookie(sk);
	return sk->__sk_common.skc_cookie.counter ?: bpf_ktime_get_boot_ns();
}

static __always_inline void emit(struct podwire_event *event, enum podwire_event_type type, __u64 now_ns)
{
	if (event->type == SILENT)
		return;
	event->time_ns = now_ns;
	event->type = type;
	count(PODWIRE_ATTEMPTED);
	if (bpf_ringbuf_output(&events, event, sizeof(*event), BPF_RB_NO_WAKEUP))
		count(PODWIRE_LOST_RING_FULL);
}

static __always_inline int is_open(const struct podwire_event *entry)
{
	return entry->established_ns || entry->flags & PODWIRE_OPEN_UNSEEN;
}

/* Whether the entry is of the connection that the socket has now; see fill_isn. */
static __always_inline int same_connection(const struct podwire_event *entry, const struct tcp_sock *tcp)
{
	__u32 local = tcp->snd_una - (__u32)tcp->bytes_acked;
	__u32 remote = tcp->rcv_nxt - (__u32)tcp->bytes_received - 1;

	if (entry->role == PODWIRE_CLIENT)
		return entry->client_isn == local && entry->server_isn == remote;
	return entry->client_isn == remote && entry->server_isn == local - 1;
}

/* An entry that outlived its socket: its end was not seen, and the kernel has given the address away again. */
static __always_inline void forget_stale(const struct podwire_event *entry)
{
	if (!entry || entry->type == SILENT)
		return;
	count(PODWIRE_ATTEMPTED);
	count(PODWIRE_LOST_MISSED_CLOSE);
}

static __always_inline void remember(__u64 key, const struct podwire_event *entry)
{
	if (!bpf_map_update_elem(&sockets, &key, entry, BPF_ANY) || entry->type == SILENT)
		return;
	count(PODWIRE_ATTEMPTED);
	count(PODWIRE_LOST_SOCKET_MAP_FULL);
}

/* The first process that is seen to own the socket; a server's socket was then accepted out of our sight. */
static __always_inline void learn_owner(struct podwire_event *entry, int owned)
{
	if (!owned || entry->owner == PODWIRE_OWNER_PROCESS || entry->type == SILENT)
		return;
	if (!entry->type && current_left_out()) {
		entry->type = SILENT;
		return;
	}
	own_by_process(entry);
	if (!entry->type) {
		__u8 closed_by = entry->closed_by;

		entry->closed_by = PODWIRE_CLOSED_NONE; /* the peer's FIN may have come first */
		emit(entry, PODWIRE_ACCEPT, bpf_ktime_get_boot_ns());
		entry->closed_by = closed_by;
	}
}

/* ---- connect ---- */

/* The edges (edges.h) shall not tell once more how a connect ended. */
static __always_inline void dial_begins(void)
{
	__u64 task = bpf_get_current_pid_tgid();
	struct dial *dial = bpf_map_lookup_elem(&dials, &task);

	if (dial && dial->task == task)
		dial->begun = 1;
}

/* Still inside the connect call, whose socket is not connecting before it returns (net/ipv4/af_inet.c). */
static __always_inline void dial_fails(const struct sock *sk)
{
	__u64 task = bpf_get_current_pid_tgid();
	struct dial told = {.task = task, .sk = (__u64)sk};

	if (sk->sk_socket->state == SS_UNCONNECTED)
		bpf_map_update_elem(&dials, &task, &told, BPF_ANY);
}

#define COPIES_APART_NS 10000000ULL /* an interrupt, or an emulated CPU, may come between */

/* Where cookie_of has no cookie to go by, two attempts are told apart by time: copies run one right after the other. */
static __always_inline int same_attempt(const struct podwire_event *one, const struct podwire_event *other)
{
	if (options.socket_cookie_helper)
		return one->socket_cookie == other->socket_cookie;
	return other->start_ns - one->start_ns < COPIES_APART_NS;
}

static __always_inline void connect_begins(struct sock *sk, const struct tcp_sock *tcp, int owned)
{
	struct podwire_event entry = {
		.start_ns = bpf_ktime_get_boot_ns(),
		.role = PODWIRE_CLIENT,
		.closed_by = PODWIRE_CLOSED_NONE,
		.rtt_min_us = -1,
	};
	struct podwire_event *known;
	__u64 key = (__u64)sk;

	if (options.connect_edge == PODWIRE_EDGE_ENTERED && owned)
		dial_begins();
	fill_tuple(&entry, sk, tcp);
	if (filtered(&entry))
		return;
	entry.socket_cookie = cookie_of(sk);
	known = bpf_map_lookup_elem(&sockets, &key);
	if (known && !is_open(known) && same_attempt(known, &entry))
		return; /* another copy was here */
	forget_stale(known);
	if (owned ? current_left_out() : socket_left_out(sk))
		entry.type = SILENT;
	else if (owned)
		own_by_process(&entry);
	else
		own_by_cgroup(&entry, sk);
	remember(key, &entry);
}

static __always_inline void connected(struct podwire_event *entry, const struct sock *sk, const struct tcp_sock *tcp,
				      __u64 now_ns)
{
	fill_tuple(entry, sk, tcp);
	fill_isn(entry, tcp);
	entry->established_ns = now_ns;
	emit(entry, PODWIRE_CONNECT, now_ns);
}

/* sk_err is 0 when the caller gave up (close, kill, send timeout), and when no port was free. */
static __always_inline void connect_failed(struct podwire_event *entry, const struct sock *sk,
					   const struct tcp_sock *tcp, __u64 now_ns)
{
	fill_tuple(entry, sk, tcp);
	entry->error = sk->sk_err;
	if (!entry->error && !entry->local_port)
		entry->error = EADDRNOTAVAIL;
	emit(entry, PODWIRE_CONNECT_FAILED, now_ns);
}

/* ---- established ---- */

/* Usually in softirq, before any process has the socket: ACCEPT waits for the accept call, if that is watched. */
static __always_inline void passive_open(struct sock *sk, const struct tcp_sock *tcp,
					 const struct podwire_event *accepted_early, __u64 now_ns)
{
	struct podwire_event entry = {
		.established_ns = now_ns,
		.role = PODWIRE_SERVER,
		.closed_by = PODWIRE_CLOSED_NONE,
		.rtt_min_us = -1,
	};

	if (accepted_early) {
		entry.tgid = accepted_early->tgid;
		entry.uid = accepted_early->uid;
		entry.cgroup_id = accepted_early->cgroup_id;
		entry.cgroup_hierarchy = accepted_early->cgroup_hierarchy;
		entry.owner = PODWIRE_OWNER_PROCESS;
		entry.type = accepted_early->type; /* 0 or SILENT */
		__builtin_memcpy(entry.comm, accepted_early->comm, sizeof(entry.comm));
	}
	fill_tuple(&entry, sk, tcp);
	if (filtered(&entry))
		return;
	fill_isn(&entry, tcp);
	entry.socket_cookie = cookie_of(sk);
	if (!accepted_early && socket_left_out(sk))
		entry.type = SILENT;
	else if (!accepted_early)
		own_by_cgroup(&entry, sk);
	if (accepted_early || !options.accept_edge)
		emit(&entry, PODWIRE_ACCEPT, now_ns);
	remember((__u64)sk, &entry);
}

static __always_inline void established(struct sock *sk, const struct tcp_sock *tcp, int old_state)
{
	__u64 key = (__u64)sk, now_ns = bpf_ktime_get_boot_ns();
	struct podwire_event *entry = bpf_map_lookup_elem(&sockets, &key);

	if (entry && is_open(entry)) {
		if (same_connection(entry, tcp))
			return; /* another copy was here */
		forget_stale(entry);
		entry = 0;
	}
	if (entry && entry->role == PODWIRE_CLIENT)
		connected(entry, sk, tcp, now_ns);
	else if (old_state == TCP_SYN_RECV)
		passive_open(sk, tcp, entry, now_ns);
}

/* ---- close ---- */

/* True if the entry's connection was established; a client's establishment that was not shown is counted here. */
static __always_inline int entry_opened(struct podwire_event *entry, const struct sock *sk, const struct tcp_sock *tcp,
					int old_state)
{
	if (is_open(entry))
		return 1;
	if (entry->role != PODWIRE_CLIENT || old_state == TCP_SYN_SENT || old_state == TCP_SYN_RECV)
		return 0;
	fill_tuple(entry, sk, tcp);
	fill_isn(entry, tcp);
	entry->flags |= PODWIRE_OPEN_UNSEEN;
	if (entry->type != SILENT) {
		count(PODWIRE_ATTEMPTED);
		count(PODWIRE_LOST_MISSED_OPEN);
	}
	return 1;
}

/* Whose FIN comes first: kept in the entry until CLOSE. */
static __always_inline void closing(const struct sock *sk, const struct tcp_sock *tcp, int old_state, int new_state,
				    int owned)
{
	__u64 key = (__u64)sk;
	struct podwire_event *entry = bpf_map_lookup_elem(&sockets, &key);

	if (!entry || !entry_opened(entry, sk, tcp, old_state))
		return;
	learn_owner(entry, owned);
	if (new_state == TCP_CLOSING)
		entry->closed_by = PODWIRE_CLOSED_BOTH;
	else if (entry->closed_by == PODWIRE_CLOSED_NONE)
		entry->closed_by = new_state == TCP_FIN_WAIT1 ? PODWIRE_CLOSED_LOCAL : PODWIRE_CLOSED_REMOTE;
}

/* bytes_received counts the peer's FIN. rtt_min is -1 until measured. */
static __always_inline void fill_counters(struct podwire_event *entry, const struct tcp_sock *tcp, int peer_done)
{
	entry->bytes_sent = tcp->bytes_sent - tcp->bytes_retrans;
	entry->bytes_received = tcp->bytes_received - peer_done;
	entry->segments_sent = tcp->segs_out;
	entry->segments_received = tcp->segs_in;
	entry->retransmits = tcp->total_retrans;
	entry->rtt_us = tcp->srtt_us >> 3;
	entry->rtt_min_us = tcp->rtt_min.s[0].v;
}

static __always_inline void count_untracked(const struct sock *sk, const struct tcp_sock *tcp, int old_state)
{
	struct podwire_event unknown = {};

	if (old_state != TCP_ESTABLISHED && old_state != TCP_FIN_WAIT1 && old_state != TCP_FIN_WAIT2 &&
	    old_state != TCP_CLOSE_WAIT && old_state != TCP_LAST_ACK && old_state != TCP_CLOSING)
		return;
	fill_tuple(&unknown, sk, tcp);
	if (!filtered(&unknown))
		count(PODWIRE_UNTRACKED);
}

static __always_inline void closed(const struct sock *sk, const struct tcp_sock *tcp, int old_state, int owned, int first)
{
	unsigned long flags = sk->__sk_common.skc_flags;
	int peer_done = flags >> SOCK_DONE & 1;
	__u64 key = (__u64)sk;
	struct podwire_event *entry = bpf_map_lookup_elem(&sockets, &key);

	if (!entry) {
		if (first) /* the others find no entry because the first one deleted it */
			count_untracked(sk, tcp, old_state);
		return;
	}
	if (entry_opened(entry, sk, tcp, old_state)) {
		learn_owner(entry, owned);
		judge_close(entry, sk->sk_err, sent_reset(old_state, owned, peer_done, flags >> SOCK_DEAD & 1));
		fill_counters(entry, tcp, peer_done);
		emit(entry, PODWIRE_CLOSE, bpf_ktime_get_boot_ns());
	} else if (entry->role == PODWIRE_CLIENT) {
		connect_failed(entry, sk, tcp, bpf_ktime_get_boot_ns());
		if (options.connect_edge == PODWIRE_EDGE_RETURN && owned)
			dial_fails(sk);
	}
	bpf_map_delete_elem(&sockets, &key);
}

/* ---- the machine ---- */

#define STATES_THAT_COUNT                                                                                             \
	(1 << TCP_SYN_SENT | 1 << TCP_ESTABLISHED | 1 << TCP_FIN_WAIT1 | 1 << TCP_CLOSE_WAIT | 1 << TCP_LAST_ACK |     \
	 1 << TCP_CLOSING | 1 << TCP_CLOSE)

/*
 * The CPU notes its last change. The note alone would not do for `transition`, since an interrupt between two copies
 * leaves another; the socket's entry alone would, but looking there costs more than all else that a copy does.
 */
static __always_inline int seen_by_another_copy(struct sock *sk, int old_state, int new_state, int first)
{
	struct change now = {
		.sk = (__u64)sk,
		.socket_cookie = sk->__sk_common.skc_cookie.counter,
		.states = (__u64)old_state << 32 | new_state,
	};
	__u32 zero = 0;
	struct change *last = bpf_map_lookup_elem(&changes, &zero);

	if (!last)
		return 0;
	if (!now.socket_cookie && options.socket_cookie_helper)
		now.socket_cookie = bpf_get_socket_cookie(sk);
	if (!first && last->sk == now.sk && last->socket_cookie == now.socket_cookie && last->states == now.states)
		return 1;
	*last = now;
	return 0;
}

/*
 * Runs several times per transition, once in each copy of the program, and does its work once: the CPU's note, else
 * the socket's entry, tells what has been done. A socket's transitions follow each other under its lock.
 *
 * Why copies: the kernel skips a program that already runs on the same CPU (since 5.13; kernel/trace/bpf_trace.c,
 * __bpf_trace_run). One copy alone would miss what an interrupt brings while it runs for a process: measured, up to 64
 * transitions in a row. Two copies suffice where programs can't be preempted, since softirqs do not nest. From 6.18
 * on a kernel with preemption preempts them (tracepoints no longer forbid it), and several tasks of one CPU may be
 * inside: more copies.
 */
static __always_inline void transition(struct sock *sk, int old_state, int new_state, int first)
{
	int owned = sk->sk_lock.owned;
	const struct tcp_sock *tcp;

	if (!(STATES_THAT_COUNT & 1 << new_state) || seen_by_another_copy(sk, old_state, new_state, first))
		return;
	tcp = bpf_skc_to_tcp_sock(sk);
	if (!tcp)
		return;
	switch (new_state) {
	case TCP_SYN_SENT:
		return connect_begins(sk, tcp, owned);
	case TCP_ESTABLISHED:
		return established(sk, tcp, old_state);
	case TCP_CLOSE:
		return closed(sk, tcp, old_state, owned, first);
	default:
		return closing(sk, tcp, old_state, new_state, owned);
	}
}

#endif
