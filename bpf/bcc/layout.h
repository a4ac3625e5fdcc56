/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Where the members that the probes read are, and reading them: by probe reads at offsets, which the node's headers
 * give. Where the kernel has BTF and its headers are missing, collector/node/layout.py puts BTF's numbers in the place
 * of each `offsetof(...)` and defines PODWIRE_LAYOUT_KNOWN.
 */
#ifndef PODWIRE_BCC_LAYOUT_H
#define PODWIRE_BCC_LAYOUT_H

#include <uapi/linux/ptrace.h>
#include <uapi/linux/errno.h>
#include <net/tcp_states.h>
#ifndef PODWIRE_LAYOUT_KNOWN
#include <linux/cgroup-defs.h>
#include <linux/fdtable.h>
#include <linux/kernfs.h>
#include <linux/net.h>
#include <linux/sched.h>
#include <linux/tcp.h>
#include <net/net_namespace.h>
#include <net/sock.h>
#endif

#define FAMILY_V4 2
#define FAMILY_V6 10
#define PROTOCOL_TCP 6
#define DONE_BIT 1 /* SOCK_DONE in sk_flags */
#define DEAD_BIT 0 /* SOCK_DEAD */
#define RB_NO_WAKEUP 1
#define ERRNO_MAX 133 /* above are restarts of system calls, which no program sees */

enum layout {
	SK_FAMILY = offsetof(struct sock, __sk_common.skc_family),
	SK_STATE = offsetof(struct sock, __sk_common.skc_state),
	SK_V4_REMOTE_LOCAL = offsetof(struct sock, __sk_common.skc_daddr), /* skc_rcv_saddr follows: one addrpair */
	SK_V6_REMOTE = offsetof(struct sock, __sk_common.skc_v6_daddr),
	SK_V6_LOCAL = offsetof(struct sock, __sk_common.skc_v6_rcv_saddr),
	SK_REMOTE_PORT = offsetof(struct sock, __sk_common.skc_dport),
	SK_NET = offsetof(struct sock, __sk_common.skc_net),
	SK_COOKIE = offsetof(struct sock, __sk_common.skc_cookie),
	SK_FLAGS = offsetof(struct sock, __sk_common.skc_flags),
	SK_OWNED = offsetof(struct sock, sk_lock.owned),
	SK_PROTOCOL = offsetof(struct sock, sk_protocol),
	SK_ERROR = offsetof(struct sock, sk_err),
	SK_CGROUP = offsetof(struct sock, sk_cgrp_data), /* a pointer unless bit 0 is set */
	SK_LOCAL_PORT = offsetof(struct tcp_sock, inet_conn.icsk_inet.inet_sport),
	TCP_RECEIVED = offsetof(struct tcp_sock, bytes_received),
	TCP_SENT = offsetof(struct tcp_sock, bytes_sent),
	TCP_RESENT = offsetof(struct tcp_sock, bytes_retrans),
	TCP_ACKED = offsetof(struct tcp_sock, bytes_acked),
	TCP_NEXT = offsetof(struct tcp_sock, rcv_nxt),
	TCP_UNACKED = offsetof(struct tcp_sock, snd_una),
	TCP_SEGMENTS_IN = offsetof(struct tcp_sock, segs_in),
	TCP_SEGMENTS_OUT = offsetof(struct tcp_sock, segs_out),
	TCP_SRTT = offsetof(struct tcp_sock, srtt_us),
	TCP_RETRANSMITS = offsetof(struct tcp_sock, total_retrans),
	TCP_RTT_MIN = offsetof(struct tcp_sock, rtt_min), /* three pairs of time and value */
	NET_INODE = offsetof(struct net, ns.inum),
	TASK_CGROUPS = offsetof(struct task_struct, cgroups),
	TASK_FILES = offsetof(struct task_struct, files),
	TASK_LEADER = offsetof(struct task_struct, group_leader),
	TASK_START = offsetof(struct task_struct, start_time),
	SET_DEFAULT = offsetof(struct css_set, dfl_cgrp),
	SET_SUBSYSTEMS = offsetof(struct css_set, subsys),
	STATE_CGROUP = offsetof(struct cgroup_subsys_state, cgroup),
	CGROUP_NODE = offsetof(struct cgroup, kn),
	NODE_PARENT = offsetof(struct kernfs_node, parent), /* __parent since 6.15: layout.py knows */
	NODE_NAME = offsetof(struct kernfs_node, name),
	NODE_ID = offsetof(struct kernfs_node, id),
	FILES_TABLE = offsetof(struct files_struct, fdt),
	TABLE_MAX = offsetof(struct fdtable, max_fds),
	TABLE_FILES = offsetof(struct fdtable, fd),
	FILE_PRIVATE = offsetof(struct file, private_data),
	SOCKET_SK = offsetof(struct socket, sk),
};

#define READ_AT(target, base, offset) bpf_probe_read_kernel(&(target), sizeof(target), (void *)((base) + (offset)))

static __always_inline __u64 u64_at(__u64 base, __u64 offset)
{
	__u64 value = 0;

	READ_AT(value, base, offset);
	return value;
}

static __always_inline __u32 u32_at(__u64 base, __u64 offset)
{
	__u32 value = 0;

	READ_AT(value, base, offset);
	return value;
}

static __always_inline __u16 u16_at(__u64 base, __u64 offset)
{
	__u16 value = 0;

	READ_AT(value, base, offset);
	return value;
}

#endif
