#!/bin/sh
# The first process of a guest: makes it look like a node, runs /command, says how it ended, powers off.
# The kernel's console is ttyS0; ttyS1 carries nothing but the command's output and the last line, which
# guest.py reads. `podwire.cgroup=hybrid` on the kernel's command line gives cgroup v1 with v2 beside it.
export PATH=/podwire/.venv/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 TERM=dumb
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/pts /dev/shm /run/netns
mount -t devpts devpts /dev/pts
for folder in /dev/shm /tmp /run; do mount -t tmpfs tmpfs $folder; done
mount --make-rshared /

if grep -q podwire.cgroup=hybrid /proc/cmdline; then
	mount -t tmpfs tmpfs /sys/fs/cgroup
	for controller in $(awk '$4 == 1 { print $1 }' /proc/cgroups); do
		mkdir /sys/fs/cgroup/$controller
		mount -t cgroup -o $controller cgroup /sys/fs/cgroup/$controller || rmdir /sys/fs/cgroup/$controller
	done
	mkdir /sys/fs/cgroup/unified
	mount -t cgroup2 cgroup2 /sys/fs/cgroup/unified
else
	mount -t cgroup2 cgroup2 /sys/fs/cgroup
fi
mount -t tracefs tracefs /sys/kernel/tracing
mount -t bpf bpf /sys/fs/bpf

for module in /modules/*.ko; do insmod $module; done
hostname podwire-guest
ip link set lo up

cd /podwire
stty -F /dev/ttyS1 raw -echo
/bin/sh /command </dev/null >/dev/ttyS1 2>&1
echo podwire-guest-exit $? >/dev/ttyS1
poweroff -f
