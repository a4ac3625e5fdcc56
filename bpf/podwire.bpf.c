// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/*
 * Entry points of the CO-RE tiers. User space (collector/node/probes.py) attaches two or four of the state programs,
 * which are copies (see `transition` for why), and the accept programs where tracefs lets it.
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
#include "lifecycle.h"

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

SEC("tracepoint/syscalls/sys_exit_accept")
int accept_exit(struct trace_event_raw_sys_exit *context)
{
	accepted(context->ret);
	return 0;
}

SEC("tracepoint/syscalls/sys_exit_accept4")
int accept4_exit(struct trace_event_raw_sys_exit *context)
{
	accepted(context->ret);
	return 0;
}
