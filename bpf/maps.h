/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Every map of the probes, and the read-only options that user space sets before load. Sizes here are
 * placeholders: collector/node/core.py sets `sockets`, `named_cgroups`, `dials` and both rings from the settings.
 */
#ifndef PODWIRE_MAPS_H
#define PODWIRE_MAPS_H

/* Which cgroup hierarchy names the owners: the default one on pure v2, else one of v1's. */
enum podwire_controller {
	PODWIRE_CONTROLLER_DEFAULT = 0,
	PODWIRE_CONTROLLER_MEMORY = 1,
	PODWIRE_CONTROLLER_PIDS = 2,
	PODWIRE_CONTROLLER_CPU = 3,
	PODWIRE_CONTROLLER_DEVICES = 4,
	PODWIRE_CONTROLLER_FREEZER = 5,
};

enum podwire_abi {
	PODWIRE_ABI = PODWIRE_ABI_VERSION, /* a macro alone would not reach the BTF */
};

/* Which call tells of connects that fail without a change of state (no route); see edges.h. */
enum podwire_connect_edge {
	PODWIRE_EDGE_NONE = 0,
	PODWIRE_EDGE_RETURN = 1,  /* the exit of tcp_v4_connect and tcp_v6_connect, which has the arguments */
	PODWIRE_EDGE_ENTERED = 2, /* an exit without them: `dials` holds what the entry saw */
};

/* What a rule in one of the filter maps says, and with it the whole filter. */
enum podwire_filter {
	PODWIRE_FILTER_OFF = 0,
	PODWIRE_FILTER_OUT = 1,  /* leave out; a filter with such rules only lets all others in */
	PODWIRE_FILTER_ONLY = 2, /* let in; a filter with such a rule leaves out all that match none */
};

struct podwire_options {
	__u32 abi_version;          /* enum podwire_abi; user space compares it, never sets it */
	__u32 cgroup_controller;    /* enum podwire_controller */
	__u32 cgroup_hierarchy;     /* that hierarchy's number, as in /proc/self/cgroup */
	__u32 accept_edge;          /* 1: the accept programs will be attached */
	__u32 filter_loopback;      /* 1: leave out 127/8, ::1 and ::ffff:127/8, by address */
	__u32 socket_cookie_helper; /* 1: tracing programs may call bpf_get_socket_cookie (kernel 5.12) */
	__u32 connect_edge;         /* enum podwire_connect_edge */
	__u32 filter_own;           /* 1: leave out the process in own_process */
	__u32 filter_ports;         /* enum podwire_filter; rules in filter_ports, by the server's port */
	__u32 filter_cidrs;         /* enum podwire_filter; rules in filter_cidrs, by either end's address */
	__u32 filter_netns;         /* enum podwire_filter; rules in filter_netns, by inode */
	__u32 filter_cgroups;       /* enum podwire_filter; rules in filter_cgroups, by the nearest ancestor */
	__u32 progress_interval_ms; /* PROGRESS of a connection that often; 0 never */
};

const volatile struct podwire_options options SEC(".rodata.options") = {
	.abi_version = PODWIRE_ABI_VERSION,
	.accept_edge = 1,
};

/* Never read: keeps the vocabularies of event.h in the BTF, from which collector/node/abi.py is generated. */
const volatile struct podwire_vocabulary {
	enum podwire_abi abi;
	enum podwire_event_type event_type;
	enum podwire_role role;
	enum podwire_closed_by closed_by;
	enum podwire_owner owner;
	enum podwire_flag flag;
	enum podwire_counter counter;
	enum podwire_controller controller;
	enum podwire_connect_edge connect_edge;
	enum podwire_filter filter;
	struct podwire_cgroup_name cgroup_name;
} vocabulary SEC(".rodata.vocabulary") = {};

/*
 * A connection from its first SYN (client) or its establishment (server) to CLOSE, keyed by the address of
 * its struct sock: what its next event will carry. A `type` of SILENT marks one that a filter by owner leaves out.
 * Inserts: connect_begins, established, accepted (Fast Open only), adopt. Reads: every stage. Deletes: closed, bury.
 */
#define SILENT 0xff
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65536);
	__type(key, __u64);
	__type(value, struct podwire_event);
} sockets SEC(".maps");

/* Inserts: emit. Reads and deletes: user space, which maps it. */
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 24);
} events SEC(".maps");

/* Inserts: tell_name. Reads and deletes: user space, which maps it, always before the events. */
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 20);
} names SEC(".maps");

/*
 * Ids whose name has been told. Inserts: tell_first_sight. Reads: is_named. Deletes: the kernel, least recently used;
 * user space, where a successor has no journal of the names.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 16384);
	__type(key, __u64);
	__type(value, __u8);
} named_cgroups SEC(".maps");

/* Indexed by enum podwire_counter. Inserts: count. Reads: user space, which sums over CPUs. Deletes: nobody. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, PODWIRE_COUNTERS);
	__type(key, __u32);
	__type(value, __u64);
} counters SEC(".maps");

/*
 * A task's connect call, by pid_tgid; the kernel evicts those of tasks that are gone, or of an exit that was missed.
 * PODWIRE_EDGE_RETURN: inserted by dial_fails, read and deleted by connect_returned.
 * PODWIRE_EDGE_ENTERED: written by note_dial, read by dial_begins and connect_left, which leaves it with `sk` 0.
 */
struct dial {
	__u64 task;    /* the key: the kernel may give the entry away between a look at it and a write to it */
	__u64 sk;      /* 0: no call is under way */
	__u64 address; /* the caller's struct sockaddr */
	__u32 family;  /* 0: the entry was not seen */
	__u32 begun;   /* 1: it changed the socket's state, so lifecycle.h tells how it ends */
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 8192);
	__type(key, __u64);
	__type(value, struct dial);
} dials SEC(".maps");

/* The change of a socket's state that this CPU came to last. Inserts and reads: seen_by_another_copy. Deletes: nobody. */
struct change {
	__u64 sk;
	__u64 socket_cookie; /* 0 if there is none and the helper is not to be had */
	__u64 states;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct change);
} changes SEC(".maps");

/* ---- filters: user space inserts before the programs are attached; filters.h reads; nobody deletes ---- */

struct own_process {
	__u64 start_ns; /* of its thread group leader: process ids come again */
	__u64 tgid;
};

/* The one exception: note_self inserts, run by user space. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct own_process);
} own_process SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32); /* enum podwire_filter, as in the next ones */
} filter_ports SEC(".maps");

struct cidr_key {
	__u32 prefix_bits; /* of 128: IPv4 is ::ffff/96 */
	__u8 address[16];
};

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1);
	__type(key, struct cidr_key);
	__type(value, __u32);
} filter_cidrs SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
} filter_netns SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1);
	__type(key, __u64);
	__type(value, __u32);
} filter_cgroups SEC(".maps");

/* Atomic although per CPU: a softirq may come between a process's load and store. */
static __always_inline void count(__u32 counter)
{
	__u64 *value = bpf_map_lookup_elem(&counters, &counter);

	if (value)
		__sync_fetch_and_add(value, 1);
}

#endif
