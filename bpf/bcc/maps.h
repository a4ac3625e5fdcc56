/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * The maps of the BCC tier, as in ../maps.h, which says who does what with them. bcc.py defines their sizes.
 */
#ifndef PODWIRE_BCC_MAPS_H
#define PODWIRE_BCC_MAPS_H

#define SILENT 0xff

enum podwire_filter { /* as in ../maps.h */
	PODWIRE_FILTER_OFF = 0,
	PODWIRE_FILTER_OUT = 1,
	PODWIRE_FILTER_ONLY = 2,
};

struct stamp {
	__u64 sk;
	__u32 old_state;
	__u32 new_state;
};

/* A connect call under way, by pid_tgid. Inserts: connect_enter. Reads: connect_begins. Deletes: connect_exit. */
struct dial { /* as in bpf/maps.h: user space reads both */
	__u64 task;
	__u64 sk;
	__u64 address; /* the kernel's struct sockaddr */
	__u32 family;
	__u32 begun; /* 1: it changed the socket's state, so lifecycle.h tells how it ends */
};

struct own_process {
	__u64 start_ns;
	__u64 tgid;
};

struct cidr_key {
	__u32 prefix_bits;
	__u8 address[16];
};

BPF_HASH(sockets, __u64, struct podwire_event, SOCKETS_MAX);
BPF_RINGBUF_OUTPUT(events, EVENTS_PAGES);
BPF_RINGBUF_OUTPUT(names, NAMES_PAGES);
BPF_TABLE("lru_hash", __u64, __u8, named_cgroups, CGROUPS_MAX);
BPF_TABLE("percpu_array", __u32, __u64, counters, PODWIRE_COUNTERS);
BPF_TABLE("percpu_array", __u32, struct stamp, handled, 2);
BPF_TABLE("lru_hash", __u64, struct dial, dials, DIALS_MAX);
/* 1 once an accept hook is attached. Inserts: bcc_compile.py. Reads: passive_open. */
BPF_ARRAY(accept_edge, __u32, 1);
BPF_ARRAY(own_process, struct own_process, 1);
BPF_HASH(filter_ports, __u32, __u32, FILTER_PORTS_MAX);
BPF_LPM_TRIE(filter_cidrs, struct cidr_key, __u32, FILTER_CIDRS_MAX);
BPF_HASH(filter_netns, __u32, __u32, FILTER_NETNS_MAX);
BPF_HASH(filter_cgroups, __u64, __u32, FILTER_CGROUPS_MAX);

static __always_inline void count(__u32 counter)
{
	__u64 *value = counters.lookup(&counter);

	if (value)
		__sync_fetch_and_add(value, 1);
}

#endif
