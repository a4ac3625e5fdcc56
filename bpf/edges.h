/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * The edges in process context, in which the tiers differ: connect returns, accept hands a socket to a process.
 * Without the socket's lock. Uses probe reads only, so it runs in every type of program.
 */
#ifndef PODWIRE_EDGES_H
#define PODWIRE_EDGES_H

/* Of a descriptor that is no open file's, the reads find nothing or rubbish: its call has failed, and said why. */
static __always_inline struct socket *socket_of(__u32 descriptor)
{
	struct task_struct *task = (void *)bpf_get_current_task();
	struct file **files = BPF_CORE_READ(task, files, fdt, fd);
	struct file *file = 0;

	bpf_probe_read_kernel(&file, sizeof(file), &files[descriptor]);
	return BPF_CORE_READ(file, private_data);
}

/* ---- connect that fails without a change of state: no route, or forbidden ---- */

struct destination { /* the heads of struct sockaddr_in and sockaddr_in6 */
	__u16 family;
	__be16 port;
	__be32 v4; /* of v6: the flow label */
	struct in6_addr v6;
};

static __always_inline void fill_failed_route(struct podwire_event *entry, struct sock *sk,
					      const struct destination *to)
{
	if (to->family == AF_INET6) {
		BPF_CORE_READ_INTO(&entry->local_address, sk, __sk_common.skc_v6_rcv_saddr);
		__builtin_memcpy(entry->remote_address, &to->v6, sizeof(entry->remote_address));
	} else {
		map_v4(entry->local_address, BPF_CORE_READ(sk, __sk_common.skc_rcv_saddr));
		map_v4(entry->remote_address, to->v4);
	}
	entry->local_port = bpf_ntohs(BPF_CORE_READ((struct inet_sock *)sk, inet_sport));
	entry->remote_port = bpf_ntohs(to->port);
	entry->netns_ino = BPF_CORE_READ(sk, __sk_common.skc_net.net, ns.inum);
}

static __always_inline void route_failed(struct sock *sk, const void *address, int in_user_space, int error)
{
	__u64 now_ns = bpf_ktime_get_boot_ns();
	struct podwire_event entry = {
		.start_ns = now_ns,
		.role = PODWIRE_CLIENT,
		.closed_by = PODWIRE_CLOSED_NONE,
		.rtt_min_us = -1,
		.error = error,
	};
	struct destination to = {};
	__u16 family = BPF_CORE_READ(sk, __sk_common.skc_family);
	__u32 bytes = family == AF_INET6 ? sizeof(to) : __builtin_offsetof(struct destination, v6);

	if (is_about_the_call(error) || BPF_CORE_READ(sk, sk_protocol) != IPPROTO_TCP)
		return;
	if (in_user_space ? bpf_probe_read_user(&to, bytes, address) : bpf_probe_read_kernel(&to, bytes, address))
		return;
	if (to.family != family)
		return;
	fill_failed_route(&entry, sk, &to);
	if (filtered(&entry) || current_left_out())
		return;
	entry.socket_cookie = BPF_CORE_READ(sk, __sk_common.skc_cookie.counter) ?: now_ns;
	own_by_process(&entry);
	emit(&entry, PODWIRE_CONNECT_FAILED, now_ns);
}

/* PODWIRE_EDGE_RETURN. A v4-mapped address passes both functions: tcp_v6_connect calls the other and tells. */
static __always_inline void connect_returned(struct sock *sk, const void *address, __u16 family, int result)
{
	__u64 key = bpf_get_current_pid_tgid();
	struct dial *told;

	if (result >= 0 || BPF_CORE_READ(sk, __sk_common.skc_family) != family)
		return;
	told = bpf_map_lookup_elem(&dials, &key);
	if (told && told->sk == (__u64)sk)
		bpf_map_delete_elem(&dials, &key);
	else
		route_failed(sk, address, 0, -result);
}

/* PODWIRE_EDGE_ENTERED, for the exits below. Where one is under way already, its exit was missed, and it counts. */
static __always_inline void note_dial(struct sock *sk, const void *address, __u16 family)
{
	__u64 task = bpf_get_current_pid_tgid();
	struct dial dial = {.task = task, .sk = (__u64)sk, .address = (__u64)address, .family = family};
	struct dial *last = bpf_map_lookup_elem(&dials, &task);

	if (last && last->task == task) {
		if (!last->sk)
			count(PODWIRE_DIALS_ENTERED);
		*last = dial;
	} else if (!bpf_map_update_elem(&dials, &task, &dial, BPF_ANY)) {
		count(PODWIRE_DIALS_ENTERED);
	}
}

/* A v4-mapped address passes both functions; what the outer one does counts. */
static __always_inline void connect_entered(struct sock *sk, const void *address, __u16 family)
{
	if (BPF_CORE_READ(sk, __sk_common.skc_family) == family)
		note_dial(sk, address, family);
}

/* A socket that is connecting already gets here again to learn how it went: that has been told. */
static __always_inline void connect_call_entered(__u32 descriptor, const void *address)
{
	struct socket *socket = socket_of(descriptor);
	struct sock *sk = BPF_CORE_READ(socket, sk);
	__u16 family = BPF_CORE_READ(sk, __sk_common.skc_family);

	if ((family == AF_INET || family == AF_INET6) && BPF_CORE_READ(socket, state) == SS_UNCONNECTED)
		note_dial(sk, address, family);
}

/* The entry stays for the task's next call: to write over it is cheaper than to take and give back another. */
static __always_inline void connect_left(__u16 family, int in_user_space, int result)
{
	__u64 task = bpf_get_current_pid_tgid();
	struct dial dial, *found = bpf_map_lookup_elem(&dials, &task);

	if (!found || found->task != task || !found->sk || (family && found->family != family))
		return;
	dial = *found;
	count(PODWIRE_DIALS_LEFT); /* first: user space must not take it for an eviction */
	found->sk = 0;
	if (result < 0 && !dial.begun)
		route_failed((struct sock *)dial.sk, (const void *)dial.address, in_user_space, -result);
}

/* ---- accept ---- */

/* With Fast Open a socket is accepted before it is established, when its entry does not exist yet. */
static __always_inline int accept_early(struct sock *sk)
{
	struct podwire_event entry = {.start_ns = bpf_ktime_get_boot_ns(), .role = PODWIRE_SERVER};
	__u64 key = (__u64)sk;

	if (BPF_CORE_READ(sk, __sk_common.skc_state) != TCP_SYN_RECV || BPF_CORE_READ(sk, sk_protocol) != IPPROTO_TCP)
		return -1;
	if (current_left_out())
		entry.type = SILENT;
	else
		own_by_process(&entry);
	return bpf_map_update_elem(&sockets, &key, &entry, BPF_NOEXIST);
}

/*
 * CLOSE may come at the same time on another CPU: the event is made from a copy, and the entry is written only while
 * it is still this socket's.
 */
static __always_inline void accepted(struct sock *sk)
{
	struct podwire_event event, *entry;
	__u64 key = (__u64)sk;

	if (!sk)
		return;
	entry = bpf_map_lookup_elem(&sockets, &key);
	if (!entry && accept_early(sk))
		entry = bpf_map_lookup_elem(&sockets, &key);
	if (!entry || entry->type || entry->role != PODWIRE_SERVER)
		return;
	if (current_left_out()) {
		entry->type = SILENT;
		return;
	}
	__builtin_memcpy(&event, entry, sizeof(event));
	own_by_process(&event);
	event.closed_by = PODWIRE_CLOSED_NONE;
	if (entry->socket_cookie == event.socket_cookie) {
		entry->type = PODWIRE_ACCEPT;
		entry->tgid = event.tgid;
		entry->uid = event.uid;
		entry->cgroup_id = event.cgroup_id;
		entry->cgroup_hierarchy = event.cgroup_hierarchy;
		__builtin_memcpy(entry->comm, event.comm, sizeof(event.comm));
		entry->owner = PODWIRE_OWNER_PROCESS;
	}
	emit(&event, PODWIRE_ACCEPT, bpf_ktime_get_boot_ns());
}

#endif
