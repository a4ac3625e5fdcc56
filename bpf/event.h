/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * The ring-buffer ABI between the probes and collector/node, nothing else.
 *
 * Members go from __u64 down to __u8, largest first, without holes or bitfields. IPv4 is stored as
 * ::ffff/96. Every enum's value equals the index of its symbol in schemas/RawBatch.avsc. The Python
 * side (collector/node/abi.py) is generated from the built object's BTF; `make abi` renews it, and a
 * test compares the two. Change anything here: raise PODWIRE_ABI_VERSION.
 */
#ifndef PODWIRE_EVENT_H
#define PODWIRE_EVENT_H

#define PODWIRE_ABI_VERSION 3
#define PODWIRE_COMM_BYTES 16
#define PODWIRE_CGROUP_LEVELS 7
#define PODWIRE_CGROUP_NAME_BYTES 128

enum podwire_event_type {
	PODWIRE_CONNECT = 1,
	PODWIRE_CONNECT_FAILED = 2,
	PODWIRE_ACCEPT = 3,
	PODWIRE_CLOSE = 4,
	PODWIRE_EXISTING = 5,
	PODWIRE_PROGRESS = 6,
};

enum podwire_role {
	PODWIRE_CLIENT = 1,
	PODWIRE_SERVER = 2,
};

enum podwire_closed_by {
	PODWIRE_CLOSED_UNKNOWN = 0,
	PODWIRE_CLOSED_NONE = 1,
	PODWIRE_CLOSED_LOCAL = 2,
	PODWIRE_CLOSED_REMOTE = 3,
	PODWIRE_CLOSED_BOTH = 4,
	PODWIRE_CLOSED_TIMER = 5,
};

enum podwire_owner {
	PODWIRE_OWNER_NONE = 1,    /* no owner known */
	PODWIRE_OWNER_PROCESS = 2, /* tgid, uid, comm and cgroup taken in process context */
	PODWIRE_OWNER_CGROUP = 3,  /* cgroup of the socket only */
};

enum podwire_flag {
	PODWIRE_RESET_LOCAL = 1,    /* this side sent the RST */
	PODWIRE_RESET_REMOTE = 2,   /* the other side's RST ended it */
	PODWIRE_NEVER_ACCEPTED = 4, /* server: closed before any process took it */
	PODWIRE_OPEN_UNSEEN = 8,    /* established out of our sight: established_ns is 0 */
};

/* Counters, one per CPU: index into the map `counters`. */
enum podwire_counter {
	PODWIRE_ATTEMPTED = 0,            /* events that should reach user space */
	PODWIRE_LOST_RING_FULL = 1,       /* ... of these: no room in the events ring */
	PODWIRE_LOST_SOCKET_MAP_FULL = 2, /* ... of these: no room to remember the socket */
	PODWIRE_LOST_NAME_RING_FULL = 3,  /* names only: told again at the cgroup's next event, no event is lost */
	PODWIRE_UNTRACKED = 4,            /* ends of unknown sockets, not attempted: of before the probes, or lost at the open */
	PODWIRE_LOST_MISSED_OPEN = 5,     /* ... of the attempted: the kernel did not show the client's establishment */
	PODWIRE_LOST_MISSED_CLOSE = 6,    /* ... of the attempted: the kernel did not show the end */
	PODWIRE_DIALS_ENTERED = 7,        /* calls of connect() that an entry put into the map `dials` */
	PODWIRE_DIALS_LEFT = 8,           /* ... of these: their exit found them there */
	PODWIRE_COUNTERS = 9,
};

struct podwire_event {
	__u64 time_ns;        /* CLOCK_BOOTTIME of this event */
	__u64 start_ns;       /* client: first SYN; server: 0 */
	__u64 established_ns; /* handshake complete on this side; 0 never */
	__u64 socket_cookie;  /* unique until reboot */
	__u64 cgroup_id;      /* kernfs id of the owner's cgroup in `cgroup_hierarchy`; 0 not known */
	__u64 bytes_sent;     /* payload without retransmissions; CLOSE, EXISTING, PROGRESS */
	__u64 bytes_received; /* payload; CLOSE, EXISTING, PROGRESS */

	__u32 client_isn; /* host order; both 0 in CONNECT_FAILED */
	__u32 server_isn;
	__u32 netns_ino;
	__u32 tgid; /* initial pid namespace; 0 unless owner is PROCESS */
	__u32 uid;
	__u32 segments_sent;
	__u32 segments_received;
	__u32 retransmits;
	__u32 rtt_us;     /* smoothed; 0 never measured */
	__u32 rtt_min_us; /* 0xffffffff never measured */
	__u32 cgroup_hierarchy;
	__u32 error;        /* positive errno, 0 none */
	__u32 progress_seq; /* PROGRESS: its number within the socket, from 1 */

	__u16 local_port; /* host order */
	__u16 remote_port;

	__u8 local_address[16];
	__u8 remote_address[16];
	__u8 comm[PODWIRE_COMM_BYTES]; /* ends at the first NUL */

	__u8 type;      /* enum podwire_event_type */
	__u8 role;      /* enum podwire_role */
	__u8 closed_by; /* enum podwire_closed_by */
	__u8 owner;     /* enum podwire_owner */
	__u8 flags;     /* enum podwire_flag, or-ed */
	__u8 reserved[3];
};

/* Told once per cgroup, in a ring of its own, before the first event that carries the id. */
struct podwire_cgroup_name {
	__u64 cgroup_id;
	__u32 cgroup_hierarchy;
	__u32 levels; /* how many of `names` are filled; names[0] is the cgroup, the next its parent */
	__u8 names[PODWIRE_CGROUP_LEVELS][PODWIRE_CGROUP_NAME_BYTES];
};

_Static_assert(sizeof(struct podwire_event) == 168, "event ABI");
_Static_assert(__builtin_offsetof(struct podwire_event, client_isn) == 56, "event ABI");
_Static_assert(__builtin_offsetof(struct podwire_event, local_port) == 108, "event ABI");
_Static_assert(__builtin_offsetof(struct podwire_event, comm) == 144, "event ABI");
_Static_assert(__builtin_offsetof(struct podwire_event, type) == 160, "event ABI");
_Static_assert(sizeof(struct podwire_cgroup_name) == 912, "cgroup name ABI");

#endif
