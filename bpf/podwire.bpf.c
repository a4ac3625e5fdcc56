// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/*
 * Entry points of the CO-RE tiers. User space attaches two or four of the state programs, which are copies (see
 * `transition` for why), and the edges of one tier (collector/node/tiers.py); it loads no others.
 */
#include "kernel_types.h"
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>
#include "event.h"
#include "maps.h"
#include "kernel_compat.h"
#include "owner.h"
#include "judge.h"
#include "filters.h"
#include "lifecycle.h"
#include "edges.h"
#include "existing.h"

char podwire_license[] SEC("license") = "Dual BSD/GPL";

SEC("tp_btf/inet_sock_set_state")
int BPF_PROG(state_1, struct sock *sk, int old_state, int new_state)
{
	transition(sk, old_state, new_state, 1);
	return 0;
}

SEC("tp_btf/inet_sock_set_state")
int BPF_PROG(state_2, struct sock *sk, int old_state, int new_state)
{
	transition(sk, old_state, new_state, 0);
	return 0;
}

SEC("tp_btf/inet_sock_set_state")
int BPF_PROG(state_3, struct sock *sk, int old_state, int new_state)
{
	transition(sk, old_state, new_state, 0);
	return 0;
}

SEC("tp_btf/inet_sock_set_state")
int BPF_PROG(state_4, struct sock *sk, int old_state, int new_state)
{
	transition(sk, old_state, new_state, 0);
	return 0;
}

/* ---- tier fentry ---- */

SEC("fexit/tcp_v4_connect")
int BPF_PROG(fexit_connect4, struct sock *sk, void *address, int bytes, int result)
{
	connect_returned(sk, address, AF_INET, result);
	return 0;
}

SEC("fexit/tcp_v6_connect")
int BPF_PROG(fexit_connect6, struct sock *sk, void *address, int bytes, int result)
{
	connect_returned(sk, address, AF_INET6, result);
	return 0;
}

/* Since 6.10. The other one's fifth argument is no argument here, and the verifier says so. */
SEC("fexit/inet_csk_accept")
int BPF_PROG(fexit_accept, struct sock *listener, void *how, struct sock *sk)
{
	accepted(sk);
	return 0;
}

/* Before 6.10. There the other one would load, and take `error` for the socket. */
SEC("fexit/inet_csk_accept")
int BPF_PROG(fexit_accept_4, struct sock *listener, int flags, int *error, int kernel, struct sock *sk)
{
	accepted(sk);
	return 0;
}

/* ---- tier kprobe ---- */

SEC("kprobe/tcp_v4_connect")
int BPF_KPROBE(kprobe_connect4, struct sock *sk, void *address)
{
	connect_entered(sk, address, AF_INET);
	return 0;
}

SEC("kretprobe/tcp_v4_connect")
int BPF_KRETPROBE(kretprobe_connect4, int result)
{
	connect_left(AF_INET, 0, result);
	return 0;
}

SEC("kprobe/tcp_v6_connect")
int BPF_KPROBE(kprobe_connect6, struct sock *sk, void *address)
{
	connect_entered(sk, address, AF_INET6);
	return 0;
}

SEC("kretprobe/tcp_v6_connect")
int BPF_KRETPROBE(kretprobe_connect6, int result)
{
	connect_left(AF_INET6, 0, result);
	return 0;
}

SEC("kretprobe/inet_csk_accept")
int BPF_KRETPROBE(kretprobe_accept, struct sock *sk)
{
	accepted(sk);
	return 0;
}

/* ---- tier tracepoint ---- */

SEC("tracepoint/syscalls/sys_enter_connect")
int connect_enter(struct trace_event_raw_sys_enter *context)
{
	connect_call_entered(context->args[0], (void *)context->args[1]);
	return 0;
}

SEC("tracepoint/syscalls/sys_exit_connect")
int connect_exit(struct trace_event_raw_sys_exit *context)
{
	connect_left(0, 1, context->ret);
	return 0;
}

SEC("tracepoint/syscalls/sys_exit_accept")
int accept_exit(struct trace_event_raw_sys_exit *context)
{
	if (context->ret >= 0)
		accepted(BPF_CORE_READ(socket_of(context->ret), sk));
	return 0;
}

SEC("tracepoint/syscalls/sys_exit_accept4")
int accept4_exit(struct trace_event_raw_sys_exit *context)
{
	if (context->ret >= 0)
		accepted(BPF_CORE_READ(socket_of(context->ret), sk));
	return 0;
}

/* ---- run by user space ---- */

/* Whose connections the filter `own` leaves out: the caller, whatever pid namespace it is in. */
SEC("raw_tp")
int note_self(void *context)
{
	struct own_process self = process_now();
	__u32 zero = 0;

	return bpf_map_update_elem(&own_process, &zero, &self, BPF_ANY);
}

/*
 * A look at the entries of SWEEP_KEYS sockets, of which 0 is none; returns how many events were made. User space reads
 * the keys out of `sockets` and hands them over as arguments, 12 at most. (An iterator over the map's elements would
 * do the same; there are kernels that refuse it.)
 */
SEC("raw_tp")
int sweep(__u64 *keys)
{
	int number, events = 0;

#pragma unroll
	for (number = 0; number < SWEEP_KEYS; number++)
		events += sweep_socket(keys[number]);
	return events;
}

/* The iterator writes one byte per event that it made: a reader of N bytes gets about N events at a time. */
static const char made = 1;

SEC("iter/task_file")
int find_existing(struct bpf_iter__task_file *context)
{
	struct task_struct *task = context->task;
	struct file *file = context->file;

	if (task && file && found_in_file(task, file))
		bpf_seq_write(context->meta->seq, &made, sizeof(made));
	return 0;
}

/* ---- where the open files of the node's processes can't be walked ---- */

SEC("tp_btf/tcp_rcv_space_adjust")
int BPF_PROG(receive, struct sock *sk)
{
	found_receiving(sk);
	return 0;
}
