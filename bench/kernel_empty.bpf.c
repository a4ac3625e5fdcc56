// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* Does nothing: what the kernel's statistics show of a run is what they cost themselves. */
char terms[] __attribute__((section("license"), used)) = "Dual BSD/GPL";

__attribute__((section("raw_tp"), used)) int empty(void *context)
{
	return 0;
}
