/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Kernel members that were renamed or retyped, each with the version, behind one function each. The running
 * kernel's BTF decides at load time; the other branch is dead code to the verifier.
 */
#ifndef PODWIRE_KERNEL_COMPAT_H
#define PODWIRE_KERNEL_COMPAT_H

struct kernfs_node___before_6_15 {
	struct kernfs_node *parent;
} __attribute__((preserve_access_index));

static __always_inline struct kernfs_node *kernfs_parent(struct kernfs_node *node)
{
	struct kernfs_node___before_6_15 *old = (void *)node;

	if (bpf_core_field_exists(old->parent))
		return BPF_CORE_READ(old, parent);
	return BPF_CORE_READ(node, __parent);
}

struct sock_cgroup_data___before_5_15 {
	__u64 val; /* a pointer to the cgroup unless bit 0 is set */
} __attribute__((preserve_access_index));

static __always_inline struct cgroup *sock_cgroup(const struct sock *sk)
{
	struct sock_cgroup_data___before_5_15 *old = (void *)&sk->sk_cgrp_data;

	if (bpf_core_field_exists(old->val)) {
		__u64 val = BPF_CORE_READ(old, val);

		return val & 1 ? 0 : (struct cgroup *)val;
	}
	return BPF_CORE_READ(sk, sk_cgrp_data.cgroup);
}

#endif
