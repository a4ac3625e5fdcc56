/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Whose connection it is: the process in process context, else the socket's cgroup; and the names of cgroups.
 * Uses probe reads only, so it runs in tracepoint programs too.
 */
#ifndef PODWIRE_OWNER_H
#define PODWIRE_OWNER_H

/* ---- the name of a cgroup, once ---- */

static __noinline int tell_name(struct kernfs_node *node, __u64 id)
{
	struct podwire_cgroup_name *name = bpf_ringbuf_reserve(&names, sizeof(*name), 0);
	__u32 level;

	if (!name)
		return -1;
	__builtin_memset(name, 0, sizeof(*name));
	name->cgroup_id = id;
	name->cgroup_hierarchy = options.cgroup_hierarchy;
	for (level = 0; level < PODWIRE_CGROUP_LEVELS; level++) {
		if (!node)
			break;
		bpf_probe_read_kernel_str(name->names[level], PODWIRE_CGROUP_NAME_BYTES,
					  BPF_CORE_READ(node, name));
		node = kernfs_parent(node);
		name->levels = level + 1;
	}
	bpf_ringbuf_submit(name, BPF_RB_NO_WAKEUP);
	return 0;
}

/* The name of a cgroup that is seen for the first time; the next event tries again if the ring is full. */
static __noinline int tell_first_sight(struct kernfs_node *node, __u64 id)
{
	__u8 told = 1;

	if (tell_name(node, id)) /* marked as told only once it is in the ring */
		count(PODWIRE_LOST_NAME_RING_FULL);
	else
		bpf_map_update_elem(&named_cgroups, &id, &told, BPF_ANY);
	return 0;
}

static __always_inline int is_named(__u64 id)
{
	return !id || bpf_map_lookup_elem(&named_cgroups, &id);
}

/* Returns the cgroup's id, whose name has been told, or will be at its next event if the ring is full. */
static __always_inline __u64 name_cgroup(struct cgroup *cgroup)
{
	struct kernfs_node *node = BPF_CORE_READ(cgroup, kn);
	__u64 id = BPF_CORE_READ(node, id);

	if (!is_named(id))
		tell_first_sight(node, id);
	return id;
}

/* ---- the owner ---- */

static __always_inline int controller_index(void)
{
	switch (options.cgroup_controller) {
	case PODWIRE_CONTROLLER_MEMORY:
		return bpf_core_enum_value(enum cgroup_subsys_id, memory_cgrp_id);
	case PODWIRE_CONTROLLER_PIDS:
		return bpf_core_enum_value(enum cgroup_subsys_id, pids_cgrp_id);
	case PODWIRE_CONTROLLER_CPU:
		return bpf_core_enum_value(enum cgroup_subsys_id, cpu_cgrp_id);
	case PODWIRE_CONTROLLER_DEVICES:
		return bpf_core_enum_value(enum cgroup_subsys_id, devices_cgrp_id);
	default:
		return bpf_core_enum_value(enum cgroup_subsys_id, freezer_cgrp_id);
	}
}

static __always_inline struct cgroup *current_cgroup(struct task_struct *task)
{
	struct css_set *set = BPF_CORE_READ(task, cgroups);
	struct cgroup_subsys_state *state = 0;

	if (options.cgroup_controller == PODWIRE_CONTROLLER_DEFAULT)
		return BPF_CORE_READ(set, dfl_cgrp);
	bpf_probe_read_kernel(&state, sizeof(state),
			      (void *)set + bpf_core_field_offset(struct css_set, subsys) +
				      sizeof(state) * controller_index());
	return BPF_CORE_READ(state, cgroup);
}

/* The same of the process's own cgroup. On pure v2 the kernel says its id at once; only a first sight walks there. */
static __always_inline __u64 name_current_cgroup(void)
{
	struct task_struct *task = (void *)bpf_get_current_task();
	__u64 id;

	if (options.cgroup_controller != PODWIRE_CONTROLLER_DEFAULT)
		return name_cgroup(current_cgroup(task));
	id = bpf_get_current_cgroup_id();
	if (!is_named(id))
		tell_first_sight(BPF_CORE_READ(current_cgroup(task), kn), id);
	return id;
}

/* Only where `current` is the owner: under the socket's user lock, or in the accept call itself. */
static __always_inline void own_by_process(struct podwire_event *entry)
{
	entry->tgid = bpf_get_current_pid_tgid() >> 32;
	entry->uid = bpf_get_current_uid_gid();
	bpf_get_current_comm(entry->comm, sizeof(entry->comm));
	entry->cgroup_id = name_current_cgroup();
	entry->cgroup_hierarchy = options.cgroup_hierarchy;
	entry->owner = PODWIRE_OWNER_PROCESS;
}

/* A process that has the socket open, which need not run now. */
static __always_inline void own_by_task(struct podwire_event *entry, struct task_struct *task)
{
	entry->tgid = BPF_CORE_READ(task, tgid);
	entry->uid = BPF_CORE_READ(task, cred, uid.val);
	BPF_CORE_READ_STR_INTO(&entry->comm, task, comm);
	entry->cgroup_id = name_cgroup(current_cgroup(task));
	entry->cgroup_hierarchy = options.cgroup_hierarchy;
	entry->owner = PODWIRE_OWNER_PROCESS;
}

/* A socket's own cgroup is one of v2, so on other nodes it says nothing about the container. */
static __always_inline void own_by_cgroup(struct podwire_event *entry, const struct sock *sk)
{
	struct cgroup *cgroup;

	entry->owner = PODWIRE_OWNER_NONE;
	if (options.cgroup_controller != PODWIRE_CONTROLLER_DEFAULT)
		return;
	cgroup = sock_cgroup(sk);
	if (!cgroup)
		return;
	entry->cgroup_id = name_cgroup(cgroup);
	entry->cgroup_hierarchy = options.cgroup_hierarchy;
	entry->owner = PODWIRE_OWNER_CGROUP;
}

#endif
