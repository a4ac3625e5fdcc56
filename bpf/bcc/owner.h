/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Whose connection it is, and the names of cgroups, as in ../owner.h.
 */
#ifndef PODWIRE_BCC_OWNER_H
#define PODWIRE_BCC_OWNER_H

static __always_inline int tell_name(__u64 node, __u64 id)
{
	struct podwire_cgroup_name *name = names.ringbuf_reserve(sizeof(*name));
	int level;

	if (!name)
		return -1;
	__builtin_memset(name, 0, sizeof(*name));
	name->cgroup_id = id;
	name->cgroup_hierarchy = CGROUP_HIERARCHY;
	for (level = 0; level < PODWIRE_CGROUP_LEVELS; level++) {
		if (!node)
			break;
		bpf_probe_read_kernel_str(name->names[level], PODWIRE_CGROUP_NAME_BYTES,
					  (void *)u64_at(node, NODE_NAME));
		node = u64_at(node, NODE_PARENT);
		name->levels = level + 1;
	}
	names.ringbuf_submit(name, RB_NO_WAKEUP);
	return 0;
}

static __always_inline __u64 name_cgroup(__u64 cgroup)
{
	__u64 node = u64_at(cgroup, CGROUP_NODE), id = u64_at(node, NODE_ID);
	__u8 told = 1;

	if (!id || named_cgroups.lookup(&id))
		return id;
	if (tell_name(node, id))
		count(PODWIRE_LOST_NAME_RING_FULL);
	else
		named_cgroups.update(&id, &told);
	return id;
}

static __always_inline __u64 current_cgroup(void)
{
	__u64 set = u64_at(bpf_get_current_task(), TASK_CGROUPS);

	if (CGROUP_CONTROLLER == 0)
		return u64_at(set, SET_DEFAULT);
	return u64_at(u64_at(set, SET_SUBSYSTEMS + sizeof(void *) * CGROUP_SUBSYSTEM), STATE_CGROUP);
}

static __always_inline void own_by_process(struct podwire_event *entry)
{
	entry->tgid = bpf_get_current_pid_tgid() >> 32;
	entry->uid = bpf_get_current_uid_gid();
	bpf_get_current_comm(entry->comm, sizeof(entry->comm));
	entry->cgroup_id = name_cgroup(current_cgroup());
	entry->cgroup_hierarchy = CGROUP_HIERARCHY;
	entry->owner = PODWIRE_OWNER_PROCESS;
}

static __always_inline void own_by_cgroup(struct podwire_event *entry, __u64 sk)
{
	__u64 cgroup;

	entry->owner = PODWIRE_OWNER_NONE;
	if (CGROUP_CONTROLLER != 0)
		return;
	cgroup = u64_at(sk, SK_CGROUP);
	if (!cgroup || cgroup & 1)
		return;
	entry->cgroup_id = name_cgroup(cgroup);
	entry->cgroup_hierarchy = CGROUP_HIERARCHY;
	entry->owner = PODWIRE_OWNER_CGROUP;
}

#endif
