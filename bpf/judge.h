/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Judgements that need no kernel memory: addresses, what a CLOSE means and which errors count. Values in, values out,
 * so that the CO-RE tiers (lifecycle.h) and BCC (podwire.bcc.c) share them. The includer brings types, errno and TCP states.
 */
#ifndef PODWIRE_JUDGE_H
#define PODWIRE_JUDGE_H

#define LOOPBACK_NET 127

static __always_inline void map_v4(__u8 *address, __be32 v4)
{
	__u32 *words = (__u32 *)address;

	words[0] = 0;
	words[1] = 0;
	words[2] = bpf_htonl(0xffff);
	words[3] = v4;
}

static __always_inline int is_loopback(const __u8 *address)
{
	const __u32 *words = (const __u32 *)address;

	if (words[0] || words[1])
		return 0;
	if (words[2] == bpf_htonl(0xffff))
		return address[12] == LOOPBACK_NET;
	return !words[2] && words[3] == bpf_htonl(1);
}

/* These say that the call was wrong or came too late, not that a peer can't be had. */
static __always_inline int is_about_the_call(int error)
{
	switch (error) {
	case EINTR:
	case EBADF:
	case EFAULT:
	case ENOTSOCK:
	case EAFNOSUPPORT:
	case EISCONN:
	case EALREADY:
	case EINPROGRESS:
		return 1;
	}
	return error > ERRNO_MAX;
}

/*
 * Without an error these end in CLOSE only by our own RST (net/ipv4/tcp.c, __tcp_close and tcp_disconnect). After
 * our FIN it is the normal end when the peer's FIN has come, or when the socket has no file any more: close() then
 * leaves the rest of the handshake to a time-wait socket.
 */
static __always_inline int sent_reset(int old_state, int owned, int peer_done, int orphaned)
{
	if (old_state == TCP_FIN_WAIT1 || old_state == TCP_FIN_WAIT2)
		return owned && !peer_done && !orphaned;
	return old_state == TCP_ESTABLISHED || old_state == TCP_CLOSE_WAIT;
}

static __always_inline void judge_close(struct podwire_event *entry, int error, int reset)
{
	entry->error = error;
	if (entry->role == PODWIRE_SERVER && !entry->type)
		entry->flags |= PODWIRE_NEVER_ACCEPTED;
	if (error == ECONNRESET || error == EPIPE)
		entry->flags |= PODWIRE_RESET_REMOTE;
	else if (error == ECONNABORTED || (!error && reset))
		entry->flags |= PODWIRE_RESET_LOCAL;
	if (entry->closed_by != PODWIRE_CLOSED_NONE)
		return;
	if (entry->flags & PODWIRE_RESET_REMOTE)
		entry->closed_by = PODWIRE_CLOSED_REMOTE;
	else if (entry->flags & PODWIRE_RESET_LOCAL)
		entry->closed_by = PODWIRE_CLOSED_LOCAL;
	else
		entry->closed_by = error ? PODWIRE_CLOSED_TIMER : PODWIRE_CLOSED_UNKNOWN;
}

#endif
