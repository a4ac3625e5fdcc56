#!/usr/bin/env bash
# Prepares a Debian 12 machine for `make demo` and `make test`; does only what is missing or has changed.
# What the commands say goes to build/setup.log; when one fails, the end of that file is shown.
set -euo pipefail
cd "$(dirname "$0")/.."

STEPS=6
LOG=build/setup.log
STAMPS=build/stamps
VENV=.venv
PATH=$PATH:/usr/sbin:/sbin
exec {IDLE}<> <(:) # never readable: what `step` waits on between two dots

fail() {
    printf 'failed\n\n%s\n' "$1" >&2
    exit 1
}

# step NUMBER "what" COMMAND...: runs the command with its output in the log, one dot per 10 s.
step() {
    local number=$1 what=$2 begin=$SECONDS said_before
    said_before=$(stat -c %s "$LOG")
    shift 2
    printf '[%d/%d] %s ... ' "$number" "$STEPS" "$what"
    "$@" >>"$LOG" 2>&1 </dev/null &
    local job=$! dots
    (while ! read -r -t 10 -u "$IDLE"; do printf '.'; done) &
    dots=$!
    trap 'kill "$job" "$dots" 2>/dev/null; exit 130' INT TERM
    local status=0
    wait "$job" || status=$?
    trap - INT TERM
    kill "$dots" 2>/dev/null || true
    wait "$dots" 2>/dev/null || true
    if ((status != 0)); then
        printf 'failed\n\nThe end of %s:\n' "$LOG" >&2
        tail -c "+$((said_before + 1))" "$LOG" | tail -n 25 >&2
        exit 1
    fi
    printf 'done in %d s\n' $((SECONDS - begin))
}

present() { printf '[%d/%d] %s ... present\n' "$1" "$STEPS" "$2"; }

# Debian packages, each with the test that tells whether it is needed.
missing_packages() {
    has() { command -v "$1" >/dev/null 2>&1; }
    python_lacks() { ! "$(python_command)" -c "import $1" 2>/dev/null; }
    has python3 || echo python3
    if python_lacks venv || python_lacks ensurepip; then echo python3-venv; fi
    has ip || echo iproute2
    has nft || echo nftables
    has nsenter && has setpriv || echo util-linux
    has clang || echo clang
    has llvm-strip || echo llvm
    has bpftool || echo bpftool
    has make || echo make
    [ -e /usr/include/bpf/bpf_helpers.h ] || echo libbpf-dev
    [[ $(ldconfig -p 2>/dev/null) == *libbpf.so.1* ]] || echo libbpf1
    [ -e /usr/include/linux/bpf.h ] || echo linux-libc-dev
    java_is_new || echo openjdk-17-jre-headless
    { kafka_is_there && { registry_is_there || ! registry_is_wanted; }; } || has mvn || echo maven
    [ -e /etc/ssl/certs/ca-certificates.crt ] || echo ca-certificates
    [ "${PODWIRE_SETUP_FOR:-}" = tests ] || return 0
    # Guests with other kernels, and BCC with any kernel's headers.
    has qemu-system-x86_64 || echo qemu-system-x86
    has busybox || echo busybox-static
    /usr/bin/python3 -c 'import bcc' 2>/dev/null || echo python3-bpfcc
    ls /usr/src/linux-headers-*/include/generated/utsrelease.h >/dev/null 2>&1 || echo linux-headers-amd64
}

java_is_new() {
    local version
    version=$(java -version 2>&1 | sed -n 's/.* version "\([0-9]*\).*/\1/p') || return 1
    [ "${version:-0}" -ge 17 ] 2>/dev/null
}

kafka_is_there() { [ -e "$STAMPS/kafka" ] && ls build/kafka/libs/kafka_*.jar >/dev/null 2>&1; }
registry_is_there() { [ -e "$STAMPS/registry" ] && ls build/registry/*-runner.jar >/dev/null 2>&1; }
registry_is_wanted() { [ "${PODWIRE_SETUP_FOR:-}" != demo ]; } # 110 MB

# The first Python that is new enough: PYTHON of the environment, then the usual names.
python_command() {
    local name
    for name in ${PYTHON:-} python3 python3.13 python3.12 python3.11 /usr/bin/python3; do
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$name"
            return
        fi
    done
    echo python3
}

install_packages() {
    export DEBIAN_FRONTEND=noninteractive
    apt-get update
    apt-get install -y --no-install-recommends "$@"
}

# A stamp holds the digest of what a step was made from.
digest() { cat "$@" | sha256sum | cut -d' ' -f1; }
fresh() { [ "$(cat "$STAMPS/$1" 2>/dev/null)" = "$2" ]; }
stamp() { printf '%s\n' "$2" >"$STAMPS/$1"; }

make_venv() {
    [ -x "$VENV/bin/python" ] && "$VENV/bin/python" -c 'import pip' || "$(python_command)" -m venv --clear "$VENV"
    "$VENV/bin/python" -m pip install --disable-pip-version-check --progress-bar off --require-hashes -r requirements/all.txt
    # The checkout itself becomes importable, without a build.
    pwd >"$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/podwire-checkout.pth"
}

# What no set-up mends (the user, capabilities, BTF) is said before anything is installed, or once there is a Python.
ask_machine() {
    [ "${PODWIRE_SETUP_FOR:-}" != demo ] || "$(python_command)" -m podwire.demo.preflight
}

if command -v "$(python_command)" >/dev/null; then ask_machine; fi
mkdir -p "$STAMPS"
: >"$LOG"

mapfile -t packages < <(missing_packages)
if ((${#packages[@]} == 0)); then
    present 1 "System packages"
elif [ "$(id -u)" != 0 ]; then
    printf '[1/%d] System packages ... ' "$STEPS"
    fail "Missing: ${packages[*]}. Run this once as root: apt-get install ${packages[*]}"
elif ! command -v apt-get >/dev/null; then
    printf '[1/%d] System packages ... ' "$STEPS"
    fail "Missing what Debian calls: ${packages[*]}. Install it with this system's package manager."
else
    step 1 "System packages (${packages[*]})" install_packages "${packages[@]}"
    ask_machine
fi

python=$(python_command)
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    printf '[2/%d] Python packages ... ' "$STEPS"
    fail "Podwire needs Python 3.11 or newer; $("$python" --version 2>&1) was found. Set PYTHON=/path/to/a/newer/python3."
fi
wanted="$(digest requirements/all.txt) $PWD"
if [ -x "$VENV/bin/python" ] && fresh python "$wanted"; then
    present 2 "Python packages"
else
    step 2 "Python packages" make_venv
    stamp python "$wanted"
fi

if "${MAKE:-make}" --no-print-directory -q bpf >/dev/null 2>&1; then
    present 3 "BPF object"
else
    step 3 "BPF object" "${MAKE:-make}" --no-print-directory bpf
fi

wanted=$(digest deploy/kafka/pom.xml)
if kafka_is_there && fresh kafka "$wanted"; then
    present 4 "Apache Kafka"
else
    step 4 "Apache Kafka (Maven Central)" "${MAKE:-make}" --no-print-directory kafka
    stamp kafka "$wanted"
fi

wanted=$(digest deploy/registry/pom.xml)
if ! registry_is_wanted; then
    printf '[5/%d] Schema registry ... not needed\n' "$STEPS"
elif registry_is_there && fresh registry "$wanted"; then
    present 5 "Schema registry"
else
    step 5 "Schema registry (Maven Central)" "${MAKE:-make}" --no-print-directory registry
    stamp registry "$wanted"
fi

wanted="$(cat "$STAMPS/python" "$STAMPS/kafka" | sha256sum)"
if fresh checked "$wanted"; then
    present 6 "Check"
else
    step 6 "Check" "$VENV/bin/python" -c 'import collector, enricher, podwire, schemas, confluent_kafka, faust'
    stamp checked "$wanted"
fi
