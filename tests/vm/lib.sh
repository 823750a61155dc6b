# shellcheck shell=bash
# What the guests' scripts share.
set -eEuo pipefail
cd /tmp || exit
trap 'echo "FAIL: line $LINENO: $BASH_COMMAND" >&2' ERR

# shellcheck disable=SC2034  # used by those who source this
readonly SOURCE='nbd+unix:///?socket=/tmp/source.sock'

fail() {
    echo "FAIL: $*"
    for log in /run/blkferry/*.log; do
        [[ -e $log ]] || continue
        echo "--- $log" && tail -n 20 "$log"
    done
    dmesg | tail -n 20
    exit 1
}

# What hangs is shown before the machine's time is up: who waits where, in the daemons and in the kernel.
show_what_hangs() {
    trap - ERR
    set +e
    sleep "${HANGS_AFTER:-$((200 + 20 * ${ROUNDS:-0}))}"
    echo "HANGS? What runs, and where it waits:"
    ps -eLo pid,tid,stat,wchan:32,args 2>/dev/null || ps
    for pid in $(pgrep 'blkferry|ublk|fio'); do
        echo "--- $pid $(tr '\0' ' ' <"/proc/$pid/cmdline")"
        for thread in "/proc/$pid/task/"*; do
            echo "$(<"$thread/comm"): $(tr '\n' ' ' <"$thread/stack")"
        done
    done
    for log in /run/blkferry/*.log; do
        [[ -e $log ]] || continue
        echo "--- $log" && tail -n 20 "$log"
    done
    timeout 10 blkferry list --json
    echo w >/proc/sysrq-trigger
    dmesg | tail -n 100
}
show_what_hangs &

# wait_for SECONDS COMMAND...: until it succeeds
wait_for() {
    local tries=$(($1 * 20))
    shift
    until "$@"; do
        ((tries-- > 0)) || fail "$* never came true"
        sleep 0.05
    done
}

# make_source MIB [NOISE]: an image whose first half, or so many MiB, is noise, on offer
make_source() {
    truncate -s "$1M" source.raw
    add_noise source.raw 0 "${2:-$(($1 / 2))}"
    export_source source.raw
}

# add_noise FILE AT MIB
add_noise() { head -c "$3M" /dev/urandom | dd of="$1" seek="$2" conv=notrunc bs=1M iflag=fullblock status=none; }

# shellcheck disable=SC2120  # by default it is source.raw
export_source() {
    blkferry export "${1:-source.raw}" --listen unix:/tmp/source.sock >export.log 2>&1 &
    source_pid=$!
    wait_for 10 test -S /tmp/source.sock
}

# status_of NAME FIELD, as jq has it
status_of() { blkferry status "$1" --json | jq -r "$2"; }

# refuses TEXT COMMAND...: it fails, with one line that has the text in it
refuses() {
    local text=$1 said
    shift
    if said=$("$@" 2>&1 >/dev/null); then fail "$* succeeded"; fi
    [[ $said == *"$text"* ]] || fail "$* said: $said"
    [[ $(wc -l <<<"$said") -eq 1 ]] || fail "$* said more than a line: $said"
}

stop_source() {
    kill "$source_pid"
    wait "$source_pid" || true
    rm -f source.sock
}

# repeat TEXT BYTES: the text in lines, over and over
repeat() { { yes "$1" 2>/dev/null || true; } | head -c "$2"; }
