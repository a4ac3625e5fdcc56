// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/*
 * The BCC tier: entry points, and the edges of ../edges.h, for nodes where CO-RE can't serve. The same maps, events,
 * names and counters, compiled on the node.
 *
 * The state hook is a raw tracepoint: the kernel skips a perf tracepoint (TRACEPOINT_PROBE) that interrupts any
 * program of its CPU (kernel/trace/bpf_trace.c, trace_call_bpf), and its transition would be lost.
 *
 * collector/node/bcc.py puts the included files of this folder into the text, because BCC knows maps by name in the
 * main file only, and defines EVENT_BYTES, EVENTS_PAGES, NAMES_PAGES, SOCKETS_MAX, CGROUPS_MAX, CGROUP_CONTROLLER,
 * CGROUP_SUBSYSTEM, CGROUP_HIERARCHY, and for each filter its mode (FILTER_PORTS) and map size (FILTER_PORTS_MAX).
 */
#include "bcc/layout.h"
#include "event.h"
#include "judge.h"
#include "bcc/maps.h"
#include "bcc/owner.h"
#include "bcc/filters.h"
#include "bcc/lifecycle.h"

_Static_assert(sizeof(struct podwire_event) == EVENT_BYTES, "the collector was built with another event.h");

int state_first(struct bpf_raw_tracepoint_args *context)
{
	return transition(context->args[0], context->args[1], context->args[2], 0);
}

int state_second(struct bpf_raw_tracepoint_args *context)
{
	return transition(context->args[0], context->args[1], context->args[2], 1);
}

/* ---- connect that fails without a change of state ---- */

struct destination { /* the heads of struct sockaddr_in and sockaddr_in6 */
	__u16 family;
	__u16 port;
	__u32 v4; /* of v6: the flow label */
	__u8 v6[16];
};

static __always_inline int connect_enter(struct pt_regs *context, __u32 family)
{
	__u64 task = bpf_get_current_pid_tgid(), sk = PT_REGS_PARM1(context), address = PT_REGS_PARM2(context);
	struct dial dial = {.task = task, .sk = sk, .address = address, .family = family};

	if (u16_at(dial.sk, SK_FAMILY) != family) /* v4-mapped passes both functions: the outer one tells */
		return 0;
	if (!dials.insert(&task, &dial) || dials.update(&task, &dial))
		count(PODWIRE_DIALS_ENTERED);
	return 0;
}

int connect4_enter(struct pt_regs *context)
{
	return connect_enter(context, FAMILY_V4);
}

int connect6_enter(struct pt_regs *context)
{
	return connect_enter(context, FAMILY_V6);
}

static __always_inline void route_failed(const struct dial *dial, int error)
{
	struct podwire_event event = {.error = error};
	struct destination to = {};

	if (is_about_the_call(error) || bpf_probe_read_kernel(&to, dial->family == FAMILY_V6 ? sizeof(to) : 8,
							      (void *)dial->address))
		return;
	if (to.family != dial->family)
		return;
	event.start_ns = bpf_ktime_get_boot_ns();
	event.role = PODWIRE_CLIENT;
	event.closed_by = PODWIRE_CLOSED_NONE;
	event.rtt_min_us = -1;
	fill_tuple(&event, dial->sk);
	event.remote_port = bpf_ntohs(to.port);
	if (to.family == FAMILY_V6)
		__builtin_memcpy(event.remote_address, to.v6, sizeof(to.v6));
	else
		map_v4(event.remote_address, to.v4);
	if (filtered(&event) || current_left_out())
		return;
	event.socket_cookie = cookie_of(dial->sk);
	own_by_process(&event);
	emit(&event, PODWIRE_CONNECT_FAILED, event.start_ns);
}

static __always_inline int connect_exit(struct pt_regs *context, __u32 family)
{
	__u64 task = bpf_get_current_pid_tgid();
	struct dial dial, *found = dials.lookup(&task);
	int result = PT_REGS_RC(context);

	if (!found || found->family != family)
		return 0;
	dial = *found;
	count(PODWIRE_DIALS_LEFT);
	dials.delete(&task);
	if (result < 0 && !dial.begun)
		route_failed(&dial, -result);
	return 0;
}

int connect4_exit(struct pt_regs *context)
{
	return connect_exit(context, FAMILY_V4);
}

int connect6_exit(struct pt_regs *context)
{
	return connect_exit(context, FAMILY_V6);
}

/* ---- accept ---- */

static __always_inline void accept_early(__u64 sk)
{
	struct podwire_event entry = {};
	__u8 state = 0;

	READ_AT(state, sk, SK_STATE);
	if (state != TCP_SYN_RECV || u16_at(sk, SK_PROTOCOL) != PROTOCOL_TCP)
		return;
	entry.role = PODWIRE_SERVER;
	if (current_left_out())
		entry.type = SILENT;
	else
		own_by_process(&entry);
	sockets.insert(&sk, &entry);
}

/* Two hooks may bring the same socket: see accept_exit. */
static __always_inline void accepted(__u64 sk)
{
	struct podwire_event event, *entry = sockets.lookup(&sk);

	if (!entry)
		return accept_early(sk);
	if (entry->type || entry->role != PODWIRE_SERVER || !entry->established_ns)
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

int accept_return(struct pt_regs *context)
{
	if (PT_REGS_RC(context))
		accepted(PT_REGS_RC(context));
	return 0;
}

/*
 * At the exit of accept and accept4. Also beside accept_return, which sees io_uring's accepts but can miss: a blocked
 * call holds one of the few instances that a kretprobe has.
 */
int accept_exit(struct { __u64 common; __s64 number; __s64 result; } *context)
{
	__s64 descriptor = context->result;
	__u64 table, file = 0, sk;

	if (descriptor < 0)
		return 0;
	table = u64_at(u64_at(bpf_get_current_task(), TASK_FILES), FILES_TABLE);
	if (descriptor >= u32_at(table, TABLE_MAX))
		return 0;
	file = u64_at(u64_at(table, TABLE_FILES), sizeof(void *) * descriptor);
	sk = u64_at(u64_at(file, FILE_PRIVATE), SOCKET_SK);
	if (sk)
		accepted(sk);
	return 0;
}

/* ---- run by user space ---- */

int note_self(struct bpf_raw_tracepoint_args *context)
{
	struct own_process self = process_now();
	int first = 0;

	own_process.update(&first, &self);
	return 0;
}
