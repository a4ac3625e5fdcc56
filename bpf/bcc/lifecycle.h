/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * The life of a connection, as in ../lifecycle.h: read that first, only what differs has a comment here.
 */
#ifndef PODWIRE_BCC_LIFECYCLE_H
#define PODWIRE_BCC_LIFECYCLE_H

/* ---- facts of a socket ---- */

static __always_inline void fill_tuple(struct podwire_event *entry, __u64 sk)
{
	__u32 v4[2] = {};

	if (u16_at(sk, SK_FAMILY) == FAMILY_V6) {
		READ_AT(entry->local_address, sk, SK_V6_LOCAL);
		READ_AT(entry->remote_address, sk, SK_V6_REMOTE);
	} else {
		READ_AT(v4, sk, SK_V4_REMOTE_LOCAL);
		map_v4(entry->local_address, v4[1]);
		map_v4(entry->remote_address, v4[0]);
	}
	entry->local_port = bpf_ntohs(u16_at(sk, SK_LOCAL_PORT));
	entry->remote_port = bpf_ntohs(u16_at(sk, SK_REMOTE_PORT));
	entry->netns_ino = u32_at(u64_at(sk, SK_NET), NET_INODE);
}

static __always_inline void fill_isn(struct podwire_event *entry, __u64 sk)
{
	__u32 local = u32_at(sk, TCP_UNACKED) - (__u32)u64_at(sk, TCP_ACKED);
	__u32 remote = u32_at(sk, TCP_NEXT) - (__u32)u64_at(sk, TCP_RECEIVED) - 1;

	if (entry->role == PODWIRE_CLIENT) {
		entry->client_isn = local;
		entry->server_isn = remote;
	} else {
		entry->client_isn = remote;
		entry->server_isn = local - 1;
	}
}

/* The cookie's helper is closed to these program types: a socket that nobody asked for its cookie gets a time. */
static __always_inline __u64 cookie_of(__u64 sk)
{
	__u64 cookie = u64_at(sk, SK_COOKIE);

	return cookie ? cookie : bpf_ktime_get_boot_ns();
}

static __always_inline void emit(struct podwire_event *event, int type, __u64 now_ns)
{
	if (event->type == SILENT)
		return;
	event->time_ns = now_ns;
	event->type = type;
	count(PODWIRE_ATTEMPTED);
	if (events.ringbuf_output(event, sizeof(*event), RB_NO_WAKEUP))
		count(PODWIRE_LOST_RING_FULL);
}

static __always_inline int is_open(const struct podwire_event *entry)
{
	return entry->established_ns || entry->flags & PODWIRE_OPEN_UNSEEN;
}

static __always_inline void forget_stale(const struct podwire_event *entry)
{
	if (!entry || entry->type == SILENT)
		return;
	count(PODWIRE_ATTEMPTED);
	count(PODWIRE_LOST_MISSED_CLOSE);
}

static __always_inline void remember(__u64 sk, struct podwire_event *entry)
{
	if (!sockets.update(&sk, entry) || entry->type == SILENT)
		return;
	count(PODWIRE_ATTEMPTED);
	count(PODWIRE_LOST_SOCKET_MAP_FULL);
}

static __always_inline void learn_owner(struct podwire_event *entry, int owned, __u64 now_ns)
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
		emit(entry, PODWIRE_ACCEPT, now_ns);
		entry->closed_by = closed_by;
	}
}

/* ---- connect ---- */

static __always_inline void dial_begins(void)
{
	__u64 task = bpf_get_current_pid_tgid();
	struct dial *dial = dials.lookup(&task);

	if (dial)
		dial->begun = 1;
}

static __always_inline void connect_begins(__u64 sk, int owned)
{
	struct podwire_event entry = {};

	if (owned)
		dial_begins();
	entry.start_ns = bpf_ktime_get_boot_ns();
	entry.role = PODWIRE_CLIENT;
	entry.closed_by = PODWIRE_CLOSED_NONE;
	entry.rtt_min_us = -1;
	fill_tuple(&entry, sk);
	if (filtered(&entry))
		return;
	entry.socket_cookie = cookie_of(sk);
	if (owned ? current_left_out() : socket_left_out(sk))
		entry.type = SILENT;
	else if (owned)
		own_by_process(&entry);
	else
		own_by_cgroup(&entry, sk);
	forget_stale(sockets.lookup(&sk));
	remember(sk, &entry);
}

static __always_inline void connected(struct podwire_event *entry, __u64 sk, __u64 now_ns)
{
	fill_tuple(entry, sk);
	fill_isn(entry, sk);
	entry->established_ns = now_ns;
	emit(entry, PODWIRE_CONNECT, now_ns);
}

static __always_inline void connect_failed(struct podwire_event *entry, __u64 sk, __u64 now_ns)
{
	fill_tuple(entry, sk);
	entry->error = u32_at(sk, SK_ERROR);
	if (!entry->error && !entry->local_port)
		entry->error = EADDRNOTAVAIL;
	emit(entry, PODWIRE_CONNECT_FAILED, now_ns);
}

/* ---- established ---- */

static __always_inline void passive_open(__u64 sk, const struct podwire_event *accepted_early, __u64 now_ns)
{
	struct podwire_event entry = {};
	int first = 0;
	__u32 *edge = accept_edge.lookup(&first);

	if (accepted_early)
		__builtin_memcpy(&entry, accepted_early, sizeof(entry));
	entry.established_ns = now_ns;
	entry.role = PODWIRE_SERVER;
	entry.closed_by = PODWIRE_CLOSED_NONE;
	entry.rtt_min_us = -1;
	fill_tuple(&entry, sk);
	if (filtered(&entry))
		return;
	fill_isn(&entry, sk);
	entry.socket_cookie = cookie_of(sk);
	if (!accepted_early && socket_left_out(sk))
		entry.type = SILENT;
	else if (!accepted_early)
		own_by_cgroup(&entry, sk);
	if (accepted_early || !edge || !*edge)
		emit(&entry, PODWIRE_ACCEPT, now_ns);
	remember(sk, &entry);
}

static __always_inline void established(__u64 sk, int old_state)
{
	__u64 now_ns = bpf_ktime_get_boot_ns();
	struct podwire_event *entry = sockets.lookup(&sk);

	if (entry && is_open(entry)) {
		forget_stale(entry);
		entry = 0;
	}
	if (entry && entry->role == PODWIRE_CLIENT)
		connected(entry, sk, now_ns);
	else if (old_state == TCP_SYN_RECV)
		passive_open(sk, entry, now_ns);
}

/* ---- close ---- */

static __always_inline int entry_opened(struct podwire_event *entry, __u64 sk, int old_state)
{
	if (is_open(entry))
		return 1;
	if (entry->role != PODWIRE_CLIENT || old_state == TCP_SYN_SENT || old_state == TCP_SYN_RECV)
		return 0;
	fill_tuple(entry, sk);
	fill_isn(entry, sk);
	entry->flags |= PODWIRE_OPEN_UNSEEN;
	if (entry->type != SILENT) {
		count(PODWIRE_ATTEMPTED);
		count(PODWIRE_LOST_MISSED_OPEN);
	}
	return 1;
}

static __always_inline void closing(__u64 sk, int old_state, int new_state, int owned)
{
	struct podwire_event *entry = sockets.lookup(&sk);

	if (!entry || !entry_opened(entry, sk, old_state))
		return;
	learn_owner(entry, owned, bpf_ktime_get_boot_ns());
	if (new_state == TCP_CLOSING)
		entry->closed_by = PODWIRE_CLOSED_BOTH;
	else if (entry->closed_by == PODWIRE_CLOSED_NONE)
		entry->closed_by = new_state == TCP_FIN_WAIT1 ? PODWIRE_CLOSED_LOCAL : PODWIRE_CLOSED_REMOTE;
}

static __always_inline void fill_counters(struct podwire_event *entry, __u64 sk, int peer_done)
{
	entry->bytes_sent = u64_at(sk, TCP_SENT) - u64_at(sk, TCP_RESENT);
	entry->bytes_received = u64_at(sk, TCP_RECEIVED) - peer_done;
	entry->segments_sent = u32_at(sk, TCP_SEGMENTS_OUT);
	entry->segments_received = u32_at(sk, TCP_SEGMENTS_IN);
	entry->retransmits = u32_at(sk, TCP_RETRANSMITS);
	entry->rtt_us = u32_at(sk, TCP_SRTT) >> 3;
	entry->rtt_min_us = u32_at(sk, TCP_RTT_MIN + sizeof(__u32));
}

static __always_inline void count_untracked(__u64 sk, int old_state)
{
	struct podwire_event unknown = {};

	if (old_state != TCP_ESTABLISHED && old_state != TCP_FIN_WAIT1 && old_state != TCP_FIN_WAIT2 &&
	    old_state != TCP_CLOSE_WAIT && old_state != TCP_LAST_ACK && old_state != TCP_CLOSING)
		return;
	fill_tuple(&unknown, sk);
	if (!filtered(&unknown))
		count(PODWIRE_UNTRACKED);
}

static __always_inline void closed(__u64 sk, int old_state, int owned)
{
	__u64 flags = u64_at(sk, SK_FLAGS), now_ns = bpf_ktime_get_boot_ns();
	int peer_done = flags >> DONE_BIT & 1;
	struct podwire_event *entry = sockets.lookup(&sk);

	if (!entry) {
		count_untracked(sk, old_state);
		return;
	}
	if (entry_opened(entry, sk, old_state)) {
		learn_owner(entry, owned, now_ns);
		judge_close(entry, u32_at(sk, SK_ERROR), sent_reset(old_state, owned, peer_done, flags >> DEAD_BIT & 1));
		fill_counters(entry, sk, peer_done);
		emit(entry, PODWIRE_CLOSE, now_ns);
	} else if (entry->role == PODWIRE_CLIENT) {
		connect_failed(entry, sk, now_ns);
	}
	sockets.delete(&sk);
}

/* ---- the machine: two programs on one hook ---- */

static __always_inline int first_time(__u64 sk, int old_state, int new_state, __u32 owned, int second)
{
	struct stamp *last = handled.lookup(&owned);

	if (!last)
		return 0;
	if (!second) {
		last->sk = sk;
		last->old_state = old_state;
		last->new_state = new_state;
		return 1;
	}
	if (last->sk != sk || last->old_state != old_state || last->new_state != new_state)
		return 1;
	last->sk = 0;
	return 0;
}

static __always_inline int transition(__u64 sk, int old_state, int new_state, int second)
{
	__u32 owned = !!u32_at(sk, SK_OWNED);

	if (u16_at(sk, SK_PROTOCOL) != PROTOCOL_TCP || !first_time(sk, old_state, new_state, owned, second))
		return 0;
	if (new_state == TCP_SYN_SENT)
		connect_begins(sk, owned);
	else if (new_state == TCP_ESTABLISHED)
		established(sk, old_state);
	else if (new_state == TCP_FIN_WAIT1 || new_state == TCP_CLOSE_WAIT || new_state == TCP_CLOSING ||
		 new_state == TCP_LAST_ACK)
		closing(sk, old_state, new_state, owned);
	else if (new_state == TCP_CLOSE)
		closed(sk, old_state, owned);
	return 0;
}

#endif
