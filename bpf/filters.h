/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * What is left out before it costs anything. By tuple (`filtered`): the socket gets no entry. By owner: the socket
 * gets an entry that is SILENT, because its later changes come in softirq, where the owner can't be asked. Neither
 * is attempted, takes room in a ring, or is counted as untracked. Every filter is off in the read-only options
 * unless it was asked for, and then not even loaded.
 */
#ifndef PODWIRE_FILTERS_H
#define PODWIRE_FILTERS_H

#define CGROUP_DEPTH_MAX 16

/* Of the rules that match, one that leaves out wins. */
static __always_inline int left_out(__u32 filter, __u32 rule, __u32 other_rule)
{
	if (rule == PODWIRE_FILTER_OUT || other_rule == PODWIRE_FILTER_OUT)
		return 1;
	return filter == PODWIRE_FILTER_ONLY && rule != PODWIRE_FILTER_ONLY && other_rule != PODWIRE_FILTER_ONLY;
}

/* ---- by tuple ---- */

static __always_inline __u32 port_rule(__u32 port)
{
	__u32 *rule = bpf_map_lookup_elem(&filter_ports, &port);

	return rule ? *rule : 0;
}

/* The server's port is the one that means something. Without a role (a socket of before), both are asked. */
static __always_inline int port_left_out(const struct podwire_event *entry)
{
	__u32 local = entry->role == PODWIRE_CLIENT ? 0 : port_rule(entry->local_port);
	__u32 remote = entry->role == PODWIRE_SERVER ? 0 : port_rule(entry->remote_port);

	return left_out(options.filter_ports, local, remote);
}

static __always_inline __u32 address_rule(const __u8 *address)
{
	struct cidr_key key = {.prefix_bits = 128};
	__u32 *rule;

	__builtin_memcpy(key.address, address, sizeof(key.address));
	rule = bpf_map_lookup_elem(&filter_cidrs, &key);
	return rule ? *rule : 0;
}

static __always_inline int netns_left_out(__u32 inode)
{
	__u32 *rule = bpf_map_lookup_elem(&filter_netns, &inode);

	return left_out(options.filter_netns, rule ? *rule : 0, 0);
}

static __always_inline int filtered(const struct podwire_event *entry)
{
	if (options.filter_loopback && (is_loopback(entry->local_address) || is_loopback(entry->remote_address)))
		return 1;
	if (options.filter_ports && port_left_out(entry))
		return 1;
	if (options.filter_cidrs && left_out(options.filter_cidrs, address_rule(entry->local_address),
					     address_rule(entry->remote_address)))
		return 1;
	return options.filter_netns && netns_left_out(entry->netns_ino);
}

/* ---- by owner ---- */

static __always_inline struct own_process process_now(void)
{
	struct task_struct *task = (void *)bpf_get_current_task();

	return (struct own_process){
		.start_ns = BPF_CORE_READ(task, group_leader, start_time),
		.tgid = bpf_get_current_pid_tgid() >> 32,
	};
}

static __always_inline int is_own_process(struct task_struct *task, __u32 tgid)
{
	__u32 zero = 0;
	struct own_process *own = bpf_map_lookup_elem(&own_process, &zero);

	return own && own->tgid == tgid && own->start_ns == BPF_CORE_READ(task, group_leader, start_time);
}

/* The nearest ancestor that has a rule decides; a cgroup that is not known is let in. */
static __noinline int cgroup_left_out(struct cgroup *cgroup)
{
	struct kernfs_node *node = BPF_CORE_READ(cgroup, kn);
	__u32 level, *rule;

	if (!node)
		return 0;
	for (level = 0; level < CGROUP_DEPTH_MAX; level++) {
		__u64 id = BPF_CORE_READ(node, id);

		rule = bpf_map_lookup_elem(&filter_cgroups, &id);
		if (rule)
			return *rule == PODWIRE_FILTER_OUT;
		node = kernfs_parent(node);
		if (!node)
			break;
	}
	return options.filter_cgroups == PODWIRE_FILTER_ONLY;
}

static __always_inline int task_left_out(struct task_struct *task)
{
	if (options.filter_own && is_own_process(task, BPF_CORE_READ(task, tgid)))
		return 1;
	return options.filter_cgroups && cgroup_left_out(current_cgroup(task));
}

/* Only where `current` is the owner. */
static __always_inline int current_left_out(void)
{
	struct task_struct *task = (void *)bpf_get_current_task();

	if (options.filter_own && is_own_process(task, bpf_get_current_pid_tgid() >> 32))
		return 1;
	return options.filter_cgroups && cgroup_left_out(current_cgroup(task));
}

/* In softirq: what the socket itself knows, which on nodes with cgroup v1 is nothing. */
static __always_inline int socket_left_out(const struct sock *sk)
{
	if (!options.filter_cgroups || options.cgroup_controller != PODWIRE_CONTROLLER_DEFAULT)
		return 0;
	return cgroup_left_out(sock_cgroup(sk));
}

#endif
