/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * What is left out before it costs anything, as in ../filters.h. A filter that is not asked for is not compiled.
 */
#ifndef PODWIRE_BCC_FILTERS_H
#define PODWIRE_BCC_FILTERS_H

#define CGROUP_DEPTH_MAX 16

static __always_inline int left_out(__u32 filter, __u32 rule, __u32 other_rule)
{
	if (rule == PODWIRE_FILTER_OUT || other_rule == PODWIRE_FILTER_OUT)
		return 1;
	return filter == PODWIRE_FILTER_ONLY && rule != PODWIRE_FILTER_ONLY && other_rule != PODWIRE_FILTER_ONLY;
}

static __always_inline __u32 port_rule(__u32 port)
{
	__u32 *rule = filter_ports.lookup(&port);

	return rule ? *rule : 0;
}

static __always_inline __u32 address_rule(const __u8 *address)
{
	struct cidr_key key = {.prefix_bits = 128};
	__u32 *rule;

	__builtin_memcpy(key.address, address, sizeof(key.address));
	rule = filter_cidrs.lookup(&key);
	return rule ? *rule : 0;
}

static __always_inline __u32 netns_rule(__u32 inode)
{
	__u32 *rule = filter_netns.lookup(&inode);

	return rule ? *rule : 0;
}

static __always_inline int filtered(const struct podwire_event *entry)
{
	if (FILTER_LOOPBACK && (is_loopback(entry->local_address) || is_loopback(entry->remote_address)))
		return 1;
	if (FILTER_PORTS && left_out(FILTER_PORTS, entry->role == PODWIRE_CLIENT ? 0 : port_rule(entry->local_port),
				     entry->role == PODWIRE_SERVER ? 0 : port_rule(entry->remote_port)))
		return 1;
	if (FILTER_CIDRS &&
	    left_out(FILTER_CIDRS, address_rule(entry->local_address), address_rule(entry->remote_address)))
		return 1;
	return FILTER_NETNS && left_out(FILTER_NETNS, netns_rule(entry->netns_ino), 0);
}

static __always_inline struct own_process process_now(void)
{
	struct own_process now = {.tgid = bpf_get_current_pid_tgid() >> 32};

	now.start_ns = u64_at(u64_at(bpf_get_current_task(), TASK_LEADER), TASK_START);
	return now;
}

static __always_inline int is_own_process(void)
{
	int first = 0;
	struct own_process *own = own_process.lookup(&first);

	if (!own || own->tgid != bpf_get_current_pid_tgid() >> 32)
		return 0;
	return own->start_ns == process_now().start_ns;
}

static __always_inline int cgroup_left_out(__u64 cgroup)
{
	__u64 node = u64_at(cgroup, CGROUP_NODE), id;
	__u32 *rule;
	int level;

	if (!node)
		return 0;
	for (level = 0; level < CGROUP_DEPTH_MAX; level++) {
		id = u64_at(node, NODE_ID);
		rule = filter_cgroups.lookup(&id);
		if (rule)
			return *rule == PODWIRE_FILTER_OUT;
		node = u64_at(node, NODE_PARENT);
		if (!node)
			break;
	}
	return FILTER_CGROUPS == PODWIRE_FILTER_ONLY;
}

static __always_inline int current_left_out(void)
{
	if (FILTER_OWN && is_own_process())
		return 1;
	return FILTER_CGROUPS && cgroup_left_out(current_cgroup());
}

static __always_inline int socket_left_out(__u64 sk)
{
	__u64 cgroup;

	if (!FILTER_CGROUPS || CGROUP_CONTROLLER != 0)
		return 0;
	cgroup = u64_at(sk, SK_CGROUP);
	return !(cgroup & 1) && cgroup_left_out(cgroup);
}

#endif
