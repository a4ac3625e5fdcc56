"""Other kernels in QEMU guests: fetch a Debian kernel, boot it with this checkout, run a command in it.

`python -m tests.kernel.guests --help` is the command behind `make kernels`. Reading order: `fetch` and `modules` (a
kernel from the Debian mirror), `image` and `cpio` (the guest's files), `init.sh` (the guest's first process), `guest`
(boot, stream, kill), `__main__` (several kernels, one matrix).
Never needs root, never installs a package, and writes only below `build/kernels`.
"""
